"""``python -m rowcol_edge.backends.openvino_worker JOB.json``: openvino and nncf where they may crash without harm.

The job names the float IR, the IR file to write, the precision and, for int8, a folder with one ``.npz`` a calibration
batch, its arrays in the order of ``inputs``; for accuracy control a second one with the selection split. Notes for
people are written beside the IR, as ``.json``.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..native import hide
from .workers import NOT_INSTALLED

_SELF_ATTENTION = "ScaledDotProductAttention"
_ELEMENTWISE = ("Add", "Multiply", "Subtract")

_ABOVE_ZERO = 2.0
"""Added to a metric from -1 to 1: nncf divides by the float model's, though only the difference is limited."""


def main(job_file: str) -> int:
    os.environ["CI"] = "true"  # what openvino and nncf take as a no to sending usage statistics
    hide("torch")
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        import openvino as ov

        model = ov.Core().read_model(job["model"])
        from . import openvino_ties

        notes: list[str] = []
        found = openvino_ties.find(model)
        if job["precision"] == "int8":
            known = {node.get_friendly_name() for node in model.get_ops()}
            model, notes = _quantized(model, job, tied=bool(found))
            _name_new(model, known)
        if found:
            openvino_ties.share(model, found)
            openvino_ties.compact(model)
    except ModuleNotFoundError as e:
        if e.name not in ("openvino", "nncf"):
            raise
        return NOT_INSTALLED
    for path, text in job["rt_info"]:
        model.set_rt_info(text, path)
    out = Path(job["out"])
    ov.save_model(model, out, compress_to_fp16=job["precision"] == "fp16")
    if found:
        openvino_ties.shorten(out)
    out.with_suffix(".json").write_text(json.dumps(notes), encoding="utf-8")
    return 0


def _quantized(model: Any, job: dict[str, Any], *, tied: bool = False) -> tuple[Any, list[str]]:
    """int8 by nncf, and what is to be said of it; once more without SmoothQuant where that fails, and without it where
    weights are tied: it scales the columns of each use otherwise, so that they are one matrix no more."""
    import nncf
    import numpy as np
    from nncf.quantization.advanced_parameters import (
        AdvancedAccuracyRestorerParameters,
        AdvancedQuantizationParameters,
        AdvancedSmoothQuantParameters,
        OverflowFix,
    )
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level("ERROR")
    transformer = _multiplies_activations(model)
    files = sorted(Path(job["calibration"]).glob("*.npz"))

    def feed(path: Path) -> dict[str, Any]:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[f"arr_{i}"] for i, name in enumerate(job["inputs"])}

    def quantize(smooth: AdvancedSmoothQuantParameters) -> Any:
        settings = {
            "subset_size": len(files),
            "model_type": nncf.ModelType.TRANSFORMER if transformer else None,
            "target_device": nncf.TargetDevice.ANY,
            "ignored_scope": nncf.IgnoredScope(names=_left_float(model, job["keep_float"])),
        }
        advanced = AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.ENABLE if job["reduce_range"] else OverflowFix.DISABLE,
            smooth_quant_alphas=smooth,
            # nncf's default is to correct, which may well make a convolutional network worse: a repair that is judged
            disable_bias_correction=not job["correct_bias"],
            # nncf's default, the mean of the samples' extremes, clips where a sample has few values
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        )
        calibration = nncf.Dataset(files, feed)
        if "accuracy" not in job:
            return nncf.quantize(model.clone(), calibration, advanced_parameters=advanced, **settings)
        selection = sorted(Path(job["accuracy"]["folder"]).glob("*.npz"))
        return nncf.quantize_with_accuracy_control(
            model.clone(),
            calibration,
            nncf.Dataset(selection, feed),
            _judge(job["accuracy"], feed),
            max_drop=job["accuracy"]["max_drop"],
            advanced_quantization_parameters=advanced,
            advanced_accuracy_restorer_parameters=AdvancedAccuracyRestorerParameters(
                ranking_subset_size=len(selection)
            ),
            **settings,
        )

    without = AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    if transformer and tied:
        return quantize(without), ["quantized without SmoothQuant, which would untie weights"]
    try:
        return quantize(AdvancedSmoothQuantParameters()), []
    except Exception as e:  # boundary: nncf raises whatever its passes meet
        if not transformer:
            raise
        reason = (str(e).splitlines() or [""])[0][:160]
        note = f"quantized without SmoothQuant, which failed ({type(e).__name__}: {reason})"
        return quantize(without), [note]


def _name_new(model: Any, known: Collection[str]) -> None:
    """Number what quantization has added by its place: openvino's own numbers differ from one process to the next."""
    added = (node for node in model.get_ordered_ops() if node.get_friendly_name() not in known)
    for number, node in enumerate(added):
        if re.fullmatch(rf"{node.get_type_name()}_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}/{number}")


def _multiplies_activations(model: Any) -> bool:
    """Whether there is attention, which wants nncf's scheme for transformers: a product without a constant operand."""
    for node in model.get_ops():
        if node.get_type_name() == _SELF_ATTENTION:
            return True
        makers = [value.get_node() for value in node.input_values()]
        if node.get_type_name() == "MatMul" and not any(map(_is_constant, makers)):
            return True
    return False


def _is_constant(node: Any) -> bool:
    makers = [value.get_node() for value in node.input_values()]
    return node.get_type_name() == "Constant" or (bool(makers) and all(map(_is_constant, makers)))


def _left_float(model: Any, layers: Sequence[str]) -> list[str]:
    """The layers, and elementwise operators that only they read: a quantizer there stands in front of them too."""
    known = {node.get_friendly_name(): node for node in model.get_ops()}
    names, above = [], [known[name] for name in layers]
    while above:
        node = above.pop()
        names.append(node.get_friendly_name())
        makers = [value.get_node() for value in node.input_values()]
        above += [m for m in makers if m.get_type_name() in _ELEMENTWISE and len(m.output(0).get_target_inputs()) == 1]
    return list(dict.fromkeys(names))


def _judge(accuracy: dict[str, Any], feed: Callable[[Path], dict[str, Any]]) -> Callable[[Any, Iterable[Path]], Any]:
    """nncf's validation function: the metric, higher is better, of a model on the whole split.

    It gives no outputs, by which nncf 3.4 would rank the layers: it then reverts first what leaves the largest error.
    The first model is the float one; its threshold decides for the others, as in a build.
    """
    import numpy as np

    from .. import quality

    metric, labels = quality.metric(accuracy["metric"]), np.array(accuracy["labels"])
    counts, sign = accuracy["counts"], 1.0 if metric.higher_is_better else -1.0
    original: list[tuple[quality.Predictions, float | None]] = []

    def judge(compiled: Any, items: Iterable[Path]) -> tuple[float, None]:
        paths = list(items)
        if len(paths) < len(counts):  # nncf asks for each item too, of which there is no metric
            return 0.0, None
        real = [np.array(compiled(feed(path))[0])[:count] for path, count in zip(paths, counts, strict=True)]
        predictions = quality.Predictions(np.concatenate(real), labels, accuracy["positive"])
        if not original:
            original.append((predictions, metric.tune(predictions)))
        threshold = metric.transfer(*original[0], predictions)
        return _ABOVE_ZERO + sign * metric.value(predictions, threshold), None

    return judge


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
