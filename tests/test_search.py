from __future__ import annotations

import pytest

from rowcol_edge.search import boldest


@pytest.mark.parametrize("count", [1, 2, 3, 8, 25])
def test_bisection_finds_the_last_index_that_holds(count: int) -> None:
    for last in range(count):
        tried: list[int] = []

        def holds(index: int, last: int = last, tried: list[int] = tried) -> bool:
            tried.append(index)
            return index <= last

        assert boldest(holds, count, lambda done, total: None) == last
        assert len(tried) <= max(1, (count - 1).bit_length())
        assert len(set(tried)) == len(tried)


def test_what_is_returned_has_been_seen_to_hold_even_if_quality_is_not_monotone() -> None:
    seen: dict[int, bool] = {}

    def holds(index: int) -> bool:
        seen[index] = index in (1, 2, 6)
        return seen[index]

    found = boldest(holds, 12, lambda done, total: None)
    assert found == 0 or seen[found]
