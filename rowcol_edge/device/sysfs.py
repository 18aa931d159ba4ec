"""Small files of /proc and /sys, which may be missing, closed to this user, or hold what nobody expected."""

from __future__ import annotations

import re
from pathlib import Path


def text(path: Path) -> str:
    """The content; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def number(path: Path) -> int | None:
    """The whole number that is all of the content; None where there is none."""
    found = text(path).strip()
    return int(found) if re.fullmatch(r"-?[0-9]+", found) else None


def obstacle(path: Path) -> str:
    """Why no number can be read there, in the system's own words; empty if one can."""
    try:
        path.read_bytes()
    except OSError as e:
        return e.strerror or str(e)
    return "" if number(path) is not None else f"holds {text(path).strip()[:20]!r}, which is no number"
