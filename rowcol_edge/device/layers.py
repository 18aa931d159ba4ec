"""``layers/ARM.json`` of a bundle: which layer of the original model each operator of an arm's file belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ..errors import BundleError
from .bundle import Bundle
from .fields import parse_json
from .records import decode

SCHEMA = 1
"""Version of the file's format. History: 1 – first one."""
FOLDER = "layers"
MODEL = "(model)"
"""Stands for the module that is the whole model: what its own code does between its layers."""
_ADDED = ("fused ",)
"""What runtimes write before the name of an operator that they have changed."""


@dataclass(frozen=True, slots=True)
class FileLayer:
    """A layer, or another module, as it stands in the file of one arm. ``form`` and ``rank`` are the plan's.

    ``macs`` are multiply-accumulates of one sample, ``traffic_bytes`` its weights and what it takes from and gives to
    others, as the file stores it; None where a size is not known.
    """

    name: str
    form: str
    rank: int | None
    macs: int
    traffic_bytes: int | None


@dataclass(frozen=True, slots=True)
class FileOperator:
    """``layer`` is its place among the layers, -1 where it belongs to none. ``gives`` are its outputs, whose names some
    runtimes take for an operator that they have changed."""

    name: str
    kind: str
    layer: int
    macs: int
    gives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerMap:
    """The operators of an arm's file and the layers they belong to."""

    layers: tuple[FileLayer, ...]
    operators: tuple[FileOperator, ...]
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> LayerMap:
        """BundleError: no such record, another schema, or a layer that is not there."""
        values = parse_json(text, where)
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != SCHEMA:
            raise BundleError(f"{where}.schema", expected=str(SCHEMA), got=repr(schema), hint="build the bundle again")
        found = decode(cls, values, where)
        for i, operator in enumerate(found.operators):
            if not -1 <= operator.layer < len(found.layers):
                got = str(operator.layer)
                raise BundleError(f"{where}.operators[{i}].layer", expected="a place among the layers", got=got)
        return found


def path(arm: str) -> str:
    """Where it lies in the bundle: not beside the artifact, whose files a runtime opens and an arm's size counts."""
    return f"{FOLDER}/{arm}.json"


def load(bundle: Bundle, arm: str) -> LayerMap | None:
    """None for a bundle that was built before there was one. IntegrityError: changed. BundleError: not readable."""
    name = path(arm)
    if all(entry.path != name for entry in bundle.manifest.files):
        return None
    return LayerMap.from_json(bundle.file(name).read_bytes(), name)


class Finder:
    """From the names that a runtime has for its operators back to those of the file."""

    def __init__(self, known: LayerMap) -> None:
        self._known = {name: operator for operator in known.operators for name in operator.gives}
        self._known |= {operator.name: operator for operator in known.operators}

    def __call__(self, names: Iterable[str]) -> FileOperator | None:
        """Of the operators that one of the runtime's was made of, the one that multiplies most, or the first with a
        layer; None where none is known."""
        found = [operator for name in names if (operator := self._find(name)) is not None]
        return max(found, key=lambda operator: (operator.macs, operator.layer >= 0), default=None)

    def _find(self, name: str) -> FileOperator | None:
        """By the whole name, or by the longest beginning of it that ends where a runtime adds something of its own."""
        for added in _ADDED:
            name = name.removeprefix(added)
        for end in range(len(name), 0, -1):
            rest = name[end:]
            # a number tells another operator of that name, a point another module
            if not rest or not (rest[0].isalnum() or rest[0] == "." or rest[1:].isdigit()):
                operator = self._known.get(name[:end])
                if operator is not None:
                    return operator
        return None
