"""What an IR says of itself in its ``rt_info``: this project's texts, and the keys that openvino's own tools read.

openvino's model API and DL Streamer take labels and preprocessing from the section ``model_info``
(https://dlstreamer.github.io/dev_guide/model_info_xml.html): labels with spaces between them, a picture as
``(pixel - mean_values) / scale_values`` in the range 0 to 255, ``reverse_input_channels`` where the model wants RGB,
since those tools hold pictures as BGR.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from .onnx_files import Port

Entry = tuple[tuple[str, ...], str]
"""Path of a key in the rt_info, and its text."""


def entries(metadata: Mapping[str, str], inputs: tuple[Port, ...]) -> list[Entry]:
    """Sorted entries for metadata with keys such as ``rowcol_edge.labels``."""
    own = [(tuple(key.split(".")), text) for key, text in metadata.items()]
    known = {key.rpartition(".")[2]: text for key, text in metadata.items()}
    return sorted(own + [(("model_info", key), text) for key, text in _model_info(known, inputs).items()])


def _model_info(known: Mapping[str, str], inputs: tuple[Port, ...]) -> dict[str, str]:
    """Only for one picture in, one label out: the tools know other models by other keys."""
    if known.get("contract") != "classify" or len(inputs) != 1:
        return {}
    found = {}
    if labels := json.loads(known.get("labels", "[]")):
        found["labels"] = " ".join("_".join(label.split()) for label in labels)
    if "preprocess" in known:
        recipe = json.loads(known["preprocess"])
        found["resize_type"] = "standard"
        if recipe["mode"] == "RGB":
            found["reverse_input_channels"] = "YES"
        if inputs[0].dtype != "uint8":  # else the graph normalises the picture itself
            found["mean_values"] = " ".join(f"{mean / recipe['scale']:.9g}" for mean in recipe["mean"])
            found["scale_values"] = " ".join(f"{std / recipe['scale']:.9g}" for std in recipe["std"])
    return found
