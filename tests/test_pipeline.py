from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn.utils import parametrizations

import rowcol_edge
from rowcol_edge import evaluation, job, limits, models, pipeline, search, targets
from rowcol_edge.backends import onnx_files
from rowcol_edge.budgets import Budgets
from rowcol_edge.cache import Cache
from rowcol_edge.config import BuildOptions
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.manifest import GRAPH_CHECKED
from rowcol_edge.errors import (
    BudgetError,
    BundleError,
    ConfigError,
    DataError,
    MissingDependencyError,
    ModelError,
    SplitError,
    StageError,
    TargetError,
)
from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.factoring.study import Study
from rowcol_edge.pipeline import Built
from rowcol_edge.report import terminal

from .nets import Dense, frames, small_net, write_splits


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return small_net()


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="module")
def built(net: torch.nn.Module, splits: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("out")
    return rowcol_edge.build(
        net,
        out=str(out),
        budget="drop<=2pp",
        labels=["plain", "striped"],
        positive="striped",
        metric="balanced_accuracy",
        **splits,
    )[0]


def test_a_bundle_has_the_three_arms_and_verifies(built: Built) -> None:
    assert [arm.name for arm in built.manifest.arms] == ["factored@int8", "dense@int8", "dense@fp32"]
    assert built.manifest.default_arm == "factored@int8"
    assert rowcol_edge.verify(built.path).ok


def test_the_factored_arm_is_smaller_and_within_the_budget(built: Built) -> None:
    factored, dense = built.manifest.arm("factored@int8"), built.manifest.arm("dense@int8")
    assert factored.parameters < dense.parameters
    assert factored.size_bytes < dense.size_bytes < built.manifest.arm("dense@fp32").size_bytes
    assert factored.quality["selection"]["drop_pp"] <= 2.0
    assert factored.threshold is not None
    assert set(factored.quality["test"]) >= {"value", "drop_pp", "ci_low_pp", "ci_high_pp", "flips", "flips_bad"}


def test_files_are_at_the_targets_opset_and_ir(built: Built) -> None:
    for arm in built.manifest.arms:
        model = onnx.load(built.path / arm.artifact)
        assert model.ir_version <= built.manifest.runtime.ir_version
        assert {o.domain: o.version for o in model.opset_import}[""] == built.manifest.runtime.opset


def test_the_report_names_the_error_of_every_stage(built: Built) -> None:
    stages = built.manifest.build["stages"]
    assert [s["stage"] for s in stages["factored@int8"]] == ["factor", "export", "simplify", "compile int8"]
    assert [s["stage"] for s in stages["dense@fp32"]] == ["fold", "export", "simplify", "compile fp32"]
    assert all(s["relative_error"] < 1e-3 for s in stages["dense@fp32"])


def test_dense_fp32_answers_as_pytorch_does(built: Built, net: torch.nn.Module) -> None:
    pictures, _ = frames(6, seed=5)
    with torch.inference_mode():
        wanted = net(torch.from_numpy(pictures)).numpy()
    with rowcol_edge.Predictor(str(built.path), arm="dense@fp32") as predictor:
        got = np.concatenate([next(iter(predictor.run({"x": p[None]}).values())) for p in pictures])
    assert np.allclose(got, wanted, atol=1e-4)


def test_the_same_build_again_is_kept(built: Built, net: torch.nn.Module, splits: dict[str, str]) -> None:
    again = rowcol_edge.build(
        net, out=str(built.path.parent), budget="drop<=2pp", labels=["plain", "striped"], positive="striped",
        metric="balanced_accuracy", **splits,
    )[0]  # fmt: skip
    assert again.reused
    assert again.manifest.created == built.manifest.created


def test_a_damaged_bundle_is_built_anew(
    built: Built, net: torch.nn.Module, splits: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"out": str(tmp_path), "precision": "fp32", "dense": False, "energy": 0.99, **splits}
    first = rowcol_edge.build(net, **options)[0]
    artifact = first.path / first.manifest.arms[0].artifact
    artifact.write_bytes(artifact.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError):
        Bundle.open(first.path)
    second = rowcol_edge.build(net, **options)[0]
    assert not second.reused
    assert rowcol_edge.verify(second.path).ok
    assert [arm.name for arm in second.manifest.arms] == ["factored@fp32"]


def test_an_edited_plan_and_another_forward_are_built_anew(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.toml"
    rowcol_edge.factor(net, out=str(tmp_path), energy=0.9, calib=splits["calib"])
    options: dict[str, Any] = {"out": tmp_path / "o", "precision": "fp32", "dense": False, "plan": plan}
    options["calib"] = splits["calib"]
    first = rowcol_edge.build(net, **options)[0]
    assert rowcol_edge.build(net, **options)[0].reused
    plan.write_text(plan.read_text().replace('form = "project"', 'form = "dense"', 1))
    second = rowcol_edge.build(net, **options)[0]
    assert not second.reused
    assert second.manifest.arms[0].parameters > first.manifest.arms[0].parameters


def test_a_fixed_plan_is_held_to_the_drop(
    net: torch.nn.Module, splits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "drop", lambda job, original, other: 3.0)
    with pytest.raises(BudgetError, match=r"3\.00 pp with this plan"):
        rowcol_edge.factor(net, energy=0.9, budget="drop<=2pp", positive="1", labels=["0", "1"], **splits)


def test_a_size_budget_is_met_by_the_compiled_file(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"precision": "fp32", "dense": False, "calib": splits["calib"]}
    full = rowcol_edge.build(net, out=tmp_path / "full", energy=1.0, **options)[0].manifest.arms[0].size_bytes
    limit = int(0.6 * full / 1000)
    one = rowcol_edge.build(net, out=tmp_path / "small", budget=f"size<={limit}KB", **options)[0]
    assert one.manifest.arms[0].size_bytes <= limit * 1000


@pytest.mark.parametrize("lost", [0.5, 3.0])
def test_beside_a_drop_the_compiled_file_gets_smaller_while_the_drop_holds(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: float
) -> None:
    limit = 4 * rowcol_edge.factor(net, calib=splits["calib"], budget="params<=0.6x").parameters_after
    size = f"size<={limit}B"  # of the weights alone, so that the file is above

    class Two(search.Ladder):
        def __init__(self, known: Study, multiple: int, model: str, kinds: Sequence[str] = ()) -> None:
            found = limits.of_budgets(known, Budgets.parse(size), 4.0)
            self.plans = FactorPlan(()), limits.cheapest(known, found, multiple, model)

        def nearer(self, index: int, progress: object = None) -> FactorPlan:
            return self.plans[index]

    fitted = 0

    def drop(job: object, original: object, other: object) -> float:
        return lost if fitted else 0.0

    def smaller(*args: Any, own: Callable[..., FactorPlan] = search.smaller) -> FactorPlan:
        nonlocal fitted
        fitted += 1
        return own(*args)

    for module, name, new in ((search, "Ladder", Two), (search, "smaller", smaller), (evaluation, "drop", drop)):
        monkeypatch.setattr(module, name, new)

    def build() -> Built:
        return rowcol_edge.build(
            net, out=tmp_path / "out", budget=f"drop<=1pp,{size}", precision="fp32", dense=False,
            positive="1", labels=["0", "1"], **splits,
        )[0]  # fmt: skip

    if lost > 1.0:
        with pytest.raises(BudgetError, match=r"budget size<=.*: factored@fp32 on"):
            build()
        assert not (tmp_path / "out").exists()
    else:
        assert build().manifest.arms[0].size_bytes <= limit
    assert fitted


@pytest.mark.parametrize("word", [rowcol_edge.build, rowcol_edge.factor])
@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"energy": 0.999}, "lower the energy, or leave out --energy to have a plan made for the budget"),
        ({"plan": "{plan}"}, "give the plan smaller ranks, or leave out --plan to have one made for the budget"),
        ({"select": "{select}"}, "allow at least "),  # whatever the drop
    ],
)
def test_a_missed_cost_hints_at_what_was_asked_for(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path, change: dict[str, Any], hint: str,
    word: Callable[..., Any],
) -> None:  # fmt: skip
    plan = tmp_path / "plan.toml"
    FactorPlan(()).write(plan)
    change = {k: v.format(plan=plan, **splits) if isinstance(v, str) else v for k, v in change.items()}
    budget = "params<=0.01x" + (",drop<=0pp" if "select" in change else "")
    with pytest.raises(BudgetError) as raised:
        word(net, calib=splits["calib"], budget=budget, out=tmp_path / "out", dense=False, precision="fp32", **change)
    assert raised.value.hint.startswith(hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("precision", "runtime", "hint"),
    [
        ("fp32", "onnxruntime", "take a lower precision"),
        ("int8", "onnxruntime", "take a lower precision"),
        ("int4-weights", "onnxruntime", ""),
        ("int8", "openvino", ""),
    ],
)
def test_a_lower_precision_is_hinted_at_where_there_is_one(
    net: torch.nn.Module, splits: dict[str, str], precision: str, runtime: str, hint: str
) -> None:
    options = {"calib": splits["calib"], "budget": "size<=99B", "energy": 0.9, "precision": precision}
    with pytest.raises(BudgetError) as raised:
        rowcol_edge.factor(net, runtime=runtime, **options)
    made = "lower the energy, or leave out --energy to have a plan made for the budget"
    assert raised.value.hint == "; or ".join(filter(None, (made, hint)))


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 4.0), ("int8", 1.0)])
def test_a_size_budget_of_factoring_is_met_by_prediction(
    net: torch.nn.Module, splits: dict[str, str], precision: str, bytes_each: float
) -> None:
    dense = sum(parameter.numel() for parameter in net.parameters())
    limit = int(0.6 * dense * bytes_each)
    found = rowcol_edge.factor(net, calib=splits["calib"], budget=f"size<={limit}B", precision=precision)
    assert found.size == (int(found.parameters_after * bytes_each), precision)
    assert 0.5 * limit < found.size[0] <= limit
    said = found.to_dict()
    assert (said["predicted_bytes"], said["precision"]) == found.size


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"energy": 0.9999}, BudgetError, r"budget size<=99B, predicted at int8: expected at most 99 bytes, got \d"),
        ({}, BudgetError, r"budget size<=99B: expected at most 99 parameters"),
        ({"precision": "auto"}, ConfigError, "precision: expected one that bytes can be predicted at, got auto"),
    ],
)
def test_a_size_budget_that_factoring_cannot_hold_is_refused(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path, change: dict[str, Any], error: type[Exception],
    message: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        rowcol_edge.factor(net, calib=splits["calib"], budget="size<=99B", out=tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_the_callers_module_stays_as_it_was(splits: dict[str, str]) -> None:
    module = small_net().train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    rowcol_edge.factor(module, energy=0.9, calib=splits["calib"])
    assert module.training
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_who_calls_may_be_in_inference_mode_and_have_made_the_model_there(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"metric": "balanced_accuracy", "recover": 1, **splits}
    usual = rowcol_edge.factor(net, budget="params<=0.7x", **options)
    with torch.inference_mode():
        made = copy.deepcopy(net)
        assert next(made.parameters()).is_inference()
        found = rowcol_edge.factor(made, budget="params<=0.7x", **options)
        (built,) = rowcol_edge.build(made, budget="params<=0.7x", out=str(tmp_path), **options)
        seen = rowcol_edge.inspect(made, calib=splits["calib"])
        assert torch.is_inference_mode_enabled()
    assert found.plan == usual.plan
    assert {layer.name for layer in seen.layers} >= {layer.name for layer in found.plan.layers}
    assert rowcol_edge.verify(built.path).ok


def test_nothing_is_written_if_one_of_two_targets_misses_its_budget(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = pipeline._check_size

    def second_fails(job: Any, arm: Any, target: Any) -> None:
        if target.name == "raspberry-pi-5":
            raise BudgetError("budget size")
        check(job, arm, target)

    monkeypatch.setattr(pipeline, "_check_size", second_fails)
    with pytest.raises(BudgetError):
        rowcol_edge.build(
            net, target=["generic-x86", "raspberry-pi-5"], out=tmp_path / "o", precision="fp32", energy=0.9,
            calib=splits["calib"],
        )  # fmt: skip
    assert not (tmp_path / "o").exists()


def test_one_logit_is_judged_and_packaged(splits: dict[str, str], tmp_path: Path) -> None:
    class OneLogit(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.net(x)
            return logits[:, 1:] - logits[:, :1]

    one = rowcol_edge.build(
        OneLogit(), out=tmp_path, precision="fp32", dense=False, budget="drop<=5pp", labels=["plain", "striped"],
        positive="striped", **splits,
    )[0]  # fmt: skip
    assert one.manifest.arms[0].quality["test"]["value"] > 0.6
    assert rowcol_edge.verify(one.path).ok


def test_a_plan_can_be_edited_and_applied_again(net: torch.nn.Module, splits: dict[str, str], tmp_path: Path) -> None:
    first = rowcol_edge.factor(net, out=str(tmp_path / "one"), energy=0.95, **splits)
    text = (tmp_path / "one" / "plan.toml").read_text()
    projected = first.plan.projected[0]
    assert projected.rank is not None
    edited = text.replace(f"rank = {projected.rank}\n", "rank = 3\n", 1)
    (tmp_path / "edited.toml").write_text(edited)
    second = rowcol_edge.factor(net, plan=str(tmp_path / "edited.toml"), **splits)
    assert {p.name: p.rank for p in second.plan.projected}[projected.name] == 3
    assert second.parameters_after < first.parameters_after
    assert FactorPlan.read(tmp_path / "one" / "plan.toml").digest == first.plan.digest


def test_a_factored_pt2_is_recognised_and_left_as_it_is(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path
) -> None:
    first = rowcol_edge.factor(net, out=str(tmp_path), energy=0.9, **splits)
    found = rowcol_edge.inspect(str(tmp_path / "model.pt2"), calib=splits["calib"])
    notes = [layer.note for layer in found.layers if "already factored" in layer.note]
    assert len(notes) == 2 * len(first.plan.projected)
    assert found.parameters == first.parameters_after
    built = rowcol_edge.build(
        str(tmp_path / "model.pt2"), out=str(tmp_path / "out"), energy=0.5, precision="fp32", **splits
    )
    notes = [note for note in built[0].manifest.build["notes"] if note.startswith("already factored, left as they are")]
    assert len(notes) == 1
    assert notes[0].count(",") == 2 * len(first.plan.projected)


class _Elsewhere(torch.nn.Module):
    """A matrix used as it is and transposed, a recurrent layer and one that can be factored; (N, 5, 12) → (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.both = torch.nn.Parameter(torch.eye(12, 16))
        self.memory, self.head = torch.nn.GRU(12, 8, batch_first=True), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x @ self.both) @ self.both.T
        logits: torch.Tensor = self.head(self.memory(x)[0][:, -1])
        return logits


def test_inspect_names_the_matrices_that_no_layer_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(32, 5, 12)).astype(np.float32))
    found = rowcol_edge.inspect(_Elsewhere(), calib=str(tmp_path / "x.npz"))
    assert [layer.name for layer in found.layers] == ["head"]
    assert [(each.name, each.kind, each.parameters) for each in found.elsewhere] == [
        ("both", "_Elsewhere", 192), ("memory.weight_ih_l0", "GRU", 288), ("memory.weight_hh_l0", "GRU", 192),
    ]  # fmt: skip
    terminal.inspection(found)
    said = " ".join(capsys.readouterr().out.split())
    assert "left alone: memory.weight_ih_l0, memory.weight_hh_l0: 480 parameters of a GRU" in said


class _Twins(torch.nn.Module):
    """Two halves of a picture through one encoder, the second one's answer multiplied with a layer's of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.own, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8), torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x[:, :6], x[:, 6:]
        both = torch.cat([torch.relu(self.encoder(first)), torch.relu(self.encoder(second)) + self.own(second)], 1)
        logits: torch.Tensor = self.head(both)
        return logits


def test_inspect_says_of_a_layer_that_is_called_twice_once_why_its_channels_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(32, 12)).astype(np.float32))
    found = rowcol_edge.inspect(_Twins().eval(), calib=str(tmp_path / "x.npz"))
    encoder = [each for each in found.channels if each.name == "encoder"]
    assert [(each.fixed, set(each.layers)) for each in encoder] == [
        ("given by encoder: shared: called 2 times", {"encoder", "own", "head"})
    ]
    terminal.inspection(found)
    assert capsys.readouterr().out.count("not narrowed: channels of encoder:") == 1


class _Louder(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


class _Fixed(torch.nn.Module):
    """Layers that cannot be factored, each for a reason of its own; (N, 3, 8, 8) → (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.deep = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=8)
        self.grouped, self.shared = torch.nn.Conv2d(8, 8, 1, groups=2), torch.nn.Conv2d(8, 8, 1)
        self.one, self.two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.normed = parametrizations.weight_norm(torch.nn.Linear(8, 8))
        self.own, self.spare, self.head = _Louder(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(torch.relu(self.deep(torch.relu(self.first(x)))))
        x = self.shared(torch.relu(self.shared(x))).mean((2, 3))
        logits: torch.Tensor = self.head(self.own(self.normed(torch.relu(self.two(torch.relu(self.one(x)))))))
        return logits


def test_inspect_measures_layers_that_cannot_be_factored_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    model = _Fixed().eval()
    with torch.inference_mode():
        found = rowcol_edge.inspect(model, calib=str(tmp_path / "x.npz"), plot=tmp_path / "x.html")
    layers = {layer.name: layer for layer in found.layers}
    fixed = {name: layer.fixed for name, layer in layers.items() if layer.fixed}
    assert set(fixed) == {"deep", "grouped", "shared", "one", "two", "normed", "own", "spare"}
    assert {name for name, layer in layers.items() if layer.rows is None} == {"own", "spare"}
    assert {name for name, layer in layers.items() if not layer.row_curve} == {"own", "spare"}
    assert (layers["deep"].rows, layers["shared"].rows, layers["one"].rows) == (64 * 16, 2 * 64 * 16, 64)
    given = []
    with torch.no_grad(), model.deep.register_forward_hook(lambda layer, taken, result: given.append(result)):
        model(torch.from_numpy(x))
    values = np.linalg.eigvalsh(np.cov(given[0].transpose(0, 1).flatten(1).double().numpy()))[::-1]
    shares = values.cumsum() / values.sum()
    assert layers["deep"].column_curve == tuple((i + 1, pytest.approx(share)) for i, share in enumerate(shares))
    assert (tmp_path / "x.html").read_text(encoding="utf-8").count("<svg") == len(layers) - 2
    terminal.inspection(found)
    lines = capsys.readouterr().out.splitlines()
    assert {name for name in fixed if f"left alone: {name}: {fixed[name]}" in lines} == set(fixed)
    [row] = [line.split() for line in lines if line.split()[:1] == ["deep"]]
    assert [bars for bars in row if set(bars) <= set("▁▂▃▄▅▆▇█")] == row[-3:-1]


def test_cost_budgets_choose_without_labels(net: torch.nn.Module, splits: dict[str, str]) -> None:
    found = rowcol_edge.factor(net, calib=splits["calib"], budget="params<=0.5x")
    assert found.parameters_after <= 0.5 * found.parameters_before


def test_a_module_that_was_handed_over_leaves_no_file_that_claims_to_repeat_it(built: Built) -> None:
    assert not (built.path.parent / "rowcol.toml").exists()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"target": "raspbery-pi-4"}, TargetError),
        ({"runtime": "onxruntime"}, TargetError),
        ({"precision": "int4"}, ConfigError),
        ({"metric": "acuracy"}, ConfigError),
        ({"metric": "iou"}, ConfigError),
        ({"budget": "drop<0.5"}, ConfigError),
        ({"budget": "params<=0x"}, ConfigError),
        ({"budget": "macs<=0x"}, ConfigError),
        ({"budget": "size<=1KB"}, BudgetError),
        ({"budget": "drop<=2pp,params<=0.001x"}, BudgetError),
        ({"calib": None}, DataError),
        ({"calib": "nowhere.npz"}, DataError),
        ({"positive": "missing"}, ConfigError),
        ({"labels": ["a", "b", "c"], "positive": None}, ConfigError),
        ({"labels": ["a", "b", "c"], "select": None, "test": None, "positive": None}, ConfigError),
        ({"select": None}, DataError),
        ({"contract": "segment", "select": None, "test": None}, ConfigError),
        ({"colour": "red"}, ConfigError),
        ({"runtime": "tflite", "dynamic_batch": True}, ConfigError),
        ({"accuracy_control": True}, ConfigError),
    ],
)
def test_bad_input_writes_nothing(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path, change: dict[str, Any], error: type[Exception]
) -> None:
    options = {"out": str(tmp_path / "out"), "labels": ["plain", "striped"], "positive": "striped", **splits, **change}
    with pytest.raises(error):
        rowcol_edge.build(net, **options)
    assert not (tmp_path / "out").exists()


class Flat(torch.nn.Module):
    """No layer and no parameter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


@pytest.mark.parametrize("budget", [None, "drop<=1pp", "params<=0.5x", "macs<=0.5x"])
@pytest.mark.parametrize("word", [rowcol_edge.build, rowcol_edge.factor])
def test_a_model_with_nothing_to_factor_is_refused(
    splits: dict[str, str], tmp_path: Path, budget: str | None, word: Callable[..., Any]
) -> None:
    options = {"calib": splits["calib"], "select": splits["select"], "budget": budget}
    with pytest.raises(ModelError, match="expected layers that can be factored, got no parameters at all"):
        word(Flat(), out=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime": "onnxruntime"}, "accuracy-control: expected runtime openvino, got onnxruntime"),
        ({"runtime": "tflite"}, "accuracy-control: expected runtime openvino, got tflite"),
        ({"precision": "fp16"}, "accuracy-control: expected precision int8 or auto, got fp16"),
        ({"select": None, "test": None, "budget": None}, "accuracy-control: expected labelled selection data"),
        (
            {"metric": "statistics:mean"},
            "expected a built-in metric, got statistics:mean – it runs in",
        ),
        ({"budget": "size<=4MB"}, "expected a budget for the drop, got .* – add drop<=0.5pp"),
        ({"energy": 0.9, "budget": None}, "expected a budget for the drop, got none – add drop<=0.5pp"),
    ],
)
def test_accuracy_control_is_refused_where_it_cannot_judge(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    options = {"runtime": "openvino", "accuracy_control": True, "budget": "drop<=2pp", **splits, **change}
    with pytest.raises(ConfigError, match=message):
        rowcol_edge.build(net, out=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_free_batch_that_the_runtime_cannot_have_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.models, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=r"dynamic-batch with tflite: expected a fixed batch.* got a free one"):
        rowcol_edge.build(
            "sample:fmnist-vit", target="raspberry-pi-5", runtime="tflite", dynamic_batch=True, out=str(tmp_path / "o")
        )


@pytest.mark.parametrize("device", ["NPU", "NPU.0"])
def test_a_free_batch_for_a_device_that_cannot_have_it_is_refused_before_any_work(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nuc = targets.load("intel-nuc")
    board = replace(nuc, name="board", runtimes=(replace(nuc.runtime("openvino"), providers=(device,)),))
    monkeypatch.setattr(targets, "load", lambda name: board)
    monkeypatch.setattr(job.models, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="dynamic-batch with openvino on the NPU of board: expected a fixed batch"):
        rowcol_edge.build(
            "sample:fmnist-vit", target="board", runtime="openvino", dynamic_batch=True, out=str(tmp_path / "o")
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"opset": 24}, "opset of target board with onnxruntime: expected 17 to 21, got 24"),
        ({"opset": 12}, "opset of target board with onnxruntime: expected 17 to 21, got 12"),
        ({"opset": 21, "ir_version": 9}, r"opset of .*: expected at most 20, which 1\.17\.0 reads, got 21 – lower it"),
        ({"ir_version": 14}, r"ir_version of .*: expected at most 9, which 1\.17\.0 reads, got 14 – lower it"),
        ({"ir_version": 11, "oldest": "1.22.1"}, r"expected at most 10, which 1\.22\.1 reads, got 11"),
        (
            {"name": "tensorrt", "oldest": "10.3.0", "opset": 21},
            r"opset of target board with tensorrt: expected at most 20, which 10\.3\.0 reads, got 21",
        ),
    ],
)
def test_what_the_oldest_runtime_does_not_read_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    pi = targets.load("raspberry-pi-5")
    board = replace(pi, name="board", runtimes=(replace(pi.runtime("onnxruntime"), **change),))
    monkeypatch.setattr(targets, "load", lambda name: board)
    monkeypatch.setattr(job.models, "load", lambda *_: pytest.fail("the model was loaded"))
    runtime = change.get("name", "onnxruntime")
    with pytest.raises(TargetError, match=message):
        rowcol_edge.build("sample:fmnist-vit", target="board", runtime=runtime, out=str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_an_original_too_large_for_its_file_is_refused_before_it_is_factored(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "LIMIT_BYTES", 1000)
    monkeypatch.setattr(pipeline, "study", lambda *_, **__: pytest.fail("the model was studied"))
    with pytest.raises(StageError, match=r"at most 1,000 bytes of weights.* – package its factored arm alone"):
        rowcol_edge.build(net, out=str(tmp_path / "o"), **splits)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", targets.available())
def test_the_targets_promise_runtimes_that_read_their_files(name: str) -> None:
    target = targets.load(name)
    for runtime in target.runtimes:
        job._check_onnx(target, BuildOptions("m", runtime=runtime.name))


def test_overlapping_splits_are_refused(net: torch.nn.Module, splits: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SplitError, match="80 shared"):
        rowcol_edge.build(net, out=str(tmp_path / "out"), **{**splits, "test": splits["select"]})


def test_an_input_of_another_shape_is_refused(net: torch.nn.Module, splits: dict[str, str], tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", x=np.zeros((4, 3, 16, 16), np.float32))
    with pytest.raises(rowcol_edge.RowcolError, match="x"):
        rowcol_edge.build(net, out=str(tmp_path / "out"), calib=str(tmp_path / "wide.npz"))
    with pytest.raises(DataError, match=r"test data .*input x"):
        rowcol_edge.build(net, out=str(tmp_path / "out"), **{**splits, "test": str(tmp_path / "wide.npz")})
    assert not (tmp_path / "out").exists()


def test_samples_that_the_preprocess_does_not_make_are_refused(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"calibration data .*samples of shape \(1, 8, 8\), which the preprocess makes"):
        rowcol_edge.build(net, out=str(tmp_path / "out"), preprocess="mode=L,size=8x8", **splits)
    assert not (tmp_path / "out").exists()


class TwoInputs(torch.nn.Module):
    """A picture and a scale, as a multi-sensor model takes them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.picture = torch.nn.Linear(64, 96)
        self.middle = torch.nn.Linear(96, 96)
        self.head = torch.nn.Linear(96, 3)

    def forward(self, pixels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.middle(torch.relu(self.picture(pixels)) * scale)))


def test_a_model_with_two_inputs_and_a_free_batch(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(
        "import numpy as np\n"
        "def batches():\n"
        "    rng = np.random.default_rng(0)\n"
        "    basis = rng.normal(size=(6, 64))\n"
        "    for _ in range(4):\n"
        "        yield {'scale': np.ones((16, 1), np.float32),\n"
        "               'pixels': (rng.normal(size=(16, 6)) @ basis).astype(np.float32)}\n"
    )
    one = rowcol_edge.build(
        TwoInputs(), calib=f"{tmp_path / 'data.py'}:batches", contract="embed", precision="fp32", dynamic_batch=True,
        out=str(tmp_path / "out"),
    )[0]  # fmt: skip
    assert [(spec.name, spec.shape) for spec in one.manifest.inputs] == [("pixels", (None, 64)), ("scale", (None, 1))]
    assert one.manifest.arm("factored@fp32").parameters < one.manifest.arm("dense@fp32").parameters
    with rowcol_edge.Predictor(str(one.path)) as predictor:
        feeds = {"pixels": np.ones((5, 64), np.float32), "scale": np.ones((5, 1), np.float32)}
        assert predictor.run(feeds)["output"].shape == (5, 3)


class _Optional(torch.nn.Module):
    """As transformers' models are called: every argument has a default, and there are more than are used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(20, 16)
        self.body, self.head = torch.nn.Linear(16, 32), torch.nn.Linear(32, 3)

    def forward(self, ids=None, mask=None, embeds=None, *, labels=None, **others):  # type: ignore[no-untyped-def]
        x = self.words(ids) if embeds is None else embeds
        x = torch.relu(self.body(x)) * (1.0 if mask is None else mask.unsqueeze(-1))
        return {"logits": self.head(x.mean(1))}


@pytest.mark.parametrize("names", [("ids",), ("ids", "mask")])
def test_inputs_with_defaults_are_those_that_the_data_name(names: tuple[str, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"mask": rng.integers(0, 2, (64, 6)).astype(np.float32), "ids": rng.integers(0, 20, (64, 6))}
    np.savez(tmp_path / "calib.npz", **{name: arrays[name] for name in names}, labels=rng.integers(0, 3, 64))
    model, calib = _Optional().eval(), str(tmp_path / "calib.npz")
    assert len(rowcol_edge.inspect(model, calib=calib).layers) == 2
    built = rowcol_edge.build(
        model, calib=calib, budget="params<=0.8x", precision="fp32", out=tmp_path / "dist", zip=False
    )[0]
    given = {name: arrays[name][:1] for name in names}
    assert tuple(spec.name for spec in built.manifest.inputs) == names
    with rowcol_edge.Predictor(str(built.path), arm="dense@fp32") as predictor:
        got = predictor.run(given)
    with torch.no_grad():
        wanted = model(**{name: torch.from_numpy(array) for name, array in given.items()})["logits"].numpy()
    np.testing.assert_allclose(got["logits"], wanted, atol=1e-5)


def test_a_bundle_for_a_runtime_that_only_its_board_has_says_that_it_never_ran(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"target": "jetson-orin-nano", "runtime": "tensorrt", "precision": "int8", "energy": 0.99}
    options["preprocess"] = "mode=L,size=16x16,mean=0.5,std=0.25"
    built = rowcol_edge.build(net, out=str(tmp_path), **options, **splits)[0]
    assert {arm.checked for arm in built.manifest.arms} == {GRAPH_CHECKED}
    assert "graph-checked, not run" in (built.path / "README.md").read_text(encoding="utf-8")
    with Bundle.open(built.path) as bundle:
        assert "recipes/gstreamer/camera.py" in {entry.path for entry in bundle.manifest.files}
    with pytest.raises(MissingDependencyError, match="python3-libnvinfer"):
        rowcol_edge.verify(built.path)


def test_precision_auto_says_what_it_measured(net: torch.nn.Module, splits: dict[str, str], tmp_path: Path) -> None:
    one = rowcol_edge.build(net, out=str(tmp_path), precision="auto", dense=False, budget="drop<=50pp", **splits)[0]
    record = one.manifest.build["precision"]
    assert record["chosen"] == one.manifest.arms[0].precision
    assert record["evidence"] == "target"
    tried = {candidate["precision"]: candidate for candidate in record["candidates"]}
    assert set(tried) == set(targets.load("generic-x86").runtime("onnxruntime").precisions)
    assert tried[record["chosen"]]["latency_ns"] > 0
    assert all("convolutions" in tried[name]["left_out"] for name in ("int8-dynamic", "int8-weights", "int4-weights"))


def test_a_precision_that_the_model_cannot_have_is_refused_before_a_plan_is_searched(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path
) -> None:
    """The search is what takes long; the refused target comes second."""
    said: list[str] = []
    options = BuildOptions(
        model="", out=str(tmp_path / "out"), target=("generic-x86", "raspberry-pi-4"), precision="int8-dynamic",
        budget="drop<=1pp", **splits,
    )  # fmt: skip
    with pytest.raises(StageError, match="convolutions"):
        pipeline.build(options, models.load(net), cache=Cache(None), progress=lambda label, *_: said.append(label))
    assert "compile dense@int8-dynamic" in said
    assert "search ranks" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("precision", "oldest"), [("int8-weights", "1.23.0"), ("int4-weights", "1.17.0")])
def test_a_bundle_promises_no_older_runtime_than_its_precision_runs_on(
    splits: dict[str, str], tmp_path: Path, precision: str, oldest: str
) -> None:
    [built] = rowcol_edge.build(
        Dense().eval(), target="generic-x86", precision=precision, labels=["plain", "striped"], energy=0.98, zip=False,
        out=str(tmp_path / "out"), **splits,
    )  # fmt: skip
    assert built.manifest.runtime.oldest == oldest
    assert (f'"onnxruntime>={oldest}"' in built.manifest.runtime.install) == (oldest != "1.17.0")
    assert built.manifest.arm(f"dense@{precision}").size_bytes < 0.5 * built.manifest.arm("dense@fp32").size_bytes
    assert rowcol_edge.verify(built.path).ok


def test_one_layer_that_int8_hurts_is_built_all_the_same(tmp_path: Path) -> None:
    """There is no other layer that could stay in int8 while it stays in float."""
    torch.manual_seed(0)
    images = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    images[:, 0] *= 200.0
    layer = torch.nn.Linear(16, 4)
    with torch.no_grad():
        layer.weight[:, 0] /= 200.0
    np.savez(tmp_path / "calib.npz", x=images)
    [built] = rowcol_edge.build(
        layer.eval(), calib=str(tmp_path / "calib.npz"), target="generic-x86", precision="int8", energy=1.0, zip=False,
        out=str(tmp_path / "out"),
    )  # fmt: skip
    assert [arm.name for arm in built.manifest.arms] == ["factored@int8", "dense@int8", "dense@fp32"]
    notes = built.manifest.build["notes"]
    assert any(note.startswith("dense@int8: ") and "few layers in float do not help" in note for note in notes), notes


class Bright(torch.nn.Module):
    """(N, 1, 12, 12) → a logit for "bright" at each pixel, after a step down and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.direct = torch.nn.Conv2d(1, 1, 1)
        self.down = torch.nn.Conv2d(1, 8, 2, stride=2)
        self.up = torch.nn.ConvTranspose2d(8, 1, 2, stride=2)
        torch.nn.init.constant_(self.direct.weight, 4.0)
        torch.nn.init.constant_(self.direct.bias, -2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.direct(x) + 0.01 * self.up(torch.relu(self.down(x)))


def bright_splits(folder: Path) -> dict[str, str]:
    rng, paths = np.random.default_rng(0), {}
    for name, count in (("calib", 24), ("select", 16), ("test", 16)):
        x = rng.random((count, 1, 12, 12)).astype(np.float32)
        paths[name] = str(folder / f"{name}.npz")
        np.savez(paths[name], x=x, labels=(x[:, 0] + rng.normal(0, 0.1, x[:, 0].shape) > 0.5).astype(np.int64))
    return paths


def test_a_segmenter_is_judged_by_its_masks_and_says_so_on_the_board(tmp_path: Path) -> None:
    torch.manual_seed(0)
    splits = bright_splits(tmp_path)
    asked: dict[str, Any] = {"labels": ["dark", "bright"], "positive": "bright", **splits}
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 2))
    with pytest.raises(DataError, match="one per sample"):
        rowcol_edge.build(classifier, out=str(tmp_path / "wrong"), metric="accuracy", **asked)
    made = rowcol_edge.build(
        Bright(), out=str(tmp_path / "out"), contract="segment", metric="iou", budget="drop<=2pp", **asked
    )[0]
    arm = made.manifest.arm("factored@int8")
    assert made.manifest.metric == "iou"
    assert 0.7 < arm.quality["test"]["value"] <= 1.0
    assert arm.quality["test"]["ci_low_pp"] <= arm.quality["test"]["drop_pp"] <= arm.quality["test"]["ci_high_pp"]
    assert "flips" not in arm.quality["test"]
    with rowcol_edge.Predictor(str(made.path)) as predictor, np.load(splits["test"]) as test:
        found = np.stack([predictor.predict(x).map for x in test["x"]])
        truth = test["labels"].astype(bool)
    assert arm.quality["test"]["value"] == pytest.approx((found & truth).sum() / (found | truth).sum(), abs=0.01)
