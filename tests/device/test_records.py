from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pytest

from rowcol_edge.device.records import decode
from rowcol_edge.errors import BundleError, MeasurementError


@dataclass(frozen=True, slots=True)
class Inner:
    count: int
    times: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    good: bool
    share: float
    limit: float | None
    rows: tuple[tuple[str, ...], ...]
    table: dict[str, Inner]
    inner: Inner | None


VALUES: dict[str, Any] = {
    "name": "a",
    "good": True,
    "share": 1,
    "limit": None,
    "rows": [["x", "y"], []],
    "table": {"t": {"count": 1, "times": [1, 2]}},
    "inner": None,
}


@dataclass(frozen=True, slots=True)
class Later:
    name: str
    added: int | None = None


def test_a_field_that_came_later_may_be_missing() -> None:
    assert decode(Later, {"name": "a"}, "doc") == Later("a")
    assert decode(Later, {"name": "a", "added": 3}, "doc") == Later("a", 3)
    with pytest.raises(BundleError, match=r"doc.name: expected a value"):
        decode(Later, {"added": 3}, "doc")


def test_round_trip() -> None:
    made = decode(Outer, VALUES, "doc")
    assert made == Outer("a", True, 1.0, None, (("x", "y"), ()), {"t": Inner(1, (1, 2))}, None)
    assert decode(Outer, asdict(made), "doc") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "doc.name: expected text, got 3"),
        ({"good": 1}, "doc.good: expected true or false, got 1"),
        ({"share": float("inf")}, "doc.share: expected a finite number, got inf"),
        ({"share": True}, "doc.share: expected a finite number, got True"),
        ({"rows": [["x"], [1]]}, r"doc.rows\[1\]\[0\]: expected text, got 1"),
        ({"rows": "x"}, "doc.rows: expected a list"),
        ({"table": []}, "doc.table: expected an object"),
        ({"table": {"t": {"count": 1.5, "times": []}}}, "doc.table.t.count: expected a whole number, got 1.5"),
        ({"inner": {"count": 10**400, "times": []}}, "doc.inner.count: expected a number of 64 bits, got one of 1329"),
        ({"inner": {"count": 1, "times": [1, 2**63]}}, r"doc.inner.times\[1\]: expected a number of 64 bits"),
        ({"share": 10**400}, "doc.share: expected a number of 64 bits"),
        ({"inner": {"count": 1, "times": [1, "2"]}}, r"doc.inner.times\[1\]: expected a whole number, got '2'"),
        ({"inner": {"count": 1}}, "doc.inner.times: expected a value, got no such key"),
        ({"more": 1}, "doc.more: expected no such key, got an unknown key"),
        ({"inner": 7}, "doc.inner: expected an object, got 7"),
    ],
)
def test_errors_name_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        decode(Outer, {**VALUES, **change}, "doc")


def test_the_error_is_the_callers() -> None:
    with pytest.raises(MeasurementError):
        decode(Inner, [], "result", MeasurementError)
