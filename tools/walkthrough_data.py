"""What a user of tools/walkthrough.py has lying about: ELPV's cells in folders, models of their own, broken files."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rowcol_edge import resources, samples, user_code
from rowcol_edge.errors import DataError

SPLITS = {"calib": "calibration", "select": "selection", "test": "test"}
RECIPE = "mode=L,size=224x224,mean=0.6,std=0.16"
WEIGHTS = "weights.safetensors"


def write(work: Path) -> None:
    """Everything, into a folder that is not there yet."""
    work.mkdir(parents=True)
    sample = samples.load("elpv-resnet18")
    images = user_code.resolve(f"{sample.data}:images", DataError, "data")
    for role, split in SPLITS.items():
        for number, (picture, label) in enumerate(images(split)):
            file = work / role / sample.labels[int(label)] / f"{number:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    for file in ("net.py", "cells.py", "odd.py"):
        shutil.copy(Path(__file__).parent / "walkthrough_user" / file, work)
    weights = load_file(resources.samples_dir() / "elpv-resnet18" / "weights.safetensors")
    save_file(weights, work / WEIGHTS)
    torch.save(weights, work / "checkpoint.pt")
    _program(work, weights)
    _broken(work, weights)


def _program(work: Path, weights: dict[str, torch.Tensor]) -> None:
    """The model as .pt2, its batch free."""
    net = user_code.resolve(f"{work / 'net.py'}:build", DataError, "model")()
    net.load_state_dict({name: value.float() for name, value in weights.items()})
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(net.eval(), (torch.zeros(2, 1, 224, 224),), dynamic_shapes=(batch,))
    torch.export.save(program, work / "net.pt2")


class _Harm:
    """What an attacker would put into a pickle."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('harmed', 'w').close()",)


def _broken(work: Path, weights: dict[str, torch.Tensor]) -> None:
    """A file for each kind of bad input."""
    bad = work / "bad"
    bad.mkdir()
    other = {name.replace("fc.", "head."): value for name, value in weights.items()}
    save_file(other, bad / "other_names.safetensors")
    save_file({**weights, "fc.weight": torch.zeros(3, 512)}, bad / "other_shape.safetensors")
    nan = weights["layer1.0.conv1.weight"].clone()
    nan[0, 0, 0, 0] = float("nan")
    save_file({**weights, "layer1.0.conv1.weight": nan}, bad / "nan.safetensors")
    (bad / "cut.safetensors").write_bytes((work / WEIGHTS).read_bytes()[:100_000])
    with (bad / "harm.pt").open("wb") as stream:
        pickle.dump({"weight": _Harm()}, stream)
    np.savez(bad / "harm.npz", x=np.array([_Harm()], dtype=object))
    pixels = np.random.default_rng(0).normal(size=(8, 1, 224, 224)).astype(np.float32)
    np.savez(bad / "shape.npz", x=pixels[:, :, :, :200])
    np.savez(bad / "dtype.npz", x=pixels.astype(np.complex64))
    pixels[3, 0, 5, 5] = np.inf
    np.savez(bad / "inf.npz", x=pixels)
    (bad / "garbage.npz").write_bytes(b"not an archive")
    (bad / "empty").mkdir()
    (bad / "picture").mkdir()
    (bad / "picture" / "a.png").write_bytes(b"not a picture")
    (bad / "locked").mkdir()
    for file, copy in ((work / WEIGHTS, "locked.safetensors"), (next((work / "calib").rglob("*.png")), "locked/a.png")):
        shutil.copy(file, bad / copy)
        (bad / copy).chmod(0)
    board = (resources.targets_dir() / "raspberry-pi-4.toml").read_text(encoding="utf-8")
    for file, old, new in (
        ("board", "rank_multiple", "rank_multipel"), ("opset", "opset = 20", "opset = 21"),
        ("ir", "ir_version = 9", "ir_version = 13"),
    ):  # fmt: skip
        assert old in board
        (bad / f"{file}.toml").write_text(board.replace(old, new), encoding="utf-8")
    (bad / "rowcol.toml").write_text('modell = "net.py:build"\n', encoding="utf-8")
    (bad / "manifest").mkdir()
    (bad / "manifest" / "manifest.json").write_text(json.dumps({"schema": 99}), encoding="utf-8")
