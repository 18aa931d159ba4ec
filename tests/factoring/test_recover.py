"""Distillation: better or the same, the same again for a seed, and on after a kill as if there had been none."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.cache import Cache
from rowcol_edge.datasets import Split, scan
from rowcol_edge.errors import ConfigError, DataError, ModelError
from rowcol_edge.factoring import batches
from rowcol_edge.factoring import recover as recovering
from rowcol_edge.factoring.apply import apply
from rowcol_edge.factoring.distil import Distillation, run
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.recover import Recovered, recover
from rowcol_edge.factoring.study import study


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.contract(torch.relu(self.expand(self.norm(x)))))


class Net(nn.Module):
    """Blocks with dropout between a stem with a batch norm and a head."""

    def __init__(self, outputs: int = 4, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(12, width), nn.BatchNorm1d(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Pair(nn.Module):
    """Two inputs, a dict of two outputs, one of which is no number to train on."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 16), nn.Linear(4, 16)
        self.map, self.score = nn.Linear(16, 8), nn.Linear(16, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.tanh(self.left(a) + self.right(b))
        return {"map": self.map(x), "score": self.score(x), "class": self.map(x).argmax(1)}


def split(count: int = 96, seed: int = 0, name: str = "x", width: int = 12) -> Split:
    values = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return scan(Split("calibration", "made", lambda: [({name: part}, None) for part in np.split(values, count // 16)]))


def pairs(count: int = 96) -> Split:
    random = np.random.default_rng(0)
    feeds = {"a": random.normal(size=(count, 6)), "b": random.normal(size=(count, 4))}
    feeds = {key: value.astype(np.float32) for key, value in feeds.items()}
    return scan(Split("calibration", "made", lambda: [(feeds, None)]))


def spoiled(model: nn.Module, amount: float = 0.3) -> nn.Module:
    """A copy with noise on its weights: what a careless rewriting leaves."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in result.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * parameter.float().abs().mean()
            parameter.add_((amount * noise).to(parameter.dtype))
    return result


def net(**options: int) -> Net:
    torch.manual_seed(0)
    model = Net(**options)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(64, 12) * 2 + 1)  # statistics of its own for the batch norm
    return model.eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_factored_model_comes_nearer_to_its_original_on_new_inputs() -> None:
    teacher, data = net(), split(256)
    known = study(teacher, data, classify=True)
    plan = FactorPlan(tuple(LayerPlan(f"blocks.{i}.expand", "project", 2) for i in range(3)))
    student = apply(known.folded, plan, known.spaces)
    found = recover(student, known.folded, data, epochs=6)
    fresh = [{"x": np.random.default_rng(9).normal(size=(200, 12)).astype(np.float32)}]
    distillation = Distillation(student, teacher, fresh, classify=True)
    before, after = distillation.distance(student, fresh), distillation.distance(found.module, fresh)
    assert after < 0.75 * before
    assert found.best_epoch > 0
    assert found.learning_rate in recovering.RATES
    assert found.features == ("blocks.0", "blocks.1", "blocks.2")
    assert [epoch.epoch for epoch in found.history] == list(range(len(found.history)))


@pytest.mark.parametrize("training", [True, False])
def test_both_models_stay_as_they_were(training: bool) -> None:
    teacher = net().train(training)
    student = spoiled(teacher)
    student.head.weight.grad = torch.ones_like(student.head.weight)
    before = weights(teacher), weights(student), torch.get_rng_state()
    found = recover(student, teacher, split(), epochs=1)
    assert same(weights(teacher), before[0])
    assert same(weights(student), before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert {module.training for model in (teacher, student, found.module) for module in model.modules()} == {training}
    assert not any(module._forward_hooks for model in (teacher, student) for module in model.modules())
    # the statistics of batch norms are the original's
    assert torch.equal(found.module.norm.running_mean, student.norm.running_mean)


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    teacher = net()
    first, again, other = (recover(spoiled(teacher), teacher, split(), epochs=2, seed=seed) for seed in (0, 0, 1))
    assert same(weights(first.module), weights(again.module))
    assert first.history == again.history
    assert not same(weights(first.module), weights(other.module))


def test_no_model_is_worse_than_the_one_that_came() -> None:
    teacher = net()
    student = spoiled(teacher)
    scores = iter([0.9, 0.5, 0.8, 0.7, 0.2])
    labels: list[str] = []

    def judge(module: nn.Module, label: str) -> float:
        labels.append(label)
        assert not any(part.training for part in module.modules())
        return next(scores)

    found = recover(student, teacher, split(), judge, epochs=10)
    assert same(weights(found.module), weights(student))
    assert found.module is not student
    assert (found.best_epoch, found.stopped) == (0, "no better model in 3 epochs")
    assert [epoch.score for epoch in found.history] == [0.9, 0.5, 0.8, 0.7]
    assert labels == ["judge before recovery", "judge epoch 1", "judge epoch 2", "judge epoch 3"]


def test_the_best_epoch_is_taken_and_of_equals_the_nearest_to_the_original() -> None:
    teacher = net()
    scores = iter([0.5, 0.8, 0.7, 0.7])
    found = recover(spoiled(teacher), teacher, split(), lambda *_: next(scores), epochs=3)
    assert found.best_epoch == 1
    assert (found.before.score, found.after.score) == (0.5, 0.8)
    equal = recover(spoiled(teacher), teacher, split(), lambda *_: 0.5, epochs=3)
    distances = [epoch.distance for epoch in equal.history]
    assert equal.best_epoch == distances.index(min(distances)) > 0


def test_any_number_is_better_than_none() -> None:
    teacher = net()
    scores = iter([math.nan, 0.5, math.nan, 0.6])
    found = recover(spoiled(teacher), teacher, split(), lambda *_: next(scores), epochs=3)
    assert found.best_epoch == 3
    worthless = recover(spoiled(teacher), teacher, split(), lambda *_: math.nan, epochs=1)
    assert not worthless.stopped


def test_no_epochs_give_a_copy() -> None:
    teacher = net()
    student = spoiled(teacher)
    found = recover(student, teacher, split(), epochs=0)
    assert found.module is not student
    assert same(weights(found.module), weights(student))
    assert (len(found.history), found.best_epoch, found.learning_rate) == (1, 0, 0.0)


def test_several_inputs_and_outputs() -> None:
    torch.manual_seed(0)
    teacher, data = Pair().eval(), pairs()
    student = spoiled(teacher)
    found = recover(student, teacher, data, epochs=8, classify=False)
    assert found.after.distance < 0.5 * found.before.distance
    assert found.history[0].loss is None
    assert all(epoch.loss is not None and math.isfinite(epoch.loss) for epoch in found.history[1:])


@pytest.mark.parametrize("kind", ["one logit", "probabilities"])
def test_other_kinds_of_classifiers(kind: str) -> None:
    teacher = net(outputs=1) if kind == "one logit" else nn.Sequential(net(), nn.Softmax(1)).eval()
    data = split(name="x" if kind == "one logit" else "input")
    student = spoiled(teacher)
    distillation = Distillation(student, teacher, list(data.batches()), classify=True)
    # nats, of the answers as the board reads them
    with torch.no_grad():
        ((wanted,), _), ((given,), _) = (run(model, data.take(96)) for model in (teacher, student))
    if kind == "one logit":
        wanted, given = (torch.cat([1 - p, p], 1) for p in (wanted.sigmoid(), given.sigmoid()))
    expected = float((wanted * (wanted.log() - given.log())).sum(1).mean())
    assert distillation.distance(student, data.batches()) == pytest.approx(expected, rel=1e-4)
    found = recover(student, teacher, data, epochs=4)
    assert found.after.distance < found.before.distance


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_other_outputs_are_compared_about_their_mean(offset: float, masked: bool) -> None:
    class Moved(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Linear(12, 4)
            with torch.no_grad():
                self.head.weight *= scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(x).double() + offset
            return found.masked_fill(torch.arange(4) > 2, -math.inf) if masked else found

    x = np.random.default_rng(0).normal(size=(200, 12)).astype(np.float32)
    teacher, student, feeds = Moved(1.0), Moved(1.01), [{"x": x}]
    distillation = Distillation(student, teacher, feeds, classify=False)
    with torch.no_grad():
        wanted, given = (
            each.head(torch.from_numpy(x)).double()[:, : 3 if masked else 4] for each in (teacher, student)
        )
    expected = float((given - wanted).square().sum() / wanted.var(0).sum() / len(x))
    assert distillation.distance(student, feeds) == pytest.approx(expected, rel=1e-3)
    loss = distillation.loss(student, feeds[0])
    loss.backward()
    assert student.head.weight.grad is not None
    assert student.head.weight.grad.isfinite().all()
    assert loss.dtype == torch.float32


def test_half_precision_is_trained_in_single_precision_and_cast_back() -> None:
    teacher = net().to(torch.bfloat16)
    student = spoiled(teacher)
    seen: list[torch.dtype] = []
    found = recover(student, teacher, split(), lambda m, _: seen.append(m.head.weight.dtype) or 0.0, epochs=4)
    assert {value.dtype for value in found.module.state_dict().values() if value.is_floating_point()} == {
        torch.bfloat16
    }
    assert set(seen) == {torch.bfloat16}  # judged as it is handed back
    assert found.after.distance < 0.8 * found.before.distance
    assert {value.dtype for value in teacher.state_dict().values() if value.is_floating_point()} == {torch.bfloat16}


def test_frozen_parameters_stay_unless_all_are() -> None:
    teacher = net()
    student = spoiled(teacher)
    student.stem.requires_grad_(False)
    found = recover(student, teacher, split(), lambda *_: float(len(_)), epochs=2)
    assert found.best_epoch > 0
    assert torch.equal(found.module.stem.weight, student.stem.weight)
    assert not torch.equal(found.module.head.weight, student.head.weight)
    assert [p.requires_grad for p in found.module.parameters()] == [p.requires_grad for p in student.parameters()]
    student.requires_grad_(False)
    found = recover(student, teacher, split(), epochs=2)
    assert not torch.equal(found.module.stem.weight, student.stem.weight)
    assert not any(parameter.requires_grad for parameter in found.module.parameters())


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    torch.manual_seed(0)
    teacher = Tied()
    found = recover(spoiled(teacher), teacher, split(), epochs=2, cache=None)
    assert found.module.second.weight is found.module.first.weight
    assert found.after.distance < found.before.distance


def test_one_sample_is_enough() -> None:
    teacher = net()
    values = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32)
    data = scan(Split("calibration", "made", lambda: [({"x": values}, None)]))
    found = recover(spoiled(teacher), teacher, data, epochs=3)
    assert found.after.distance <= found.before.distance


def test_a_large_split_is_shuffled_in_parts_that_hold_each_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_CHUNK_BYTES", 40 * 12 * 4)
    data = batches.Batches(split(208), 24)
    rows = [batch["x"] for batch in data.epoch()]
    held = np.concatenate([feeds["x"] for feeds in data.held])
    assert len(rows) == data.steps == math.ceil((208 - len(held)) / 24)
    assert all(len(batch) == 24 for batch in rows[:-1])
    seen = np.concatenate([*rows, held])
    assert np.array_equal(np.unique(seen, axis=0), np.unique(split(208).take(208)["x"], axis=0))
    assert len(seen) == 208


# ---------------------------------------------------------------- going on after a kill


class _KilledError(Exception):
    pass


def _killed_at(step: int) -> Callable[[str, int, int], None]:
    def progress(label: str, done: int, total: int) -> None:
        if done == step:
            raise _KilledError

    return progress


def _run(
    cache: Cache | None = None, progress: Callable[[str, int, int], None] | None = None, **options: Any
) -> Recovered:
    teacher = net()
    return recover(spoiled(teacher), teacher, split(), epochs=4, batch=16, cache=cache, progress=progress, **options)


@pytest.mark.parametrize("epoch", [0, 2, 3])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(tmp_path: Path, epoch: int) -> None:
    whole = _run()
    tried = len(recovering.RATES) * recovering._TRIED_STEPS
    steps = 6  # of 96 samples 12 are held out
    with pytest.raises(_KilledError):
        _run(Cache(tmp_path), _killed_at(tried + epoch * steps + 3))
    reports: list[int] = []
    found = _run(Cache(tmp_path), lambda label, done, total: reports.append(done))
    assert reports[1] == tried + epoch * steps  # whole epochs are not done again
    assert reports[-1] == tried + 4 * steps
    assert found.history == whole.history
    assert found.best_epoch == whole.best_epoch
    assert same(weights(found.module), weights(whole.module))
    assert not list(tmp_path.rglob("*.safetensors"))  # what is over needs no snapshot


def test_a_run_that_is_killed_for_good_goes_on(tmp_path: Path) -> None:
    whole = _run()
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_recover as here
from rowcol_edge.cache import Cache
def progress(label, done, total):
    if done == total - 9:
        os.kill(os.getpid(), signal.SIGKILL)
here._run(Cache(here.Path({str(tmp_path)!r})), progress)
"""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | threads)
    assert done.returncode == -signal.SIGKILL
    reports: list[int] = []
    found = _run(Cache(tmp_path), lambda label, done, total: reports.append(done))
    assert reports[-1] - reports[1] == 12  # two of the four epochs were left
    assert same(weights(found.module), weights(whole.module))
    assert found.history == whole.history


def test_a_damaged_snapshot_or_another_run_is_begun_anew(tmp_path: Path) -> None:
    whole = _run()
    with pytest.raises(_KilledError):
        _run(Cache(tmp_path), _killed_at(len(recovering.RATES) * recovering._TRIED_STEPS + 15))
    entries = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in entries} <= {".safetensors", ".json"}
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1  # earlier epochs are forgotten
    assert _run(Cache(tmp_path), seed=1).history != whole.history
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert _run(Cache(tmp_path)).history == whole.history


def test_a_run_with_other_frozen_parameters_is_another(tmp_path: Path) -> None:
    teacher = net()

    def run(frozen: bool, cache: Cache | None, progress: Callable[[str, int, int], None] | None = None) -> Recovered:
        student = spoiled(teacher)
        student.stem.requires_grad_(not frozen)
        return recover(student, teacher, split(), epochs=4, batch=16, cache=cache, progress=progress)

    whole = run(True, None)
    with pytest.raises(_KilledError):
        run(False, Cache(tmp_path), _killed_at(len(recovering.RATES) * recovering._TRIED_STEPS + 15))
    found = run(True, Cache(tmp_path))
    assert found.history == whole.history
    assert same(weights(found.module), weights(whole.module))
    assert torch.equal(found.module.stem.weight, spoiled(teacher).stem.weight)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": -1}, "recover: epochs: expected a whole number from 0, got -1"),
        ({"epochs": 1.5}, "got 1.5"),
        ({"epochs": True}, "got True"),
        ({"epochs": 1, "batch": 0}, "recover: batch: expected a whole number from 1"),
        ({"epochs": 1, "patience": 0}, "recover: patience"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recover(net(), net(), split(), **options)


def test_data_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match=r"data to recover on: expected samples that the original takes, got x \(10,\)"):
        recover(net(), net(), split(width=10), epochs=1)


def test_other_outputs_than_the_originals_are_refused() -> None:
    with pytest.raises(ModelError, match=r"its original: expected the same outputs, \[\(1, 4\)\], got \[\(1, 5\)\]"):
        recover(net(outputs=5), net(), split(), epochs=1)
    classes = nn.Sequential(net(), _Argmax()).eval()
    with pytest.raises(ModelError, match="an output of floating point numbers"):
        recover(classes, classes, split(name="input"), epochs=1)


def test_a_model_that_cannot_be_differentiated_is_refused() -> None:
    class Inference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    with pytest.raises(ModelError, match="expected outputs that can be differentiated, got element 0 of tensors does"):
        recover(Inference(), Inference(), split(), epochs=1)


class _Argmax(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(1)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ModelError, match="the model to recover: expected parameters to train, got none"):
        recover(nn.ReLU(), nn.ReLU(), split(name="input"), epochs=1)


@pytest.mark.parametrize("good", [1, 0])
def test_a_loss_that_is_no_number_ends_training_with_the_best_so_far(
    good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = spoiled(net())
    if good:
        steps = partial(Distillation.loss)
        counted = iter(range(10**6))

        def loss(self: Distillation, model: nn.Module, feeds: Any) -> torch.Tensor:
            # the rates are tried first; then the third step of the second epoch
            nan = math.nan if torch.is_grad_enabled() and next(counted) >= tried + 6 + 2 else 1.0
            return steps(self, model, feeds) * nan

        tried = len(recovering.RATES) * recovering._TRIED_STEPS
        monkeypatch.setattr(Distillation, "loss", loss)
    else:
        monkeypatch.setattr(Distillation, "loss", lambda self, model, feeds: model.head.weight.sum() * math.nan)
    found = recover(student, net(), split(), epochs=4, batch=16)
    assert found.stopped == f"the loss became nan in epoch {2 if good else 1}"
    assert found.best_epoch == good
    assert len(found.history) == good + 1
    assert all(bool(torch.isfinite(value).all()) for value in found.module.state_dict().values())
    assert same(weights(found.module), weights(student)) is not bool(good)
