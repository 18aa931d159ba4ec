"""Linear layers where they are fastest: torch's library for them, MKL, uses the processor's widest instructions on its
own maker's processors only; the one for convolutions, oneDNN, everywhere.

A linear layer is a convolution with one tap over its positions. The other order of adding up shows in float32's last
digits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ROWS, _LEAST = 256, 1 << 23
"""Rows and multiply-accumulates: below, a convolution takes longer to lay out the weights than it saves."""
_LINEAR = (F.linear, torch.ops.aten.linear.default)  # the latter in saved programs


@contextlib.contextmanager
def convolved() -> Iterator[None]:
    """Inside, large linear layers are calculated by oneDNN at float32 on a processor with AVX-512; not in a backward
    pass, where no such mode is on."""
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    on = onednn and torch._C._get_mkldnn_enabled()
    faster = on and torch.backends.cpu.get_cpu_capability() == "AVX512"
    with _Convolved() if faster else contextlib.nullcontext():
        yield


def product(rows: Tensor, matrices: Tensor) -> Tensor:
    """(groups, samples, positions, size) times (groups, size, directions), also in a backward pass."""
    if len(matrices) > 1:
        return rows @ matrices.unsqueeze(1)
    with convolved():
        return F.linear(rows[0], matrices[0].T).unsqueeze(0)


class _Convolved(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        plain = func in _LINEAR and not types  # a tensor's own type may have a way of its own
        return (_convolution if plain else func)(*args, **(kwargs or {}))


def _convolution(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002 (torch's name)
    if not _fits(input, weight, bias):
        return F.linear(input, weight, bias)
    rows = input.reshape(1, 1, -1, input.shape[-1]).permute(0, 3, 1, 2)  # as they lie, channels last
    # by its own name, as torch takes another library for few threads
    each = None if bias is None else bias.contiguous()  # it reads on where the first of them lies
    maps = torch.mkldnn_convolution(rows, weight[:, :, None, None], each, (0, 0), (1, 1), (1, 1), 1)
    # no view: a hook on a view's gradient is lost where code goes on in place
    result: Tensor = torch.ops.aten._unsafe_view(
        maps.permute(0, 2, 3, 1).contiguous(), [*input.shape[:-1], len(weight)]
    )
    return result


def _fits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Large enough, and nothing about it is unusual."""
    given = [each for each in (rows, weight, bias) if each is not None]
    if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in given):
        return False
    if any(each.layout != torch.strided or each.is_nested for each in given) or torch.is_autocast_enabled("cpu"):
        return False
    if (
        weight.dim() != 2
        or rows.shape[-1:] != weight.shape[1:]
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        return False
    if torch.autograd.forward_ad._current_level >= 0:  # derivatives on the way forward, which it has none of
        return False
    # what saves activations otherwise may calculate them again on the way back, and find others
    if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    return rows.shape[:-1].numel() >= _ROWS and rows.numel() * len(weight) >= _LEAST
