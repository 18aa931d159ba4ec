"""Files that take turns of a tenth of a second, each in a process of its own that stays up meanwhile.

The profiler starts a process for each block, so that seconds lie between one file's block and another's: its intervals
hold what a machine's neighbours on the host do in that time, which can be more than the few percent that are asked
about. Turns this short meet the same of it; those of a slow file are as long as three inferences. A round is a process
for each file and a few turns in a balanced order; its ratio is the median over the turns. The interval is over the
rounds, as pages lie elsewhere in each process. Before a turn threads of the others come to rest, and its first
inference, which finds the caches as the others left them, does not count.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rowcol_edge.device import schedule, stats
from rowcol_edge.device.profile import NULL, Block
from rowcol_edge.device.runtimes import RuntimeOptions, load_runtime
from rowcol_edge.device.verdicts import Judgement, judge
from rowcol_edge.device.worker import Request, sample
from rowcol_edge.errors import MeasurementError

_TURN_SECONDS, _REST_SECONDS = 0.12, 0.02
_FEWEST = 2
"""Inferences of a turn, after its first."""

_TIMEOUT_SECONDS = 300.0
"""Of a turn, or of a file's loading: a bound on hanging, not on being slow."""


@dataclass(frozen=True, slots=True)
class Turns:
    """Of each arm but the baseline each round's ratio to it."""

    baseline: str
    ratios: dict[str, list[float]]

    def judged(self, evidence: str) -> Judgement:
        """By the profiler's rules; the ratios stand in for the medians of its blocks."""
        rounds = len(self.ratios[NULL])
        blocks = {
            arm: [Block(number, 0, 0, 0, 0, True, (), (round(1e9 * ratio),)) for number, ratio in enumerate(ratios)]
            for arm, ratios in {self.baseline: [1.0] * rounds, **self.ratios}.items()
        }
        pairs = [(arm, self.baseline) for arm in self.ratios if arm != NULL]
        return judge(blocks, pairs, self.baseline, evidence)


def take_turns(requests: Mapping[str, Request], baseline: str, rounds: int) -> Turns:
    """Measure arms against ``baseline``, one of them; another is its null arm. MeasurementError: a process ends early,
    or hangs."""
    ratios: dict[str, list[float]] = {arm: [] for arm in requests if arm != baseline}
    for names in schedule.order(list(requests), rounds):
        turns = _round({name: requests[name] for name in names})
        for arm, each in ratios.items():
            each.append(stats.median([a / b for a, b in zip(turns[arm], turns[baseline], strict=True)]))
    return Turns(baseline, ratios)


def _round(requests: Mapping[str, Request]) -> dict[str, list[float]]:
    """Of each arm the median of each of its turns, in ns."""
    arms = list(requests)
    with ExitStack() as stack:
        files = {arm: stack.enter_context(_File(arm, request)) for arm, request in requests.items()}
        slowest = max(stats.median(file.inferences(3)) for file in files.values())
        count = 1 + max(_FEWEST, round(_TURN_SECONDS * 1e9 / slowest))
        medians: dict[str, list[float]] = {arm: [] for arm in arms}
        for row in schedule.order(arms, schedule.cycle(len(arms))):
            for arm in row:
                time.sleep(_REST_SECONDS)
                medians[arm].append(stats.median(files[arm].inferences(count)[1:]))
        return medians


class _File:
    """A process that has a file open and runs it when it is asked to."""

    def __init__(self, arm: str, request: Request) -> None:
        self._arm = arm
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 – see __exit__
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )
        self._say(request.to_json())

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def inferences(self, count: int) -> list[int]:
        """Their times in ns."""
        stdout = self._process.stdout
        assert stdout is not None
        with suppress(BrokenPipeError):  # of a process that has ended, which gives no line
            self._say(str(count))
        ready, *_ = select.select([stdout], [], [], _TIMEOUT_SECONDS)
        if not ready:
            raise MeasurementError(f"arm {self._arm}", expected=f"times within {_TIMEOUT_SECONDS:.0f} s", got="none")
        line = stdout.readline()
        if not line:
            code = self._process.wait()
            self._stderr.seek(0)
            last = self._stderr.read().strip().rpartition("\n")[2]
            raise MeasurementError(f"arm {self._arm}", expected="times", got=f"exit code {code}: {last}")
        times: list[int] = json.loads(line)
        return times

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def main() -> None:
    """The other end: a request on stdin, then numbers of inferences; their times on stdout."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print
    request = Request.from_json(sys.stdin.readline())
    options = RuntimeOptions(request.threads, request.providers, request.properties)
    with np.load(request.golden_inputs, allow_pickle=False) as arrays:
        feed = dict(arrays)
    with load_runtime(request.runtime).open(Path(request.artifact), options) as session:
        for _ in range(_FEWEST):
            session.run(feed)
        for line in sys.stdin:
            times = sample(session.run, feed, 0, (int(line), int(line)), time.perf_counter_ns)
            print(json.dumps(times), file=out, flush=True)


if __name__ == "__main__":
    main()
