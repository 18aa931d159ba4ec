"""Every error rowcol_edge raises on purpose.

    RowcolError                     exit code 2 unless stated
    ├── InputError                  something the user handed over
    │   ├── ModelError              model reference, factory, .pt2
    │   │   ├── WeightsError        a weights file that does not fit the model
    │   │   └── UnsupportedOpError  an operator that a stage cannot take (names the module)
    │   ├── DataError               images, arrays, batches
    │   │   └── SplitError          splits that share samples
    │   ├── TargetError             unknown or malformed target
    │   ├── ConfigError             rowcol.toml, options, budgets, metrics
    │   ├── PlanError               a factor plan that does not fit the model
    │   └── BundleError             a bundle that is damaged or of another kind
    │       └── IntegrityError      a digest or size that does not match
    ├── MissingDependencyError      a package that is not installed (gives the install line)
    ├── StageError                  a stage of the build failed on valid input
    │   └── ParityError             an exact stage changed the outputs
    ├── BudgetError                 exit code 1: a budget or gate was not met
    ├── VerifyError                 exit code 1: a bundle computes something else here than where it was built
    ├── NotComparableError          exit code 3: two measurements that must not be compared
    ├── BoardError                  a board at the end of a line that lacks what a run needs, or whose run failed
    │   ├── UnreachableError        no line to it, or one that dropped and did not come back
    │   ├── LoginError              it does not let this user in
    │   └── HostKeyError            its host key is unknown, or another one than on record
    ├── FleetError                  exit code 1: jobs of a fleet that were not done; what was done is written
    ├── SchedulerError              the scheduler of a fleet cannot be reached, or is gone
    └── MeasurementError            the profiler could not take the measurement

Each says what is wrong, what was expected, what was got, and a hint for the next step.
"""

from __future__ import annotations

from collections.abc import Iterable


class RowcolError(Exception):
    """``what: expected …, got …`` plus a hint; the command line prints it without a traceback."""

    exit_code = 2

    def __init__(self, what: str, *, expected: str = "", got: str = "", hint: str = "") -> None:
        super().__init__(what, expected, got, hint)
        self.what = what
        self.expected = expected
        self.got = got
        self.hint = hint

    def __str__(self) -> str:
        text = self.what
        if self.expected:
            text += f": expected {self.expected}"
        if self.got:
            text += f"{', ' if self.expected else ': '}got {self.got}"
        if self.hint:
            text += f" – {self.hint}"
        return text


class InputError(RowcolError):
    """Something the user handed over cannot be used."""


class ModelError(InputError):
    """A model reference, factory or saved program that cannot be loaded."""


class WeightsError(ModelError):
    """Weights that do not fit the model, or are not finite."""


class UnsupportedOpError(ModelError):
    """An operator that a stage cannot take; names the module it comes from."""


class DataError(InputError):
    """Images, arrays or batches of the wrong kind, shape, type or content."""


class SplitError(DataError):
    """Two splits share samples, so a choice would be judged on data it has seen."""


class TargetError(InputError):
    """An unknown target or a malformed target file."""


class ConfigError(InputError):
    """An option, a budget, a metric or a key of rowcol.toml."""


class PlanError(InputError):
    """A factor plan that does not fit the model."""


class BundleError(InputError):
    """A bundle that is damaged, incomplete or of another kind."""


class IntegrityError(BundleError):
    """A file of the bundle has another digest or size than its manifest says."""


class MissingDependencyError(RowcolError):
    """A package is missing; the message holds the exact install line, pip's unless ``install`` gives another."""

    def __init__(self, what: str, *, package: str, install: str = "", hint: str = "") -> None:
        install = "install it with: " + (install or f"python -m pip install '{package}'")
        hint = f"{install}; {hint}" if hint else install
        super().__init__(what, expected=f"package {package}", got="it is not installed", hint=hint)
        self.package = package

    def __reduce__(self) -> tuple[object, ...]:
        return (_missing, (self.what, self.package, self.hint))


def _missing(what: str, package: str, hint: str) -> MissingDependencyError:
    error = MissingDependencyError(what, package=package)
    error.hint = hint
    return error


class StageError(RowcolError):
    """A stage of the build failed on valid input."""


class ParityError(StageError):
    """A stage that must not change the outputs changed them."""


class BudgetError(RowcolError):
    """A budget or gate was not met."""

    exit_code = 1


class VerifyError(RowcolError):
    """A bundle's arm does not reproduce its golden outputs on this machine."""

    exit_code = 1


class NotComparableError(RowcolError):
    """Two measurements that must not be compared."""

    exit_code = 3


class BoardError(RowcolError):
    """A board at the end of a line that lacks what a run needs, or whose run failed."""


class UnreachableError(BoardError):
    """No line to a board, or one that dropped and did not come back."""


class LoginError(BoardError):
    """A board that does not let this user in."""


class HostKeyError(BoardError):
    """A board whose host key is unknown, or another one than on record."""


class FleetError(RowcolError):
    """Jobs of a fleet that were not done; what was done is written."""

    exit_code = 1


class SchedulerError(RowcolError):
    """The scheduler of a fleet cannot be reached, or is gone."""


class MeasurementError(RowcolError):
    """The profiler could not take the measurement."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint with the one or two known names that are nearest to one that is not known; empty if none is near."""
    from difflib import get_close_matches  # only a mistake pays for this import

    near = get_close_matches(name, list(known), n=2)
    return f"did you mean {' or '.join(near)}?" if near else ""
