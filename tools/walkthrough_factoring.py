"""The steps of tools/walkthrough.py that go through what factoring does: spaces, forms, budgets, and odd models."""

from __future__ import annotations

import contextlib
import json
import signal
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rowcol_edge import user_code
from rowcol_edge.errors import DataError
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from walkthrough_steps import CALIB, MODEL, NAMES, Step, bad

FEW = ("--calib", "odd.py:few")
LAYER = "layer4.1.conv2"
HANDLED = {
    "dead and constant channels": "dead", "zero weights": "zeros", "rank-deficient weights": "deficient",
    "unused layers": "unused", "channels last": "last", "float16": "half", "bfloat16": "bfloat", "float64": "double",
}  # fmt: skip
"""By a factory of walkthrough_user/odd.py: factored like any other."""
LEFT = {
    "a layer used twice": ("twice", "layer4.1.conv1", "called 2 times"),
    "a tied weight": ("tied", LAYER, "tied to another module"),
    "a forward of its own": ("subclass", LAYER, "Louder has a forward of its own"),
    "weight norm": ("parametrized", LAYER, "its weight is parametrized"),
}
"""The factory, the layer that stays as it is, and what is said of it."""
_PARTS = {
    "layer4.1.conv2": LayerPlan("layer4.1.conv2", "project", 64),
    "layer4.0.conv2": LayerPlan("layer4.0.conv2", "project", 64, split="row"),
    "layer3.1.conv2": LayerPlan("layer3.1.conv2", "project", 64, split="both", taken=48),
    "layer3.0.conv2": LayerPlan("layer3.0.conv2", "project", 96, split="spatial"),
}
_SHAPES = {
    "layer4.1.conv2.reduce": (64, 512, 3, 3), "layer4.1.conv2.expand": (512, 64, 1, 1),
    "layer4.0.conv2.reduce": (64, 512, 1, 1), "layer4.0.conv2.expand": (512, 64, 3, 3),
    "layer3.1.conv2.reduce": (48, 256, 1, 1), "layer3.1.conv2.core": (64, 48, 3, 3),
    "layer3.1.conv2.expand": (256, 64, 1, 1),
    "layer3.0.conv2.reduce": (96, 256, 3, 1), "layer3.0.conv2.expand": (256, 96, 1, 3),
}  # fmt: skip


def steps(work: Path) -> Iterator[Step]:
    yield from _spaces(work)
    yield from _forms(work)
    yield from _ties()
    yield from _budgets(work)
    yield from _odd(work)


def _spaces(work: Path) -> Iterator[Step]:
    said: list[str] = []

    def plotted(_: str) -> None:
        page = (work / "spectra.html").read_text(encoding="utf-8")
        assert page.count("<svg") > 20, page.count("<svg")
        for layer in (LAYER, "fc"):
            assert layer in page

    def two_inputs(out: str) -> None:
        layers = {layer["name"]: layer for layer in json.loads(out)["layers"]}
        assert layers["kind"]["row_size"] == 1
        assert 0 < layers[f"net.{LAYER}"]["row_rank_99"] < layers[f"net.{LAYER}"]["row_rank_999"] < 512

    def repeated(out: str) -> None:
        said.append(out)
        assert said[0] == out

    yield Step("spectra as charts", ("inspect", *MODEL, *FEW, "--plot", "spectra.html"), check=plotted)
    inspect = ("inspect", "net.py:WithKind", "--calib", "cells.py:calibration", "--json")
    yield Step("spaces of two inputs", inspect, check=two_inputs)
    for name in ("spaces once", "spaces once more, every digit the same"):
        yield Step(name, ("inspect", *MODEL, *FEW, "--json"), check=repeated)


def _forms(work: Path) -> Iterator[Step]:
    def planned() -> None:
        FactorPlan(tuple(_PARTS.values())).write(work / "splits.toml")

    def split(_: str) -> None:
        from safetensors import safe_open

        with safe_open(work / "splits" / "model.safetensors", "numpy") as file:
            found = {name: tuple(file.get_slice(f"{name}.weight").get_shape()) for name in _SHAPES}
        assert found == _SHAPES, found
        agree(work, "splits", "net.py:trained")

    def projected(folder: str, kind: str) -> Callable[[str], None]:
        def check(_: str) -> None:
            forms = {name: layer["form"] for name, layer in plan(work / folder)["layers"].items()}
            assert any(form == "project" for name, form in forms.items() if kind in name), forms

        return check

    def second_pass(wanted: bool) -> Callable[[str], None]:
        def check(out: str) -> None:
            assert plan(work / "pass")["refit"] is wanted
            assert json.loads(out)["parameters_after"] <= 0.4 * json.loads(out)["parameters_before"]

        return check

    def narrowed(_: str) -> None:
        made = plan(work / "narrow")
        names = " ".join(made["channels"])
        for word in ("patch", "expand", "query", "value"):
            assert word in names, names
        assert all(each["width"] < each["of"] for each in made["channels"].values())
        gauges = [layer["gauge"] for layer in made["layers"].values() if layer["form"] == "project"]
        assert gauges
        assert all(gauges)

    def text(out: str) -> None:
        channels = json.loads(out)["channels"]
        free = [each for each in channels if not each["fixed"]]
        assert sum(each["groups"] == 12 for each in free) == 2 * 6, free  # queries with keys, values; six blocks
        assert sum("intermediate" in each["name"] for each in free) == 6
        assert any("norm" in each["fixed"] for each in channels), channels  # the stream

    given = ("factor", *MODEL, *CALIB, "--plan", "splits.toml", "--out", "splits")
    yield Step("splits by a plan: column, row, both, spatial", given, before=planned, check=split)
    unet = ("factor", "sample:elpv-scratch-unet", "--budget", "params<=0.4x", "--out", "unet")
    yield Step("transposed convolutions", unet, check=projected("unet", "up"))
    sound = ("factor", "sample:italy-power-cnn", "--budget", "params<=0.4x", "--out", "sound")
    yield Step("one-dimensional convolutions", sound, check=projected("sound", ""))
    for switch, wanted in (("--refit", True), ("--no-refit", False)):
        yield Step(f"a second pass: {switch}",
                   ("factor", *MODEL, *FEW, "--budget", "params<=0.4x", switch, "--out", "pass", "--json"),
                   check=second_pass(wanted))  # fmt: skip
    vit = ("factor", "sample:fmnist-vit", "--budget", "params<=0.3x", "--out", "narrow")
    yield Step("fewer heads' channels, hidden units and splits at once", vit, check=narrowed)
    yield Step("a text model's heads and hidden units", ("inspect", "sample:minilm", "--json"), check=text)


def _ties() -> Iterator[Step]:
    pictures = ("--calib", "odd.py:noise")

    def tied(wanted: Mapping[str, int]) -> Callable[[str], None]:
        def check(out: str) -> None:
            found = dict.fromkeys(wanted, 0)
            for each in json.loads(out)["elsewhere"]:
                if each["kind"] in found:
                    found[each["kind"]] += each["parameters"]
            assert found == wanted, found

        return check

    def transformer(width: int, hidden: int) -> dict[str, int]:
        """Of 12 blocks, each matrix once."""
        return {"TiedAttention": 12 * 2 * width**2, "TiedFeedForward": 12 * width * hidden}

    stages = {"TiedStage": 256 * 1024 + 512 * 2048}
    for name, wanted in (("tiny", transformer(384, 1472)), ("small", transformer(768, 2960)), ("resnet50", stages)):
        inspect = ("inspect", f"sample:halvit-{name}", *pictures, "--json")
        yield Step(f"one matrix for two uses: halvit-{name}", inspect, check=tied(wanted))


def _budgets(work: Path) -> Iterator[Step]:
    judged = (*CALIB, "--select", "select", *NAMES)

    def held(out: str) -> None:
        found = json.loads(out)
        chosen = next(trial for trial in found["trials"] if trial["made_by"] == found["made_by"])
        assert found["parameters_after"] <= 0.5 * found["parameters_before"]
        assert chosen["drop"] <= 0.5 + 1e-9, chosen
        layers = plan(work / "both")["layers"].values()
        macs = [sum(layer[f"macs_{when}"] for layer in layers) for when in ("after", "before")]
        assert macs[0] <= 0.7 * macs[1], macs

    def light(out: str) -> None:
        found = json.loads(out)
        assert 2_000_000 < found["predicted_bytes"] <= 3_000_000, found["predicted_bytes"]

    def recovered(out: str) -> None:
        record = json.loads(out)["recovered"]
        assert 1 <= record["best_epoch"] <= record["epochs"] == len(record["history"]) - 1 == 3, record
        assert record["after"] > record["before"], record

    budget = "params<=0.5x,macs<=0.7x,drop<=0.5pp"
    several = ("factor", *MODEL, *judged, "--budget", budget, "--out", "both", "--json")
    yield Step("parameters, MACs and drop at once", several, check=held)
    size = ("factor", *MODEL, *FEW, "--budget", "size<=3MB", "--out", "bytes", "--json")
    yield Step("a budget of bytes", size, check=light)
    for budget in ("params<=0.0005x", "macs<=0.005x", "size<=0.01MB"):
        yield Step(f"out of reach: {budget}", ("factor", *MODEL, *FEW, "--budget", budget, "--out", "new"), code=1,
                   says=("error: budget .*expected: .*got: ",), check=lambda _: absent(work / "new"))  # fmt: skip
    yield bad("a budget of nothing", ("factor", *MODEL, *FEW, "--budget", "params<=0x", "--out", "new"), "budget")
    vit = ("factor", "sample:fmnist-vit", "--budget")
    yield Step("budgets that exclude each other", (*vit, "params<=0.05x,drop<=0.1pp", "--out", "new"), code=1,
               says=("error: budgets .*expected: .*got: .*the boldest plan found",),
               check=lambda _: absent(work / "new"))  # fmt: skip
    distilled = (*vit, "params<=0.17x", "--recover", "3", "--out", "recovered", "--json")
    yield Step("distilled, killed in its second epoch", distilled, code=-signal.SIGKILL, signal=signal.SIGKILL,
               signal_at="judge epoch 2", check=lambda _: absent(work / "recovered"))  # fmt: skip
    yield Step("distilled, from its second epoch on", distilled, says=(r"^(?!.*judge epoch 1\b).*judge epoch 2\b",),
               check=recovered)  # fmt: skip


def _odd(work: Path) -> Iterator[Step]:
    def factor(factory: str, *more: str) -> tuple[str, ...]:
        return ("factor", f"odd.py:{factory}", *FEW, "--budget", "params<=0.6x", "--out", factory, *more)

    def agreed(factory: str) -> Callable[[str], None]:
        return lambda _: agree(work, factory, f"odd.py:{factory}")

    def left(factory: str, layer: str, why: str) -> Callable[[str], None]:
        def check(_: str) -> None:
            found = plan(work / factory)["layers"].get(layer, {"form": "dense", "reason": ""})
            assert found["form"] == "dense", found
            assert why in found["reason"], found
            agree(work, factory, f"odd.py:{factory}")

        return check

    def embeddings(out: str) -> None:
        notes = {layer["name"]: layer["note"] for layer in json.loads(out)["layers"]}
        assert "tied" in notes["answer"], notes

    for name, factory in HANDLED.items():
        yield Step(f"odd: {name}", factor(factory), check=agreed(factory))
    for name, (factory, layer, why) in LEFT.items():
        yield Step(f"odd: {name}", factor(factory), check=left(factory, layer, why))
    letters = ("inspect", "odd.py:next_letter", "--calib", "odd.py:text", "--json")
    yield Step("odd: tied embeddings", letters, check=embeddings)
    refused = ("hooked", "weight norm in a hook"), ("masked", "a pruning mask left in")
    for factory, name in refused:
        yield bad(name, ("factor", f"odd.py:{factory}", *FEW, "--budget", "params<=0.6x", "--out", "new"), LAYER)
    few = {"one": "one picture", "three": "three pictures", "copies": "pictures that are there eight times"}
    for calib, name in (few | {"flat": "constant pictures"}).items():
        options = ("factor", *MODEL, "--calib", f"odd.py:{calib}", "--budget", "params<=0.6x", "--out", calib)
        yield Step(f"odd: {name}", options, says=("few|constant|none to predict",))
    options = ("factor", *MODEL, "--calib", "odd.py:hole", "--budget", "params<=0.6x", "--out", "new")
    yield bad("a pixel that is no number", options, "NaN|finite")


# ---------------------------------------------------------------- what checks use


def plan(folder: Path) -> dict[str, Any]:
    """The plan in a folder, its layers and channels by their names."""
    read = tomllib.loads((folder / "plan.toml").read_text(encoding="utf-8"))
    return read | {key: {each["name"]: each for each in read.get(key, [])} for key in ("layers", "channels")}


def absent(path: Path) -> None:
    assert not path.exists(), path


def agree(work: Path, folder: str, factory: str) -> None:
    """The factored model decides like the model of the factory, on all but two of the first 32 selection pictures."""
    with contextlib.chdir(work):
        dense = user_code.resolve(factory, DataError, "model")().eval()
        pictures = next(user_code.resolve("cells.py:selection", DataError, "data")())[0]["picture"]
    x = torch.from_numpy(pictures)
    program = torch.export.load(work / folder / "model.pt2").module()  # in float32, whatever the model came in
    with torch.inference_mode():
        got = np.concatenate([program(one[None]).numpy() for one in x])
        wanted = dense(x.to(next(dense.parameters()).dtype)).float().numpy()
    assert np.isfinite(got).all()
    same = int((wanted.argmax(1) == got.argmax(1)).sum())
    assert same >= len(x) - 2, f"{same} of {len(x)} decisions are the same"
