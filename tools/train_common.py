"""What the training scripts share: resumable stages, moving averages, atomic files, progress with an ETA."""

from __future__ import annotations

import ctypes
import functools
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rowcol_edge.device.system import environment

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from malloc.h
ROOT = Path(__file__).resolve().parent.parent


def keep_memory() -> None:
    """Have glibc keep freed memory: given back and fetched again for every layer, it costs more than the arithmetic."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: slower, not wrong
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
        mallopt(option, value)


@functools.cache
def arithmetic() -> str:
    """What products are trained in: without instructions for it, bfloat16 takes many times as long as float32."""
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(environment().isa) else "float32"


def reduced(wanted: bool = True) -> torch.autocast:
    """Products in the `arithmetic` of this processor; False: in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted and arithmetic() == "bfloat16")


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary neighbour and rename it: a killed run leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    numbers = re.compile(r"\[\s+((?:-?[\d.e+-]+,?\s+)+)\]")
    text = numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"  # lists of numbers on one line
    atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def save_half(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Floating weights as fp16, counters as they are."""
    half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    for name, value in half.items():
        if not torch.isfinite(value.float()).all():
            raise ValueError(f"{name} does not fit fp16")
    atomically(path, lambda p: save_file(half, p))
    path.chmod(0o644)  # safetensors makes files for the owner only


def load_half(model: torch.nn.Module, path: Path) -> torch.nn.Module:
    """The shipped weights in an fp32 model, in eval mode; every key must be there."""
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


class Checkpoint:
    """One file per stage, rewritten after every epoch.

    `settings` is stored with it: a checkpoint of other settings, or of another arithmetic, is set aside, never resumed.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = json.dumps({**settings, "arithmetic": arithmetic()}, sort_keys=True)

    def load(self) -> dict[str, Any] | None:
        if not self.path.is_file():
            return None
        stored = torch.load(self.path, map_location="cpu", weights_only=True)
        if stored["settings"] == self.settings:
            return stored
        self.path.rename(self.path.with_suffix(".other-settings.pt"))
        print(f"{self.path.name}: other settings, starting afresh", flush=True)
        return None

    def save(self, **state: Any) -> None:
        atomically(self.path, lambda p: torch.save({"settings": self.settings, **state}, p))


class Average:
    """Exponential moving average of parameters and buffers."""

    def __init__(self, model: torch.nn.Module, decay: float, begun: bool = False) -> None:
        self.decay = decay
        self.begun = begun
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Unless the model was trained when it came, the decay grows with `step`: a random start is forgotten early."""
        decay = self.decay if self.begun else min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)


class Stage:
    """One model in training: it resumes from its checkpoint, saves itself and tells the time left after every epoch.

    `modules["model"]` is the one that is averaged; `costs` says how long each epoch takes relative to the others.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        modules: dict[str, torch.nn.Module],
        optimizer: torch.optim.Optimizer,
        average: float,
        costs: Sequence[float],
        clip: float = float("inf"),
        begun: bool = False,
    ) -> None:
        self.checkpoint, self.modules, self.optimizer, self.clip = checkpoint, modules, optimizer, clip
        self.average = Average(modules["model"], average, begun)
        self.costs = np.cumsum([0.0, *costs])
        self.epoch, self.seconds, self.text = 0, 0.0, ""
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"score": 0.0, "epoch": 0, "state": self.average.state}
        if stored := checkpoint.load():
            for name, module in modules.items():
                module.load_state_dict(stored[name])
            optimizer.load_state_dict(stored["optimizer"])
            self.average.state, self.best, self.history = stored["average"], stored["best"], stored["history"]
            self.epoch, self.seconds = stored["epoch"], stored["seconds"]

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to do; the body of the loop trains one."""
        first, began = self.epoch, time.monotonic()
        while self.epoch < len(self.costs) - 1:
            started = time.monotonic()
            yield self.epoch
            self.epoch += 1
            self.seconds += time.monotonic() - started
            self.save()
            share = (self.costs[self.epoch] - self.costs[first]) / (self.costs[-1] - self.costs[first])
            spent = (time.monotonic() - began) / 60
            name, count = self.checkpoint.path.stem, len(self.costs) - 1
            left = spent / share - spent
            print(f"[{name}] {self.epoch}/{count} {self.text} · {spent:.1f} min, {left:.1f} min left", flush=True)

    def learn(self, loss: torch.Tensor, step: int, lr: float) -> None:
        """One step down the gradient of `loss`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip < float("inf"):
            torch.nn.utils.clip_grad_norm_(self.modules["model"].parameters(), self.clip)
        self.optimizer.step()
        self.average.update(self.modules["model"], step)

    def judge(self, figures: dict[str, Any], score: float) -> None:
        """Put an epoch's selection figures on record; keep its average if no earlier one scored as high."""
        self.history.append({"epoch": self.epoch + 1, **figures})
        self.text += f", selection {figures}"
        if score > self.best["score"]:
            state = {name: value.clone() for name, value in self.average.state.items()}
            self.best = {"score": score, "epoch": self.epoch + 1, "state": state}

    def save(self) -> None:
        self.checkpoint.save(
            **{name: module.state_dict() for name, module in self.modules.items()},
            optimizer=self.optimizer.state_dict(),
            average=self.average.state,
            best=self.best,
            history=self.history,
            epoch=self.epoch,
            seconds=self.seconds,
        )

    def about(self) -> dict[str, Any]:
        return {"epochs": self.epoch, "seconds": round(self.seconds), "history": self.history}


def cosine(step: int, total: int, warmup: int, floor: float = 0.01) -> float:
    """Factor on the learning rate: linear warm-up, then a half cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def schedule(text: str) -> tuple[tuple[int, int], ...]:
    """PIXELS:EPOCHS,... or TOKENS:EPOCHS,... from the command line."""
    return tuple((int(a), int(b)) for a, b in (part.split(":") for part in text.split(",")))


def by_epoch(phases: Iterable[tuple[int, int]]) -> list[int]:
    """((size, epochs), ...) → the size of every epoch."""
    return [size for size, epochs in phases for _ in range(epochs)]


def rates(sizes: Sequence[int], steps: int, lr: float, restart: float, warmup: int) -> list[float]:
    """The learning rate at every step of epochs with `steps` steps each.

    Sizes (pixels, tokens) grow within a cycle. Where they shrink again, the next cycle starts: a warm-up and a half
    cosine from `restart` times the peak before.
    """
    starts = [0, *(e for e in range(1, len(sizes)) if sizes[e] < sizes[e - 1]), len(sizes)]
    return [
        lr * restart**cycle * cosine(step, (end - start) * steps, warmup)
        for cycle, (start, end) in enumerate(pairwise(starts))
        for step in range((end - start) * steps)
    ]


def decay_groups(modules: Iterable[torch.nn.Module], decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels, none on biases and norms."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def shuffled(count: int, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Index batches of one epoch, all of the same size (the rest sits this epoch out)."""
    order = torch.randperm(count, generator=generator)
    yield from order[: count - count % batch].split(batch)


def machine() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {"machine": threads, "cpu": _cpu(), "arithmetic": arithmetic(), "versions": versions}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def command() -> str:
    """How this run was started, relative to the repository."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    return " ".join(["python", name.as_posix(), *sys.argv[1:]])
