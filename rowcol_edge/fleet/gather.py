"""What a fleet has measured: a folder of profiles that fills as they come, and one table of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..device.files import write_whole
from ..device.main import check_room, write_profile
from ..device.profile import Profile
from ..device.table import mebibytes, milliseconds, ratio_text, times_count
from ..errors import BundleError, ConfigError, FleetError
from ..report.compare import paired
from ..report.gate import default_arm, default_baseline
from .queueing import DONE, Ended, Job

SCHEMA = 1
"""Of ``fleet.json``. History: 1 – first version."""
MEASURED, KEPT, FAILED = "measured", "kept", "failed"
"""KEPT: measured by an earlier run, of the same bundle, board and options."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One job: where it was measured and what its default arm showed, or why it was not measured.

    ``latency``, ``ratio`` and ``memory``, the peak with the verdict on the target's budget, are texts as in the table;
    what is not known is empty.
    """

    bundle: str
    digest: str
    target: str
    board: str
    state: str
    reason: str = ""
    attempts: int = 0
    seconds: float = 0.0
    file: str = ""
    arm: str = ""
    latency: str = ""
    ratio: str = ""
    memory: str = ""
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class Gathered:
    """All entries in the order of the jobs, and the folder of their profiles."""

    folder: Path
    entries: tuple[Entry, ...]

    @property
    def profiles(self) -> list[Path]:
        return [self.folder / entry.file for entry in self.entries if entry.file]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "entries": [asdict(entry) for entry in self.entries]}

    def raise_if_incomplete(self) -> None:
        """FleetError names the boards that measured nothing; BudgetError a default arm that takes too much memory."""
        failed = [entry for entry in self.entries if entry.state == FAILED]
        if failed:
            raise FleetError(
                f"{len(failed)} of {len(self.entries)} profiles were not measured", expected="all of them",
                got="; ".join(dict.fromkeys(f"{entry.board}: {entry.reason}" for entry in failed[:3])),
                hint="repeat the command: it keeps what was measured",
            )  # fmt: skip
        for path in self.profiles:
            Profile.load(path).raise_if_over_budget()


class Folder:
    """The results of a campaign. ConfigError: a place that cannot be written. BundleError: one without room."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            (path / "profiles").mkdir(parents=True, exist_ok=True)
            write_whole(path / "profiles" / ".written", "")
            (path / "profiles" / ".written").unlink()
            check_room(path / "profiles")
        except OSError as e:
            raise _not_written(path, e) from e

    def kept(self, job: Job) -> Entry | None:
        """What an earlier run measured for this very job; a file that is damaged is measured again."""
        for board in sorted(job.places, key=len, reverse=True):  # the name of a bundle may end like another board's
            for path in sorted((self.path / "profiles").glob(f"*--{board}-{job.id}.json")):
                try:
                    measured = Profile.load(path)
                except BundleError:
                    continue
                if measured.digest == job.work["digest"]:
                    return self._entry(job, board, measured, path, KEPT)
        return None

    def keep(self, ended: Ended) -> Entry:
        """Write the profile of a job that was done; the entry of one that was not.

        Where it cannot be written the entry says where it is kept: the other boards go on.
        """
        return replace(self._kept_or_not(ended), attempts=ended.attempts, seconds=round(ended.seconds, 1))

    def _kept_or_not(self, ended: Ended) -> Entry:
        job, outcome = ended.job, ended.outcome
        if outcome.state != DONE:
            return unmeasured(job, outcome.reason, ended.place)
        measured = Profile.from_json(outcome.result, f"profile from {ended.place}")
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.work["name"])
        path = self.path / "profiles" / f"{name}--{ended.place}-{job.id}.json"
        try:
            write_profile(measured, path)
        except BundleError as e:
            return unmeasured(job, f"measured, but not written: {e}", ended.place)
        return self._entry(job, ended.place, measured, path, MEASURED)

    def write(self, entries: Sequence[Entry]) -> Gathered:
        """Write ``fleet.json``. ConfigError: it cannot be written any more."""
        found = Gathered(self.path, tuple(entries))
        text = json.dumps(found.to_dict(), indent=1, ensure_ascii=False)
        try:
            write_whole(self.path / "fleet.json", text + "\n")
        except OSError as e:
            raise _not_written(self.path / "fleet.json", e) from e
        return found

    def _entry(self, job: Job, board: str, measured: Profile, path: Path, state: str) -> Entry:
        arm = default_arm(measured)
        against = paired(measured, arm, default_baseline(measured, arm))
        return replace(
            _named(job, board, state),
            file=str(path.relative_to(self.path)),
            arm=arm,
            latency=milliseconds(measured.arms[arm].latency.median_ns) if times_count(measured) else "",
            ratio=ratio_text(against) if against else "",
            memory=_memory(measured, arm),
            evidence=measured.evidence,
        )


def _memory(measured: Profile, arm: str) -> str:
    peak, budget = measured.arms[arm].memory, measured.memory_budget
    if peak is None or not times_count(measured):
        return ""
    return ", ".join(filter(None, (mebibytes(peak.peak_bytes), budget.verdicts.get(arm, "") if budget else "")))


def unmeasured(job: Job, reason: str, place: str = "") -> Entry:
    """The entry of a job that gave no profile; without a ``place``: on none of those that would have done."""
    return replace(_named(job, place or ", ".join(job.places), FAILED), reason=reason)


def _not_written(path: Path, error: OSError) -> ConfigError:
    return ConfigError("--out", expected="a folder that can be written", got=f"{path}: {error.strerror}")


def _named(job: Job, board: str, state: str) -> Entry:
    return Entry(job.work["name"], job.work["digest"], job.work["target"], board, state)
