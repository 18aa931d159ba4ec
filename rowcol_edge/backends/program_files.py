"""Captured programs on disk: a ``.pt2`` of ``torch.export`` that knows the names of its inputs and outputs.

The build's own temporary files, written and read by itself; what users hand over is read by `pt2`.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device import digests
from ..errors import StageError
from .onnx_files import Port

if TYPE_CHECKING:
    import torch

_NAMES = "rowcol_edge.json"


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and names of outputs, in the program's own order."""

    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]

    @property
    def free_batch(self) -> bool:
        return any(size is None for port in self.inputs for size in port.shape or ())


def write(captured: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], out: Path) -> None:
    """Save a program; ``inputs`` and ``outputs`` are the names of its own, in its own order."""
    import torch

    placeholders = {node.name: node.meta["val"] for node in captured.graph.nodes if node.op == "placeholder"}
    tensors = [placeholders[name] for name in captured.graph_signature.user_inputs if isinstance(name, str)]
    ports = [asdict(_port(name, tensor)) for name, tensor in zip(inputs, tensors, strict=True)]
    names = json.dumps({"inputs": ports, "outputs": list(outputs)})
    with warnings.catch_warnings():
        # of weights that do not lie in memory row by row; those on the CPU are saved as they are
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        torch.export.save(captured, out, extra_files={_NAMES: names})


def signature(path: Path) -> Signature:
    """The names, types and sizes, without loading weights. StageError: no such file, or another one."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(name for name in archive.namelist() if name.endswith(f"extra/{_NAMES}"))
            values = json.loads(archive.read(entry))
    except (OSError, zipfile.BadZipFile, StopIteration) as e:
        got = str(e) or "an archive without names"
        raise StageError(f"reading {path.name}", expected="a captured program", got=got) from e
    inputs = (Port(port["name"], port["dtype"], tuple(port["shape"])) for port in values["inputs"])
    return Signature(tuple(inputs), tuple(values["outputs"]))


def beside(path: Path, suffix: str) -> Path:
    """Where a conversion of a program lies: next to it, under a name that another program would not have."""
    digest, _ = digests.sha256_file(path)
    return path.resolve().with_name(f"{path.stem}.{digest[:16]}{suffix}")


def _port(name: str, tensor: Any) -> Port:
    shape = tuple(size if isinstance(size, int) else None for size in tensor.shape)
    return Port(name, str(tensor.dtype).removeprefix("torch."), shape)
