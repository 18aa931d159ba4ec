"""A model as the user names it: ``sample:NAME``, ``package.module:factory``, ``path/file.py:factory`` or ``file.pt2``.

Weights come from safetensors, or from a checkpoint read with ``weights_only=True``; nothing is ever unpickled.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils import _pytree as pytree

from . import user_code
from .errors import DataError, ModelError, WeightsError
from .lift import lift, load_program
from .samples import Sample
from .samples import load as load_sample

_SHOWN_KEYS = 3
_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt")
_OTHER_MODEL = "hand over the weights that were saved from this model, or the model that they were saved from"
#: what `torch.compile` and training on several devices make of a module, and where each holds the module itself
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
_NESTED = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on the CPU.

    Attributes:
        reference: how the user named it.
        name: short name for files and tables.
        module: the model; never changed by any stage.
        inputs: names of the tensors its forward takes, in order (see `input_names` and `named`).
        digest: sha256 over the architecture's text and every parameter and buffer.
        sample: the embedded sample it came from, if any.
    """

    reference: str
    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    digest: str
    sample: Sample | None = None


def load(reference: str | nn.Module, weights: str | Path | None = None) -> LoadedModel:
    """Load a model by reference, or wrap a module that is already there.

    Raises:
        ModelError: the reference, file or factory cannot be used.
        WeightsError: weights that do not fit (names the first keys that differ) or are not finite.
    """
    if isinstance(reference, nn.Module):
        check_there(reference)
        check_copyable(reference)
        # a copy: the caller's model keeps its mode, its device and its weights
        module, name, text, sample = (
            copy.deepcopy(reference),
            type(reference).__name__,
            type(reference).__qualname__,
            None,
        )
    else:
        text = reference
        module, name, sample = _resolve(reference)
        check_there(module)
        check_copyable(module)
    if sample is not None and weights is None:
        weights = sample.weights
    if weights is not None:
        load_weights(module, Path(weights))
    check_finite(module)
    module = module.cpu().float().eval()  # stored in half or double precision, it is worked on in single
    return LoadedModel(text, name, module, input_names(module), digest(module), sample)


def _resolve(reference: str) -> tuple[nn.Module, str, Sample | None]:
    if reference.startswith("sample:"):
        sample = load_sample(reference.removeprefix("sample:"))
        return _made(sample.factory, reference), sample.name, sample
    if reference.endswith(".pt2"):
        return _program(Path(reference)), Path(reference).stem, None
    module_name, separator, function = reference.rpartition(":")
    if not separator:
        raise ModelError(
            f"model {reference!r}",
            expected="sample:NAME, package.module:factory, path/file.py:factory or a saved .pt2",
            got="no factory",
        )
    return _made(reference, reference), function if function not in ("build", "model") else _stem(module_name), None


def _program(path: Path) -> nn.Module:
    program = load_program(path)
    sizes = [node.meta["val"].shape[0] for node in _inputs(program) if node.meta["val"].dim()]
    fixed = {size for size in sizes if isinstance(size, int)}
    if not fixed:
        return lift(program)
    if fixed != {1}:
        raise ModelError(
            str(path),
            expected="a program with a free batch, or one for single samples",
            got=f"a batch fixed at {', '.join(str(size) for size in sorted(fixed))}",
            hint='export it with dynamic_shapes={"x": {0: torch.export.Dim("batch")}}',
        )
    return OneByOne(lift(program))


def _inputs(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


class OneByOne(nn.Module):
    """A saved program that takes single samples, given batches of any size."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program
        self.input_names = input_names(program)

    def forward(self, *arrays: torch.Tensor) -> Any:
        results = [self.program(*(a[i : i + 1] for a in arrays)) for i in range(len(arrays[0]))]
        return pytree.tree_map(lambda *parts: torch.cat(parts), *results)


def _stem(module_name: str) -> str:
    return Path(module_name).stem if module_name.endswith(".py") else module_name.rpartition(".")[2]


def _made(factory: str, reference: str) -> nn.Module:
    module = user_code.call(user_code.resolve(factory, ModelError, "model"), ModelError, f"model {reference!r}")
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"model {reference!r}",
            expected="a torch.nn.Module",
            got=type(module).__name__,
            hint="name a function without parameters that returns the model",
        )
    return module


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a state dict into ``module``; every key and shape must fit. Half-precision storage is widened."""
    state = _read_state(path)
    expected = module.state_dict()
    missing = [k for k in expected if k not in state]
    unexpected = [k for k in state if k not in expected]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"missing {_first(missing)}")
        if unexpected:
            parts.append(f"unexpected {_first(unexpected)}")
        raise WeightsError(
            str(path),
            expected=f"the model's {len(expected)} keys",
            got="; ".join(parts),
            hint=_prefix_hint(missing, unexpected),
        )
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise WeightsError(
                f"{path}: {key}",
                expected=f"shape {tuple(value.shape)}",
                got=f"{tuple(state[key].shape)}",
                hint=_OTHER_MODEL,
            )
        given = state[key].dtype
        # another width of float is a way to store weights; another kind of number is another file
        if given != value.dtype and not (given.is_floating_point and value.is_floating_point()):
            raise WeightsError(f"{path}: {key}", expected=_dtype(value.dtype), got=_dtype(given), hint=_OTHER_MODEL)
    module.load_state_dict(state, strict=True)


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    if not path.is_file():
        raise WeightsError(
            str(path),
            expected="a weights file",
            got="no such file",
            hint="a relative path starts from the current folder",
        )
    if path.suffix == ".safetensors":
        try:
            path.open("rb").close()  # safetensors calls a file that may not be read one that is not there
            return load_file(path)
        except (SafetensorError, OSError) as e:
            raise WeightsError(
                str(path), expected="a safetensors file", got=str(e), hint="save or copy it again"
            ) from e
    if path.suffix not in _CHECKPOINTS:
        raise WeightsError(str(path), expected=f".safetensors or one of {_CHECKPOINTS}", got=path.suffix or "no ending")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on pickle protocols of files that it then refuses
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # boundary: a broken file can lead the unpickler anywhere
        raise WeightsError(
            str(path),
            expected="a checkpoint of plain tensors (read with weights_only=True)",
            got=_unpickling(e),
            hint="save only the state dict: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        ) from e
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise WeightsError(str(path), expected="a dict of tensors", got=type(loaded).__name__)
    return loaded


def _unpickling(error: Exception) -> str:
    """What stopped torch, without its advice to read the file in spite of it."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"a pickle that calls {found[1]}"
    first = str(error).partition("\n")[0]
    return "a pickle of more than tensors" if not first or "weights_only" in first else first


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first(keys: list[str]) -> str:
    more = f" (+{len(keys) - _SHOWN_KEYS} more)" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(keys[:_SHOWN_KEYS]) + more


def _prefix_hint(missing: list[str], unexpected: list[str]) -> str:
    for prefix in ("module.", "model."):
        if unexpected and all(k.startswith(prefix) for k in unexpected):
            return f"the file's keys all start with {prefix!r}: strip it"
        if missing and all(k.startswith(prefix) for k in missing):
            return (
                f"the model's keys all start with {prefix!r}: save the inner module's weights or wrap it the same way"
            )
    return _OTHER_MODEL


def check_there(module: nn.Module) -> None:
    """Raises ModelError naming the first module that is TorchScript or a wrapper of torch's own, or else the first
    parameter or buffer that holds no numbers yet (of a lazy layer, or on the meta device)."""
    for name, part in module.named_modules():
        what, own = (f"module {name!r}", f"{name}.") if name else ("the model", "model.")
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                what,
                expected="a torch.nn.Module in Python",
                got="a TorchScript module",
                hint="hand over the module that it was made from, with the weights of its state_dict()",
            )
        kind = type(part).__name__
        if (inner := _WRAPPERS.get(kind)) in part._modules:
            got = f"{kind} around it"
            raise ModelError(what, expected="the module itself", got=got, hint=f"use {own}{inner} in its place")
    for key, value in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise ModelError(
                f"parameter {key}",
                expected="numbers",
                got="none: its lazy layer has seen no input",
                hint="call the model once on a sample, then hand it over",
            )
        if value.is_meta:
            raise ModelError(
                f"parameter {key}",
                expected="numbers",
                got="none: it is on the meta device",
                hint="make the model on the CPU, or load its weights with load_state_dict(weights, assign=True)",
            )


def check_copyable(module: nn.Module) -> None:
    """Raises ModelError naming the first layer that holds a tensor with a history: torch cannot copy it."""
    for name, layer in module.named_modules():
        for key, value in vars(layer).items():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                raise ModelError(
                    f"layer {name!r}" if name else "the model",
                    expected="tensors that are parameters or buffers",
                    got=f"a {key} that was computed from others",
                    hint="torch.nn.utils.prune.remove(layer, 'weight') after pruning, "
                    "torch.nn.utils.remove_weight_norm(layer) after training, or use "
                    "torch.nn.utils.parametrizations.weight_norm; set any other such attribute to None",
                )


def check_finite(module: nn.Module) -> None:
    """Raises WeightsError naming the first parameter or buffer that holds NaN or Inf.

    Buffers but a norm's statistics may hold infinities, as the masks of attention do.
    """
    masks = {
        name for name, _ in module.named_buffers() if name.rpartition(".")[2] not in ("running_mean", "running_var")
    }
    for key, value in module.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            wrong = value.isnan() if key in masks else ~value.isfinite()
            bad = int(wrong.sum())
            if not bad:
                continue
            raise WeightsError(
                f"weights {key}",
                expected="finite values",
                got=f"{bad} NaN or Inf out of {value.numel()}",
                hint="the training diverged or the file is damaged: hand over an earlier checkpoint",
            )


def input_names(module: nn.Module) -> tuple[str, ...]:
    """Names of forward's arguments that have no default, or of its first one if all have; ``input`` where they cannot
    be told."""
    if isinstance(module, OneByOne):
        return module.input_names
    arguments = _arguments(module)
    return tuple(n for n, required in arguments.items() if required) or tuple(arguments)[:1] or ("input",)


def may_be_named(module: nn.Module) -> bool:
    """Whether forward leaves open which of its arguments it gets."""
    return not all(_arguments(module).values())


def named(model: LoadedModel, arrays: Sequence[str]) -> LoadedModel:
    """The model with arrays of these names as its inputs, in the order of its forward, where that has them all and
    requires no others; as it is for a single array of another name, and where some that forward requires are missing.

    Raises:
        DataError: several arrays, one of a name that forward does not have.
    """
    arguments = _arguments(model.module)
    strangers = [name for name in arrays if name not in arguments]
    if strangers and len(arrays) > 1:
        raise DataError(
            "names of the input arrays",
            expected=f"arguments of {type(model.module).__name__}.forward: {', '.join(arguments)}",
            got=", ".join(strangers),
            hint="rename them, or hand over a module whose forward takes arrays of these names and calls the model",
        )
    inputs = tuple(name for name, required in arguments.items() if required or name in arrays)
    if strangers or not inputs or not set(inputs) <= set(arrays) or inputs == model.inputs:
        return model
    return replace(model, inputs=inputs, digest=hashlib.sha256(json.dumps([model.digest, inputs]).encode()).hexdigest())


def _arguments(module: nn.Module) -> dict[str, bool]:
    """Forward's arguments by name: whether it requires them."""
    parameters = inspect.signature(module.forward).parameters.values()
    single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: p.default is p.empty for p in single}


def digest(module: nn.Module) -> str:
    """sha256 over what the module computes: its structure, the source of its own classes, their plain attributes, every
    tensor of its state, and which modules and tensors are one under several names."""
    sha = hashlib.sha256(repr(module).encode())
    for kind in sorted({type(m) for m in module.modules()}, key=lambda k: f"{k.__module__}.{k.__qualname__}"):
        if not kind.__module__.startswith("torch."):
            sha.update(user_code.source(kind).encode())
    if isinstance(module, torch.fx.GraphModule):
        sha.update(module.code.encode())
    modules = dict(module.named_modules(remove_duplicate=False))
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for found in (modules, tensors):
        names: dict[int, str] = {}
        sha.update(json.dumps([names.setdefault(id(each), name) for name, each in found.items()]).encode())
    for name, each in modules.items():
        sha.update(f"{name}{_plain(vars(each))}".encode())
    for key, value in sorted(tensors.items()):
        sha.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
        sha.update(_bytes(value))
    return sha.hexdigest()


_OWN_TO_MODULES = frozenset(vars(nn.Module()))
_DEEPEST = 8  # of containers in containers: one may hold itself


def _bytes(value: torch.Tensor) -> bytes:
    found: bytes = (
        value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    )
    return found


def _plain(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Numbers, texts, arrays and functions that a module keeps, also in tuples, lists and dictionaries, which no repr
    shows. Where on this machine it was loaded from has no part in it."""

    def shown(value: object, depth: int = 0) -> str:
        if isinstance(value, str):
            return "a path" if Path(value).is_absolute() else repr(value)
        if isinstance(value, bool | int | float | None):
            return repr(value)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(np.array(value))
        if type(value) is torch.Tensor and value.layout is torch.strided:
            return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(_bytes(value)).hexdigest()}"
        if isinstance(value, tuple | list) and depth < _DEEPEST:
            return f"[{', '.join(shown(each, depth + 1) for each in value)}]"
        if isinstance(value, Mapping) and depth < _DEEPEST:
            return shown([(key, value[key]) for key in sorted(value, key=str)], depth + 1)
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"

    return {name: shown(attributes[name]) for name in sorted(attributes) if name not in _OWN_TO_MODULES}
