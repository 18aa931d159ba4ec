"""How a model is called: named inputs, eval mode, and which modules ran."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from rowcol_edge.errors import DataError, ModelError

Arguments = tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch's warnings about its own deprecated parts are dropped, and the graph it writes to stderr where it gives up;
    what a model prints goes to stderr.

    stdout belongs to the command line's ``--json``.
    """
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sys.stderr),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def bind(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Arguments:
    """Arguments for ``model(...)``: to the parameters of their names, else by position in the order given.

    Where names fit, what can go by position does, so that a saved program is called as the model is.

    Raises:
        ModelError: ``forward`` takes neither those names nor that many inputs.
    """
    places = places_of(model, list(tensors))
    return tuple(tensors[n] for n in places), {n: t for n, t in tensors.items() if n not in places}


def places_of(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names that go by position, in that order; the others go by keyword."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if set(names) <= named or any(p.kind is p.VAR_KEYWORD for p in parameters):
        leading = itertools.takewhile(lambda p: p.kind is p.POSITIONAL_OR_KEYWORD and p.name in names, parameters)
        return [p.name for p in leading]
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(names) > len(places) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ModelError(
            f"forward of {type(model).__name__} does not take these inputs",
            expected=f"inputs named {', '.join(sorted(named)) or '(none)'}",
            got=", ".join(names),
        )
    return list(names)


def feed(model: nn.Module, batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The batch as tensors on the model's device; floating inputs take the model's floating type.

    Raises:
        DataError: NaN or infinity in an input, or a type that torch cannot hold.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    tensors: dict[str, torch.Tensor] = {}
    for name, array in batch.items():
        try:
            # A copy: arrays may be read-only (memory mapped), which torch warns about.
            tensor = torch.from_numpy(np.array(array))
        except TypeError as error:
            raise DataError(f"input {name!r}", expected="numbers", got=f"dtype {np.asarray(array).dtype}") from error
        if tensor.is_floating_point():
            if not bool(torch.isfinite(tensor).all()):
                raise DataError(f"input {name!r} holds NaN or infinity", hint="clean the data first")
            tensor = tensor if weight is None else tensor.to(weight.dtype)
        tensors[name] = tensor if weight is None else tensor.to(weight.device)
    return tensors


def tensors(result: object) -> list[torch.Tensor]:
    """What a model returns, in its own order, however deep it lies in dicts, tuples and lists; without what is none."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result.values() if isinstance(result, Mapping) else result
    return [one for part in parts for one in tensors(part)] if isinstance(parts, (list, tuple, ValuesView)) else []


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, every module's own training flag put back afterwards.

    The fused path of ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` is off inside: it would run the
    block as one operator, in which no layer can be seen.
    """
    flags = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for module, _ in flags:
            module.training = False
        yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def channels_last(model: nn.Module, example: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Kernels of 2-d convolutions lie channels last inside, which CPUs calculate faster; as they were where the example
    does not run so: code may `view` what a convolution gives."""
    layers = [each for each in model.modules() if type(each) in (nn.Conv2d, nn.ConvTranspose2d)]
    weights = {id(w): w for each in layers if (w := each._parameters.get("weight")) is not None}.values()
    before = [weight.data for weight in weights]

    def restore() -> None:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data

    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        if before:
            args, kwargs = bind(model, example)
            try:
                with evaluating(model), torch.no_grad():
                    model(*args, **kwargs)
            except RuntimeError:
                restore()
        yield
    finally:
        restore()


@dataclass(slots=True)
class Calls:
    """Which modules were entered: ``counts`` per name, ``stack`` of those not left (the culprit after an error), and
    those that were given ``more`` than one argument."""

    counts: Counter[str] = field(default_factory=Counter)
    stack: list[str] = field(default_factory=list)
    more: set[str] = field(default_factory=set)

    @property
    def innermost(self) -> str:
        """Name of the innermost module not left, ``""`` for the model itself."""
        return self.stack[-1] if self.stack else ""


def _in_inference_mode(name: str) -> ModelError:
    return ModelError(
        f"module {name!r}" if name else "the model",
        expected="a forward of tensors that can be differentiated",
        got="one under torch.inference_mode()",
        hint="take it out of the forward, and turn it on where the model is called",
    )


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[Calls]:
    """Counts calls of every module through its own ``forward`` while the context lasts.

    Raises:
        ModelError: a forward turns inference mode on by itself; names its module.
    """
    calls = Calls()
    outside = torch.is_inference_mode_enabled()
    handles: list[Any] = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_inference_mode_enabled() and not outside:  # who calls this one has turned it on
                raise _in_inference_mode(calls.innermost)
            calls.counts[name] += 1
            calls.stack.append(name)
            if len(args) + len(kwargs) > 1:
                calls.more.add(name)

        return hook

    def leave(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        name = calls.stack.pop()
        if isinstance(output, torch.Tensor) and output.is_inference() and not outside:
            raise _in_inference_mode(name)

    try:
        for name, module in model.named_modules():
            handles += [
                module.register_forward_pre_hook(enter(name), with_kwargs=True),
                module.register_forward_hook(leave),
            ]
        yield calls
    finally:
        for handle in handles:
            handle.remove()
