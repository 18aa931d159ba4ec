"""Pipelines around a bundle, generated beside it: DeepStream's ``nvinfer``, and GStreamer with this project's runner.

They are derived from the manifest and were never run on the board: each says so in its first lines. What they rest on:

- ``nvinfer`` (https://docs.nvidia.com/metropolis/deepstream/dev-guide/text/DS_plugin_gst-nvinfer.html) calculates
  ``y = net-scale-factor · (x − offsets[c])`` on pixels 0–255, with one scale for all channels. The bundle's
  ``(pixel · scale − mean[c]) / std[c]`` is that with ``net-scale-factor = scale / std`` and
  ``offsets[c] = mean[c] / scale``, if all channels have one std; otherwise it cannot be said.
- its classifier reads labels from one line, separated by semicolons, and names the label of the largest value above
  ``classifier-threshold``, no less than 0, without a softmax (nvdsinfer_context_impl_output_parsing.cpp). A bundle's
  outputs are logits and its threshold is on a probability: that decision has to be taken from the attached tensor.
- its engine is the one that ``engine`` builds: ``nvinfer`` itself would want a calibration table for int8.
"""

from __future__ import annotations

from math import isclose
from textwrap import dedent

from .device.manifest import GRAPH_CHECKED, Manifest
from .device.preprocess import Preprocess
from .device.runtimes import ENGINE_BUILDERS
from .device_archive import DEVICE_ARCHIVE_NAME

FOLDER = "recipes"
LABEL = f"generated, {GRAPH_CHECKED}"
_DEEPSTREAM, _GSTREAMER = f"{FOLDER}/deepstream", f"{FOLDER}/gstreamer"
_NETWORK_MODE = {"fp32": 0, "int8": 1, "fp16": 2}
_COLOUR_FORMAT = {"RGB": 0, "L": 2}
_FILTER = {"nearest": 0, "bilinear": 1, "bicubic": 2}
_RAW_FORMAT = {"RGB": "RGB", "L": "GRAY8"}


def files(manifest: Manifest) -> dict[str, bytes]:
    """The recipes that the target asks for and that this bundle allows, by path in the bundle."""
    made: dict[str, str] = {}
    for wanted in manifest.target.get("recipes") or ():
        if manifest.preprocess is None or _obstacle(wanted, manifest):
            continue
        recipe = Preprocess.from_dict(manifest.preprocess)
        if wanted == "deepstream":
            made |= _deepstream(manifest, recipe)
        elif wanted == "gstreamer":
            made |= {f"{_GSTREAMER}/camera.py": _gstreamer(manifest, recipe)}
    return {path: text.encode() for path, text in made.items()}


def left_out(manifest: Manifest) -> list[str]:
    """A sentence for each recipe that the target asks for and that this bundle does not allow."""
    wanted = manifest.target.get("recipes") or ()
    return [f"no {name} recipe: {why}" for name in wanted if (why := _obstacle(name, manifest))]


def _obstacle(wanted: str, manifest: Manifest) -> str:
    """Why a recipe cannot be made for this bundle; empty if it can."""
    if manifest.preprocess is None or len(manifest.inputs) != 1:
        return "nothing says how a picture becomes this model's input"
    if wanted == "deepstream" and manifest.runtime.name not in ENGINE_BUILDERS:
        return f"nvinfer runs TensorRT engines, and this bundle is for {manifest.runtime.name}"
    if wanted == "deepstream" and manifest.frames:
        return (
            "nvinfer hands over float channels that it has normalised itself, and this bundle's graph takes uint8 "
            "camera frames and normalises them: for DeepStream build it without --bake-preprocess"
        )
    return ""


def _deepstream(manifest: Manifest, recipe: Preprocess) -> dict[str, str]:
    arm = manifest.arm()
    classifier = _is_classifier(manifest)
    factors = [recipe.scale / std for std in recipe.std]
    factor = sum(factors) / len(factors)
    remarks = [
        LABEL,
        f"nvinfer configuration for {_one_line(manifest.name)}, arm {arm.name}. To change it, copy it elsewhere.",
        _scale_remark(recipe, factor),
        _label_remark(manifest, classifier),
        "nvinfer resizes and converts colours in hardware, the bundle was made with Pillow: pixels differ a little.",
    ]
    lines = [
        *(f"# {remark}" for remark in remarks if remark),
        "",
        "[property]",
        "gpu-id=0",
        "gie-unique-id=1",
        f"onnx-file=../../{arm.artifact}",
        "# the engine is given to the element, see pipeline.sh",
        f"network-mode={_NETWORK_MODE[arm.precision]}",
        f"batch-size={manifest.inputs[0].shape[0] or 1}",
        f"infer-dims={recipe.channels};{recipe.height};{recipe.width}",
        "network-input-order=0",
        f"model-color-format={_COLOUR_FORMAT[recipe.mode]}",
        f"net-scale-factor={factor:.10g}",
        f"offsets={';'.join(f'{mean / recipe.scale:.10g}' for mean in recipe.mean)}",
        "maintain-aspect-ratio=0",
        f"scaling-filter={_FILTER[recipe.resample]}",
        "process-mode=1",
        f"network-type={1 if classifier else 100}",
        "output-tensor-meta=1",
    ]
    made = {}
    if classifier:
        lines += ["labelfile-path=labels.txt", "classifier-threshold=0.0"]
        made[f"{_DEEPSTREAM}/labels.txt"] = ";".join(manifest.labels) + "\n"
    made[f"{_DEEPSTREAM}/config_infer_primary.txt"] = "\n".join(lines) + "\n"
    made[f"{_DEEPSTREAM}/pipeline.sh"] = _pipeline(arm.name, recipe)
    return made


def _is_classifier(manifest: Manifest) -> bool:
    """Can nvinfer name a label: one output a label, and labels its file can hold?"""
    shape = manifest.outputs[0].shape
    fits = manifest.contract == "classify" and len(manifest.labels) > 1 and shape[-1] == len(manifest.labels)
    return fits and not any(mark in label for label in manifest.labels for mark in ";\n")


def _scale_remark(recipe: Preprocess, factor: float) -> str:
    if all(isclose(recipe.scale / std, factor, rel_tol=1e-6) for std in recipe.std):
        return ""
    worst = max(abs(factor * std / recipe.scale - 1) for std in recipe.std)
    stds = ", ".join(f"{std:g}" for std in recipe.std)
    return (
        f"NOT EXACT: the channels have different stds ({stds}), nvinfer has one scale for all: values are off by up to "
        f"{worst:.1%}. If that matters, put the preprocessing into the graph, or use GStreamer and the bundle's runner."
    )


def _label_remark(manifest: Manifest, classifier: bool) -> str:
    if not classifier:
        return (
            "network-type=100: nvinfer has no rule for these outputs. They are attached as a tensor "
            "(NvDsInferTensorMeta); the bundle's README says how to read it."
        )
    decision, threshold = "a softmax over the outputs, and the most probable label", manifest.arm().threshold
    if threshold is not None and manifest.positive is not None:
        decision += f", or {manifest.positive!r} if its probability is at least {threshold:.6g}"
    return (
        f"nvinfer names the label of the largest output, if that is above 0. The bundle's rule is {decision}: take "
        "that decision from the attached tensor (NvDsInferTensorMeta), not from nvinfer's label."
    )


def _pipeline(arm: str, recipe: Preprocess) -> str:
    return dedent(f"""\
        #!/bin/sh
        # {LABEL}
        # A camera through nvinfer: run it in the bundle's folder. The first run builds the engine, which takes minutes.
        set -e
        ENGINE=$(python3 {DEVICE_ARCHIVE_NAME} engine . --arms {arm} --json |
            python3 -c 'import json, sys; print(json.load(sys.stdin)["engines"]["{arm}"]["path"])')
        exec gst-launch-1.0 \\
            v4l2src device="${{CAMERA:-/dev/video0}}" ! videoconvert ! video/x-raw,format=NV12 ! \\
            nvvideoconvert ! 'video/x-raw(memory:NVMM),format=NV12' ! mux.sink_0 \\
            nvstreammux name=mux batch-size=1 live-source=1 width={recipe.width} height={recipe.height} ! \\
            nvinfer config-file-path={_DEEPSTREAM}/config_infer_primary.txt model-engine-file="$ENGINE" ! \\
            fakesink
        """)


def _gstreamer(manifest: Manifest, recipe: Preprocess) -> str:
    return dedent(f'''\
        #!/usr/bin/env python3
        # {LABEL}
        # {_one_line(manifest.name)}
        """A camera through GStreamer to the model of this bundle: one answer a frame on stdout.

        Needs python3-gi and gir1.2-gst-plugins-base-1.0 besides what the bundle needs. Run it anywhere:
            python3 camera.py [SOURCE]
        SOURCE is the beginning of a GStreamer pipeline, such as "nvarguscamerasrc ! nvvidconv" or "videotestsrc";
        without one it is "v4l2src device=/dev/video0". Frames come in their own size: the bundle's own preprocessing
        resizes them, as it did when it was built.
        """

        import sys
        from pathlib import Path

        import gi
        import numpy as np

        gi.require_version("Gst", "1.0")
        from gi.repository import Gst

        BUNDLE = Path(__file__).resolve().parents[2]
        sys.path.insert(0, str(BUNDLE / "{DEVICE_ARCHIVE_NAME}"))
        from rowcol_edge.device import Predictor

        CHANNELS = {recipe.channels}
        SOURCE = sys.argv[1] if len(sys.argv) > 1 else "v4l2src device=/dev/video0"
        FORMAT = "videoconvert ! video/x-raw,format={_RAW_FORMAT[recipe.mode]}"
        SINK = "appsink name=sink max-buffers=1 drop=true sync=false"


        def frames(pipeline):
            """uint8 frames, (height, width, channels); what comes while one is worked on is dropped."""
            sink, bus = pipeline.get_by_name("sink"), pipeline.get_bus()
            while not sink.get_property("eos"):
                failed = bus.pop_filtered(Gst.MessageType.ERROR)
                if failed is not None:
                    sys.exit(f"error: {{failed.parse_error().gerror.message}}")
                sample = sink.emit("try-pull-sample", Gst.SECOND)
                if sample is None:
                    continue
                caps, buffer = sample.get_caps().get_structure(0), sample.get_buffer()
                height, width = caps.get_value("height"), caps.get_value("width")
                data = np.frombuffer(buffer.extract_dup(0, buffer.get_size()), np.uint8)
                rows = data.reshape(height, -1)[:, : width * CHANNELS]  # rows are padded to four bytes
                yield np.ascontiguousarray(rows).reshape(height, width, CHANNELS)


        Gst.init(None)
        pipeline = Gst.parse_launch(f"{{SOURCE}} ! {{FORMAT}} ! {{SINK}}")
        pipeline.set_state(Gst.State.PLAYING)
        try:
            with Predictor(BUNDLE) as predictor:
                for frame in frames(pipeline):
                    print(predictor.predict(frame).to_dict(), flush=True)
        finally:
            pipeline.set_state(Gst.State.NULL)
        ''')


def _one_line(text: str) -> str:
    return " ".join(text.split())
