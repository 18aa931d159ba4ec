"""How the files that a converter's process made come to their place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path


def publish(made: Path, out: Path, suffixes: Sequence[str] = ()) -> tuple[str, int]:
    """Move an artifact to ``out``, each of its files in one step; sha256 and size in bytes over all of them.

    Args:
        suffixes: of its files, in the order they come; without them it is the file ``made`` alone.
    """
    digest, size_bytes = hashlib.sha256(), 0
    for suffix in suffixes or (out.suffix,):
        content = made.with_suffix(suffix).read_bytes()
        digest.update(content)
        size_bytes += len(content)
        temporary = out.with_name(f".{out.stem}.{os.getpid()}{suffix}")
        try:
            temporary.write_bytes(content)
            temporary.replace(out.with_suffix(suffix))
        finally:
            temporary.unlink(missing_ok=True)
    return digest.hexdigest(), size_bytes
