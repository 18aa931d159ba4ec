"""``python -m rowcol_edge.backends.openvino_worker JOB.json``: openvino and nncf where they may crash without harm.

The job names the ONNX file, the IR file to write, the precision and, for int8, a folder with one ``.npz`` a calibration
batch, its arrays in the order of ``inputs``. Notes for people are written beside the IR, as ``.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

NOT_INSTALLED = 40


def main(job_file: str) -> int:
    os.environ["CI"] = "true"  # what openvino and nncf take as a no to sending usage statistics
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        import openvino as ov

        model = ov.Core().read_model(job["model"])
        notes: list[str] = []
        if job["precision"] == "int8":
            model, notes = _quantized(model, job)
    except ModuleNotFoundError as e:
        if e.name not in ("openvino", "nncf"):
            raise
        return NOT_INSTALLED
    for path, text in job["rt_info"]:
        model.set_rt_info(text, path)
    out = Path(job["out"])
    ov.save_model(model, out, compress_to_fp16=job["precision"] == "fp16")
    out.with_suffix(".json").write_text(json.dumps(notes), encoding="utf-8")
    return 0


def _quantized(model: Any, job: dict[str, Any]) -> tuple[Any, list[str]]:
    """int8 by nncf, and what is to be said of it; once more without SmoothQuant where that fails."""
    import nncf
    import numpy as np
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        AdvancedSmoothQuantParameters,
        OverflowFix,
    )

    nncf.set_log_level("ERROR")
    files = sorted(Path(job["calibration"]).glob("*.npz"))

    def feed(path: Path) -> dict[str, Any]:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[f"arr_{i}"] for i, name in enumerate(job["inputs"])}

    def quantize(smooth: AdvancedSmoothQuantParameters) -> Any:
        return nncf.quantize(
            model.clone(),
            nncf.Dataset(files, feed),
            subset_size=len(files),
            model_type=nncf.ModelType.TRANSFORMER if job["transformer"] else None,
            ignored_scope=nncf.IgnoredScope(names=job["keep_float"]),
            target_device=nncf.TargetDevice.ANY,
            advanced_parameters=AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.ENABLE if job["reduce_range"] else OverflowFix.DISABLE,
                smooth_quant_alphas=smooth,
            ),
        )

    try:
        return quantize(AdvancedSmoothQuantParameters()), []
    except Exception as e:  # boundary: nncf raises whatever its passes meet
        if not job["transformer"]:
            raise
        reason = (str(e).splitlines() or [""])[0][:160]
        note = f"quantized without SmoothQuant, which failed ({type(e).__name__}: {reason})"
        return quantize(AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)), [note]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
