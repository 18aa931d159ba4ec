"""Which layers of an int8 arm stay in float: as few of the worst as its quality needs.

A layer in float costs three more bytes a weight, and its own time at fp32. So never more than one, or an eighth of the
layers, stay, and the caller weighs the bytes against those of a more careful plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .arms import Arm
from .backends.base import LayerError
from .errors import StageError

PRECISIONS = ("int8", "int8-io")
"""Those whose layers can stay in float one by one."""
TOLERANCE = 0.1
"""Relative error ‖a-b‖₂/‖b‖₂ of an arm's outputs against its own float source, on held-out inputs, above which layers
are tried in float even where no drop in quality was seen, or none can be: int8 that works stays at a few per cent."""
_SHARE = 8
_CLEARLY = 0.8


def better(arm: Arm, repaired: Arm | None) -> Arm:
    """The repaired arm where there is one and its outputs are clearly better; else the arm itself."""
    return repaired if repaired is not None and repaired.loss < _CLEARLY * arm.loss else arm


def fewest(
    errors: Sequence[LayerError], make: Callable[[Sequence[LayerError]], Arm], holds: Callable[[Arm], bool],
    said: list[str],
) -> Arm | None:  # fmt: skip
    """The arm with the fewest of the worst layers in float that holds; None if an eighth of them is not enough.

    The most is tried first and then halved: where it does not help, that is one compilation and not several. What
    cannot be made does not hold (a model of one layer has nothing left in int8); ``said`` gets why.
    """
    found = None
    count = max(1, len(errors) // _SHARE) if errors else 0
    while count:
        arm = made(lambda: make(errors[:count]), f"with {count} layers in float", said)  # noqa: B023 – called at once
        if arm is None or not holds(arm):
            break
        found, count = arm, count // 2
    return found


def made(make: Callable[[], Arm], what: str, said: list[str]) -> Arm | None:
    """A variant that is worth a try; None where it cannot be made, and ``said`` gets why."""
    try:
        return make()
    except StageError as e:
        said.append(failed(what, e))
        return None


def failed(what: str, error: StageError) -> str:
    """A note about something that was tried and can be done without."""
    return f"{what}: not made: {error.what}" + (f", got {error.got}" if error.got else "")


def notes(arm: Arm) -> list[str]:
    """What people are told about how an arm was quantized."""
    said = []
    if arm.repaired:
        biases = " and biases corrected" if arm.artifact.biases_corrected else ""
        said.append(f"{arm.name}: layers equalised{biases}, outputs {arm.loss:.1%} off its float source")
    if arm.kept_float:
        layers = ", ".join(f"{layer.name} (error {layer.error:.1%})" for layer in arm.kept_float)
        said.append(f"{arm.name}: kept in float, because quantizing them hurts most: {layers}")
    if not said and arm.precision in PRECISIONS and arm.loss > TOLERANCE:
        said.append(f"{arm.name}: outputs are {arm.loss:.1%} off its float source, and few layers in float do not help")
    return said
