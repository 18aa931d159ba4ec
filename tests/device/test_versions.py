from __future__ import annotations

import pytest

from rowcol_edge.device.versions import is_at_least, name_of, numbers, satisfies


@pytest.mark.parametrize(
    ("version", "requirement", "fits"),
    [
        ("1.17.0", "onnxruntime>=1.17", True),
        ("1.16.9", "onnxruntime>=1.17", False),
        ("2.0.0", "numpy<2", False),
        ("1.26.4", "numpy>=1.24,<2", True),
        ("1.10", "x>1.9", True),
        ("1.9.1", "x~=1.9.0", True),
        ("1.10.0", "x~=1.9.0", False),
        ("2.0", "x==2", True),
        ("2.0", "x!=2.0.0", False),
        ("0.1", "pillow", True),
    ],
)
def test_satisfies(version: str, requirement: str, fits: bool) -> None:
    assert satisfies(version, requirement) is fits


def test_numbers_leave_out_what_is_no_number() -> None:
    assert numbers("1.17.3rc1") == (1, 17, 3)
    assert numbers("2.10.0+cpu") == (2, 10)
    assert numbers("") == ()


def test_names_are_those_of_packages() -> None:
    assert [name_of(text) for text in ("ai_edge_litert >= 2", "numpy<2", "Pillow")] == [
        "ai-edge-litert",
        "numpy",
        "pillow",
    ]


def test_a_version_is_at_least_another() -> None:
    assert is_at_least("1.17.3rc1", "1.17.3")
    assert is_at_least("2.15", "2.15.0")
    assert is_at_least("2.16.2", "2.15")
    assert not is_at_least("2.14.0", "2.15")
