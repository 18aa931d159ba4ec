"""Which channels must change together: the terms of a sum, what a depthwise convolution passes on, the heads of an
attention. It is read off the exported graph, see `axes`, not off names."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rowcol_edge.factoring import axes
from rowcol_edge.factoring.axes import Axis, Digit, Part, Trail
from rowcol_edge.factoring.channels import ChannelSet, Index, Slot
from rowcol_edge.factoring.graph import LayerGraph, weight_owners
from rowcol_edge.factoring.layers import held


def find(model: nn.Module, graph: LayerGraph, program: torch.export.ExportedProgram) -> tuple[ChannelSet, ...]:
    """All sets of ``model`` (batch norms folded), in call order, those that must stay as they are with the reason.

    ``program`` is of this model, or of one with other modules of the same structure.
    """
    reasons = held(model, graph)
    owners = weight_owners(model, program)
    parts = {
        holder: Part(name, module := model.get_submodule(name), _norm_reason(module, reasons.get(name, "")))
        for holder, name in owners.items()
    }
    known = {part.name for part in parts.values()}
    computed = {
        name: Part(name, model.get_submodule(name), reason)
        for name, reason in reasons.items()
        if reason and name not in known
    }
    trail = axes.follow(program, parts, computed)
    return tuple(replace(each, loose=_loose(model, each)) for each in _Sets(trail).all())


def _loose(model: nn.Module, channels: ChannelSet) -> int:
    """Parameters that go with a channel besides the weights and biases of layers."""
    parameters, count = dict(model.named_parameters()), 0
    for slot in channels.carriers:
        module = model.get_submodule(slot.name)
        if isinstance(module, _BatchNorm):
            count += channels.groups * sum(1 for _ in module.parameters())
    for name in channels.norms:
        count += sum(1 for _ in model.get_submodule(name).parameters())
    for slot in channels.parameters:
        if slot.name in parameters:
            found = parameters[slot.name]
            count += found.numel() // found.shape[slot.axis] * slot.index.shape[2] * channels.groups
    return count


def _norm_reason(module: nn.Module, layer: str) -> str:
    """Why a norm cannot be made narrower; of a layer its own reason."""
    if isinstance(module, _BatchNorm):
        return "" if module.track_running_stats and not module.training else "a batch norm over its batch"
    if isinstance(module, nn.LayerNorm):
        return "hooks are attached to it" if module._forward_hooks or module._forward_pre_hooks else ""
    return layer


@dataclass(frozen=True, slots=True)
class _Atom:
    """A digit of a root that is split no further."""

    root: int
    stride: int


class _Sets:
    """Classes of atoms that are the same, and what follows from them."""

    def __init__(self, trail: Trail) -> None:
        self.trail = trail
        self.cuts: dict[int, set[int]] = {place: {1, root.size} for place, root in enumerate(trail.roots)}
        self._refine()
        self.parent: dict[_Atom, _Atom] = {}
        self.members: dict[_Atom, list[_Atom]] = defaultdict(list)
        for first, second in trail.same:
            for a, b in zip(self.atoms(first), self.atoms(second), strict=True):
                self.parent[self.top(a)] = self.top(b)

    def _refine(self) -> None:
        """Cut every root wherever a digit of it, or of one that is the same, begins or ends."""
        trail = self.trail
        every = [
            *(digit for pair in trail.same for digit in pair), *(digit for digit, _ in trail.pinned), *trail.bent,
            *(digit for _, axis in (*trail.read, *trail.carried) for digit in axes.digits(axis)),
        ]  # fmt: skip
        for digit in every:
            if digit.root >= 0:
                self.cuts[digit.root] |= {digit.stride, digit.stride * digit.size}
        changed = True
        while changed:
            changed = False
            for one, other in (*trail.same, *((b, a) for a, b in trail.same)):
                inside = {
                    cut // one.stride for cut in self.cuts[one.root] if one.stride <= cut <= one.stride * one.size
                }
                wanted = {cut * other.stride for cut in inside}
                if not wanted <= self.cuts[other.root]:
                    self.cuts[other.root] |= wanted
                    changed = True

    def atoms(self, digit: Digit) -> list[_Atom]:
        """Outermost first."""
        begin, end = digit.stride, digit.stride * digit.size
        inside = sorted(cut for cut in self.cuts[digit.root] if begin <= cut < end)
        return [_Atom(digit.root, cut) for cut in reversed(inside)]

    def size(self, atom: _Atom) -> int:
        return min(cut for cut in self.cuts[atom.root] if cut > atom.stride) // atom.stride

    def top(self, atom: _Atom) -> _Atom:
        while self.parent.get(atom, atom) != atom:
            atom = self.parent[atom]
        return atom

    def all(self) -> tuple[ChannelSet, ...]:
        trail = self.trail
        for place, root in enumerate(trail.roots):
            if root.size > 1:
                for atom in self.atoms(Digit(place, root.size, 1)):
                    self.members[self.top(atom)].append(atom)
        reasons: dict[_Atom, str] = {}
        # what is cut out is often put together again, and that says more
        for digit, reason in sorted(trail.pinned, key=lambda pinned: pinned[1] == axes.CUT):
            for atom in self.atoms(digit):
                reasons.setdefault(self.top(atom), reason)
        for place, cuts in self.cuts.items():
            ordered = sorted(cuts)
            if not trail.roots[place].size:  # an empty buffer
                continue
            if any(b % a for a, b in itertools.pairwise(ordered)):
                for atom in self.atoms(Digit(place, trail.roots[place].size, 1)):
                    reasons.setdefault(self.top(atom), "reshaped in two ways")
        bent = {self.top(atom) for digit in trail.bent for atom in self.atoms(digit)}
        made = [self._set(found, reasons, bent) for found in self.members.values()]
        return tuple(each for each in made if each is not None)

    def _norms(
        self, own: set[_Atom], reasons: Mapping[_Atom, str], bent: set[_Atom]
    ) -> tuple[list[str], list[tuple[str, Slot]], str]:
        """Layer norms that look at the class, who reads what they give, and why the class must stay if it must."""
        names: list[str] = []
        uses: list[tuple[str, Slot]] = []
        for name, digit, root in self.trail.normed:
            if not own & set(self.atoms(digit)):
                continue
            given = self.atoms(Digit(root, digit.size, 1))
            top = self.top(given[0])
            names.append(name)
            if len(given) != 1 or reasons.get(top) or top in bent:
                return names, [], reasons.get(top, "") or "more than linear layers read what a layer norm makes of it"
            if len(self.members[top]) > 1:
                return names, [], "what a layer norm gives is added to, as in post-norm Transformers"
            uses += [(name, slot) for slot in self._slots(self.trail.read, {given[0]}, set())]
        return names, uses, ""

    def _set(self, members: Sequence[_Atom], reasons: Mapping[_Atom, str], bent: set[_Atom]) -> ChannelSet | None:
        roots = self.trail.roots
        top = self.top(members[0])
        fixed, linear = reasons.get(top, ""), top not in bent
        layers = [atom for atom in members if roots[atom.root].parameter is None and not roots[atom.root].norm]
        # the outer digit of heads · d stays: how many heads there are is often written in the code
        if not layers or any(atom.stride != 1 for atom in layers):
            return None
        own = set(members)
        producers = [Slot(roots[atom.root].name, self._own(atom)) for atom in layers]
        parameters = [
            Slot(roots[atom.root].name, self._own(atom), roots[atom.root].parameter or 0)
            for atom in members
            if roots[atom.root].parameter is not None
        ]
        size = self.size(members[0])
        groups = producers[0].index.shape[0]
        heads = {
            self.top(outer)
            for atom in layers
            for outer in self.atoms(Digit(atom.root, roots[atom.root].size, 1))
            if outer.stride > 1
        }
        uses, carriers = (self._slots(places, own, heads) for places in (self.trail.read, self.trail.carried))
        norms, seen, reason = self._norms(own, reasons, bent)
        if norms and not fixed:
            if any(roots[atom.root].norm for atom in members):
                reason = "what a layer norm gives is added to, as in post-norm Transformers"
            fixed = reason or _stream_reason(plain=bool(uses or carriers), linear=linear, groups=groups)
            uses = [slot for _, slot in seen]
        every = [*producers, *parameters, *uses, *carriers]
        if not fixed and any(slot.index.shape[:2] != (groups, size) for slot in every):
            fixed = "its heads are not alike everywhere"
        contracted = self._contracted(own)
        if contracted and not fixed:
            alone = len(contracted) == 1 and sorted(slot.name for slot in producers) == sorted(contracted[0])
            fixed = _product_reason(alone=alone and len(every) == len(producers), linear=linear)
        if not uses and not contracted and not fixed:
            fixed = "no layer reads it"
        return ChannelSet(
            name=producers[0].name,
            groups=groups,
            size=size,
            producers=tuple(producers),
            carriers=tuple(carriers),
            uses=tuple(uses),
            parameters=tuple(parameters),
            norms=tuple(norms) if not fixed else (),
            normed={slot.name: norms.index(norm) for norm, slot in seen} if not fixed else {},
            linear=linear and not parameters and not carriers,
            contracted=contracted[0] if contracted and not fixed else None,
            fixed=fixed,
        )

    def _own(self, atom: _Atom) -> Index:
        """Along the whole axis of the root itself; the atom is its innermost or, of a parameter, any."""
        size = self.size(atom)
        values = np.arange(self.trail.roots[atom.root].size).reshape(-1, size, atom.stride)
        return np.asarray(values, dtype=np.int64)

    def _slots(self, places: Sequence[tuple[str, Axis]], own: set[_Atom], heads: set[_Atom]) -> list[Slot]:
        """Where layers take the class: one slot for each segment that holds it."""
        found = []
        for name, axis in places:
            begin = 0
            for segment in axis:
                index = self._index(segment, own, heads)
                if index is not None:
                    found.append(Slot(name, begin + index))
                begin += axes.span(segment)
        return found

    def _index(self, segment: axes.Segment, own: set[_Atom], heads: set[_Atom]) -> Index | None:
        """(groups, size, taps) along the segment; None where the class is not in it."""
        parts: list[tuple[_Atom | None, int]] = []
        for digit in segment:
            if digit.root < 0:
                parts.append((None, digit.size))
            else:
                parts += [(atom, self.size(atom)) for atom in self.atoms(digit)]
        places = [place for place, (atom, _) in enumerate(parts) if atom in own]
        if len(places) != 1:
            return np.zeros((0, 0, 0), dtype=np.int64) if places else None
        place = places[0]
        values = np.arange(axes.span(segment), dtype=np.int64).reshape([count for _, count in parts])
        outer = [i for i, (atom, _) in enumerate(parts) if atom is not None and self.top(atom) in heads]
        taps = [i for i in range(len(parts)) if i != place and i not in outer]
        ordered = values.transpose([*outer, place, *taps])
        size = parts[place][1]
        groups = int(np.prod([parts[i][1] for i in outer], dtype=np.int64))
        return ordered.reshape(groups, size, -1)

    def _contracted(self, own: set[_Atom]) -> list[tuple[str, str]]:
        roots = self.trail.roots
        return [
            (roots[first.root].name, roots[second.root].name)
            for first, second in self.trail.contracted
            if own & set(self.atoms(first))
        ]


def _stream_reason(*, plain: bool, linear: bool, groups: int) -> str:
    """Why channels that layer norms look at must stay."""
    if plain:
        return "a layer norm looks at all of it, and a layer that has none before it"
    if not linear:
        return "a layer norm looks at all of it, behind something that is not linear"
    return "" if groups == 1 else "a layer norm looks at heads"


def _product_reason(*, alone: bool, linear: bool) -> str:
    """Why queries and keys must stay."""
    if not alone:
        return "more than one product of a query and a key reads it"
    return "" if linear else "something that is not linear lies before the product (rotary embeddings, a norm)"
