"""The factor plan: which layer gets which form and rank, as a file people read, edit and apply again."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w

from rowcol_edge.errors import PlanError

SCHEMA = 2  # 1: forms dense and project; 2: channels and the form narrow (a plan of schema 1 has none, and is read)
FORMS = ("dense", "narrow", "project")

_HEADER = """\
# Factor plan of rowcol-edge. Edit `form` ("dense" or "project") and `rank` of a layer, `width` of a set of
# channels, then apply the plan again; a layer without a table stays dense, channels without one keep their width.
# The form "narrow" (a layer whose channels got fewer and that is else dense), energy, parameters_*, macs_*, of
# and reason are derived: they are computed anew when the plan is applied. macs_* are per sample.

"""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's form, and what follows from it."""

    name: str
    form: str = "dense"
    rank: int | None = None  # of the project form, else None
    energy: float = 1.0  # share kept of what the output is worth at the model's own (of its variance if not known)
    parameters_before: int = 0
    parameters_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    reason: str = ""  # why it stays dense


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """How many channels of a set are kept."""

    name: str
    width: int  # of each group, if they come in groups (the heads of an attention)
    of: int = 0
    parameters: int = 0  # saved outside of layers


@dataclass(frozen=True, slots=True)
class FactorPlan:
    """Forms, ranks and widths of a whole model."""

    layers: tuple[LayerPlan, ...]
    rank_multiple: int = 1
    made_by: str = ""  # "energy=0.999", "parameters<=400000", "edited" …
    model: str = ""
    channels: tuple[ChannelPlan, ...] = ()  # narrowed sets only
    refit: bool = False  # fit the weights once more, to inputs that are already compressed

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for layer in self.layers:
            if layer.name in seen:
                raise PlanError(f"plan names layer {layer.name!r} twice")
            seen.add(layer.name)
            _check_form(layer)
        sets = [each.name for each in self.channels]
        for each in self.channels:
            if sets.count(each.name) > 1:
                raise PlanError(f"plan names channels {each.name!r} twice")
            if each.width < 1:
                raise PlanError(f"channels {each.name!r}: width", expected="at least 1", got=str(each.width))
        if self.rank_multiple < 1:
            raise PlanError("rank_multiple", expected="a positive integer", got=str(self.rank_multiple))

    @property
    def projected(self) -> tuple[LayerPlan, ...]:
        """The layers that become two."""
        return tuple(layer for layer in self.layers if layer.form == "project")

    @property
    def changes(self) -> bool:
        """Whether applying it changes anything."""
        return bool(self.projected or self.channels)

    @property
    def saved_parameters(self) -> int:
        """Parameters that applying the plan takes away."""
        layers = sum(layer.parameters_before - layer.parameters_after for layer in self.layers)
        return layers + sum(each.parameters for each in self.channels)

    @property
    def digest(self) -> str:
        """sha256 of what the plan decides: name, form and rank of the layers that become two, widths of channels.
        Derived numbers, order, comments and dense layers have no part in it, so plans that do the same have the same
        digest."""
        decisions = sorted((layer.name, layer.form, layer.rank) for layer in self.projected)
        widths = sorted((each.name, each.width) for each in self.channels)
        return hashlib.sha256(
            json.dumps([SCHEMA, decisions, widths, self.refit], separators=(",", ":")).encode()
        ).hexdigest()

    def to_toml(self) -> str:
        """The plan as TOML with a header for people."""
        content: dict[str, Any] = {"schema": SCHEMA, "model": self.model, "made_by": self.made_by}
        content["rank_multiple"] = self.rank_multiple
        content["refit"] = self.refit
        if self.channels:
            content["channels"] = [asdict(each) for each in self.channels]
        content["layers"] = [
            {key: value for key, value in asdict(layer).items() if value not in (None, "")} for layer in self.layers
        ]
        return _HEADER + tomli_w.dumps(content)

    def write(self, path: str | Path) -> None:
        """Writes the plan; an existing file is replaced in one step.

        Raises:
            PlanError: the folder cannot be written.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self.to_toml(), encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise PlanError(f"cannot write plan {target}", got=error.strerror or str(error)) from error

    @classmethod
    def read(cls, path: str | Path) -> FactorPlan:
        """Reads a plan file. What it says about the model is checked by ``ranks.refresh`` and ``apply``.

        Raises:
            PlanError: unreadable, no TOML, another schema, an unknown key, a wrong type, an impossible rank.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            got = (error.strerror if isinstance(error, OSError) else None) or str(error)
            hint = "a bundle and rowcol-edge factor each hold a plan.toml"
            raise PlanError(f"plan {path}", expected="a readable plan file", got=got, hint=hint) from error
        return cls.from_toml(text, where=str(path))

    @classmethod
    def from_toml(cls, text: str, *, where: str = "plan") -> FactorPlan:
        """Parses TOML text; ``where`` names it in errors (see ``read``)."""
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(where, expected="TOML", got=str(error)) from error
        schema = content.pop("schema", None)
        if schema not in (1, SCHEMA):
            raise PlanError(f"{where}: schema", expected=f"1 or {SCHEMA}", got=repr(schema))
        tables, sets = _tables(content, "layers", where), _tables(content, "channels", where)
        _check_keys(content, {"model": str, "made_by": str, "rank_multiple": int, "refit": bool}, where)
        return cls(
            layers=tuple(_layer(table, where) for table in tables),
            channels=tuple(_channels(table, where) for table in sets),
            **content,
        )


def _tables(content: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    tables = content.pop(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise PlanError(f"{where}: {key}", expected=f"[[{key}]] tables", got=type(tables).__name__)
    return tables


_LAYER_TYPES: dict[str, type] = {
    "name": str,
    "form": str,
    "rank": int,
    "energy": float,
    "parameters_before": int,
    "parameters_after": int,
    "macs_before": int,
    "macs_after": int,
    "reason": str,
}
assert tuple(_LAYER_TYPES) == tuple(field.name for field in fields(LayerPlan))


def _layer(table: dict[str, Any], where: str) -> LayerPlan:
    name = table.get("name")
    if not isinstance(name, str):
        raise PlanError(f"{where}: a [[layers]] table without a name")
    # A whole number is a valid energy for people who write `energy = 1`.
    table = {key: float(value) if key == "energy" and type(value) is int else value for key, value in table.items()}
    _check_keys(table, _LAYER_TYPES, f"{where}: layer {name!r}")
    if table.get("form", "dense") != "project":
        # Turning a layer back to dense should not need a second edit.
        table.pop("rank", None)
    return LayerPlan(**table)


_CHANNEL_TYPES: dict[str, type] = {"name": str, "width": int, "of": int, "parameters": int}
assert tuple(_CHANNEL_TYPES) == tuple(field.name for field in fields(ChannelPlan))


def _channels(table: dict[str, Any], where: str) -> ChannelPlan:
    name = table.get("name")
    if not isinstance(name, str) or "width" not in table:
        raise PlanError(f"{where}: a [[channels]] table without a {'width' if isinstance(name, str) else 'name'}")
    _check_keys(table, _CHANNEL_TYPES, f"{where}: channels {name!r}")
    return ChannelPlan(**table)


def _check_keys(table: Mapping[str, object], types: Mapping[str, type], where: str) -> None:
    for key, value in table.items():
        if key not in types:
            raise PlanError(f"{where}: unknown key {key!r}", hint=nearest(key, types) or f"known: {', '.join(types)}")
        if type(value) is not types[key]:
            raise PlanError(f"{where}: {key}", expected=types[key].__name__, got=repr(value))


def _check_form(layer: LayerPlan) -> None:
    if layer.form not in FORMS:
        hint = nearest(layer.form, FORMS)
        raise PlanError(f"layer {layer.name!r}: form", expected=" or ".join(FORMS), got=repr(layer.form), hint=hint)
    if layer.form == "project" and (layer.rank is None or layer.rank < 1):
        raise PlanError(f"layer {layer.name!r}: rank", expected="at least 1", got=str(layer.rank))


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x' or 'y'?``, ``""`` if nothing is near."""
    matches = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
