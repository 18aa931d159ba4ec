"""What the scripts that train a small sample in minutes share: one loop over random views, resumed after a kill."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rowcol_edge.errors import ModelError
from rowcol_edge.user_code import import_file
from train_common import (
    ROOT,
    Checkpoint,
    Stage,
    command,
    cosine,
    decay_groups,
    keep_memory,
    load_half,
    machine,
    reduced,
    save_half,
    write_json,
)

#: inputs and targets of one step
Step = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    epochs: int = 40
    lr: float = 2e-3
    decay: float = 0.05
    batch: int = 32
    average: float = 0.99


class Recipe:
    """How one sample is trained. A subclass says what a step sees, what it loses, and what a model is worth."""

    def __init__(self, sample: str, settings: Settings) -> None:
        self.sample, self.settings = sample, settings
        self.folder = ROOT / "sample_models" / sample
        self.data: Any = import_file(self.folder / "data.py", ModelError)
        self.build: Callable[[], nn.Module] = import_file(self.folder / "model.py", ModelError).build

    def steps(self, epoch: int) -> int:
        """How many steps an epoch has."""
        raise TypeError(f"{type(self).__name__} must define steps()")

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Step]:
        raise TypeError(f"{type(self).__name__} must define batches()")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define loss()")

    def score(self, model: nn.Module, split: str) -> float:
        """Quality on a split, from 0 to 1."""
        raise TypeError(f"{type(self).__name__} must define score()")

    def outputs(self, model: nn.Module, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The model's outputs on a split, and the labels."""
        model.eval()
        with torch.no_grad():
            pairs = [(model(torch.from_numpy(x)).numpy(), y) for x, y in getattr(self.data, split)()]
        outputs, labels = zip(*pairs, strict=True)
        return np.concatenate(outputs), np.concatenate(labels)


def fast(x: Tensor) -> Tensor:
    """Pictures with channels last, which a CPU convolves faster."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def fast_module(module: Any) -> Any:
    return module.to(memory_format=torch.channels_last)


def train(recipe: Recipe, cache: Path, stop_after: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The moving average of the epoch that did best on the selection split, and what happened on the way."""
    settings = recipe.settings
    torch.manual_seed(settings.seed)
    model, averaged = fast_module(recipe.build()), recipe.build()
    optimizer = torch.optim.AdamW(decay_groups([model], settings.decay), lr=settings.lr)
    checkpoint = Checkpoint(cache / f"{recipe.sample}.pt", asdict(settings))
    stage = Stage(checkpoint, {"model": model}, optimizer, settings.average, [1.0] * settings.epochs, clip=1.0)
    for epoch in stage.epochs():
        if epoch >= stop_after:
            break
        generator = torch.Generator().manual_seed(1000 * settings.seed + epoch)
        model.train()
        losses = []
        steps = recipe.steps(epoch)
        for step, (inputs, targets) in enumerate(recipe.batches(epoch, generator), epoch * steps):
            with reduced():
                outputs = model(fast(inputs))
            loss = recipe.loss(outputs.float(), targets)
            stage.learn(loss, step, settings.lr * cosine(step, steps * settings.epochs, warmup=steps))
            losses.append(loss.item())
        averaged.load_state_dict(stage.average.state)
        stage.text = f"loss {np.mean(losses):.3f}"
        score = recipe.score(averaged, "selection")
        stage.judge({"selection": round(score, 4)}, score)
    return stage.best["state"], stage.about() | {"best_epoch": stage.best["epoch"]}


def run(recipe: Recipe, metric: str, cache: Path, stop_after: int) -> None:
    """Train, store as fp16, read back, score every split but ``train``, and write ``tools/results/SAMPLE.json``."""
    weights = recipe.folder / "weights.safetensors"
    state, about = train(recipe, cache, stop_after)
    save_half(weights, state)
    model = load_half(recipe.build(), weights)
    splits = ("train", "calibration", "selection", "test")
    result = {
        "schema": 1,
        "sample": recipe.sample,
        "splits": {split: sum(len(y) for _, y in getattr(recipe.data, split)()) for split in splits},
        "parameters": sum(p.numel() for p in model.parameters()),
        **{f"{split}_{metric}": round(recipe.score(model, split), 4) for split in splits[1:]},
        **about,
        "settings": asdict(recipe.settings),
        "command": command(),
        **machine(),
    }
    write_json(ROOT / "tools" / "results" / f"{recipe.sample}.json", result)
    print({key: value for key, value in result.items() if key.endswith(metric)})


def main(sample: str, metric: str, make: Callable[[Settings], Recipe], text: str | None, **defaults: Any) -> None:
    """The command line of a training script."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = ROOT / ".cache" / sample
    parser.add_argument("--cache", type=Path, default=cache, help="checkpoints (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--epochs", type=int, default=defaults.pop("epochs", Settings.epochs))
    stop = "stop when so many epochs are done; a later run goes on (default: all)"
    parser.add_argument("--stop-after", type=int, default=2**31, metavar="N", help=stop)
    options = parser.parse_args()
    keep_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    run(make(Settings(seed=options.seed, epochs=options.epochs, **defaults)), metric, options.cache, options.stop_after)
