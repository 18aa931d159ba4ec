"""The power that this machine takes, as far as it tells: rails by name, read while something runs.

Two sources, both read-only files:

- INA3221 monitors, as on a Jetson's module. Linux's own driver shows up to three channels as ``in[123]_label``,
  ``in[123]_input`` in mV and ``curr[123]_input`` in mA (kernel.org, hwmon/ina3221), which JetPack 5 and newer have;
  NVIDIA's driver before that shows ``rail_name_[012]`` and ``in_power[012]_input`` in mW below ``iio:device*``.
- RAPL, the energy counters of Intel's and AMD's processors: ``energy_uj`` of each domain goes up to
  ``max_energy_range_uj`` and starts again (kernel.org, power/powercap/powercap). Since 2020 (CVE-2020-8694) only root
  may read them on most systems. It is the processor's own model of what it takes, not the board at its plug.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from . import sysfs

INA3221 = "INA3221"
RAPL = "RAPL"

PERIOD_SECONDS = 0.02
"""Between two readings of all rails. The same readings are taken at rest, so their own cost is subtracted too."""

_HWMON = "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label"
_IIO = "sys/bus/i2c/drivers/ina3221*/*/iio:device*/rail_name_*"
_POWERCAP = "sys/class/powercap/intel-rapl:*"
_UNCONNECTED = "NC"
_PLATFORM = "psys"
_WHOLE = ("VDD_IN", "POM_5V_IN", _PLATFORM, "package-0")
"""Rails that stand for the most, and so come first: a Jetson module's input, an Intel platform, the processor's
package."""
_PACKAGE = re.compile(r"package-[0-9]+(-die-[0-9]+)?")
"""A RAPL domain that is a whole processor, or a die of it: a machine with several takes their sum."""
_INPUTS = (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"))
"""Rails that are a module's inputs side by side, where no rail is behind another: their sum stands for the most.

Jetson AGX Orin: the 5 V system rail supplies inputs and outputs and, by ``VDDQ_VDD2_1V8AO``, memory; GPU, SoC, CPU and
accelerators are fed from the high voltage (NVIDIA, Jetson Linux Developer Guide, "Jetson Orin Nano Series, Jetson Orin
NX Series and Jetson AGX Orin Series", power monitors). Jetson AGX Xavier: NVIDIA, DG-09840, figure 5-14."""

Samples = Sequence[tuple[float, float]]
"""Readings of one rail: when, in seconds, and what (W, or J of a counter)."""


@dataclass(frozen=True, slots=True)
class Rail:
    """A supply that can be read: the product of the whole numbers in ``files``, times ``scale``.

    In W; in J for a ``counter``, which starts again behind ``range_joules`` (0: the system does not say where).
    """

    name: str
    source: str
    files: tuple[Path, ...]
    scale: float
    counter: bool = False
    range_joules: float = 0.0

    def read(self) -> float | None:
        """None where a file cannot be read now."""
        value = self.scale
        for file in self.files:
            found = sysfs.number(file)
            if found is None:
                return None
            value *= found
        return value


@dataclass(frozen=True, slots=True)
class Rails:
    """What can be read, the rail that stands for the most first; ``unread`` says why something there cannot be."""

    found: tuple[Rail, ...]
    unread: str


@dataclass(frozen=True, slots=True)
class RailRun:
    """Mean power of a rail, or of several together (``A + B``), at rest and while inferences run, in W; ``samples``
    readings stand behind the latter."""

    rail: str
    source: str
    idle_watts: float
    watts: float
    samples: int


def rails(root: Path = Path("/")) -> Rails:
    """The rails of this machine; ``root`` stands in for it in tests."""
    candidates = [*_hwmon(root), *_iio(root), *_powercap(root)]
    unread = []
    for rail in candidates:
        why = [f"{file.name}: {text}" for file in rail.files if (text := sysfs.obstacle(file))]
        unread += [f"{rail.source} {rail.name}, {text}" for text in why[:1]]
    if not candidates:
        unread = ["no INA3221 monitor and no RAPL counter here"]
    found = _told_apart([rail for rail in candidates if rail.read() is not None])
    found.sort(key=lambda rail: _WHOLE.index(rail.name) if rail.name in _WHOLE else len(_WHOLE))
    return Rails(tuple(found), "; ".join(unread))


def mean_watts(rail: Rail, samples: Samples) -> float | None:
    """Mean power over the time of the samples; None with less than two of them, or for a counter that went back and
    does not say how far it goes."""
    if len(samples) < 2 or samples[-1][0] <= samples[0][0]:
        return None
    joules = 0.0
    for (begin, before), (end, after) in pairwise(samples):
        if not rail.counter:
            joules += (before + after) / 2 * (end - begin)
            continue
        step = after - before if after >= before else after - before + rail.range_joules
        if step < 0:
            return None
        joules += step
    return joules / (samples[-1][0] - samples[0][0])


def set_against(rails_read: Sequence[Rail], idle: Sequence[Samples], busy: Sequence[Samples]) -> tuple[RailRun, ...]:
    """Each rail at rest and at work, before them the sum of those that are a module's inputs, or of several processors;
    one that could not be read throughout is left out."""
    runs: list[RailRun] = []
    for rail, at_rest, at_work in zip(rails_read, idle, busy, strict=True):
        idle_watts, watts = mean_watts(rail, at_rest), mean_watts(rail, at_work)
        if idle_watts is not None and watts is not None:
            runs.append(RailRun(rail.name, rail.source, idle_watts, watts, len(at_work)))
    return (*_sums(runs), *runs)


def _sums(runs: Sequence[RailRun]) -> Iterator[RailRun]:
    by_name = {run.rail: run for run in runs}
    packages = tuple(run.rail for run in runs if run.source == RAPL and _PACKAGE.fullmatch(run.rail))
    whole = (packages,) if len(packages) > 1 and _PLATFORM not in by_name else ()
    for names in (*_INPUTS, *whole):
        if all(name in by_name for name in names):
            parts = [by_name[name] for name in names]
            yield RailRun(
                " + ".join(names),
                parts[0].source,
                sum(part.idle_watts for part in parts),
                sum(part.watts for part in parts),
                min(part.samples for part in parts),
            )


def _told_apart(found: Sequence[Rail]) -> list[Rail]:
    """Rails of one source and name under names of their own: the second is ``VDD_IN (2)``."""
    seen: Counter[tuple[str, str]] = Counter()
    told = []
    for rail in found:
        seen[rail.source, rail.name] += 1
        count = seen[rail.source, rail.name]
        told.append(rail if count == 1 else replace(rail, name=f"{rail.name} ({count})"))
    return told


class Recorder:
    """Reads rails at the begin of its ``with`` block, every ``period_seconds`` in a thread, and at the end."""

    def __init__(
        self,
        rails_read: Sequence[Rail],
        period_seconds: float = PERIOD_SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.samples: list[list[tuple[float, float]]] = [[] for _ in rails_read]
        self._rails = rails_read
        self._period_seconds = period_seconds
        self._clock = clock
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="power", daemon=True)

    def _take(self) -> None:
        for rail, samples in zip(self._rails, self.samples, strict=True):
            value = rail.read()
            if value is not None:
                samples.append((self._clock(), value))

    def _go_on(self) -> None:
        while not self._end.wait(self._period_seconds):
            self._take()

    def __enter__(self) -> Recorder:
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self._take()


def _hwmon(root: Path) -> list[Rail]:
    found = []
    for label in sorted(root.glob(_HWMON)):
        number, name = label.name[len("in") : -len("_label")], sysfs.text(label).strip()
        current = label.with_name(f"curr{number}_input")
        # the label of the sum of all shunt voltages has no current beside it
        if name and _UNCONNECTED not in name.split("_") and current.exists():
            found.append(Rail(name, INA3221, (current, label.with_name(f"in{number}_input")), 1e-6))
    return found


def _iio(root: Path) -> list[Rail]:
    found = []
    for label in sorted(root.glob(_IIO)):
        name, number = sysfs.text(label).strip(), label.name[len("rail_name_") :]
        if name and _UNCONNECTED not in name.split("_"):
            found.append(Rail(name, INA3221, (label.with_name(f"in_power{number}_input"),), 1e-3))
    return found


def _powercap(root: Path) -> list[Rail]:
    found = []
    for zone in sorted(root.glob(_POWERCAP)):
        if not re.fullmatch(r"intel-rapl(:[0-9]+)+", zone.name):
            continue
        name = sysfs.text(zone / "name").strip()
        if not name:
            continue
        # intel-rapl:0:1 is a part of intel-rapl:0
        above = sysfs.text(zone.with_name(zone.name.rpartition(":")[0]) / "name").strip()
        range_uj = sysfs.number(zone / "max_energy_range_uj") or 0
        full = f"{above}/{name}" if above else name
        found.append(Rail(full, RAPL, (zone / "energy_uj",), 1e-6, True, max(0, range_uj) * 1e-6))
    return found
