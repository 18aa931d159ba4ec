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

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring.costs import Form, Split

SCHEMA = 3  # 1: forms dense and project; 2: channels and the form narrow; 3: other splits than column; all are read
FORMS = ("dense", "narrow", "project")

_HEADER = """\
# Factor plan of rowcol-edge. Edit `form` ("dense" or "project") and `rank` of a layer, `width` of a set of
# channels, then apply the plan again; a layer without a table stays dense, channels without one keep their width.
# `split` says which spaces a layer of form "project" keeps `rank` directions of: "column" (what it gives; if nothing
# is said), "row" (what it takes), "both" (Tucker-2: `rank` of what it gives, `taken` of what it takes) or "spatial"
# (k×1, then 1×k; with `across_first = true` the other way round).
# The form "narrow" (a layer whose channels got fewer and that is else dense), gauge, energy, parameters_*, macs_*, of
# reason and note are derived: they are computed anew when the plan is applied; loss, gap and recovered (epochs of the
# model beside this file) are left out then. macs_* are per sample.

"""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's form, and what follows from it."""

    name: str
    form: str = "dense"
    rank: int | None = None  # of the project form, else None
    energy: float | None = 1.0  # share kept of what the spaces cut down are worth (of variance if not known)
    parameters_before: int = 0
    parameters_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    reason: str = ""  # why it stays dense
    split: str = "column"  # of the project form
    taken: int | None = None  # of a split of both: what is kept of the layer's input
    across_first: bool = False  # of a spatial split
    gauge: str = ""  # how the channels between its parts were evened out (see `gauge`), one after the other

    @property
    def shape(self) -> str:
        """The form in words, with the split where there is one."""
        return f"{self.form} ({self.split})" if self.form == "project" else self.form

    @property
    def how(self) -> Split:
        """The split of the project form; PlanError where it is none."""
        if self.split not in list(Form):
            hint = nearest(self.split, map(str, Form))
            raise PlanError(f"layer {self.name!r}: split", expected=" or ".join(Form), got=repr(self.split), hint=hint)
        try:
            return Split(Form(self.split), self.rank or 0, self.taken, self.across_first)
        except PlanError as error:
            raise PlanError(f"layer {self.name!r}: {error.what}", expected=error.expected, got=error.got) from error


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
    recovered: int = 0  # epochs that the model beside it was trained for (see `recover`)
    loss: float | None = None  # predicted at the model's output
    gap: float | None = None  # at most so much of it could be saved by other forms and ranks at these widths
    note: str = ""  # why gradients or calibration data are too few to trust it (see `thin`)

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
        """The layers that become two or three."""
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
    def saved_macs(self) -> int:
        """Multiply-accumulates of one sample that applying the plan takes away."""
        return sum(layer.macs_before - layer.macs_after for layer in self.layers)

    @property
    def digest(self) -> str:
        """sha256 of what the plan decides: name, split and ranks of layers that become several, widths of channels.
        Derived numbers, order, comments and dense layers have no part in it, so plans that do the same have the same
        digest."""
        decisions = sorted(
            (layer.name, layer.split, layer.rank, layer.taken or 0, layer.across_first) for layer in self.projected
        )
        widths = sorted((each.name, each.width) for each in self.channels)
        return hashlib.sha256(
            json.dumps([SCHEMA, decisions, widths, self.refit], separators=(",", ":")).encode()
        ).hexdigest()

    def to_toml(self) -> str:
        """The plan as TOML with a header for people."""
        import tomli_w  # plans are also read where only the extra `report` is installed

        content: dict[str, Any] = {"schema": SCHEMA, "model": self.model, "made_by": self.made_by}
        content["rank_multiple"] = self.rank_multiple
        content["refit"] = self.refit
        if self.recovered:
            content["recovered"] = self.recovered
        content |= {key: value for key in ("loss", "gap") if (value := getattr(self, key)) is not None}
        if self.note:
            content["note"] = self.note
        if self.channels:
            content["channels"] = [asdict(each) for each in self.channels]
        content["layers"] = [_table(layer) for layer in self.layers]
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
        if schema not in range(1, SCHEMA + 1):
            raise PlanError(f"{where}: schema", expected=f"1 to {SCHEMA}", got=repr(schema))
        tables, sets = _tables(content, "layers", where), _tables(content, "channels", where)
        _check_keys(content, _PLAN_TYPES, where)
        return cls(
            layers=tuple(_layer(table, where) for table in tables),
            channels=tuple(_channels(table, where) for table in sets),
            **content,
        )


_PLAN_TYPES: dict[str, type] = {
    "model": str,
    "made_by": str,
    "rank_multiple": int,
    "refit": bool,
    "recovered": int,
    "loss": float,
    "gap": float,
    "note": str,
}


def _table(layer: LayerPlan) -> dict[str, Any]:
    """What there is to say of a layer."""
    said = {key: getattr(layer, key) for key in _LAYER_TYPES if key != "split" or layer.form == "project"}
    return {key: value for key, value in said.items() if value is not None and value != "" and value is not False}


def _tables(content: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    tables = content.pop(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise PlanError(f"{where}: {key}", expected=f"[[{key}]] tables", got=type(tables).__name__)
    return tables


#: in the order in which a layer's table has them
_LAYER_TYPES: dict[str, type] = {
    "name": str,
    "form": str,
    "split": str,
    "rank": int,
    "taken": int,
    "across_first": bool,
    "gauge": str,
    "energy": float,
    "parameters_before": int,
    "parameters_after": int,
    "macs_before": int,
    "macs_after": int,
    "reason": str,
}
assert set(_LAYER_TYPES) == {field.name for field in fields(LayerPlan)}


def _layer(table: dict[str, Any], where: str) -> LayerPlan:
    name = table.get("name")
    if not isinstance(name, str):
        raise PlanError(f"{where}: a [[layers]] table without a name")
    # A whole number is a valid energy for people who write `energy = 1`.
    table = {key: float(value) if key == "energy" and type(value) is int else value for key, value in table.items()}
    _check_keys(table, _LAYER_TYPES, f"{where}: layer {name!r}")
    if table.get("form", "dense") != "project":
        # Turning a layer back to dense should not need a second edit.
        for key in ("split", "rank", "taken", "across_first", "gauge"):
            table.pop(key, None)
    elif "energy" not in table:
        table["energy"] = None
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
    if layer.form != "project":
        return
    if layer.rank is None or layer.rank < 1:
        raise PlanError(f"layer {layer.name!r}: rank", expected="at least 1", got=str(layer.rank))
    _ = layer.how


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x' or 'y'?``, ``""`` if nothing is near."""
    matches = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
