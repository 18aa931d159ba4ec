"""Fewer channels: the layers that give, pass on and take a set's channels, rewritten for those that are kept.

No operator is added. With ``T`` (width × size) what is kept and ``B`` (size × width) what a reader makes of it,

    giver:   W → T W,  b → T b          reader:  W → W B,  b → b + W shift

and what passes the channels on keeps those that are kept. Where only the product of query and key reads a set,
``qᵀk ≈ (T q)ᵀ (Bᵀ k)``, which is exact for all of it.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.calling import bind, evaluating, quiet, tensors
from rowcol_edge.errors import PlanError
from rowcol_edge.factoring.channel_spaces import ChannelSpaces, unmeasured
from rowcol_edge.factoring.channels import ChannelSet, Slot
from rowcol_edge.factoring.products import product

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Narrowing:
    """A set at a width.

    Attributes:
        take: (groups, width, size), what is kept.
        give: for each use (groups, size, width) and the shift (groups, size); None: the first channels are kept and
            the others dropped.
        partner: (groups, width, size), what is kept of the keys where a product of two reads the set.
        scale: what the queries are multiplied with, because the code divides by the root of the width.
    """

    channels: ChannelSet
    take: Array
    give: tuple[tuple[Array, Array], ...] | None
    partner: Array | None = None
    scale: float = 1.0

    @property
    def width(self) -> int:
        return int(self.take.shape[1])

    def rows(self, slot: Slot) -> Array | None:
        """(groups, width, size) that a giver's outputs are multiplied with; None: the first are kept as they are."""
        if self.give is None:
            return None
        first = self.channels.contracted is None or slot.name == self.channels.contracted[0]
        return self.scale * self.take if first or self.partner is None else self.partner


def narrowing(channels: ChannelSet, spaces: ChannelSpaces, width: int) -> Narrowing:
    """A set narrowed to its best ``width`` channels (a group)."""
    take = spaces.take(width)
    if channels.contracted is not None:
        partner = spaces.reads[0].basis[:, :, :width].transpose(0, 2, 1).astype(np.float64)
        # each direction as large among the queries as among the keys, which an int8 product wants
        sizes = np.sqrt(np.linalg.norm(take, axis=2, keepdims=True) / np.linalg.norm(partner, axis=2, keepdims=True))
        return Narrowing(channels, take / sizes, (), partner * sizes, _scale(channels, width))
    return Narrowing(channels, take, tuple(spaces.give(place, width) for place in range(len(channels.uses))))


def _scale(channels: ChannelSet, width: int) -> float:
    return float((width / channels.size) ** 0.5) if channels.rescale else 1.0


def plain(model: nn.Module, channels: ChannelSet, width: int) -> Narrowing:
    """The first ``width`` channels, or as many directions with a part of each; the others as if nobody read them."""
    if channels.norms:
        spaces = unmeasured(model, channels)
        return Narrowing(channels, spaces.take(width), tuple(spaces.give(i, width) for i in range(len(channels.uses))))
    if channels.turned:
        take = _frame(channels)[None, :, :width].transpose(0, 2, 1).repeat(channels.groups, 0)
        give = tuple((take.transpose(0, 2, 1), np.zeros(take.shape[::2])) for _ in channels.uses)
        return Narrowing(channels, take, give, take, _scale(channels, width))
    return Narrowing(channels, np.eye(width, channels.size)[None], None)


def _frame(channels: ChannelSet) -> Array:
    """(size, size): random directions, which only what treats all combinations of channels alike lets through."""
    return np.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((channels.size, channels.size))).Q)


def narrow(model: nn.Module, narrowings: Iterable[Narrowing]) -> nn.Module:
    """A copy of ``model`` with each set at its width; the model is left as it is.

    Raises:
        PlanError: a set of another model.
    """
    result = copy.deepcopy(model)
    editor = _Editor(result)
    for each in narrowings:
        _write(editor, each)
    editor.finish()
    return result


def _write(editor: _Editor, each: Narrowing) -> None:
    channels, width = each.channels, each.width
    for slot in channels.producers:
        editor.outputs(slot, width, each.rows(slot))
    for name in channels.norms:
        editor.norm(name, width)
    if channels.norms:
        for slot in channels.parameters:
            editor.rotate(slot, each.take[0])
    elif channels.carriers or channels.parameters:
        kept = np.broadcast_to(each.take.argmax(axis=2), (channels.groups, width))
        for slot in channels.carriers:
            editor.carry(slot, kept)
        for slot in channels.parameters:
            editor.parameter(slot, kept)
    for place, slot in enumerate(channels.uses):
        editor.inputs(slot, width, None if each.give is None else each.give[place])
    for name, attribute in channels.sizes:
        setattr(editor.model.get_submodule(name), attribute, width)


@dataclass(slots=True)
class _Editor:
    """Weights in float64 while several sets change them; what is dropped goes at the end, so that places stay."""

    model: nn.Module
    weights: dict[str, Array] = field(default_factory=dict)
    biases: dict[str, Array | None] = field(default_factory=dict)
    dropped: dict[tuple[str, int], list[NDArray[np.int64]]] = field(default_factory=lambda: defaultdict(list))
    parameters: dict[tuple[str, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=dict)

    def _layer(self, name: str) -> nn.Linear | _ConvNd | _BatchNorm:
        try:
            module = self.model.get_submodule(name)
        except AttributeError as error:
            raise PlanError(f"channels of layer {name!r}", expected="a layer of the model", got="none") from error
        assert isinstance(module, nn.Linear | _ConvNd | _BatchNorm)  # channels.find follows no others
        return module

    def _weight(self, name: str) -> Array:
        """(out, in, kernel …), float64."""
        if name not in self.weights:
            module = self._layer(name)
            weight, bias = (
                None if each is None else each.detach().to("cpu", torch.float64, copy=True).numpy()
                for each in (module.weight, module.bias)
            )
            assert weight is not None
            self.weights[name] = weight.swapaxes(0, 1) if _inputs_first(module) else weight
            self.biases[name] = bias
        return self.weights[name]

    def outputs(self, slot: Slot, width: int, take: Array | None) -> None:
        self.dropped[slot.name, 0].append(slot.index[:, width:, 0].reshape(-1))
        if take is None:
            return
        weight, bias = self._weight(slot.name), self.biases[slot.name]
        for rows, part in zip(slot.index[:, :, 0], take, strict=True):
            moved = product(part, weight[rows].reshape(len(rows), -1))
            weight[rows[:width]] = moved.reshape(-1, *weight.shape[1:])
            if bias is not None:
                bias[rows[:width]] = part @ bias[rows]

    def inputs(self, slot: Slot, width: int, give: tuple[Array, Array] | None) -> None:
        self.dropped[slot.name, 1].append(slot.index[:, width:].reshape(-1))
        if give is None:
            return
        weight = self._weight(slot.name)
        moved = np.zeros(weight.shape[0])
        for group, part, shift in zip(slot.index, *give, strict=True):
            for columns in group.T:
                before = weight[:, columns]
                if shift.any():
                    moved += (before.reshape(*before.shape[:2], -1).sum(2)) @ shift
                weight[:, columns[:width]] = np.moveaxis(product(np.moveaxis(before, 1, -1), part), -1, 1)
        bias = self.biases[slot.name]  # which the layer has from now on, whatever is in it: that is what it costs
        self.biases[slot.name] = moved if bias is None else bias + moved

    def carry(self, slot: Slot, kept: NDArray[np.int64]) -> None:
        """A depthwise convolution or a batch norm: the rows of the kept channels."""
        self._move(slot.name, 0, slot.index, kept)

    def parameter(self, slot: Slot, kept: NDArray[np.int64]) -> None:
        self._move(slot.name, slot.axis, slot.index, kept)

    def norm(self, name: str, width: int) -> None:
        """A layer norm without scale and shift, which its readers take up; see `ChannelSpaces.take`."""
        norm = self.model.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm)
        norm.eps *= norm.normalized_shape[0] / width
        norm.normalized_shape = (width,)
        with torch.no_grad():
            for part, value in (("weight", 1.0), ("bias", 0.0)):
                old = getattr(norm, part)
                if old is not None:
                    new = torch.full_like(old[:width], value)
                    setattr(norm, part, nn.Parameter(new, requires_grad=old.requires_grad))

    def rotate(self, slot: Slot, take: Array) -> None:
        """A parameter that is added to a stream."""
        path, _, attribute = slot.name.rpartition(".")
        holder = self.model.get_submodule(path)
        old = getattr(holder, attribute)
        values = np.moveaxis(old.detach().double().cpu().numpy(), slot.axis, -1) @ take.T
        new = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, slot.axis))).to(old)
        setattr(
            holder,
            attribute,
            nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new,
        )
        if isinstance(holder, nn.Embedding):
            holder.embedding_dim = len(take)

    def _move(self, name: str, axis: int, index: NDArray[np.int64], kept: NDArray[np.int64]) -> None:
        width = kept.shape[1]
        source = np.take_along_axis(index, kept[:, :, None], axis=1)
        moves = (index[:, :width].reshape(-1), source.reshape(-1))
        before = self.parameters.get((name, axis))
        if before is not None:  # segments of a concatenation, each of another set
            moves = tuple(np.concatenate(pair) for pair in zip(before, moves, strict=True))  # type: ignore[assignment]
        self.parameters[name, axis] = moves
        self.dropped[name, axis].append(index[:, width:].reshape(-1))

    @torch.no_grad()
    def finish(self) -> None:
        for name in dict.fromkeys((*self.weights, *(name for name, _ in self.dropped))):
            if isinstance(_module(self.model, name), nn.Linear | _ConvNd) and (name, 0) not in self.parameters:
                self._layer_done(name)
        for (name, axis), (target, source) in self.parameters.items():
            gone = np.concatenate(self.dropped[name, axis])
            module = _module(self.model, name)
            if isinstance(module, _ConvNd):
                self._slice(module, "weight", 0, target, source, gone)
                if module.bias is not None:
                    self._slice(module, "bias", 0, target, source, gone)
                module.in_channels = module.out_channels = module.groups = len(module.weight)
            elif isinstance(module, _BatchNorm):
                for part in ("weight", "bias", "running_mean", "running_var"):
                    if getattr(module, part) is not None:
                        self._slice(module, part, 0, target, source, gone)
                assert module.running_mean is not None
                module.num_features = len(module.running_mean)
            else:
                path, _, attribute = name.rpartition(".")
                self._slice(self.model.get_submodule(path), attribute, axis, target, source, gone)

    @staticmethod
    def _slice(
        holder: nn.Module,
        name: str,
        axis: int,
        target: NDArray[np.int64],
        source: NDArray[np.int64],
        gone: NDArray[np.int64],
    ) -> None:
        old = getattr(holder, name)
        order = np.arange(old.shape[axis])
        order[target] = source
        order = np.delete(order, gone)
        new = old.detach().index_select(axis, torch.from_numpy(order).to(old.device)).contiguous()
        if isinstance(old, nn.Parameter):
            setattr(holder, name, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            setattr(holder, name, new)

    def _layer_done(self, name: str) -> None:
        module = self._layer(name)
        assert isinstance(module, nn.Linear | _ConvNd)
        first = int(_inputs_first(module))  # the axis of the outputs
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        if name in self.weights:
            changed, moved = self.weights[name], self.biases[name]
            weight = torch.from_numpy(changed.swapaxes(0, 1) if first else changed).to(weight)
            bias = None if moved is None else torch.from_numpy(moved).to(weight)
        for side in (0, 1):
            gone = self.dropped.get((name, side), [])
            if gone:
                axis = side ^ first
                kept = torch.from_numpy(np.delete(np.arange(weight.shape[axis]), np.concatenate(gone)))
                weight = weight.index_select(axis, kept.to(weight.device))
                bias = bias if bias is None or side else bias.index_select(0, kept.to(weight.device))
        old = module.weight
        last = old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous()
        weight = weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        module.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        if bias is not None:
            module.bias = nn.Parameter(bias.contiguous(), requires_grad=old.requires_grad)
        outputs, inputs = weight.shape[first], weight.shape[1 - first]
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = outputs, inputs
        else:
            module.out_channels, module.in_channels = outputs, inputs


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a parameter
        return None


def _inputs_first(module: nn.Module) -> bool:
    """torch keeps a transposed convolution's weight as (in, out, kernel)."""
    return isinstance(module, _ConvNd) and module.transposed


def checked(
    model: nn.Module, sets: Sequence[ChannelSet], example: Mapping[str, torch.Tensor]
) -> tuple[ChannelSet, ...]:
    """The sets, those fixed that the model's code cannot have narrower, and those marked whose product of query and key
    it divides by the root of their width, whose width it keeps in attributes, or which cannot be combined anew.

    Every set is tried at two widths, neighbours at different ones: the narrowed model must give what the model gives
    whose other channels, or directions, nobody reads. All at once first; halves of them where that fails.
    """
    tried = {each.name: each for each in _tried(model, [each for each in sets if not each.fixed], example)}
    return tuple(each if each.fixed else tried[each.name] for each in sets)


_TRIES, _SHARES = 2, (0.34, 0.5)  # of the channels: widths between these
_TOLD = 0.2  # of an output: a change that rounding to single precision does not hide


def _tried(model: nn.Module, some: Sequence[ChannelSet], example: Mapping[str, torch.Tensor]) -> Sequence[ChannelSet]:
    def works(marked: Sequence[ChannelSet]) -> bool:
        return all(_alike(model, marked, turn, example) for turn in range(_TRIES))

    products = any(each.contracted is not None for each in some)
    for rescale in (False, True) if products else (False,):
        marked = [replace(each, rescale=rescale and each.contracted is not None) for each in some]
        if not some or works(marked):
            return marked
    if len(some) > 1:
        half = len(some) // 2
        return [*_tried(model, some[:half], example), *_tried(model, some[half:], example)]
    [one], kinds = some, _sizes(model, some[0])
    kept = [[kind] for kind in kinds] + ([kinds] if len(kinds) > 1 else [])
    found = [replace(one, sizes=tuple(itertools.chain(*attributes))) for attributes in kept]
    if one.turned and one.contracted is None:
        found += [replace(each, linear=False) for each in (one, *found)]
    for each in found:
        if works([each]):
            return [each]
    return [replace(one, fixed="the model's code does not do with fewer")]


def _width(channels: ChannelSet, place: int, turn: int) -> int:
    """To try the set at ``place`` with: neighbours of a size get other ones, as they may in a plan, and each of them
    another one in its second turn."""
    least, most = (max(2 if channels.norms else 1, int(channels.size * share)) for share in _SHARES)
    count = max(1, min(max(most, least + 1), channels.size - 1) - least + 1)
    return least + (place + turn * max(1, count // _TRIES)) % count


def _sizes(model: nn.Module, channels: ChannelSet) -> list[list[tuple[str, str]]]:
    """Attributes in which the model's code may keep the number of channels, those of modules of a kind together.

    Of torch's own modules none: what reads theirs is a layer or norm of the set, or does without.
    """
    found: dict[tuple[type, str], list[tuple[str, str]]] = defaultdict(list)
    for name, module in model.named_modules() if channels.groups == 1 else ():
        for attribute, value in vars(module).items():
            if type(value) is int and value == channels.size and not type(module).__module__.startswith("torch."):
                found[type(module), attribute].append((name, attribute))
    return list(found.values())


def _alike(model: nn.Module, sets: Sequence[ChannelSet], turn: int, example: Mapping[str, torch.Tensor]) -> bool:
    found = _outcomes(model, sets, turn, example)
    close = bool(found) and all(_close(*each) for each in found)
    told = all(_largest(whole - wanted) >= _TOLD * _largest(wanted) for wanted, _, whole in found if _single(wanted))
    if not told or (found and not close and any(each.turned for each in sets)):
        # rounding may be all that single precision shows of what the channels do (a large offset, say), and directions
        # round otherwise than channels
        double = {name: value.double() if value.is_floating_point() else value for name, value in example.items()}
        found = _outcomes(copy.deepcopy(model).double(), sets, turn, double)
        return bool(found) and all(_close(*each) for each in found)
    return close


def _single(values: torch.Tensor) -> bool:
    return values.dtype == torch.float32


def _outcomes(
    model: nn.Module, sets: Sequence[ChannelSet], turn: int, example: Mapping[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What the model gives whose other channels nobody reads, what the narrowed one gives, and what the whole one does;
    empty where one of them does not run."""
    widths = [_width(each, place, turn) for place, each in enumerate(sets)]
    unread = copy.deepcopy(model)
    for each, width in zip(sets, widths, strict=True):
        _unread(unread, each, width)
    try:
        wanted = _outputs(unread, example)
        got = _outputs(
            narrow(model, [plain(model, each, width) for each, width in zip(sets, widths, strict=True)]), example
        )
        whole = _outputs(model, example)
    except Exception:  # noqa: BLE001 - boundary: the user's own code meets sizes it may not expect
        return []
    return list(zip(wanted, got, whole, strict=True)) if len(wanted) == len(got) == len(whole) else []


def _unread(model: nn.Module, channels: ChannelSet, width: int) -> None:
    """In place: nobody reads the channels, or directions, behind the first ``width``."""
    if channels.norms or channels.turned:
        frame = unmeasured(model, channels).stream if channels.norms else _frame(channels)
        assert frame is not None
        kept = frame[:, : width - 1] if channels.norms else frame[:, :width]
        inside = kept @ kept.T
        editor = _Editor(model)
        for slot in channels.producers:
            editor.outputs(slot, channels.size, inside[None].repeat(channels.groups, 0))
        for slot in channels.parameters:
            editor.rotate(slot, inside)
        editor.finish()
        return
    with torch.no_grad():
        for slot in channels.uses:
            weight = model.get_submodule(slot.name).weight
            assert isinstance(weight, torch.Tensor)
            columns = torch.from_numpy(slot.index[:, width:].reshape(-1)).to(weight.device)
            axis = 0 if _inputs_first(model.get_submodule(slot.name)) else 1
            weight.index_fill_(axis, columns, 0.0)


def _outputs(model: nn.Module, example: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    args, kwargs = bind(model, example)
    with evaluating(model), torch.inference_mode(), quiet():
        return tensors(model(*args, **kwargs))


def _close(wanted: torch.Tensor, got: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether both are the same beside what the channels do in ``whole``, whose every channel is read: an offset that
    is larger than all that the model calculates hides no difference."""
    if not wanted.shape == got.shape == whole.shape:
        return False
    eps = torch.finfo(wanted.dtype).eps if wanted.is_floating_point() else 0.0
    size, done = _largest(wanted), _largest(whole - wanted)
    near = (wanted - got).abs() <= max(64 * eps * size, 4 * max(64 * eps, 1e-5) * min(done, size), 1e-34)
    return bool((near | (wanted == got)).all())  # scores that are masked are infinite in both


def _largest(values: torch.Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
