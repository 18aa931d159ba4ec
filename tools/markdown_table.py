"""Tables in Markdown, and what stands in their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is of text, the others of numbers."""
    lines = [" | ".join(heads), "|".join("---" if i == 0 else "--:" for i in range(len(heads)))]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def interval(found: Mapping[str, Any]) -> str:
    """A ratio with its 95 % interval."""
    return f"{found['ratio']:.2f} [{found['ci_low']:.2f}, {found['ci_high']:.2f}]"


def ratio(found: Mapping[str, Any] | None) -> str:
    """The same of a comparison, which says if it shows nothing; a dash where there is none."""
    if found is None or found["ratio"] is None:
        return "–"
    decided = found["verdict"] in ("faster", "slower")
    return interval(found) if decided else f"{interval(found)}, {found['verdict']}"
