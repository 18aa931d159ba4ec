from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rowcol_edge import cli, models, samples, targets
from rowcol_edge.config import DEFAULT_BUDGET, BuildOptions
from rowcol_edge.device.profile import Profile
from rowcol_edge.errors import BudgetError, MeasurementError
from rowcol_edge.export.parity import torch_run

from .nets import small_net, write_splits
from .profiles import make_bundle, make_manifest


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run_command(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user's own folder: factory, weights, three splits."""
    folder = tmp_path_factory.mktemp("user")
    save_file(small_net().state_dict(), folder / "weights.safetensors")
    nets = Path(__file__).with_name("nets.py").read_text()
    (folder / "mine.py").write_text(nets + "\n\ndef build():\n    return SmallNet()\n")
    return {
        "model": f"{folder / 'mine.py'}:build",
        "weights": str(folder / "weights.safetensors"),
        **write_splits(folder),
    }


@pytest.fixture(scope="module")
def bundle(model: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    code = run(
        "build", model["model"], "--weights", model["weights"], "--calib", model["calib"], "--select", model["select"],
        "--test", model["test"], "--labels", "plain,striped", "--positive", "striped", "--budget", "drop<=2pp",
        "--out", str(out),
    )  # fmt: skip
    assert code == 0
    return out / "generic-x86-onnxruntime"


def test_help_says_what_holds_where_an_option_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    options = BuildOptions("model")
    for value in (*options.target, options.out, options.runtime, options.precision, options.calib_size, DEFAULT_BUDGET):
        assert f"default: {value}" in said


def test_targets_lists_boards_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("targets", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [t["name"] for t in found["targets"]] == list(targets.available())
    assert found["samples"] == list(samples.available())
    assert {"elpv-resnet18", "fmnist-vit", "halvit-tiny", "minilm"} <= set(found["samples"])
    assert run("targets") == 0
    assert "raspberry-pi-5" in capsys.readouterr().out


def test_targets_shows_one_board_and_what_it_installs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("targets", "jetson-orin-nano") == 0
    shown = capsys.readouterr().out
    for spec in targets.load("jetson-orin-nano").runtimes:
        assert all(f"    {line}\n" in shown for line in targets.install_lines(spec).splitlines())
        assert f"precisions: {', '.join(spec.precisions)} (graph-checked, not run)\n" in shown
    assert run("targets", "imx8m-plus") == 0
    shown = capsys.readouterr().out
    assert "precisions: fp32, int8-io (graph-checked, not run)\n" in shown
    assert f"precisions: {', '.join(targets.load('imx8m-plus').runtimes[1].precisions)}\n" in shown
    assert run("targets", "jetson-orin-nano", "--json") == 0
    assert json.loads(capsys.readouterr().out) == targets.load("jetson-orin-nano").to_dict()
    assert run("targets", "jetson-orin-nanno") == 2
    assert "did you mean jetson-orin-nano" in capsys.readouterr().err


def test_inspect_shows_every_layer(model: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", model["model"], "--weights", model["weights"], "--calib", model["calib"]]
    assert run(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in found["layers"]] == ["stem", "body", "more", "head"]
    body = found["layers"][1]
    assert 1 <= body["row_rank_99"] <= 16
    assert 1 <= body["column_rank_99"] <= body["column_rank_999"] <= 64
    assert run(*arguments) == 0
    assert "column" in capsys.readouterr().out


SIGNAL = """
import torch
from torch import nn


class Signal(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.norm = nn.Conv1d(2, 48, 5, stride=2, padding=2), nn.BatchNorm1d(48)
        self.middle = nn.Conv1d(48, 48, 3, padding=1)
        self.up = nn.ConvTranspose1d(48, 32, 4, stride=2, padding=1)
        self.end = nn.Conv1d(32, 2, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.middle(torch.relu(self.norm(self.down(x)))))
        return self.end(torch.relu(self.up(x)))


def build():
    return Signal()
"""


def test_signals_are_inspected_drawn_and_factored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "signal_net.py").write_text(SIGNAL)
    time = np.arange(32) * np.linspace(0.1, 1.0, 40)[:, None]
    np.savez(tmp_path / "calib.npz", x=np.stack([np.sin(time), np.cos(3 * time)], 1).astype(np.float32))
    common = [f"{tmp_path / 'signal_net.py'}:build", "--calib", str(tmp_path / "calib.npz")]
    plot = tmp_path / "spectra.html"
    assert run("inspect", *common, "--plot", str(plot), "--json") == 0
    layers = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert [layer["kind"] for layer in layers.values()] == ["conv1d", "conv1d", "convtranspose1d", "conv1d"]
    up = layers["up"]
    assert (up["shape"], up["macs"]) == ("32×48 4", 32 * 48 * 4 * 16)
    assert 1 <= up["row_rank_99"] <= up["row_rank_999"] <= 48
    for curve, size in ((up["row_curve"], 48), (up["column_curve"], 32)):
        assert curve[-1] == [size, pytest.approx(1.0)]
        assert curve == sorted(curve)
    assert plot.read_text(encoding="utf-8").count("<svg") == sum(1 for x in layers.values() if x["rows"])
    assert run("inspect", *common, "--plot", str(tmp_path / "spectra.png")) == 2
    assert "ends in .html" in capsys.readouterr().err
    out = tmp_path / "out"
    assert run("factor", *common, "--energy", "0.6", "--out", str(out), "--json") == 0
    forms = {layer["name"]: layer["form"] for layer in json.loads(capsys.readouterr().out)["plan"]}
    assert forms["up"] == forms["middle"] == "project"
    assert run("inspect", str(out / "model.pt2"), *common[1:], "--json") == 0
    kinds = {layer["name"]: layer["kind"] for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert (kinds["up.reduce"], kinds["up.expand"]) == ("convtranspose1d", "conv1d")


def test_too_few_data_to_fill_the_spaces_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wide.py").write_text(
        "import torch\n\n\ndef wide():\n    return torch.nn.Sequential(torch.nn.Linear(40, 30))\n"
    )
    for taken, said in ((12, True), (64, False)):
        inputs = np.random.default_rng(0).normal(size=(taken, 40)).astype(np.float32)
        np.savez(tmp_path / f"{taken}.npz", x=inputs)
        assert run("inspect", f"{tmp_path / 'wide.py'}:wide", "--calib", str(tmp_path / f"{taken}.npz")) == 0
        assert (f"{taken} rows cannot fill" in " ".join(capsys.readouterr().out.split())) is said


def test_one_calibration_sample_is_warned_of_wherever_the_plan_is(
    model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(model["calib"]) as arrays:
        np.savez(tmp_path / "one.npz", x=arrays["x"][:1])
    common = [model["model"], "--weights", model["weights"], "--budget", "params<=0.5x", "--calib"]
    for calib, warned in ((str(tmp_path / "one.npz"), True), (model["calib"], False)):
        out = tmp_path / f"out {warned}"
        assert run("factor", *common, calib, "--out", str(out)) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("warning: too few calibration data: fewer than 4 samples" in said) is warned
        assert ('note = "too few calibration data' in (out / "plan.toml").read_text()) is warned
        assert run("build", *common, calib, "--no-dense", "--out", str(out)) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("note: factored: too few calibration data: fewer than 4 samples" in said) is warned
        bundle = out / "generic-x86-onnxruntime"
        notes = json.loads((bundle / "manifest.json").read_text())["build"]["notes"]
        assert any("too few calibration data" in note for note in notes) is warned
        assert ('note = "too few calibration data' in (bundle / "plan.toml").read_text()) is warned
        assert run("factor", *common[:3], "--plan", str(bundle / "plan.toml"), "--calib", calib, "--json") == 0
        assert bool(json.loads(capsys.readouterr().out)["note"]) is warned


def test_factoring_says_that_a_size_is_predicted(
    model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        "factor",
        model["model"],
        "--weights",
        model["weights"],
        "--calib",
        model["calib"],
        "--out",
        str(tmp_path),
    ]
    for precision, budget in (("int8", "size<=30KB"), ("fp32", "size<=120KB")):
        assert run(*common, "--budget", budget, "--precision", precision) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert re.search(rf"predicted [0-9.]+ MB of weights at {precision}; build judges the real file", said)
    assert run(*common, "--budget", "params<=0.5x") == 0
    assert "build judges" not in capsys.readouterr().out


REGRESSION = """
import torch
from torch import nn


class Loads(nn.Module):
    \"\"\"Four outputs that have most of what they say in common, which no softmax would show.\"\"\"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        self.last.weight.data = 0.05 * self.last.weight.data + 0.3 * torch.randn(1, 64)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def build():
    return Loads()
"""


def test_outputs_are_scores_of_classes_only_where_nothing_else_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loads.py").write_text(REGRESSION)
    inputs = np.random.default_rng(0).normal(size=(256, 16)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=inputs)
    errors, half = [], "of half the outputs' squared relative error about their mean"
    for contract, taken, unit in (("classify", True, "nats"), ("embed", False, half)):
        out, said = tmp_path / contract, [] if taken else ["--contract", "embed"]
        asked = [f"{tmp_path / 'loads.py'}:build", "--calib", str(tmp_path / "calib.npz"), "--budget", "params<=0.5x"]
        assert run("factor", *asked, *said, "--out", str(out)) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert ("taken for scores of classes; where they are none, say what they mean: --contract" in shown) is taken
        assert re.search(rf"predicted loss [0-9.e-]+ {unit}", shown)
        assert re.search(
            r"second pass (not )?kept.* [0-9.e-]+ → [0-9.e-]+ on inputs that no layer was fitted to", shown
        )
        assert run("factor", *asked, "--contract", contract, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["contract"], found["note"]) == (contract, None)
        assert found["second_pass"] in shown
        wanted, got = (
            next(iter(torch_run(models.load(model).module)({"x": inputs}).values()))
            for model in (asked[0], str(out / "model.pt2"))
        )
        errors.append(np.linalg.norm(got - wanted) / np.linalg.norm(wanted - wanted.mean(0)))
    assert errors[1] < 0.8 * errors[0]


def test_what_the_user_named_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("import torch\n\n\ndef two():\n    return torch.nn.Linear(4, 4)\n")
    np.savez(tmp_path / "[red]calib.npz", x=np.ones((2, 4), np.float32), labels=np.array([0, 1]))
    assert run("inspect", f"{tmp_path / 'mine.py'}:two", "--calib", str(tmp_path / "[red]calib.npz")) == 0
    assert "mine.py:two:20parameters" in "".join(capsys.readouterr().out.split())
    data = [
        "data",
        f"{tmp_path / 'mine.py'}:two",
        "--calib",
        str(tmp_path / "[red]calib.npz"),
        "--labels",
        "[red],:two:",
    ]
    assert run(*data) == 0
    assert "[red] 1, :two: 1" in capsys.readouterr().out


def test_factor_writes_three_files(model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "f"
    assert run(
        "factor", model["model"], "--weights", model["weights"], "--calib", model["calib"], "--energy", "0.95",
        "--out", str(out), "--json",
    ) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["parameters_after"] < found["parameters_before"]
    assert sorted(p.name for p in out.iterdir()) == ["model.pt2", "model.safetensors", "plan.toml"]


def test_build_verify_run_and_compare(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", str(bundle), "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert run("verify", str(bundle)) == 0
    assert "ok     factored@int8" in capsys.readouterr().out
    np.save(tmp_path / "frame.npy", np.zeros((1, 16, 16), np.float32))
    assert run("run", str(bundle), str(tmp_path / "frame.npy"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["prediction"]["label"] in ("plain", "striped")
    assert run("compare", str(bundle), "--markdown") == 0
    assert "factored@int8" in capsys.readouterr().out


def test_profile_is_kept_with_the_bundle_and_compared(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", str(bundle), "--blocks", "6", "--seconds", "10", "--json") == 0
    captured = capsys.readouterr()
    measured = json.loads(captured.out)
    assert set(measured["arms"]) >= {"factored@int8", "dense@int8", "dense@fp32"}
    assert list((bundle / "profiles").glob("*.json"))
    assert run("compare", str(bundle), "--json") == 0
    rows = json.loads(capsys.readouterr().out)["arms"]
    assert len(rows) == 3
    assert all(row["latency_ns"] > 0 for row in rows)


def test_arms_are_read_as_on_the_board(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def profile(*given: Any, arms: Any, **named: Any) -> None:
        asked.append(arms)
        raise MeasurementError("asked")

    monkeypatch.setattr("rowcol_edge.api.profile_to", profile)
    for arms in (("--arms", " a@int8, b@fp32,"), (), ("--arms", "")):
        assert run("profile", str(tmp_path), *arms) == 2
    assert asked == [("a@int8", "b@fp32"), None]
    assert "error: arms\n  expected: at least one arm\n  got:      ''" in capsys.readouterr().err


@pytest.mark.parametrize("where", [(), ("--on", "ssh://127.0.0.1:1")])
def test_a_time_that_does_not_end_is_refused_before_anything_is_measured(
    where: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*given: Any, **named: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("rowcol_edge.device.measure.run_session", measured)
    monkeypatch.setattr("rowcol_edge.fleet.remote.profile", measured)
    make_bundle(tmp_path / "b", make_manifest())
    assert run("profile", str(tmp_path / "b"), "--seconds", "inf", *where) == 2
    assert "a time > 0 that ends\n  got:      inf" in capsys.readouterr().err
    assert not list((tmp_path / "b" / "profiles").iterdir())


def test_too_much_memory_for_the_target_is_exit_code_1(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def over(profile: Profile) -> None:
        raise BudgetError("memory on generic-x86")

    monkeypatch.setattr(Profile, "raise_if_over_budget", over)
    out = bundle.with_name("over.json")
    flags = ("--arms", "factored@int8", "--blocks", "6", "--seconds", "5", "--out", str(out))
    assert run("profile", str(bundle), *flags) == 1
    captured = capsys.readouterr()
    assert "memory budget 2048 MiB: factored@int8 within" in captured.out
    assert "memory on generic-x86" in captured.err
    assert list(Profile.load(out).arms) == ["factored@int8"]


def test_a_bundle_without_dense_arms_is_not_comparable(
    model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(
        "build", model["model"], "--weights", model["weights"], "--calib", model["calib"], "--energy", "0.95",
        "--precision", "fp32", "--no-dense", "--out", str(tmp_path),
    ) == 0  # fmt: skip
    assert run("compare", str(tmp_path / "generic-x86-onnxruntime")) == 3
    assert "expected: a dense arm" in capsys.readouterr().err


def test_stdout_holds_the_document_alone_whatever_the_users_code_prints(
    model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(model["model"].rpartition(":")[0]).read_text()
    loud = source.replace("return SmallNet()", "print('MADE'); return SmallNet()")
    (tmp_path / "loud.py").write_text(f"{loud}\nprint('IMPORT')\n")
    assert run("inspect", f"{tmp_path / 'loud.py'}:build", "--calib", model["calib"], "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["layers"]
    assert "IMPORT" in captured.err
    assert "MADE" in captured.err


def test_a_config_file_repeats_the_build(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "--config", str(bundle.parent / "rowcol.toml"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["bundles"][0]["reused"] is True


def bad(arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.rstrip().splitlines()
    assert says in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("extra", "code", "says"),
    [
        (["--target", "rasberry-pi-4"], 2, "raspberry-pi-4"),
        (["--runtime", "onnx"], 2, "onnxruntime"),
        (["--precision", "int7"], 2, "int8"),
        (["--metric", "f2"], 2, "balanced_accuracy"),
        (["--budget", "sise<=4MB"], 2, "did you mean size"),
        (["--weights", "nowhere.safetensors"], 2, "no such file"),
        (["--calib", "nowhere"], 2, "no such file or folder"),
        (["--test", "{select}"], 2, "shared sample"),
        (["--budget", "size<=1KB"], 1, "size<=1KB"),
        (["--plan", "nowhere.toml"], 2, "nowhere.toml"),
        (["--config", "nowhere.toml"], 2, "readable rowcol.toml"),
        (["--colour", "red"], 2, "No such option"),
    ],
)
def test_bad_builds(
    model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], code: int, says: str
) -> None:
    options = {
        "--weights": model["weights"],
        "--calib": model["calib"],
        "--select": model["select"],
        "--test": model["test"],
    }
    options |= {"--labels": "plain,striped", "--positive": "striped"}
    options |= dict([[e.format(**model) for e in extra]])
    arguments = [
        "build",
        model["model"],
        "--out",
        str(tmp_path / "out"),
        *(x for pair in options.items() for x in pair),
    ]
    bad(arguments, code, says, capsys)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_name_the_first_key(
    model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"stem.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    bad(["inspect", model["model"], "--weights", str(tmp_path / "w.safetensors")], 2, "norm.weight", capsys)


def test_a_damaged_bundle_is_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    artifact = copy / "arms" / "factored@int8.onnx"
    artifact.write_bytes(artifact.read_bytes()[:-7])
    for command in (["verify", str(copy)], ["run", str(copy), "x.png"], ["profile", str(copy)], ["compare", str(copy)]):
        bad(command, 2, "factored@int8.onnx", capsys)


def test_running_on_something_else_is_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("no picture")
    bad(["run", str(bundle), str(tmp_path / "text.png")], 2, "error:", capsys)
    bad(["run", str(bundle), str(tmp_path / "none.png")], 2, "error:", capsys)
    bad(["run", str(bundle), str(tmp_path / "none.npy"), "--arm", "factored@int9"], 2, "factored@int8", capsys)
    Image.new("L", (4, 4)).save(tmp_path / "small.png")
    bad(["verify", str(tmp_path)], 2, "manifest.json", capsys)


@pytest.mark.parametrize(
    ("encoding", "arguments", "code", "said"),
    [
        ("latin-1", ["targets"], 0, "raspberry-pi-5"),
        ("ascii", ["targets"], 0, "raspberry-pi-5"),
        ("latin-1", ["verify", "nowhere/→"], 2, "nowhere/\\u2192"),
    ],
)
def test_what_the_locale_lacks_is_escaped(encoding: str, arguments: list[str], code: int, said: str) -> None:
    """Tables are full of dashes and lines; Python takes UTF-8 by itself in the locale C alone."""
    done = subprocess.run(
        [sys.executable, "-m", "rowcol_edge", *arguments], env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True, text=True, encoding=encoding, check=False,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert said in done.stdout + done.stderr


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rowcol_edge import samples

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(samples, "available", interrupted)
    assert run("targets", "--json") == 130
    assert capsys.readouterr().out == ""


def test_an_installed_command_answers() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rowcol_edge", "build", "sample:nothing", "--out", "never"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: sample:nothing" in done.stderr
    assert "Traceback" not in done.stderr
