"""Linear layers where they are fastest: torch's library for them, MKL, uses the processor's widest instructions on its
own maker's processors only; the one for convolutions, oneDNN, everywhere.

A linear layer is a convolution with one tap over its positions. The other way of adding up float32 shows in the last
digit, as another batch size does.
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
    """Inside, what large linear layers give is calculated by oneDNN where that is faster: at float32 on a processor
    with AVX-512."""
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    faster = onednn and torch.backends.cpu.get_cpu_capability() == "AVX512"
    with _Convolved() if faster else contextlib.nullcontext():
        yield


def product(rows: Tensor, matrices: Tensor) -> Tensor:
    """(groups, samples, positions, size) times (groups, size, directions)."""
    if len(matrices) == 1:
        return F.linear(rows[0], matrices[0].T).unsqueeze(0)
    return rows @ matrices.unsqueeze(1)


class _Convolved(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        return (_convolution if func in _LINEAR else func)(*args, **(kwargs or {}))


def _convolution(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002 (torch's name)
    given = [each for each in (input, weight, bias) if each is not None]
    plain = all(each.dtype == torch.float32 and each.layout == torch.strided and not each.is_nested for each in given)
    plain = plain and all(each.device.type == "cpu" for each in given)
    plain = plain and weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])
    plain = plain and input.shape[-1:] == weight.shape[1:]  # else the error is to be that of a linear layer
    if not plain or input.shape[:-1].numel() < _ROWS or input.numel() * len(weight) < _LEAST:
        return F.linear(input, weight, bias)
    rows = input.reshape(1, 1, -1, input.shape[-1]).permute(0, 3, 1, 2)  # as they lie, channels last
    maps = F.conv2d(rows, weight[:, :, None, None], bias).permute(0, 2, 3, 1).contiguous()
    # no view, as a linear layer gives none: a hook on a view's gradient is lost where code goes on in place
    result: Tensor = torch.ops.aten._unsafe_view(maps, [*input.shape[:-1], len(weight)])
    return result
