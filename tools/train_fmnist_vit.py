"""Train sample:fmnist-vit; a killed run goes on where it was.

    apt-get install dataset-fashion-mnist
    python -m pip install -e . torch safetensors
    python tools/train_fmnist_vit.py

Training leaves out the calibration and selection images that are committed in images.npz. The moving average after the
last epoch is shipped (nothing is chosen); it is stored as fp16, read back and scored on the selection images, the
committed test images and all 10,000 test images. `--make-images` writes images.npz again (the same arrays, for the same
seed).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rowcol_edge.errors import ModelError
from rowcol_edge.user_code import import_file
from train_common import (
    ROOT,
    Checkpoint,
    Stage,
    atomically,
    by_epoch,
    command,
    decay_groups,
    keep_memory,
    load_half,
    machine,
    rates,
    reduced,
    save_half,
    schedule,
    shuffled,
    write_json,
)

SAMPLE = ROOT / "sample_models" / "fmnist-vit"
RESULT = ROOT / "tools" / "results" / "fmnist-vit.json"
WEIGHTS = SAMPLE / "weights.safetensors"
IMAGES_SEED = 20241
COUNTS = {"calibration": ("train", 128), "selection": ("train", 400), "test": ("t10k", 400)}


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    # (random tokens kept of the 49, epochs): half the tokens take less than half the time
    phases: tuple[tuple[int, int], ...] = ((24, 8), (49, 2), (24, 6), (49, 3))
    lr: float = 1.5e-3
    restart: float = 0.6  # share of the lr at which the second cycle starts
    decay: float = 0.05
    batch: int = 128
    average: float = 0.998
    smoothing: float = 0.05


def make_images(data: Any) -> None:
    """Deal class-balanced images out of the original files and store them as plain uint8 arrays."""
    rng = np.random.default_rng(IMAGES_SEED)
    originals = {part: data.original(part) for part in ("train", "t10k")}
    piles = {
        part: [list(rng.permutation(np.flatnonzero(labels == c))) for c in range(10)]
        for part, (_, labels) in originals.items()
    }
    arrays: dict[str, np.ndarray] = {}
    for split, (part, count) in COUNTS.items():
        rows = np.array([piles[part][i % 10].pop() for i in range(count)], np.int32)
        arrays |= {
            f"{split}_rows": rows,
            f"{split}_images": originals[part][0][rows],
            f"{split}_labels": originals[part][1][rows],
        }

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            np.savez_compressed(stream, **arrays)

    atomically(SAMPLE / "images.npz", write)


def normalised(data: Any, pixels: np.ndarray) -> Tensor:
    """What `Preprocess.pixels` gives, for many images at once: (N, 28, 28) uint8 → (N, 1, 28, 28)."""
    recipe = data.preprocess()
    sideways = np.ascontiguousarray(pixels.reshape(-1, 28))
    strip = type(recipe)(**{**recipe.to_dict(), "height": len(sideways)}).pixels(sideways)
    return torch.from_numpy(strip.reshape(-1, 1, 28, 28))


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the pictures; shift each by up to two pixels."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    padded = F.pad(x, (2, 2, 2, 2), value=float(x.min()))
    dx, dy = torch.randint(5, (2, len(x)), generator=generator)
    rows = torch.arange(28)
    return padded[
        torch.arange(len(x))[:, None, None], 0, (dy[:, None] + rows)[:, :, None], (dx[:, None] + rows)[:, None, :]
    ][:, None]


def some(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random tokens of each picture."""
    chosen = torch.rand(tokens.shape[:2], generator=generator).argsort(1)[:, :count]
    return tokens.gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[2]))


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: np.ndarray) -> float:
    model.eval()
    guess = torch.cat([model(x).argmax(1) for x in inputs.split(500)])
    return round(float((guess.numpy() == labels).mean()), 4)


def train(settings: Settings, data: Any, build: Any, cache: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    pixels, labels = data.arrays("train")
    inputs, targets = normalised(data, pixels), torch.from_numpy(labels.astype(np.int64))
    selection = normalised(data, data.arrays("selection")[0]), data.arrays("selection")[1]
    torch.manual_seed(settings.seed)
    model, averaged = build(), build()
    optimizer = torch.optim.AdamW(decay_groups([model], settings.decay), lr=settings.lr)
    checkpoint = Checkpoint(cache / "vit.pt", asdict(settings))
    sizes = by_epoch(settings.phases)
    stage = Stage(checkpoint, {"model": model}, optimizer, settings.average, sizes, clip=1.0)
    steps = len(labels) // settings.batch
    lr = rates(sizes, steps, settings.lr, settings.restart, warmup=steps // 2)
    for epoch in stage.epochs():
        generator = torch.Generator().manual_seed(1000 * settings.seed + epoch)
        model.train()
        losses = []
        for step, pick in enumerate(shuffled(len(labels), settings.batch, generator), epoch * steps):
            # the fused attention's backward is slower than plain matrix products on a CPU
            with reduced(), sdpa_kernel(SDPBackend.MATH):
                tokens = model.tokens(augment(inputs[pick], generator))
                if sizes[epoch] < tokens.shape[1]:
                    tokens = some(tokens, sizes[epoch], generator)
                logits = model.classify(tokens)
            loss = F.cross_entropy(logits.float(), targets[pick], label_smoothing=settings.smoothing)
            stage.learn(loss, step, lr[step])
            losses.append(loss.item())
            if (step + 1) % 100 == 0:
                print(f"[vit] step {step + 1}/{len(lr)}, loss {losses[-1]:.3f}", flush=True)
        averaged.load_state_dict(stage.average.state)
        stage.text = f"loss {np.mean(losses):.3f}"
        stage.judge({"accuracy": accuracy(averaged, *selection)}, score=0.0)
        save_half(WEIGHTS, stage.average.state)
    return stage.average.state, stage.about()


def run(settings: Settings, cache: Path) -> None:
    data = import_file(SAMPLE / "data.py", ModelError)
    build = import_file(SAMPLE / "model.py", ModelError).build
    state, about = train(settings, data, build, cache)
    save_half(WEIGHTS, state)
    model = load_half(build(), WEIGHTS)
    got = {
        f"{split}_accuracy": accuracy(model, normalised(data, p), y)
        for split in COUNTS
        for p, y in [data.arrays(split)]
    }
    pixels, labels = data.original("t10k")
    result = {
        "schema": 1,
        "sample": "fmnist-vit",
        "splits": {
            "train": len(data.arrays("train")[1]),
            **{k: count for k, (_, count) in COUNTS.items()},
            "test_all": len(labels),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        **got,
        "test_all_accuracy": accuracy(model, normalised(data, pixels), labels),
        **about,
        "settings": asdict(settings),
        "command": command(),
        **machine(),
    }
    write_json(RESULT, result)
    print({k: v for k, v in result.items() if k.endswith("accuracy")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-images", action="store_true", help="write images.npz and stop")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache" / "fmnist-vit", help="checkpoints (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--phases", type=schedule, default=Settings.phases, help="TOKENS:EPOCHS,..., e.g. 24:8,49:2")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    options = parser.parse_args()
    if options.make_images:
        make_images(import_file(SAMPLE / "data.py", ModelError))
        return
    keep_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    run(Settings(seed=options.seed, phases=options.phases), options.cache)


if __name__ == "__main__":
    main()
