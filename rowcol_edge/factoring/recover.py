"""A rewritten model trained for a few epochs to answer as its original does, without labels.

    samples ─ some held out ─ rate: the one of a few that lowers the held-out loss most
            └ the others ─ epochs of AdamW (warm-up, then half a cosine; clipped) ─ after each: judged ─▶ the best

The loss is that of `distil`. Dropout is off and batch norms keep their statistics, as in the original. What comes back
is the best epoch by the judge, or the model as it was: never a worse one.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from rowcol_edge import cache as caching
from rowcol_edge import models
from rowcol_edge.cache import Cache
from rowcol_edge.calling import evaluating
from rowcol_edge.datasets import Split
from rowcol_edge.errors import ConfigError, ModelError
from rowcol_edge.factoring import snapshots
from rowcol_edge.factoring.batches import Batches, Feeds, length
from rowcol_edge.factoring.distil import Distillation
from rowcol_edge.factoring.snapshots import Snapshots, Tensors
from rowcol_edge.factoring.spaces import Progress
from rowcol_edge.factoring.training import adam, has_halves, schedule, single, trainable

#: called with a module and a label; returns its quality, higher is better
Judge = Callable[[nn.Module, str], float]

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""Learning rates that are tried; none below or above is taken."""
_TRIED_STEPS = 8
PATIENCE = 3
"""Epochs without a better model after which training stops."""
_CLIP = 1.0


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch's figures; epoch 0 is the model as it came.

    Attributes:
        loss: mean of the training loss; None for epoch 0.
        distance: of the outputs to the original's, on the held-out samples.
        score: the judge's, or the negative distance where there is no judge.
    """

    epoch: int
    loss: float | None
    distance: float
    score: float


@dataclass(frozen=True, slots=True)
class Recovered:
    """Attributes:
    module: the best one, in the types of the student; a new module even if that is the student itself.
    history: the figures of each epoch, the student's own first.
    learning_rate: the one that was chosen; 0 where nothing was trained.
    features: blocks that were compared with the original's.
    stopped: why training ended before its last epoch; empty if it did not.
    """

    module: nn.Module
    history: tuple[Epoch, ...]
    best_epoch: int
    learning_rate: float
    features: tuple[str, ...]
    stopped: str = ""

    @property
    def before(self) -> Epoch:
        return self.history[0]

    @property
    def after(self) -> Epoch:
        return self.history[self.best_epoch]


def recover(
    student: nn.Module,
    teacher: nn.Module,
    samples: Split,
    judge: Judge | None = None,
    *,
    epochs: int,
    classify: bool = True,
    seed: int = 0,
    batch: int = 32,
    patience: int = PATIENCE,
    cache: Cache | None = None,
    key: object = None,
    progress: Progress | None = None,
) -> Recovered:
    """Distil ``teacher`` into a copy of ``student``; both stay as they are. Deterministic for a seed.

    Parameters that require no gradient stay as they are, unless none requires one: then all are trained. Half precision
    is trained in single precision and cast back before it is judged.

    Args:
        samples: inputs to train on; labels are not used. More unlabelled data help more than more epochs. Up to 64 of
            them (an eighth, if that is less) are held out. Samples are shuffled within 512 MB.
        judge: chooses the epoch that is kept, equal ones by the distance of the outputs on the held-out samples.
            None: that distance alone. A model in eval mode is handed over.
        classify: the first output is logits or probabilities of classes, if it is (samples, classes).
        patience: epochs without a better model after which training stops.
        cache: keeps the state after each epoch until the run is over, so that one that was killed goes on there and
            ends with the same result; ``key`` says, as JSON, what decides the judge's answers.
        progress: gets the steps done and the steps in all.

    Raises:
        ConfigError: epochs, batch or patience out of range.
        ModelError: other outputs than the teacher's, nothing to train, or nothing to differentiate.
        DataError: inputs that the teacher does not take.
    """
    for name, value, least in (("epochs", epochs, 0), ("batch", batch, 1), ("patience", patience, 1)):
        if type(value) is not int or value < least:  # True is no number of epochs
            raise ConfigError(f"recover: {name}", expected=f"a whole number from {least}", got=repr(value))
    taught = single(teacher) if has_halves(teacher) else teacher
    work = single(student)
    trained = trainable(work)
    decides = ["recover", key, models.digest(student), sorted(trained), models.digest(teacher), samples.key]
    kept = Snapshots(cache or Cache(None), caching.key([*decides, epochs, classify, seed, batch, patience]))
    with torch.random.fork_rng(devices=[]), evaluating(taught), evaluating(work), torch.enable_grad():
        torch.manual_seed(seed)
        data = Batches(samples, batch)
        training = _Training(student, work, trained, Distillation(work, taught, data.held, classify=classify), data)
        return training.run(judge, epochs, patience, kept, progress)


class _DivergedError(Exception):
    """A loss that is no number."""


@dataclass(slots=True)
class _Training:
    """A model in training; all that a snapshot holds."""

    student: nn.Module
    work: nn.Module
    trained: Mapping[str, nn.Parameter]
    distillation: Distillation
    data: Batches
    rate: float = 0.0
    history: list[Epoch] = field(default_factory=list)
    best: Tensors = field(default_factory=dict)
    best_epoch: int = 0
    stopped: str = ""

    def run(
        self, judge: Judge | None, epochs: int, patience: int, kept: Snapshots, progress: Progress | None
    ) -> Recovered:
        steps = _Steps(progress, (len(RATES) * _TRIED_STEPS if epochs else 0) + epochs * self.data.steps)
        optimizer = adam(self.trained.values(), self.rate)
        if (found := kept.newest(epochs)) is None or not self._resumed(*found, optimizer):
            self._judged(None, judge, 0)
            self.rate = self._fastest(steps) if epochs else 0.0
            self._keep(kept, optimizer)
        steps.reach(steps.total - (epochs - self._done) * self.data.steps)
        while self._done < epochs:
            if self._done - self.best_epoch >= patience:
                self.stopped = f"no better model in {patience} epochs"
                break
            try:
                self._judged(self._train(optimizer, epochs, steps), judge, self._done + 1)
            except _DivergedError as error:
                self.stopped = f"{error} in epoch {self._done + 1}"
                break
            self._keep(kept, optimizer)
        steps.reach(steps.total)
        kept.clear(epochs)
        return Recovered(
            self._result(self.best), tuple(self.history), self.best_epoch, self.rate,
            self.distillation.features, self.stopped,
        )  # fmt: skip

    @property
    def _done(self) -> int:
        return self.history[-1].epoch

    def _train(self, optimizer: torch.optim.Optimizer, epochs: int, steps: _Steps) -> float:
        """One epoch; returns the mean of its losses."""
        total, first = 0.0, self._done * self.data.steps
        for place, feeds in enumerate(self.data.epoch()):
            share = schedule(first + place, epochs * self.data.steps)
            total += self._step(self.work, optimizer, feeds, self.rate * share)
            steps.advance()
        return total / self.data.steps

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, feeds: Feeds, rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = self.distillation.loss(model, feeds)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _DivergedError(f"the loss became {value}")
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(
                "the model to recover",
                expected="outputs that can be differentiated",
                got=str(error).partition(chr(10))[0],
            ) from error
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        size = float(nn.utils.clip_grad_norm_(parameters, _CLIP))
        if not math.isfinite(size):
            raise _DivergedError(f"the gradient became {size}")
        optimizer.step()
        return value

    def _fastest(self, steps: _Steps) -> float:
        """The rate with the least loss on the held-out samples after a few steps; the smallest if none is a number."""
        random = torch.get_rng_state()
        epochs = itertools.chain.from_iterable(self.data.epoch() for _ in range(_TRIED_STEPS))
        batches = list(itertools.islice(epochs, _TRIED_STEPS))
        found = []
        for rate in RATES:
            model = copy.deepcopy(self.work)
            optimizer = adam(trainable(model).values(), rate)
            try:
                for place, feeds in enumerate(batches):
                    self._step(model, optimizer, feeds, rate * min(1.0, (place + 1) / 2))
                    steps.advance()
                found.append((self._held_loss(model), rate))
            except _DivergedError:
                break  # a larger one will not do better
        torch.set_rng_state(random)
        return min([entry for entry in found if math.isfinite(entry[0])], default=(0.0, RATES[0]))[1]

    @torch.no_grad()
    def _held_loss(self, model: nn.Module) -> float:
        losses = [float(self.distillation.loss(model, feeds)) * length([feeds]) for feeds in self.data.held]
        return sum(losses) / length(self.data.held)

    def _judged(self, loss: float | None, judge: Judge | None, number: int) -> None:
        """Put an epoch on record, and its state in the place of the best if it is better."""
        now = snapshots.state(self.work)
        module = self._result(now)
        with evaluating(module):
            compared = single(module) if has_halves(module) else module
            distance = self.distillation.distance(compared, self.data.held)
            if number and not math.isfinite(distance):
                raise _DivergedError(f"the distance to the original became {distance}")
            label = f"judge epoch {number}" if number else "judge before recovery"
            score = -distance if judge is None else judge(module, label)
        self.history.append(Epoch(number, loss, distance, score))
        if not number or self._rank(number) > self._rank(self.best_epoch):
            self.best, self.best_epoch = now, number

    def _rank(self, number: int) -> tuple[float, float]:
        """What no number is given for is worse than any."""
        found = self.history[number]
        score, distance = found.score, found.distance
        return (-math.inf if math.isnan(score) else score, -distance if math.isfinite(distance) else -math.inf)

    def _result(self, tensors: Tensors) -> nn.Module:
        """A copy of the student with this state, in its own types."""
        module = copy.deepcopy(self.student)
        snapshots.restore(module, tensors)
        return module

    def _keep(self, kept: Snapshots, optimizer: torch.optim.Optimizer) -> None:
        tensors = {f"now.{name}": value for name, value in snapshots.state(self.work).items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for place, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimiser.{place}.{name}": value.clone() for name, value in values.items()}
        tensors["random"] = torch.get_rng_state()
        history = [asdict(epoch) for epoch in self.history]
        kept.save(self._done, tensors, {"rate": self.rate, "best_epoch": self.best_epoch, "history": history})

    def _resumed(self, tensors: Tensors, said: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> bool:
        """Whether training could be put where the snapshot was taken."""
        now, best, moments = (_part(tensors, kind) for kind in ("now.", "best.", "optimiser."))
        if not (snapshots.fits(self.work, now) and snapshots.fits(self.work, best) and "random" in tensors):
            return False
        snapshots.restore(self.work, now)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in moments.items():
            place, _, kind = name.partition(".")
            state.setdefault(int(place), {})[kind] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["random"])
        self.rate, self.best, self.best_epoch = said["rate"], best, said["best_epoch"]
        self.history = [Epoch(**epoch) for epoch in said["history"]]
        return True


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class _Steps:
    """Progress in steps."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self.total, self._done = progress, total, 0
        self.reach(0)

    def advance(self) -> None:
        self.reach(self._done + 1)

    def reach(self, done: int) -> None:
        self._done = done
        if self._progress is not None and self.total:
            self._progress("recover", min(done, self.total), self.total)
