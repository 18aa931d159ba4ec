"""Work side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from rowcol_edge.factoring.abreast import abreast


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_items_are_worked_on_together_by_one_thread_each(three_threads: None) -> None:
    together = threading.Barrier(3, timeout=30)

    def work(item: int) -> tuple[int, int, int]:
        together.wait()
        return item, threading.get_ident(), torch.get_num_threads()

    found = abreast(work, [3, 1, 2])
    assert [item for item, _, _ in found] == [3, 1, 2]
    assert len({thread for _, thread, _ in found} | {threading.get_ident()}) == 4
    assert {threads for _, _, threads in found} == {1}
    assert torch.get_num_threads() == 3


def test_an_error_is_raised_and_the_threads_are_as_before(three_threads: None) -> None:
    def work(item: int) -> int:
        return 1 // item

    with pytest.raises(ZeroDivisionError):
        abreast(work, [1, 0, 1])
    assert torch.get_num_threads() == 3
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [3]


def test_one_thread_works_here() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert abreast(lambda _: threading.get_ident(), [1, 2]) == [threading.get_ident()] * 2
    finally:
        torch.set_num_threads(before)
