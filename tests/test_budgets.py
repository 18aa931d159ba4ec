from __future__ import annotations

import pytest

from rowcol_edge.budgets import Budgets
from rowcol_edge.errors import ConfigError


def test_every_kind_is_read_in_its_base_unit() -> None:
    budgets = Budgets.parse("drop<=0.5pp, size<=4MB,params<=0.5x, macs <= 2G")
    limits = {b.kind: b.absolute(100.0) for b in budgets.entries}
    assert limits == {"drop": 0.5, "size": 4e6, "params": 50.0, "macs": 2e9}
    assert str(Budgets.parse("drop<=0.5pp")) == "drop<=0.5pp"


def test_binary_units_and_no_budget() -> None:
    size = Budgets.parse("size<=4MiB").get("size")
    assert size is not None
    assert size.limit == 4 * 2**20
    assert Budgets.parse("").entries == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("drop=0.5", "drop<=0.5pp"),
        ("dropp<=1", "did you mean drop"),
        ("size<=4furlongs", "unit"),
        ("drop<=-1pp", "drop<=0.5pp"),
        ("drop<=1pp,drop<=2pp", "one limit for drop"),
    ],
)
def test_anything_else_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Budgets.parse(text)
