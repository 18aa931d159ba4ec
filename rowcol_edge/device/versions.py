"""Version numbers and the ranges of them that requirements ask for."""

from __future__ import annotations

import re

WITH_NUMPY_2 = "2.15"
"""Of tflite-runtime: PyPI's ends at 2.14 and is built for numpy 1, newer ones are vendors' and for their own numpy."""


def satisfies(found: str, requirement: str) -> bool:
    """Does a version fit a requirement such as ``numpy>=1.24,<2``? Releases only: that is all a target may ask for."""
    for operator, wanted in re.findall(r"(==|>=|<=|!=|~=|<|>)\s*([0-9.]+)", requirement):
        have, want = numbers(found), numbers(wanted)
        fits = {
            "==": have == want, "!=": have != want, ">=": have >= want, "<=": have <= want, ">": have > want,
            "<": have < want, "~=": have >= want and found.split(".")[: wanted.count(".")] == wanted.split(".")[:-1],
        }  # fmt: skip
        if not fits[operator]:
            return False
    return True


def is_at_least(version: str, oldest: str) -> bool:
    """Is a version the other one, or newer? Only the leading numbers count: ``1.17.3rc1`` is 1.17.3."""
    return numbers(version) >= numbers(oldest)


def name_of(requirement: str) -> str:
    """``onnxruntime-gpu>=1.17`` → ``onnxruntime-gpu``."""
    return re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def numbers(version: str) -> tuple[int, ...]:
    """``1.17.3rc1`` → (1, 17, 3); trailing zeros do not count."""
    match = re.match(r"\d+(\.\d+)*", version)
    found = [int(part) for part in match.group().split(".")] if match else []
    while found and not found[-1]:
        found.pop()
    return tuple(found)
