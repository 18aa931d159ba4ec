"""Work on one matrix beside work on another, each by one of torch's threads."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_MOST = 4  # at once: each has its matrices in memory


def abreast(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """``work`` of each item, in their order.

    Decompositions and narrow products of a few hundred features are too small to be shared out: threads that do it wait
    for one another, busily, longer than they work. ``work`` must not need torch's thread-local modes, such as that of
    inference.
    """
    threads = torch.get_num_threads()
    if min(threads, len(items)) < 2:
        return [work(item) for item in items]
    try:
        with ThreadPoolExecutor(min(threads, _MOST), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)  # the number set last is also that of threads that begin later
        _trim()


def _trim() -> None:
    """Gives back what glibc keeps for threads that have ended, hundreds of MB."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no such function elsewhere
        ctypes.CDLL(None).malloc_trim(0)
