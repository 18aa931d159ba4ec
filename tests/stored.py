"""What a file's metadata say to a program that knows its format only."""

from __future__ import annotations

from pathlib import Path

import onnx
import openvino

from rowcol_edge.backends import tflite_files

PREFIX = "rowcol_edge."


def metadata(path: Path) -> dict[str, str]:
    """Ours, by key."""
    found = _READERS[path.suffix](path)
    return {key: text for key, text in found.items() if key.startswith(PREFIX)}


def _in_onnx(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def _in_openvino(path: Path) -> dict[str, str]:
    model = openvino.Core().read_model(path)
    if not model.has_rt_info("rowcol_edge"):
        return {}
    found = model.get_rt_info("rowcol_edge").value
    return {PREFIX + key: str(text) for key, text in found.items()}


def _in_tflite(path: Path) -> dict[str, str]:
    found = tflite_files.metadata(tflite_files.read(path))
    return {key: value.decode() for key, value in found.items() if key.startswith(PREFIX)}


_READERS = {".onnx": _in_onnx, ".xml": _in_openvino, ".tflite": _in_tflite}
