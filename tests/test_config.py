from __future__ import annotations

from pathlib import Path

import pytest

from rowcol_edge import config
from rowcol_edge.config import BuildOptions
from rowcol_edge.device.preprocess import Preprocess
from rowcol_edge.errors import ConfigError, DataError


def test_a_written_build_reads_back_the_same(tmp_path: Path) -> None:
    options = BuildOptions(
        model="nets.py:build", target=("raspberry-pi-4", "generic-x86"), calib="calib", labels=("good", "bad"),
        positive="bad", preprocess=Preprocess("L", 32, 48, mean=(0.5,), std=(0.25,)), dense=False, energy=0.99,
    )  # fmt: skip
    config.write(options, tmp_path / "rowcol.toml")
    assert config.read(tmp_path / "rowcol.toml", {}) == options


def test_the_command_line_comes_on_top(tmp_path: Path) -> None:
    config.write(BuildOptions(model="sample:fmnist-vit", precision="fp32"), tmp_path / "rowcol.toml")
    assert config.read(tmp_path / "rowcol.toml", {"precision": "int8"}).precision == "int8"


def test_preprocess_on_the_command_line() -> None:
    recipe = config.parse_preprocess("mode=L,size=24x32,mean=0.5,std=0.25,scale=1/128")
    assert recipe == Preprocess("L", 24, 32, scale=1 / 128, mean=(0.5,), std=(0.25,))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('model = "m"\nprecison = "int8"', r"did you mean precision\?"),
        ('model = "m"\nprecision = "int7"', "fp32"),
        ('model = "m"\ndense = "no"', "true or false"),
        ('model = "m"\nenergy = "high"', "a number"),
        ('model = "m"\nenergy = 1.5', "a share in"),
        ('model = "m"\nlabels = [1, 2]', "list of names"),
        ('model = "m"\nbudget = "drop<0.5"', "drop<=0.5pp"),
        ('model = "m"\ntarget = []', "at least one"),
        ('model = "m"\nplan = "p.toml"\nenergy = 0.9', "both"),
        ('model = "m"\nplan = "p.toml"\nrefit = false', "a plan file says itself"),
        ('model = "m"\nplan = "p.toml"\nrefit = true', "set refit in the plan file"),
        ('precision = "int8"', "model reference"),
        ("model = ", "valid TOML"),
    ],
)
def test_bad_files_are_refused_with_the_key(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "rowcol.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        config.read(tmp_path / "rowcol.toml", {})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"readable rowcol\.toml"):
        config.read(tmp_path / "rowcol.toml", {})


@pytest.mark.parametrize("text", ["L", "size=24", "mean=a/b", "scale=1/0"])
def test_bad_preprocess_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        config.parse_preprocess(text)


def test_how_to_write_a_value_for_each_channel_is_said() -> None:
    with pytest.raises(DataError, match=r"mean=0\.5/0\.5/0\.5"):
        config.parse_preprocess("mode=RGB,size=8x8,mean=0.5,std=0.5/0.5/0.5")


def test_preprocess_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="mean"):
        config.parse_preprocess("mode=L,size=8x8,mean=0.1/0.2/0.3,std=1")


def test_labels_that_repeat_are_refused() -> None:
    with pytest.raises(ConfigError, match="labels: expected names that differ"):
        config.make({"model": "m", "labels": ["a", "a"]})


@pytest.mark.parametrize("content", [b"\xff\xfe not ours", None])
def test_what_a_person_put_in_the_place_of_the_file_is_left_alone(tmp_path: Path, content: bytes | None) -> None:
    place = tmp_path / "rowcol.toml"
    if content is None:
        place.mkdir()
    else:
        place.write_bytes(content)
    config.write(config.make({"model": "m"}), place)
    assert place.is_dir() if content is None else place.read_bytes() == content
