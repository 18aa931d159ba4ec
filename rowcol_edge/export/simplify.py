"""onnxsim, in a time-limited process of its own. It may fail in any way; then the model goes on as it is."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from .. import native
from ..backends import onnx_files, onnx_ties
from ..errors import StageError
from .simplify_worker import NOT_EQUAL, NOT_INSTALLED

_GROWTH = 1.02
"""A result that is more than 2 % larger must have fewer nodes."""


@dataclass(frozen=True, slots=True)
class Simplified:
    """``path`` holds the simplified model, or the one it was given if ``applied`` is false and ``reason`` says why."""

    path: Path
    applied: bool
    reason: str
    nodes_before: int
    nodes_after: int
    size_bytes_before: int
    size_bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the path."""
        values = asdict(self)
        del values["path"]
        return values


def simplify(source: Path, out: Path, *, timeout_s: float = 300.0) -> Simplified:
    """Simplify ``source`` into ``out``; opset, IR version, inputs and outputs stay.

    Raises:
        StageError: ``source`` cannot be read, or ``out`` not be written. A simplifier that crashes, hangs, is missing
            or returns something worse is no error: ``reason`` says so.
    """
    before = onnx_files.load(source)
    with tempfile.TemporaryDirectory(prefix="rowcol-simplify-") as work:
        result = Path(work) / "simplified.onnx"
        reason = _run(_aside(before, Path(work) / "aside.onnx") or source, result, timeout_s)
        after = before
        if not reason:
            after, reason = _accepted(before, result)
    onnx_files.write(after, out)
    return Simplified(
        path=out,
        applied=not reason,
        reason=reason,
        nodes_before=len(before.graph.node),
        nodes_after=len(after.graph.node),
        size_bytes_before=before.ByteSize(),
        size_bytes_after=after.ByteSize(),
    )


def _aside(model: onnx.ModelProto, out: Path) -> Path | None:
    """The model in a file whose tied weights stand as inputs: onnxsim transposes constants, and folds others into
    them, so that a tied one would be stored once for each of its uses. None if it has none."""
    aside = onnx_ties.aside(model)
    if aside is None:
        return None
    onnx_files.write(aside, out)
    return out


def _run(source: Path, result: Path, timeout_s: float) -> str:
    """Why onnxsim failed; empty if it did not."""
    meanings = {
        NOT_INSTALLED: "onnxsim is not installed",
        NOT_EQUAL: "onnxsim says that its result computes something else",
    }
    worker = "rowcol_edge.export.simplify_worker"
    failure = native.run(worker, [source, result], tool="onnxsim", timeout_s=timeout_s, exit_codes=meanings)
    return failure or ("" if result.is_file() else "onnxsim wrote no file")


def _accepted(before: onnx.ModelProto, result: Path) -> tuple[onnx.ModelProto, str]:
    """The simplified model, or the one before and why."""
    try:
        after = onnx_files.load(result)
        onnx_ties.restore(after, before)
        onnx_files.strip(after)
        onnx_files.check(after, "simplify", opset_version=onnx_files.opset(before), ir_version=before.ir_version)
    except StageError as e:
        return before, f"onnxsim wrote an invalid model ({e})"
    changed = onnx_files.difference(before, after)
    if changed:
        return before, f"onnxsim changed the model's interface: {changed}"
    shallower = len(after.graph.node) < len(before.graph.node)
    if after.ByteSize() > _GROWTH * before.ByteSize() and not shallower:
        return before, f"the result grew from {before.ByteSize():,} to {after.ByteSize():,} bytes without fewer nodes"
    if len(after.graph.node) > len(before.graph.node):
        return before, f"the result has {len(after.graph.node)} nodes, more than the {len(before.graph.node)} before"
    return after, ""
