"""A target: a board, the runtimes it can run, and what a build has to know about both.

Targets are TOML files whose keys are the fields below, one file a board; its stem is the target's name. Reading is
strict: an unknown key, a missing one or a value of another type is a TargetError, so that no slip becomes a default.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rowcol_edge.device.manifest import GRAPH_CHECKED, PRECISIONS, RuntimeEntry
from rowcol_edge.device.runtimes import ENGINE_BUILDERS
from rowcol_edge.errors import TargetError, did_you_mean
from rowcol_edge.resources import targets_dir
from rowcol_edge.tables import Table, check_keys

SCHEMA = 2
"""History:

1 – first version.
2 – what to install is data (``pythons``, ``platform``, ``requirements`` and what goes with them) where it was shell
    text; ``opset`` and ``ir_version`` may be left out; ``recipes``.
"""

RECIPES = ("deepstream", "gstreamer")

_CPU = {"CPU", "CPUExecutionProvider"}
"""What targets call the processor, in the words of their runtimes."""
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_VERSION = re.compile(r"\d+(\.\d+)+")
_PYTHON = re.compile(r"3\.\d+")
_PLATFORM = re.compile(r"manylinux_(?P<glibc>\d+_\d+)_(?P<machine>x86_64|aarch64)")
_VENV = "python3 -m venv ~/rowcol-edge"
_ACTIVATE = ". ~/rowcol-edge/bin/activate"


@dataclass(frozen=True, slots=True)
class Alternative:
    """Other packages for the same runtime, for boards where the first choice does not install or load."""

    pythons: tuple[str, ...]
    """Where these packages have wheels; some of the target's."""
    requirements: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class RuntimeSpec:
    """A runtime on a board: the oldest version that must open a bundle, and what that version can read."""

    name: str
    oldest: str
    """Oldest version a bundle promises to run with."""
    providers: tuple[str, ...]
    """onnxruntime: execution providers, in the order they are tried. openvino, tensorrt: the device. tflite: CPU, or
    the library of a delegate."""
    precisions: tuple[str, ...]
    requirements: tuple[str, ...]
    """What pip installs on the board (PEP 508)."""
    why: str
    """Where these values come from, for people."""
    opset: int | None = None
    """ONNX opset a model is exported at; None for a runtime that reads no ONNX."""
    ir_version: int | None = None
    """Highest ONNX IR version that the oldest runtime reads; None with ``opset``."""
    properties: dict[str, str] = field(default_factory=dict)
    """Settings in the runtime's own words, such as the precision openvino calculates in."""
    system: tuple[str, ...] = ()
    """Shell lines to run before, such as those of the system's package manager."""
    venv: str = _VENV
    """Shell line that makes the virtual environment ``~/rowcol-edge``."""
    index_url: str = ""
    """Package index of the board's vendor, searched besides PyPI."""
    find_links: str = ""
    """Folder or page with the vendor's wheels, searched besides PyPI."""
    alternatives: tuple[Alternative, ...] = ()

    @property
    def runs_at_build(self) -> bool:
        """Building runs an artifact on this machine's CPU: is that the runtime and the kind of device it is for?"""
        return self.name not in ENGINE_BUILDERS and set(self.providers) <= _CPU

    @property
    def offered(self) -> str:
        """The precisions, for people; labelled where what is built for them never ran on the device it is for."""
        return ", ".join(self.precisions) + ("" if self.runs_at_build else f" ({GRAPH_CHECKED})")

    def onnx(self) -> tuple[int, int]:
        """Opset and IR version; TargetError if the target names none."""
        if self.opset is None or self.ir_version is None:
            raise TargetError(
                f"runtime {self.name}", expected="opset and ir_version", got="a target without them",
                hint="name them in the target's file: a runtime that reads ONNX needs them",
            )  # fmt: skip
        return self.opset, self.ir_version


@dataclass(frozen=True, slots=True)
class Target:
    """A board and how to build for it."""

    name: str
    title: str
    match: dict[str, str]
    """How to know the board: ``machine`` as ``uname -m`` says it, ``device_tree_model`` a part of its own name,
    ``cpu_model`` a regular expression found in the processor's name."""
    pythons: tuple[str, ...]
    """CPython versions a bundle meets there, oldest first."""
    platform: str
    """Platform tag of the newest wheels that install there: the glibc of its oldest system, and the machine."""
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
    """Pipelines that a bundle for this board comes with a labelled recipe for, out of `RECIPES`."""

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
    table = Table(values, source)
    table.keys(_TARGET_KEYS)
    if (schema := table.whole("schema")) != SCHEMA:
        raise TargetError(
            f"{source}: schema",
            expected=str(SCHEMA),
            got=str(schema),
            hint="this version of rowcol-edge is another one",
        )
    match = _match(table, source)
    pythons = _pythons(table)
    target = Target(
        name=name,
        title=table.prose("title"),
        match=match,
        pythons=pythons,
        platform=table.text("platform", _PLATFORM, "a tag such as manylinux_2_36_aarch64"),
        runtimes=_runtimes(table.tables("runtimes"), source, pythons),
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
    if not target.platform.endswith(f"_{match['machine']}"):
        raise TargetError(f"{source}: platform", expected=f"a tag of {match['machine']}", got=repr(target.platform))
    return target


def runtime_entry(target: Target, runtime: RuntimeSpec) -> RuntimeEntry:
    """A runtime of a target as a bundle's manifest holds it."""
    return RuntimeEntry(
        name=runtime.name,
        oldest=runtime.oldest,
        opset=runtime.opset,
        ir_version=runtime.ir_version,
        threads=target.threads,
        install=install_lines(runtime),
        providers=runtime.providers,
        properties=runtime.properties,
    )


def install_lines(runtime: RuntimeSpec) -> str:
    """Shell lines that install a runtime on the board, from the data of its target."""
    lines = [*activate(runtime), _pip(runtime, runtime.requirements)]
    lines += [
        f"# {other.why} (Python {', '.join(other.pythons)}): {_pip(runtime, other.requirements)}"
        for other in runtime.alternatives
    ]
    return "\n".join(lines)


def activate(runtime: RuntimeSpec) -> list[str]:
    """The lines before that of pip: what the system needs, and the virtual environment."""
    return [*runtime.system, runtime.venv, _ACTIVATE]


def _pip(runtime: RuntimeSpec, requirements: tuple[str, ...]) -> str:
    words = ["python3 -m pip install"]
    words += [f"--extra-index-url {runtime.index_url}"] if runtime.index_url else []
    words += [f"--find-links {runtime.find_links}"] if runtime.find_links else []
    # a shell would take < and > for redirections
    return " ".join([*words, *(f'"{text}"' if re.search("[^A-Za-z0-9._-]", text) else text for text in requirements)])


def _match(table: Table, source: str) -> dict[str, str]:
    match = table.strings_by_key("match")
    check_keys(match, {"machine": True, "device_tree_model": False, "cpu_model": False}, f"{source}: match")
    try:
        re.compile(match.get("cpu_model", ""))
    except re.error as e:
        raise TargetError(f"{source}: match.cpu_model", expected="a regular expression", got=str(e)) from e
    return match


def _pythons(table: Table, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """CPython versions, oldest first; with ``known``, some of those."""
    found = table.texts("pythons", known)
    if not all(_PYTHON.fullmatch(version) for version in found):
        raise TargetError(f"{table.where}: pythons", expected="versions such as 3.11", got=repr(list(found)))
    return tuple(sorted(found, key=lambda version: int(version.partition(".")[2])))


def _runtimes(tables: list[Mapping[str, Any]], source: str, pythons: tuple[str, ...]) -> tuple[RuntimeSpec, ...]:
    specs: list[RuntimeSpec] = []
    for position, values in enumerate(tables):
        spec = _runtime(Table(values, f"{source}: runtimes[{position}]"), pythons)
        if spec.name in {earlier.name for earlier in specs}:
            raise TargetError(f"{source}: runtimes", expected="each runtime once", got=f"{spec.name} twice")
        specs.append(spec)
    return tuple(specs)


def _runtime(table: Table, pythons: tuple[str, ...]) -> RuntimeSpec:
    table.keys({key: key not in _OPTIONAL for key in RuntimeSpec.__dataclass_fields__})
    has = table.values.__contains__
    if has("opset") != has("ir_version"):
        raise TargetError(table.where, expected="both opset and ir_version, or neither", got="one of them")
    return RuntimeSpec(
        name=table.text("name"),
        oldest=table.text("oldest", _VERSION, "a version such as 1.17.0"),
        opset=table.whole("opset") if has("opset") else None,
        ir_version=table.whole("ir_version") if has("ir_version") else None,
        providers=table.texts("providers"),
        precisions=table.texts("precisions", PRECISIONS),
        requirements=table.requirements("requirements"),
        why=table.prose("why"),
        properties=table.strings_by_key("properties") if has("properties") else {},
        system=table.lines("system") if has("system") else (),
        venv=table.text("venv") if has("venv") else _VENV,
        index_url=table.text("index_url") if has("index_url") else "",
        find_links=table.text("find_links") if has("find_links") else "",
        alternatives=_alternatives(table, pythons) if has("alternatives") else (),
    )


def _alternatives(table: Table, pythons: tuple[str, ...]) -> tuple[Alternative, ...]:
    found = []
    for position, values in enumerate(table.tables("alternatives")):
        inner = Table(values, f"{table.where}: alternatives[{position}]")
        inner.keys(dict.fromkeys(Alternative.__dataclass_fields__, True))
        found.append(Alternative(_pythons(inner, pythons), inner.requirements("requirements"), inner.prose("why")))
    return tuple(found)


_OPTIONAL = (
    "opset", "ir_version", "properties", "system", "venv", "index_url", "find_links", "alternatives",
    "proxy_env", "recipes",
)  # fmt: skip
_TARGET_KEYS = {"schema": True} | {key: key not in _OPTIONAL for key in Target.__dataclass_fields__ if key != "name"}


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
