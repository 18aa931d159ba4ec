"""``python -m rowcol_edge.export.simplify_worker IN OUT``: onnxsim in a process that may crash without harm."""

from __future__ import annotations

import sys

from ..native import hide

NOT_INSTALLED = 40
NOT_EQUAL = 41
"""Exit codes that `simplify` turns into words; any other failure is a crash."""

_FUSIONS = ["fuse_attention", "fuse_gqa"]
"""Passes that leave ONNX for operators of onnxruntime alone: TensorRT has none of them, and Q/DQ does not reach the
weights inside."""


def main(source: str, out: str) -> int:
    hide("torch")
    try:
        import onnx
        import onnxsim
    except ImportError:
        return NOT_INSTALLED
    # onnxsim compares the two models on random inputs itself and says whether they agreed.
    simplified, equal = onnxsim.simplify(onnx.load(source), skipped_optimizers=_FUSIONS)
    if not equal:
        return NOT_EQUAL
    onnx.save(simplified, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
