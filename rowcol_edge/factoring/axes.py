"""Where channels go: the axes of every tensor in an exported graph, followed back to the layers that made them.

An axis is a row of segments (a concatenation has several), a segment a row of digits, as in a mixed-radix number: a
layer that gives ``heads · d`` features gives one digit, which a reshape to ``(heads, d)`` splits in two. What an
operator does to two axes at once (a sum, a product, a contraction) makes their digits the same; what it does that
channels cannot survive by themselves (a layer norm, an output of the model, an operator that is not known) pins them,
with the reason.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.factoring.graph import inside

# Roots of digits that no layer gives, all below zero:
NOTHING = -1  # samples, pixels, tokens
INPUT = -2  # whatever the model is given


@dataclass(frozen=True, slots=True)
class Digit:
    """``size`` values of a root's channels, ``stride`` channels apart."""

    root: int
    size: int
    stride: int


Segment = tuple[Digit, ...]
Axis = tuple[Segment, ...]
Axes = tuple[Axis, ...]
_ONE: Axis = ((),)
CUT = "channels are cut out of it"


@dataclass(frozen=True, slots=True)
class Root:
    """Where channels begin: the output of a layer or layer norm, or an axis of a parameter that is no layer's."""

    name: str
    size: int
    parameter: int | None = None  # the axis of the parameter ``name``; None: a module
    norm: bool = False


@dataclass(slots=True)
class Trail:
    """What a graph does to channels."""

    roots: list[Root] = field(default_factory=list)
    same: list[tuple[Digit, Digit]] = field(default_factory=list)
    pinned: list[tuple[Digit, str]] = field(default_factory=list)
    bent: list[Digit] = field(default_factory=list)  # by something that is not linear
    read: list[tuple[str, Axis]] = field(default_factory=list)  # by a layer that mixes them
    carried: list[tuple[str, Axis]] = field(default_factory=list)  # by one that treats each by itself
    contracted: list[tuple[Digit, Digit]] = field(default_factory=list)  # summed over in a product of two tensors
    normed: list[tuple[str, Digit, int]] = field(default_factory=list)  # layer norm, what it takes, root it gives

    def pin(self, axis: Axis, reason: str) -> None:
        self.pinned += [(digit, reason) for digit in digits(axis) if digit.root >= 0]

    def root(self, root: Root) -> Axis:
        self.roots.append(root)
        return ((Digit(len(self.roots) - 1, root.size, 1),),) if root.size > 1 else _ONE

    def merge(self, first: Axis, second: Axis) -> Axis:
        """Two axes that become one, channel by channel."""
        if size(first) == 1 or size(second) == 1:
            return second if size(first) == 1 else first
        if [span(segment) for segment in first] != [span(segment) for segment in second]:
            reason = "combined with channels that are put together in another way"
            if _repeats(first) or _repeats(second):
                reason = "combined with values that come more than once, as rotary embeddings do"
            self.pin(first, reason)
            self.pin(second, reason)
            return nowhere(size(first))
        return tuple(self._merge(a, b) for a, b in zip(first, second, strict=True))

    def _merge(self, first: Segment, second: Segment) -> Segment:
        pairs = aligned(first, second)
        if pairs is None:
            self.pin((first, second), "combined with channels that are put together in another way")
            return nowhere(span(first))[0]
        merged = []
        for a, b in pairs:
            if INPUT in (a.root, b.root):
                self.pin(((a, b),), "combined with the model's own input, as a stream is that starts there")
            elif NOTHING in (a.root, b.root):
                self.pin(((a, b),), "combined with values that no layer gives, as rotary embeddings are")
            else:
                self.same.append((a, b))
            merged.append(b if a.root < 0 <= b.root or a.root == NOTHING else a)
        return tuple(merged)


def digits(axis: Axis) -> list[Digit]:
    return [digit for segment in axis for digit in segment]


def _repeats(axis: Axis) -> bool:
    """Whether some of its channels are there again."""
    found = [digit for digit in digits(axis) if digit.root >= 0]
    return len(set(found)) < len(found)


def span(segment: Segment) -> int:
    """Values in a segment."""
    return math.prod(digit.size for digit in segment)


def size(axis: Axis) -> int:
    """Values along an axis."""
    return sum(map(span, axis))


def nowhere(count: int, root: int = NOTHING) -> Axis:
    return ((Digit(root, count, 1),),) if count > 1 else _ONE


def aligned(first: Segment, second: Segment) -> list[tuple[Digit, Digit]] | None:
    """Digits of equal size side by side, split where need be; None where no split makes them equal."""
    pairs: list[tuple[Digit, Digit]] = []
    left, right = list(first[::-1]), list(second[::-1])  # innermost first
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if a.size > b.size:
            parts = _split(a, b.size)
            if parts is None:
                return None
            outer, a = parts
            left.insert(0, outer)
        elif b.size > a.size:
            parts = _split(b, a.size)
            if parts is None:
                return None
            outer, b = parts
            right.insert(0, outer)
        pairs.insert(0, (a, b))
    return None if left or right else pairs


def _split(digit: Digit, inner: int) -> tuple[Digit, Digit] | None:
    """(outer, inner) with ``inner`` values in the second."""
    if digit.size % inner:
        return None
    return Digit(digit.root, digit.size // inner, digit.stride * inner), Digit(digit.root, inner, digit.stride)


def reshaped(trail: Trail, axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes of a tensor of that shape that holds the same values in the same order."""
    result: list[Axis] = []
    taken = [axis for axis in axes if size(axis) > 1]
    given = list(shape)
    while given:
        outs = [given.pop(0)]
        ins: list[Axis] = []
        if outs[0] == 1:
            result.append(_ONE)
            continue
        total, wanted = 1, outs[0]
        while total != wanted:
            if total < wanted:
                ins.append(taken.pop(0))
                total *= size(ins[-1])
            else:
                outs.append(given.pop(0))
                wanted *= outs[-1]
        result += _regrouped(trail, ins, outs)
    return tuple(result)


def _regrouped(trail: Trail, ins: list[Axis], outs: list[int]) -> list[Axis]:
    if len(ins) == len(outs) == 1:
        return ins
    if all(len(axis) == 1 for axis in ins):
        found = _cut([digit for axis in ins for digit in axis[0]], outs)
        if found is not None:
            return found
    elif len(outs) == 1 and all(len(axis) == 1 for axis in ins[1:]):
        rest = tuple(digit for axis in ins[1:] for digit in axis[0])
        return [tuple((*segment, *rest) for segment in ins[0])]
    for axis in ins:
        trail.pin(axis, "reshaped across channels")
    return [nowhere(count) for count in outs]


def _cut(row: list[Digit], outs: list[int]) -> list[Axis] | None:
    """A row of digits, outermost first, in groups of these sizes."""
    left = row[::-1]  # innermost first, so that the last group is taken first
    found: list[Axis] = []
    for count in reversed(outs):
        group: list[Digit] = []
        while count > 1:
            digit = left.pop(0)
            if digit.size > count:
                parts = _split(digit, count)
                if parts is None:
                    return None
                outer, digit = parts
                left.insert(0, outer)
            if count % digit.size:
                return None
            count //= digit.size
            group.insert(0, digit)
        found.insert(0, (tuple(group),))
    return found


@dataclass(frozen=True, slots=True)
class Part:
    """A module and how it takes part: ``held`` says why its weights cannot be made narrower."""

    name: str
    module: nn.Module
    held: str = ""


def follow(
    program: torch.export.ExportedProgram, weights: Mapping[str, Part], layers: Mapping[str, Part] | None = None
) -> Trail:
    """The trail of a graph.

    Args:
        program: traced with fixed sizes.
        weights: placeholder → the layer or batch norm whose weight (or running statistic) it is.
        layers: name → layer, for those whose weight is no placeholder because it is computed (parametrizations).
    """
    return _Follower(program, weights, layers or {}).read()


_SAME = frozenset(
    [
        "aten::clone",
        "aten::contiguous",
        "aten::alias",
        "aten::detach",
        "aten::dropout",
        "aten::dropout_",
        "aten::feature_dropout",
        "aten::lift_fresh_copy",
    ]
)
_POOLS = ("max_pool", "avg_pool", "adaptive", "upsample", "_unsafe_upsample", "reflection_pad", "replication_pad")
_LINEAR = frozenset(("aten::add", "aten::sub", "aten::neg", "aten::add_", "aten::sub_"))
_DIVIDES = frozenset(("aten::div", "aten::div_"))
_SCALES = _DIVIDES | {"aten::mul", "aten::mul_"}
_POINTWISE = frozenset(  # without a tag that says so
    [
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "relu6",
        "relu",
        "silu",
        "gelu",
        "elu",
        "leaky_relu",
        "selu",
        "celu",
        "mish",
        "softplus",
        "logsigmoid",
        "masked_fill",
        "add",
        "sub",
        "mul",
        "div",
    ]
)
_SUMS = frozenset(("aten::mean", "aten::sum"))
_REDUCES = _SUMS | {"aten::amax", "aten::amin"}


class _Follower:
    def __init__(
        self, program: torch.export.ExportedProgram, weights: Mapping[str, Part], layers: Mapping[str, Part]
    ) -> None:
        self.trail = Trail()
        self.program = program
        self.weights = weights
        self.layers = layers
        self.axes: dict[fx.Node, Any] = {}
        self.carriers: dict[str, Axis] = {}  # what a batch norm takes
        signature = program.graph_signature
        self.stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def read(self) -> Trail:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.axes[node] = self._placeholder(node)
            elif node.op == "output":
                for value in node.all_input_nodes:
                    self._pin(value, "an output of the model")
            elif node.op == "call_function":
                self.axes[node] = self._call(node)
        return self.trail

    def _placeholder(self, node: fx.Node) -> Axes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return ()
        if node.name in self.stored and node.name not in self.weights:
            path = self.stored[node.name]
            return tuple(self.trail.root(Root(path, count, place)) for place, count in enumerate(value.shape))
        root = INPUT if node.name in self.program.graph_signature.user_inputs else NOTHING
        return tuple(nowhere(count, root) for count in value.shape)

    def _call(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if node.target is operator.getitem:
            source, place = node.args
            held = self.axes[cast(Any, source)]
            return held[cast(int, place)] if isinstance(held, list) else self._opaque(value)
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if not isinstance(value, torch.Tensor | list | tuple):
            return ()
        known = _known(value)
        if known and isinstance(value, torch.Tensor) and not value.numel():
            return self._opaque(value)  # it holds no channels
        handler = self._handler(name, node)
        if known and handler is not None:
            try:
                found = handler(node)
            except (LookupError, TypeError, ValueError):
                # boundary: users' models call operators in ways that no handler foresees; a wrong shape tells others
                found = None
            if _fits(found, value):
                return found
        self._unknown(node, name)
        return self._opaque(value)

    def _handler(self, name: str, node: fx.Node) -> Callable[[fx.Node], Any] | None:
        short = name.removeprefix("aten::")
        if name in _SAME:
            return lambda node: self._of(node.args[0])
        if short.startswith(_POOLS):
            return self._pool
        if name in _REDUCES and len(node.args) > 1:
            return self._reduce
        own = getattr(self, f"_op_{short}", None)
        if own is not None:
            return cast(Callable[[fx.Node], Any], own)
        if short.removesuffix("_") in _POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return self._pointwise
        return None

    # What is there

    def _of(self, value: object) -> Axes:
        found = self.axes.get(value, ()) if isinstance(value, fx.Node) else ()
        return found if isinstance(found, tuple) else ()

    def _opaque(self, value: object) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(nowhere(count) for count in value.shape) if _known(value) else (_ONE,) * value.dim()
        return [self._opaque(one) for one in value] if isinstance(value, list | tuple) else ()

    def _pin(self, node: fx.Node, reason: str) -> None:
        held = self.axes.get(node, ())
        for axes in held if isinstance(held, list) else [held]:
            for axis in axes:
                self.trail.pin(axis, reason)

    def _unknown(self, node: fx.Node, name: str) -> None:
        for value in node.all_input_nodes:
            self._pin(value, f"read by {name.removeprefix('aten::') or node.target}")

    def _bend(self, axes: Axes) -> Axes:
        self.trail.bent += [digit for axis in axes for digit in digits(axis) if digit.root >= 0]
        return axes

    # Layers

    def _layer(self, node: fx.Node, place: int) -> Axes:
        """A convolution (channels at 1, batched) or a linear layer (at the end)."""
        value = cast(torch.Tensor, node.meta["val"])
        taken = self._of(node.args[0])
        weight = node.args[1]
        part = self.weights.get(weight.name) if isinstance(weight, fx.Node) else None
        part = part or self.layers.get(inside(node))
        others = [self._of(extra) for extra in node.args[1:] if isinstance(extra, fx.Node)]
        if part is None or (isinstance(part.module, _ConvNd) and value.dim() != len(part.module.kernel_size) + 2):
            for axes in (taken, *others):
                for axis in axes:
                    self.trail.pin(axis, "read by a weight that is no layer's")
            return tuple(nowhere(count) for count in value.shape)
        kept = [nowhere(count) for count in value.shape]
        if place == 1:
            kept[0] = taken[0]
            for axis in taken[2:]:
                self.trail.pin(axis, "a convolution moves over it")
        else:
            kept[:-1] = taken[:-1]
        # one bias for all channels that are not its own; a layer without one may be given one, see `projections`
        self._bend(tuple(kept))
        axis = taken[place]
        grouped = isinstance(part.module, _ConvNd) and part.module.groups > 1
        if part.held or (grouped and not _by_channel(part.module)):
            reason = part.held or "a grouped convolution"
            self.trail.pin(axis, f"read by {part.name}: {reason}")
            given = self.trail.root(Root(part.name, value.shape[place]))
            self.trail.pin(given, f"given by {part.name}: {reason}")
        elif grouped:
            self.trail.carried.append((part.name, axis))
            self._bend((axis,))
            given = axis
        else:
            self.trail.read.append((part.name, axis))
            given = self.trail.root(Root(part.name, value.shape[place]))
        kept[place] = given
        return tuple(kept)

    def _op_linear(self, node: fx.Node) -> Axes:
        return self._layer(node, cast(torch.Tensor, node.meta["val"]).dim() - 1)

    def _conv(self, node: fx.Node) -> Axes:
        return self._layer(node, 1)

    _op_conv1d = _op_conv2d = _op_conv3d = _op_conv_transpose1d = _op_conv_transpose2d = _op_conv_transpose3d = _conv

    def _op_batch_norm(self, node: fx.Node) -> Axes:
        taken = self._of(node.args[0])
        parts = [
            self.weights[value.name]
            for value in node.args[1:5]
            if isinstance(value, fx.Node) and value.name in self.weights
        ]
        if not parts or parts[0].held:
            self.trail.pin(taken[1], "read by a batch norm that is not a layer's" if not parts else parts[0].held)
        elif parts[0].name in self.carriers:  # called more than once: on channels that have to stay alike
            self.trail.merge(self.carriers[parts[0].name], taken[1])
        else:
            self.carriers[parts[0].name] = taken[1]
            self.trail.carried.append((parts[0].name, taken[1]))
        return self._bend(taken)

    def _op_layer_norm(self, node: fx.Node) -> Axes:
        taken = self._of(node.args[0])
        weight, last = node.args[2] if len(node.args) > 2 else None, digits(taken[-1])
        part = self.weights.get(weight.name) if isinstance(weight, fx.Node) else None
        once = part is not None and part.name not in (name for name, _, _ in self.trail.normed)
        whole = len(cast(Sequence[int], node.args[1])) == len(last) == 1 and last[0].root >= 0
        if part is not None and once and not part.held and whole:
            given = self.trail.root(Root(part.name, size(taken[-1]), norm=True))
            self.trail.normed.append((part.name, last[0], len(self.trail.roots) - 1))
            return (*self._bend(taken[:-1]), given)
        for axis in taken[-len(cast(Sequence[int], node.args[1])) :]:
            self.trail.pin(axis, "a layer norm looks at all of it")
        for extra in node.args[2:4]:
            for axis in self._of(extra):
                self.trail.pin(axis, "a layer norm looks at all of it")
        return self._bend(taken)

    def _op_embedding(self, node: fx.Node) -> Axes:
        table, places = (self._of(each) for each in node.args[:2])
        weight = cast(fx.Node, node.args[0])
        part = self.weights.get(weight.name)
        if part is not None:  # tied to the layer that tells words
            table = (table[0], self.trail.root(Root(self.stored[weight.name], size(table[1]), 1)))
            self.trail.pin(table[1], f"read by {part.name}: {part.held}")
        self.trail.pin(table[0], "rows are picked out of it")
        return (*places, table[1])

    def _op_softmax(self, node: fx.Node) -> Axes:
        taken = self._of(node.args[0])
        self.trail.pin(taken[cast(int, node.args[1])], "a softmax looks at all of it")
        return self._bend(taken)

    _op__softmax = _op_log_softmax = _op__log_softmax = _op_softmax

    # Element by element

    def _pointwise(self, node: fx.Node) -> Axes:
        value = cast(torch.Tensor, node.meta["val"])
        operands = [self._of(each) for each in _tensors(node)]
        rank = value.dim()
        result: list[Axis] = [_ONE] * rank
        met = [0] * rank
        for axes in operands:
            for place, axis in zip(range(rank - len(axes), rank), axes, strict=True):
                met[place] += size(axis) > 1
                result[place] = self.trail.merge(result[place], axis)
        result = [
            axis if size(axis) == count else nowhere(count) for axis, count in zip(result, value.shape, strict=True)
        ]
        name = node.target._schema.name  # type: ignore[union-attr]
        numbers = any(isinstance(each, int | float) for each in node.args[1:2])
        if name in _LINEAR and not numbers:
            # one value for all channels of another operand is no combination of them
            self._bend(tuple(axis for axis, count in zip(result, met, strict=True) if 0 < count < len(operands)))
            return tuple(result)
        if name in _SCALES and not node.kwargs.get("rounding_mode"):
            squared = len(operands) == 1 and not numbers
            self._bend(tuple(axis for axis, count in zip(result, met, strict=True) if count > 1 or squared))
            if name in _DIVIDES:
                self._bend(self._of(node.args[1]))
            return tuple(result)
        return self._bend(tuple(result))

    def _cast(self, node: fx.Node) -> Axes:
        taken = self._of(node.args[0])
        return taken if cast(torch.Tensor, node.meta["val"]).is_floating_point() else self._bend(taken)

    _op_to = _op__to_copy = _cast

    def _op_prelu(self, node: fx.Node) -> Axes:
        taken, slopes = (self._of(each) for each in node.args[:2])
        merged = self.trail.merge(taken[1], slopes[0])
        return self._bend((taken[0], merged, *taken[2:]))

    # Sizes

    def _view(self, node: fx.Node) -> Axes:
        return reshaped(self.trail, self._of(node.args[0]), tuple(cast(torch.Tensor, node.meta["val"]).shape))

    _op_view = _op_reshape = _op__unsafe_view = _op_flatten = _op_unflatten = _op_squeeze = _op_unsqueeze = _view

    def _op_permute(self, node: fx.Node) -> Axes:
        taken = self._of(node.args[0])
        return tuple(taken[place] for place in cast(Sequence[int], node.args[1]))

    def _op_transpose(self, node: fx.Node) -> Axes:
        taken = list(self._of(node.args[0]))
        first, second = cast(tuple[int, int], node.args[1:3])
        taken[first], taken[second] = taken[second], taken[first]
        return tuple(taken)

    def _op_t(self, node: fx.Node) -> Axes:
        return self._of(node.args[0])[::-1]

    def _op_numpy_T(self, node: fx.Node) -> Axes:  # noqa: N802 – the operator's name
        return self._of(node.args[0])[::-1]

    def _op_expand(self, node: fx.Node) -> Axes:
        shape = cast(torch.Tensor, node.meta["val"]).shape
        taken = self._of(node.args[0])
        taken = (_ONE,) * (len(shape) - len(taken)) + taken
        return tuple(axis if size(axis) == count else nowhere(count) for axis, count in zip(taken, shape, strict=True))

    def _op_cat(self, node: fx.Node) -> Axes:
        # torch leaves out empty parts, even of another rank, as the caches are that Transformers of text begin with
        parts = [self._of(part) for part in cast(Sequence[fx.Node], node.args[0]) if part.meta["val"].numel()]
        rank = len(parts[0])
        place = cast(int, node.args[1]) % rank if len(node.args) > 1 else 0
        result = list(parts[0])
        for other in range(rank):
            if other != place:
                for part in parts[1:]:
                    result[other] = self.trail.merge(result[other], part[other])
        # a single channel is a segment too
        joined = [part[place] if size(part[place]) > 1 else (((Digit(NOTHING, 1, 1),),)) for part in parts]
        result[place] = tuple(itertools.chain.from_iterable(joined))
        origins = {digit.root for digit in digits(result[place])}
        if max(origins) < 0:
            result[place] = nowhere(size(result[place]), min(origins))
        return tuple(result)

    def _op_select(self, node: fx.Node) -> Axes:
        taken, place = list(self._of(node.args[0])), cast(int, node.args[1])
        self.trail.pin(taken.pop(place), "single channels are picked out of it")
        return tuple(taken)

    def _sliced(self, node: fx.Node) -> Axes:
        """A part along one axis."""
        taken = list(self._of(node.args[0]))
        for place, (axis, count) in enumerate(zip(taken, cast(torch.Tensor, node.meta["val"]).shape, strict=True)):
            if size(axis) != count:
                self.trail.pin(axis, CUT)
                taken[place] = nowhere(count)
        return tuple(taken)

    _op_slice = _sliced

    def _padded(self, node: fx.Node) -> Axes:
        result = list(self._sliced(node))
        margins = cast(Sequence[int], node.args[1])  # before and behind, the last axis first
        for place, count in enumerate(margins):
            axis = len(result) - 1 - place // 2
            if count and size(result[axis]) > 1:  # cut at one end and filled at the other, if it is as long
                self.trail.pin(result[axis], CUT)
                result[axis] = nowhere(size(result[axis]))
        # beside zeros every combination of channels is what it is elsewhere, beside other numbers it is not
        number = any(isinstance(each, int | float) and each != 0 for each in (*node.args[2:], *node.kwargs.values()))
        return self._bend(tuple(result)) if number else tuple(result)

    _op_constant_pad_nd = _op_pad = _padded

    def _parts(self, node: fx.Node) -> list[Axes]:
        """Pieces along one axis."""
        taken = self._of(node.args[0])
        found = []
        for part in cast(Sequence[torch.Tensor], node.meta["val"]):
            axes = list(taken)
            for place, (axis, count) in enumerate(zip(taken, part.shape, strict=True)):
                if size(axis) != count:
                    self.trail.pin(axis, CUT)
                    axes[place] = nowhere(count)
            found.append(tuple(axes))
        return found

    _op_split = _op_split_with_sizes = _op_chunk = _op_tensor_split = _parts

    def _op_unbind(self, node: fx.Node) -> list[Axes]:
        taken, place = list(self._of(node.args[0])), cast(int, node.args[1]) if len(node.args) > 1 else 0
        self.trail.pin(taken.pop(place), "single channels are picked out of it")
        return [tuple(taken)] * len(cast(Sequence[torch.Tensor], node.meta["val"]))

    def _op_roll(self, node: fx.Node) -> Axes:
        taken = self._of(node.args[0])
        for place in cast(Sequence[int], node.args[2] if len(node.args) > 2 else range(len(taken))):
            self.trail.pin(taken[place], "rolled")
        return taken

    def _pool(self, node: fx.Node) -> Any:
        """Samples and channels stay, pixels change."""
        value = node.meta["val"]
        first = value[0] if isinstance(value, list | tuple) else value
        taken = self._of(node.args[0])
        axes = tuple(
            axis if size(axis) == n else nowhere(n) for axis, n in zip(taken[:2], first.shape[:2], strict=True)
        )
        for axis in taken[2:]:
            self.trail.pin(axis, "pooled over")
        result = (*axes, *(nowhere(count) for count in first.shape[2:]))
        self._bend(result)
        return [result] * len(value) if isinstance(value, list | tuple) else result

    def _reduce(self, node: fx.Node) -> Axes:
        taken = list(self._of(node.args[0]))
        over = node.args[1]
        places = [over] if isinstance(over, int) else list(cast(Sequence[int], over or range(len(taken))))
        places = [place % len(taken) for place in places]
        for place in places:
            self.trail.pin(taken[place], "all channels are reduced to one, as in an RMS norm")
        if node.target._schema.name not in _SUMS:  # type: ignore[union-attr]
            self._bend(tuple(taken))
        kept = len(cast(torch.Tensor, node.meta["val"]).shape) == len(taken)
        if kept:
            return tuple(_ONE if place in places else axis for place, axis in enumerate(taken))
        return tuple(axis for place, axis in enumerate(taken) if place not in places)

    # Products of two tensors

    def _op_scaled_dot_product_attention(self, node: fx.Node) -> Axes:
        query, key, values = (self._of(each) for each in node.args[:3])
        if not len(query) == len(key) == len(values):
            self._unknown(node, "attention")
            return cast(Axes, self._opaque(node.meta["val"]))
        self._contract(query[-1], key[-1])
        for axis in (key[-2], values[-2]):
            self.trail.pin(axis, "a softmax looks at all of it")
        batch = [
            self.trail.merge(self.trail.merge(a, b), c)
            for a, b, c in zip(query[:-2], key[:-2], values[:-2], strict=True)
        ]
        self._bend((*query[:-1], *key[:-2]))
        return (*batch, query[-2], values[-1])

    def _op_matmul(self, node: fx.Node) -> Axes:
        first, second = (self._of(each) for each in node.args[:2])
        if len(first) != len(second) or len(first) < 2:
            self._unknown(node, "matmul")
            return cast(Axes, self._opaque(node.meta["val"]))
        self._contract(first[-1], second[-2])
        batch = [self.trail.merge(a, b) for a, b in zip(first[:-2], second[:-2], strict=True)]
        both = [size(a) > 1 and size(b) > 1 for a, b in zip(first[:-2], second[:-2], strict=True)]
        self._bend(tuple(itertools.compress(batch, both)))
        return (*batch, first[-2], second[-1])

    _op_bmm = _op_matmul

    def _contract(self, first: Axis, second: Axis) -> None:
        one, other = digits(first), digits(second)
        if len(one) == len(other) == 1 and min(one[0].root, other[0].root) >= 0:
            self.trail.same.append((one[0], other[0]))
            self.trail.contracted.append((one[0], other[0]))
        else:
            self.trail.pin(first, "summed over in a product")
            self.trail.pin(second, "summed over in a product")


def _known(value: object) -> bool:
    """No size of a tensor, or of several, depends on the data, as that of what a mask picks does."""
    if isinstance(value, torch.Tensor):
        return all(isinstance(count, int) for count in value.shape)
    return not isinstance(value, list | tuple) or all(map(_known, value))


def _fits(found: Any, value: object) -> bool:
    """Are these the axes of such a tensor, or of such tensors?"""
    if isinstance(value, torch.Tensor):
        return isinstance(found, tuple) and list(map(size, found)) == [max(count, 1) for count in value.shape]
    return isinstance(found, list) and isinstance(value, list | tuple) and all(map(_fits, found, value))


def _by_channel(module: nn.Module) -> bool:
    """A depthwise convolution: each channel by itself."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels


def _tensors(node: fx.Node) -> list[fx.Node]:
    """Tensor operands in order, one that comes twice counted once."""
    return list(dict.fromkeys(node.all_input_nodes))
