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


@pytest.mark.parametrize(
    "text", ["params<=0x", "params<=0", "macs<=0x", "macs<=0.0G", "size<=0MB", f"params<={'9' * 400}"]
)
def test_a_cost_of_nothing_is_refused_with_an_example(text: str) -> None:
    kind = text.partition("<")[0]
    with pytest.raises(
        ConfigError, match=rf"budget {kind}: expected a finite number above 0, got '.*' – e\.g\. {kind}<="
    ):
        Budgets.parse(text)


def test_no_drop_at_all_may_be_asked_for() -> None:
    assert Budgets.parse("drop<=0pp").entries[0].limit == 0.0
