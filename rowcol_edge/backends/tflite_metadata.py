"""Metadata by TFLite's convention: who the model is, how pictures become its input, what its outputs are called.

The convention (metadata_schema.fbs of tflite-support, file identifier M001) is a flatbuffer of its own inside the
model, and a zip archive behind the model with the files it names. No maintained package carries its classes, so the
few tables that are needed are built here; the slots are those of the schema.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np

from ..device.preprocess import Preprocess
from ..device.runtimes import seal

NAME = "TFLITE_METADATA"
IDENTIFIER = b"M001"
LABELS = "labels.txt"
_IMAGE, _NORMALIZATION, _AXIS_LABELS = 2, 1, 2  # ContentProperties, ProcessUnitOptions, AssociatedFileType
_RGB, _GRAYSCALE = 1, 2  # ColorSpaceType
_EPOCH = (1980, 1, 1, 0, 0, 0)


def described(said: Mapping[str, str], inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """The flatbuffer ``ModelMetadata`` for what an arm says of itself (see `Backend.compile`)."""
    labels = bool(json.loads(said.get("rowcol_edge.labels", "[]")))
    preprocess = said.get("rowcol_edge.preprocess")
    normalizes = json.loads(said.get("rowcol_edge.frames", "false"))  # the graph itself
    recipe = Preprocess.from_dict(json.loads(preprocess)) if preprocess and not normalizes else None
    b = flatbuffers.Builder(1024)
    # the preprocessing is that of the only input, the labels are those of the first output
    ins = [_tensor(b, name, recipe if len(inputs) == 1 else None, labels=False) for name in inputs]
    outs = [_tensor(b, name, None, labels=labels and i == 0) for i, name in enumerate(outputs)]
    graph = _table(b, {2: _offsets(b, ins), 3: _offsets(b, outs)})
    name = b.CreateString(said.get("rowcol_edge.model", ""))
    description = b.CreateString(_description(said))
    version = b.CreateString("1.0.0")
    b.Finish(_table(b, {0: name, 1: description, 3: _offsets(b, [graph]), 7: version}), file_identifier=IDENTIFIER)
    return bytes(b.Output())


def attached(model: bytes, said: Mapping[str, str]) -> bytes:
    """The model with its label file behind it, in a zip archive that ends in the checksum."""
    labels = json.loads(said.get("rowcol_edge.labels", "[]"))
    buffer = io.BytesIO()
    buffer.write(model)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_STORED) as archive:
        if labels:
            archive.writestr(zipfile.ZipInfo(LABELS, _EPOCH), "".join(f"{label}\n" for label in labels))
        archive.comment = seal.MARK + seal.BLANK
    return seal.sealed(buffer.getvalue())


def _description(said: Mapping[str, str]) -> str:
    arm, contract = said.get("rowcol_edge.arm", ""), said.get("rowcol_edge.contract", "")
    return ", ".join(filter(None, (f"arm {arm}" if arm else "", f"contract {contract}" if contract else "")))


def _tensor(b: Any, name: str, recipe: Preprocess | None, *, labels: bool) -> int:
    fields = {0: b.CreateString(name)}
    if recipe is not None:
        size = _numbers(b, (recipe.width, recipe.height))
        image = _table(b, {1: size}, {0: _GRAYSCALE if recipe.channels == 1 else _RGB})
        fields[3] = _table(b, {1: image}, {0: _IMAGE})
        # the convention normalizes pixels of 0 to 255 by (x − mean) ÷ std
        mean, std = (
            b.CreateNumpyVector((np.asarray(values) / recipe.scale).astype(np.float32))
            for values in (recipe.mean, recipe.std)
        )
        unit = _table(b, {1: _table(b, {0: mean, 1: std})}, {0: _NORMALIZATION})
        fields[4] = _offsets(b, [unit])
    if labels:
        file = _table(b, {0: b.CreateString(LABELS)}, {2: _AXIS_LABELS})
        fields[6] = _offsets(b, [file])
    return _table(b, fields)


def _table(b: Any, offsets: Mapping[int, int], enums: Mapping[int, int] | None = None) -> int:
    """A table of offsets and one-byte enums by slot."""
    b.StartObject(1 + max([*offsets, *(enums or {})]))
    for slot, value in offsets.items():
        b.PrependUOffsetTRelativeSlot(slot, value, 0)
    for slot, value in (enums or {}).items():
        b.PrependInt8Slot(slot, value, 0)
    end: int = b.EndObject()
    return end


def _numbers(b: Any, values: Sequence[int]) -> int:
    b.StartObject(len(values))
    for slot, value in enumerate(values):
        b.PrependUint32Slot(slot, value, 0)
    end: int = b.EndObject()
    return end


def _offsets(b: Any, items: Sequence[int]) -> int:
    b.StartVector(4, len(items), 4)
    for item in reversed(items):
        b.PrependUOffsetTRelative(item)
    end: int = b.EndVector()
    return end
