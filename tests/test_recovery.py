"""Recovery as a user asks for it: ``recover`` and ``recover_data`` of `build` and `factor`."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rowcol_edge
from rowcol_edge import cli, config, recovery
from rowcol_edge.config import BuildOptions
from rowcol_edge.errors import ConfigError, DataError, SplitError
from rowcol_edge.factoring import apply
from rowcol_edge.factoring.distil import Distillation
from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.pipeline import Factored

from .nets import frames, small_net, write_splits

BUDGET = "params<=0.35x"


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return small_net()


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_splits(tmp_path_factory.mktemp("splits"))


def _factor(net: torch.nn.Module, **options: Any) -> Factored:
    return rowcol_edge.factor(net, **{"budget": BUDGET, "cache": False, **options})


def test_the_chosen_plan_is_recovered(net: torch.nn.Module, splits: dict[str, str], tmp_path: Path) -> None:
    plain = _factor(net, calib=splits["calib"], select=splits["select"])
    found = _factor(net, calib=splits["calib"], select=splits["select"], recover=3, out=tmp_path)
    assert found.plan.digest == plain.plan.digest  # the search is the same
    assert found.parameters_after == plain.parameters_after
    record = found.to_dict()["recovered"]
    assert (record["epochs"], record["measure"], record["judged_on"]) == (3, "accuracy", "selection")
    assert record["before"] == pytest.approx(plain.trials[-1].value)
    assert record["after"] >= record["before"]
    stored, before = load_file(tmp_path / "model.safetensors"), plain.module.state_dict()
    assert stored.keys() == before.keys()
    changed = any(not torch.equal(stored[key], before[key]) for key in stored)
    assert changed is (record["best_epoch"] > 0)
    plan = tomllib.loads((tmp_path / "plan.toml").read_text())
    assert (plan["made_by"], plan["recovered"]) == (plain.plan.made_by, 3)
    assert (tmp_path / "model.pt2").is_file()


def test_a_model_with_other_frozen_layers_is_recovered_anew(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWCOL_CACHE", str(tmp_path))
    frozen = copy.deepcopy(net)
    frozen.get_submodule("body").requires_grad_(False)
    options = {"budget": "params<=0.15x", "calib": splits["calib"], "recover": 2}
    whole = _factor(frozen, **options).module.state_dict()
    free, found = (_factor(model, **{**options, "cache": True}).module.state_dict() for model in (net, frozen))
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert not all(torch.equal(free[name], whole[name]) for name in whole)


@pytest.mark.parametrize("budget", ["params<=0.5x", "drop<=30pp"])
def test_a_model_that_was_judged_is_not_made_again(
    net: torch.nn.Module, splits: dict[str, str], budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, made = 0, apply.refit

    def counted(*args: Any, **kwargs: Any) -> torch.nn.Module:
        nonlocal count
        count += 1
        return made(*args, **kwargs)

    monkeypatch.setattr(apply, "refit", counted)
    found = _factor(net, calib=splits["calib"], select=splits["select"], budget=budget)
    assert found.plan.refit
    assert count == len(found.trials) > 0


def test_epochs_are_those_that_were_trained(net: torch.nn.Module, splits: dict[str, str], tmp_path: Path) -> None:
    """Labels of which the model knows nothing: no epoch is better, and training stops after three."""
    x = np.load(splits["select"])["x"]
    np.savez(tmp_path / "select.npz", x=x, labels=np.full(len(x), 1))
    found = _factor(net, calib=splits["calib"], select=str(tmp_path / "select.npz"), recover=9, out=tmp_path / "out")
    assert found.recovery is not None
    record = found.recovery.record
    assert record["stopped"] == "no better model in 3 epochs"
    assert record["epochs"] == len(record["history"]) - 1 == record["best_epoch"] + 3 < 9
    assert found.recovery.note.startswith(f"factored: recovered in {record['epochs']} epochs, ")
    assert found.plan.recovered == record["epochs"]


def test_a_plan_of_a_recovered_model_makes_one_that_is_not(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path
) -> None:
    first = _factor(net, calib=splits["calib"], recover=2, out=tmp_path / "one")
    assert FactorPlan.read(tmp_path / "one" / "plan.toml").recovered == 2
    options = {"calib": splits["calib"], "plan": str(tmp_path / "one" / "plan.toml"), "budget": None}
    plain, again = _factor(net, **options), _factor(net, **options, recover=1)
    assert (plain.plan.recovered, again.plan.recovered) == (0, 1)
    assert plain.plan.made_by == again.plan.made_by == first.plan.made_by


def test_distances_have_digits_that_tell_them_apart() -> None:
    record = {
        "epochs": 8,
        "best_epoch": 8,
        "measure": "distance to the original",
        "before": 6.6e-07,
        "after": 6.1234e-07,
    }
    made = recovery.Recovery(FactorPlan(()), {**record, "judged_on": "selection", "stopped": ""}, {})
    assert "distance to the original 6.6e-07 → 6.123e-07 on the selection split" in made.note


def test_nothing_is_said_of_it_where_it_was_not_asked_for(net: torch.nn.Module, splits: dict[str, str]) -> None:
    found = _factor(net, calib=splits["calib"], recover=0)
    assert found.recovery is None
    assert "recovered" not in found.to_dict()
    assert "recovered" not in found.plan.to_toml().replace("loss, gap and recovered", "")
    assert "recover" not in BuildOptions("m").to_dict()


def test_without_labels_fidelity_decides(net: torch.nn.Module, splits: dict[str, str], tmp_path: Path) -> None:
    more, _ = frames(320, seed=7)
    np.savez(tmp_path / "more.npz", x=more)
    unlabelled, _ = frames(80, seed=8)
    np.savez(tmp_path / "select.npz", x=unlabelled)
    found = _factor(
        net, calib=splits["calib"], select=str(tmp_path / "select.npz"), recover=4, budget="params<=0.1x",
        recover_data=str(tmp_path / "more.npz"),
    )  # fmt: skip
    record = found.to_dict()["recovered"]
    assert (record["measure"], record["judged_on"]) == ("distance to the original", "selection")
    assert record["data"]["samples"] == 320
    assert record["best_epoch"] > 0
    assert record["after"] < record["before"]
    alone = _factor(net, calib=splits["calib"], recover=1).to_dict()["recovered"]
    assert (alone["judged_on"], alone["data"]["samples"]) == ("calibration", 80)


def test_a_bundle_says_that_its_arm_was_recovered(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWCOL_CACHE", str(tmp_path / "cache"))
    options: dict[str, Any] = {"budget": BUDGET, "precision": "fp32", "zip": False, **splits}
    plain = rowcol_edge.build(net, out=tmp_path / "plain", **options)[0]
    built = rowcol_edge.build(net, out=tmp_path / "built", recover=2, **options)[0]
    record = built.manifest.build["recovered"]
    assert "recovered" not in plain.manifest.build
    arm, other = built.manifest.arm("factored@fp32"), plain.manifest.arm("factored@fp32")
    assert arm.plan_digest == other.plan_digest
    # the same plan in the same cache, and yet another file
    changed = (built.path / arm.artifact).read_bytes() != (plain.path / other.artifact).read_bytes()
    assert changed is (record["best_epoch"] > 0)
    assert arm.quality["selection"]["value"] == pytest.approx(record["after"], abs=0.02)
    assert any(note.startswith("factored: recovered in 2 epochs") for note in built.manifest.build["notes"])
    assert tomllib.loads((built.path / "plan.toml").read_text())["recovered"] == 2
    assert rowcol_edge.verify(built.path).ok

    def never(*args: object, **options: object) -> None:
        raise AssertionError("recovered again")

    monkeypatch.setattr(recovery, "recover", never)
    again = rowcol_edge.build(net, out=tmp_path / "built", recover=2, force=True, **options)[0]
    assert again.manifest.build["recovered"] == record
    with pytest.raises(AssertionError, match="recovered again"):
        rowcol_edge.build(net, out=tmp_path / "other", recover=3, **options)


def test_a_model_that_stays_dense_needs_no_recovery(net: torch.nn.Module, splits: dict[str, str]) -> None:
    found = rowcol_edge.factor(net, calib=splits["calib"], budget="params<=1x", recover=2, cache=False)
    assert not found.plan.projected
    assert found.recovery is None


def test_the_command_line_says_before_and_after(
    splits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(small_net().state_dict(), tmp_path / "weights.safetensors")
    nets = Path(__file__).with_name("nets.py").read_text()
    (tmp_path / "mine.py").write_text(nets + "\n\ndef build():\n    return SmallNet()\n")
    command = [
        "factor", f"{tmp_path / 'mine.py'}:build", "--weights", str(tmp_path / "weights.safetensors"),
        "--calib", splits["calib"], "--select", splits["select"], "--budget", BUDGET, "--out", str(tmp_path / "out"),
        "--no-cache",
    ]  # fmt: skip
    assert _run(*command, "--recover", "2") == 0
    printed = capsys.readouterr()
    assert "factored: recovered in 2 epochs" in " ".join(printed.out.split())
    assert "… recover" in printed.err
    assert _run(*command, "--recover", "1", "--recover-data", splits["test"], "--json") == 0
    assert json.loads(capsys.readouterr().out)["recovered"]["data"]["reference"] == splits["test"]
    assert _run(*command, "--recover", "-1") == 2
    assert "options: recover" in capsys.readouterr().err
    assert _run(*command, "--recover-data", splits["test"]) == 2
    assert "recover_data" in capsys.readouterr().err


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run_command(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("value", [-1, True, "3", 1.5])
def test_epochs_that_are_no_number_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="recover: expected a number of epochs from 0"):
        config.make({"model": "m", "recover": value})


def test_data_without_epochs_are_refused() -> None:
    with pytest.raises(ConfigError, match="recover_data: expected epochs of recovery besides"):
        config.make({"model": "m", "recover_data": "more.npz"})


def test_data_of_another_shape_or_of_the_selection_split_are_refused(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path
) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros((40, 1, 8, 8), np.float32))
    with pytest.raises(DataError, match=r"recovery data .*: expected shape \(1, 16, 16\).* got \(1, 8, 8\)"):
        _factor(net, calib=splits["calib"], recover=1, recover_data=str(tmp_path / "other.npz"))
    for name in ("select", "test"):
        with pytest.raises(SplitError, match=r"recovery and .* splits"):
            _factor(net, **splits, recover=1, recover_data=splits[name])
    # what spaces are measured on may be trained on
    assert _factor(net, calib=splits["calib"], recover=1, recover_data=splits["calib"]).recovery is not None


@pytest.mark.parametrize(("rounded", "shown"), [(-1e-9, 0.0), (2.0, 2.0), (float("nan"), float("nan"))])
def test_no_distance_is_below_zero(
    rounded: float, shown: float, net: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [{"x": frames(4, seed=0)[0]}]
    measured = Distillation(net, net, batches, classify=True)
    monkeypatch.setattr(measured, "_outputs", lambda *_: torch.tensor(rounded))
    assert measured.distance(net, batches) == pytest.approx(shown, nan_ok=True)
