"""ONNX files: read, compare their signature, clean, check, and write in one step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import MissingDependencyError, StageError

try:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
except ModuleNotFoundError as e:
    raise MissingDependencyError("working with ONNX files", package="rowcol-edge[build]") from e

LIMIT_BYTES = 2**31 - 2**26
"""A protobuf message ends at 2³¹ − 1 bytes; 64 MiB are left for the graph and for constants that tools add."""


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output. ``shape`` holds None where a size is free or unknown, and is None where the rank is."""

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None


def load(path: Path) -> onnx.ModelProto:
    """StageError: not there, damaged, or with its weights in other files."""
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as e:
        raise StageError(f"reading {path.name}", expected="an ONNX file", got=str(e) or type(e).__name__) from e
    if not proto.graph.output:
        raise StageError(f"reading {path.name}", expected="an ONNX file", got="no graph in it")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
        raise StageError(f"reading {path.name}", expected="weights inside the file", got="weights in other files")
    return proto


def opset(proto: onnx.ModelProto) -> int:
    """Version of the standard operators."""
    return max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def inputs(proto: onnx.ModelProto) -> tuple[Port, ...]:
    """Inputs that a caller feeds: those without a default value in the file."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    return tuple(_port(value) for value in proto.graph.input if value.name not in constants)


def outputs(proto: onnx.ModelProto) -> tuple[Port, ...]:
    return tuple(_port(value) for value in proto.graph.output)


def difference(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    """The first input or output that is not as it was, in words; empty if all are. An unknown size matches any."""
    for kind, old, new in (
        ("inputs", inputs(before), inputs(after)),
        ("outputs", outputs(before), outputs(after)),
    ):
        if [port.name for port in old] != [port.name for port in new]:
            return f"{kind} {', '.join(p.name for p in old)} became {', '.join(p.name for p in new) or 'none'}"
        for a, b in zip(old, new, strict=True):
            if a.dtype != b.dtype or not _agree(a.shape, b.shape):
                return f"{kind[:-1]} {a.name} went from {a.dtype} {a.shape} to {b.dtype} {b.shape}"
    return ""


def _agree(a: tuple[int | None, ...] | None, b: tuple[int | None, ...] | None) -> bool:
    if a is None or b is None:
        return True
    return len(a) == len(b) and all(x is None or y is None or x == y for x, y in zip(a, b, strict=True))


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    dtype = dtype_name(tensor.elem_type) if tensor.elem_type else value.type.WhichOneof("value") or "unknown"
    if not tensor.HasField("shape"):
        return Port(value.name, dtype, None)
    return Port(value.name, dtype, tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim))


def dtype_name(elem_type: int) -> str:
    """numpy's name of an ONNX element type; ONNX's own, in lower case, where numpy has none."""
    if elem_type == onnx.TensorProto.STRING:
        return "str"
    return str(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those inside its nodes (If, Loop, Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from graphs(inner)


def strip(proto: onnx.ModelProto) -> None:
    """Remove, in place, what no runtime reads: stack traces with paths of the build machine, notes, unused domains."""
    del proto.metadata_props[:]
    proto.ClearField("doc_string")
    used = {function.domain for function in proto.functions}
    for graph in graphs(proto.graph):
        del graph.metadata_props[:]
        graph.ClearField("doc_string")
        used |= {node.domain for node in graph.node}
        for item in (*graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
            del item.metadata_props[:]
            item.ClearField("doc_string")
    kept = [entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx") or entry.domain in used]
    # Entries are copied first: they are views into the list that is emptied.
    copies = [onnx.helper.make_opsetid(entry.domain, entry.version) for entry in kept]
    del proto.opset_import[:]
    proto.opset_import.extend(copies)


def check(proto: onnx.ModelProto, stage: str, *, opset_version: int, ir_version: int) -> None:
    """Full ONNX check at the versions asked for; ``ir_version`` is set in place.

    Raises:
        StageError: another opset, too large, or invalid.
    """
    if opset(proto) != opset_version:
        raise StageError(
            stage,
            expected=f"opset {opset_version}",
            got=f"opset {opset(proto)}: the operators cannot be converted",
            hint=f"a target that reads opset {opset(proto)} can run it",
        )
    proto.ir_version = ir_version
    if proto.ByteSize() > LIMIT_BYTES:
        raise StageError(
            stage, expected=f"at most {LIMIT_BYTES:,} bytes in one ONNX file", got=f"{proto.ByteSize():,} bytes"
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise StageError(stage, expected="a valid ONNX model", got=_first_line(e)) from e


def write(proto: onnx.ModelProto, out: Path) -> tuple[str, int]:
    """Write in one step; returns sha256 and size in bytes. The same model gives the same bytes."""
    content = proto.SerializeToString(deterministic=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        partial.replace(out)
    except OSError as e:
        raise StageError(f"writing {out}", expected="a folder that can be written", got=str(e)) from e
    finally:
        partial.unlink(missing_ok=True)
    return hashlib.sha256(content).hexdigest(), len(content)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
