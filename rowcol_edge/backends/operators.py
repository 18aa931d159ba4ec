"""The operators of an artifact, put together by the layers of the original model: what the times of a runtime's own
profiler are read by.

An operator belongs to the module it was written from, by its name (``blocks.0.attention/MatMul``). What converters and
quantizers have put in between belongs where its input comes from, what reads constants alone where its output goes.
Parts of a factored layer lie in a module of the layer's name, so they count to it, and so does what only changes a
layer's output value by value. Layers that a converter has made one product of stand together, in all files that are set
side by side. All else that no module is known for is left without a layer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..device.layers import MODEL, FileLayer, FileOperator

_ON_OUTPUTS = frozenset({
    "BatchNormalization", "Cast", "Clamp", "Clip", "Convert", "DequantizeLinear", "Elu", "FakeQuantize", "Gelu",
    "HSigmoid", "HSwish", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "PReLU", "QuantizeLinear", "Relu",
    "Selu", "Sigmoid", "SoftPlus", "Swish", "Tanh", "DEQUANTIZE", "GELU", "HARD_SWISH", "LEAKY_RELU", "LOGISTIC",
    "QUANTIZE", "RELU", "RELU6", "TANH",
})  # fmt: skip
"""What works on each value alone: runtimes do it while they write a layer's output."""


_BETWEEN = frozenset({
    "Cast", "Constant", "Convert", "Expand", "Flatten", "Identity", "Reorder", "Reshape", "Split", "Squeeze",
    "Transpose", "Unsqueeze", "CAST", "EXPAND_DIMS", "RESHAPE", "SQUEEZE", "TRANSPOSE",
})  # fmt: skip
"""What lays out values anew for what comes next, see also `_ON_OUTPUTS`."""
_SPLIT = "Split"
_DENSE: tuple[str, int | None] = ("dense", None)


@dataclass(frozen=True, slots=True)
class Operator:
    """``module`` is empty where nothing tells it; ``macs`` are multiply-accumulates of one sample."""

    name: str
    kind: str
    module: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int = 0


@dataclass(frozen=True, slots=True)
class OperatorGraph:
    """Operators in the order they run. ``size_bytes`` is that of each tensor as it is stored, for one sample; None or
    missing where it is not known. ``inputs`` and ``outputs`` are those of the whole."""

    operators: tuple[Operator, ...]
    size_bytes: Mapping[str, int | None]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def module_of(name: str, kind: str) -> str:
    """``blocks.0.attention`` of ``blocks.0.attention/MatMul_2``, MODEL of ``MatMul_2``; empty for other names."""
    if re.fullmatch(rf"{re.escape(kind)}(_\d+)?", name):
        return MODEL
    module = name.rpartition("/")[0].partition("/")[0]
    return "" if module == kind else module


def by_layer(
    graph: OperatorGraph,
    layers: Collection[str],
    forms: Mapping[str, tuple[str, int | None]] | None = None,
    together: Iterable[frozenset[str]] | None = None,
) -> tuple[tuple[FileLayer, ...], tuple[FileOperator, ...]]:
    """The operators with their layers; layers in the order they first run.

    Bytes of a layer are its weights, what it takes from other layers and what these take from it, each once.

    Args:
        layers: names of the layers that could be factored; a module that lies in none stands for itself.
        forms: form and rank by layer; ``dense`` where nothing is said.
        together: layers that stand together as one, see `merged`; those of the graph itself where nothing is said.
    """
    groups = merged([graph], layers) if together is None else tuple(together)
    joint = {name: _joint(group) for group in groups for name in group}
    known = dict(forms or {})
    known |= {_joint(group): _form([known[name] for name in sorted(group) if name in known]) for group in groups}
    homes = [joint.get(home, home) for home in _homes(graph, layers)]
    names = list(dict.fromkeys(filter(None, homes)))
    macs: Counter[str] = Counter()
    for operator, home in zip(graph.operators, homes, strict=True):
        macs[home] += operator.macs
    traffic = _traffic(graph, homes)
    found = tuple(FileLayer(name, *known.get(name, _DENSE), macs[name], traffic[name]) for name in names)
    places = {name: place for place, name in enumerate(names)}
    return found, tuple(
        FileOperator(operator.name, operator.kind, places.get(home, -1), operator.macs, _named(operator))
        for operator, home in zip(graph.operators, homes, strict=True)
    )


def merged(graphs: Iterable[OperatorGraph], layers: Collection[str]) -> tuple[frozenset[str], ...]:
    """Layers whose products a converter has made one in any of the graphs: queries, keys and values, say. Times of such
    layers can be compared with those of other files only together."""
    found: list[frozenset[str]] = []
    for graph in graphs:
        homes = [_layer(operator.module, layers) for operator in graph.operators]
        for members in _members(graph, homes, layers).values():
            touched = [group for group in found if not group.isdisjoint(members)]
            found = [group for group in found if group not in touched] + [frozenset(members).union(*touched)]
    return tuple(group for group in found if len(group) > 1)


def _joint(group: Collection[str]) -> str:
    """``blocks.0.attention.key+query+value``."""
    names = sorted(group)
    parent, point, _ = names[0].rpartition(".")
    return f"{parent}{point}" + "+".join(name.removeprefix(f"{parent}{point}") for name in names)


def _form(forms: Sequence[tuple[str, int | None]]) -> tuple[str, int | None]:
    """The form and rank of layers that stand together; no rank where they differ."""
    kinds = dict.fromkeys(kind for kind, _ in forms)
    return forms[0] if len(set(forms)) == 1 else (", ".join(kinds), None) if kinds else _DENSE


def _named(operator: Operator) -> tuple[str, ...]:
    """Its outputs, where they have names that a runtime may show."""
    return tuple(name for name in operator.outputs if name != operator.name and not name.isdigit() and ":" not in name)


def _homes(graph: OperatorGraph, layers: Collection[str]) -> list[str]:
    """The layer of each operator, one of them for a product of several; empty where none can be told."""
    made = {name: place for place, operator in enumerate(graph.operators) for name in operator.outputs}
    read = _readers(graph)
    live = _live(graph)
    homes = [_layer(operator.module, layers) for operator in graph.operators]
    for place, members in _members(graph, homes, layers).items():
        homes[place] = members[0]
    for place, operator in enumerate(graph.operators):
        sources = [name for name in operator.inputs if name in live]
        maker = made.get(sources[0]) if sources else None
        alone = maker is not None and len(sources) == 1 and read[sources[0]] == [place]
        lost = not homes[place] and operator.kind in _BETWEEN | _ON_OUTPUTS
        if maker is not None and (lost or (alone and operator.kind in _ON_OUTPUTS)):
            homes[place] = homes[maker] or homes[place]
    for place in reversed(range(len(graph.operators))):  # constants, and what stands before the first layer
        readers = [reader for name in graph.operators[place].outputs for reader in read.get(name, ())]
        lost = not homes[place] and graph.operators[place].kind in _BETWEEN | _ON_OUTPUTS
        if readers and (lost or live.isdisjoint(graph.operators[place].inputs)):
            homes[place] = homes[readers[0]] or homes[place]
    return homes


def _readers(graph: OperatorGraph) -> dict[str, list[int]]:
    """By tensor, the places of the operators that read it."""
    read: dict[str, list[int]] = {}
    for place, operator in enumerate(graph.operators):
        for name in operator.inputs:
            read.setdefault(name, []).append(place)
    return read


def _members(graph: OperatorGraph, homes: Sequence[str], layers: Collection[str]) -> dict[int, tuple[str, ...]]:
    """By place of a product that no module is known for, the layers whose product it is, by what reads it: the bias of
    one, or the parts it is split into. Parts that only the module around them reads are of those of its layers that
    the graph has no operator of."""
    read, live = _readers(graph), _live(graph)
    found = {}
    for place, operator in enumerate(graph.operators):
        if homes[place] or not operator.macs:
            continue
        readers, parted = _first_known(graph, place, homes, read)
        heirs = tuple(dict.fromkeys(homes[reader] for reader in readers))
        holders = {name.rpartition(".")[0] for name in heirs}
        biased = len(readers) == 1 and _adds_a_constant(graph.operators[readers[0]], live)
        if parted and len(heirs) == 1:
            inner = [name for name in layers if name.rpartition(".")[0] == heirs[0] and name not in homes]
            found[place] = tuple(inner) or heirs
        elif (parted and len(holders) == 1) or biased:
            found[place] = heirs
    return found


def _first_known(
    graph: OperatorGraph, place: int, homes: Sequence[str], read: Mapping[str, Sequence[int]]
) -> tuple[list[int], bool]:
    """The first operators with a layer that read what one without gives, and whether it is split on the way."""
    found, ahead, parted = [], [place], False
    while ahead:
        for name in graph.operators[ahead.pop(0)].outputs:
            for reader in read.get(name, ()):
                if homes[reader]:
                    found.append(reader)
                elif (kind := graph.operators[reader].kind) in _BETWEEN:
                    parted |= kind == _SPLIT
                    ahead.append(reader)
    return found, parted


def _adds_a_constant(operator: Operator, live: Collection[str]) -> bool:
    return operator.kind == "Add" and sum(name in live for name in operator.inputs) == 1


def _layer(module: str, layers: Collection[str]) -> str:
    """The layer that a module is, or is a part of; the module itself where that is none."""
    parts = module.split(".")
    outer = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in outer if name in layers), module)


def _live(graph: OperatorGraph) -> set[str]:
    """Tensors that follow from the inputs; all others are constants."""
    live = set(graph.inputs)
    for operator in graph.operators:
        if not live.isdisjoint(operator.inputs):
            live.update(operator.outputs)
    return live


def _traffic(graph: OperatorGraph, homes: Sequence[str]) -> dict[str, int | None]:
    """Bytes that go in and out of each layer at least; None where a size is not known."""
    live, made = _live(graph), {name for operator in graph.operators for name in operator.outputs}
    takes: dict[str, set[str]] = {home: set() for home in homes}
    gives: dict[str, set[str]] = {home: set() for home in homes}
    for operator, home in zip(graph.operators, homes, strict=True):
        # what is worked out of constants is not stored: they are
        takes[home].update(name for name in operator.inputs if name in live or name not in made)
        gives[home].update(operator.outputs)
    needed = set(graph.outputs)
    return {
        home: _total(
            graph.size_bytes,
            (takes[home] - gives[home])
            | {name for name in gives[home] & live if name in needed or _read_elsewhere(name, home, takes)},
        )
        for home in takes
    }


def _read_elsewhere(name: str, home: str, takes: Mapping[str, set[str]]) -> bool:
    return any(name in taken for other, taken in takes.items() if other != home)


def _total(size_bytes: Mapping[str, int | None], names: Iterable[str]) -> int | None:
    sizes = [size_bytes.get(name) for name in names if name]
    return None if None in sizes else sum(size for size in sizes if size is not None)
