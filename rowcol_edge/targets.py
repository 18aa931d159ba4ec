"""A target: a board, the runtimes it can run, and what a build has to know about both.

Targets are TOML files whose keys are the fields below, one file a board; its stem is the target's name. Reading is
strict: an unknown key, a missing one or a value of another type is a TargetError, so that no slip becomes a default.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rowcol_edge.device.manifest import PRECISIONS
from rowcol_edge.errors import TargetError, did_you_mean
from rowcol_edge.resources import targets_dir

SCHEMA = 1
"""History: 1 – first version."""

RECIPES = ("deepstream", "gstreamer")

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_VERSION = re.compile(r"\d+(\.\d+)+")


@dataclass(frozen=True, slots=True)
class RuntimeSpec:
    """A runtime on a board: the oldest version that must open a bundle, and what that version can read."""

    name: str
    oldest: str
    """Oldest version a bundle promises to run with."""
    opset: int
    """ONNX opset a model is exported at."""
    ir_version: int
    """Highest ONNX IR version that the oldest runtime reads."""
    providers: tuple[str, ...]
    """onnxruntime: execution providers, in the order they are tried. openvino: the device."""
    precisions: tuple[str, ...]
    install: str
    """Shell lines that install the runtime on the board."""
    why: str
    """Where these values come from, for people."""
    properties: dict[str, str] = field(default_factory=dict)
    """Settings in the runtime's own words, such as the precision openvino calculates in; may be left out."""


@dataclass(frozen=True, slots=True)
class Target:
    """A board and how to build for it."""

    name: str
    title: str
    match: dict[str, str]
    """How to know the board: ``machine`` as ``uname -m`` says it, ``device_tree_model`` a part of its own name,
    ``cpu_model`` a regular expression found in the processor's name."""
    python: str
    """Oldest Python a bundle meets there."""
    runtimes: tuple[RuntimeSpec, ...]
    threads: int
    """Threads an inference uses there."""
    isa: tuple[str, ...]
    """Instruction sets to count on, as /proc/cpuinfo of Linux names them."""
    int8_saturates: bool
    """Whether 8-bit products saturate when added in pairs: int8 weights then keep to 7 bits (``reduce_range``)."""
    proxy_env: dict[str, str]
    """Environment that holds another host to this board's instruction set; empty if nothing can."""
    proxy_note: str
    """What a figure taken on another host is worth."""
    rank_multiple: int
    """Ranks are rounded to a multiple of this."""
    memory_mb: int
    """Peak memory, in MiB, that an inference process may take."""
    why: str
    """Where these values come from, for people."""
    recipes: tuple[str, ...] = ()
    """Pipelines that a bundle for this board comes with a labelled recipe for, out of `RECIPES`; may be left out."""

    def runtime(self, name: str) -> RuntimeSpec:
        """The runtime called ``name``; TargetError with the nearest names if the target does not list it."""
        for spec in self.runtimes:
            if spec.name == name:
                return spec
        known = [spec.name for spec in self.runtimes]
        raise TargetError(
            f"runtime of target {self.name}",
            expected=f"one of {', '.join(known)}",
            got=repr(name),
            hint=did_you_mean(name, known),
        )

    def to_dict(self) -> dict[str, Any]:
        """The target as JSON values; ``name`` included, tuples as lists."""
        values: dict[str, Any] = _jsonable(asdict(self))
        return values


def available() -> tuple[str, ...]:
    """Names of the targets that come with this installation, sorted."""
    return tuple(sorted(path.stem for path in targets_dir().glob("*.toml")))


def load(name: str) -> Target:
    """The target called ``name``, or the one in the file ``name`` if it ends in ``.toml``.

    Raises TargetError: no such target (with the nearest names), a file that cannot be read, or one that is malformed.
    """
    if name.endswith(".toml"):
        path = Path(name).expanduser()
    else:
        known = available()
        if name not in known:
            hint = did_you_mean(name, known) or "the path of your own .toml file is accepted too"
            raise TargetError("unknown target", expected=f"one of {', '.join(known)}", got=repr(name), hint=hint)
        path = targets_dir() / f"{name}.toml"
    return parse(_read(path), name=path.stem, source=str(path))


def parse(values: Mapping[str, Any], *, name: str, source: str) -> Target:
    """A Target from the values of its file. ``source`` names the file in errors. Raises TargetError."""
    if not _NAME.fullmatch(name):
        raise TargetError(
            source, expected="a file name of lower-case words and hyphens, such as my-board.toml", got=f"{name}.toml"
        )
    table = _Table(values, source)
    table.keys(_TARGET_KEYS)
    if (schema := table.whole("schema")) != SCHEMA:
        raise TargetError(
            f"{source}: schema",
            expected=str(SCHEMA),
            got=str(schema),
            hint="this version of rowcol-edge is another one",
        )
    match = table.strings_by_key("match")
    _check_keys(match, {"machine": True, "device_tree_model": False, "cpu_model": False}, f"{source}: match")
    try:
        re.compile(match.get("cpu_model", ""))
    except re.error as e:
        raise TargetError(f"{source}: match.cpu_model", expected="a regular expression", got=str(e)) from e
    return Target(
        name=name,
        title=table.prose("title"),
        match=match,
        python=table.text("python", _VERSION, "a version such as 3.11"),
        runtimes=_runtimes(table.tables("runtimes"), source),
        threads=table.whole("threads"),
        isa=table.texts("isa"),
        int8_saturates=table.flag("int8_saturates"),
        proxy_env=table.strings_by_key("proxy_env") if "proxy_env" in values else {},
        proxy_note=table.prose("proxy_note"),
        rank_multiple=table.whole("rank_multiple"),
        memory_mb=table.whole("memory_mb"),
        why=table.prose("why"),
        recipes=table.texts("recipes", RECIPES) if "recipes" in values else (),
    )


def _runtimes(tables: list[Mapping[str, Any]], source: str) -> tuple[RuntimeSpec, ...]:
    specs: list[RuntimeSpec] = []
    for position, values in enumerate(tables):
        table = _Table(values, f"{source}: runtimes[{position}]")
        table.keys({key: key != "properties" for key in RuntimeSpec.__dataclass_fields__})
        spec = RuntimeSpec(
            name=table.text("name"),
            oldest=table.text("oldest", _VERSION, "a version such as 1.17.0"),
            opset=table.whole("opset"),
            ir_version=table.whole("ir_version"),
            providers=table.texts("providers"),
            precisions=table.texts("precisions", PRECISIONS),
            properties=table.strings_by_key("properties") if "properties" in values else {},
            install=table.text("install"),
            why=table.prose("why"),
        )
        if spec.name in {earlier.name for earlier in specs}:
            raise TargetError(f"{source}: runtimes", expected="each runtime once", got=f"{spec.name} twice")
        specs.append(spec)
    return tuple(specs)


_OPTIONAL = ("proxy_env", "recipes")
_TARGET_KEYS = {"schema": True} | {key: key not in _OPTIONAL for key in Target.__dataclass_fields__ if key != "name"}


@dataclass(frozen=True, slots=True)
class _Table:
    """A TOML table, read field by field; every error says where it is."""

    values: Mapping[str, Any]
    where: str

    def keys(self, known: Mapping[str, bool]) -> None:
        _check_keys(self.values, known, self.where)

    def text(self, key: str, pattern: re.Pattern[str] | None = None, expected: str = "text that is not empty") -> str:
        value = self.values[key]
        if not isinstance(value, str) or not value.strip() or (pattern and not pattern.fullmatch(value)):
            raise self._wrong(key, expected, value)
        return value.strip()

    def prose(self, key: str) -> str:
        """Text for people, its line breaks removed: whoever prints it wraps it."""
        return " ".join(self.text(key).split())

    def whole(self, key: str) -> int:
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, "a whole number of 1 or more", value)
        return value

    def flag(self, key: str) -> bool:
        value = self.values[key]
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def texts(self, key: str, choices: Iterable[str] = ()) -> tuple[str, ...]:
        allowed = tuple(choices)
        one = f"of {', '.join(allowed)}" if allowed else "of texts"
        values = self._listed(key, f"a list {one}, not empty", lambda v: isinstance(v, str) and bool(v.strip()))
        for value in values:
            if allowed and value not in allowed:
                raise self._wrong(key, f"a list {one}", value, did_you_mean(value, allowed))
        if len(set(values)) != len(values):
            raise self._wrong(key, "each value once", values)
        return tuple(values)

    def tables(self, key: str) -> list[Mapping[str, Any]]:
        return self._listed(key, f"at least one [[{key}]] table", lambda v: isinstance(v, dict))

    def strings_by_key(self, key: str) -> dict[str, str]:
        value = self.values[key]
        if not isinstance(value, dict) or not all(isinstance(v, str) and v.strip() for v in value.values()):
            raise self._wrong(key, "a table of texts", value)
        return dict(value)

    def _listed(self, key: str, expected: str, fits: Callable[[Any], bool]) -> list[Any]:
        value = self.values[key]
        if not isinstance(value, list) or not value or not all(fits(item) for item in value):
            raise self._wrong(key, expected, value)
        return value

    def _wrong(self, key: str, expected: str, got: object, hint: str = "") -> TargetError:
        return TargetError(f"{self.where}: {key}", expected=expected, got=repr(got), hint=hint)


def _check_keys(values: Mapping[str, Any], known: Mapping[str, bool], where: str) -> None:
    """Refuse keys that are not in ``known`` and the absence of those that ``known`` marks as required."""
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known) or f"known keys: {', '.join(known)}"
            raise TargetError(where, expected="known keys only", got=f"unknown key {key!r}", hint=hint)
    missing = [key for key, required in known.items() if required and key not in values]
    if missing:
        raise TargetError(
            where, expected=f"the key {missing[0]!r}", got="no such key", hint=f"missing: {', '.join(missing)}"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        reason = (e.strerror or str(e)) if isinstance(e, OSError) else "bytes that are not UTF-8"
        raise TargetError(str(path), expected="a readable target file", got=reason) from e
    except tomllib.TOMLDecodeError as e:
        raise TargetError(str(path), expected="valid TOML", got=str(e)) from e


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value
