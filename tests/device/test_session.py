"""The protocol over a fake executor and a fake clock: no process is started, no time passes."""

from __future__ import annotations

import pytest

from rowcol_edge.device.profile import NULL
from rowcol_edge.device.session import MEMORY_REPEATS, Session, run_session
from rowcol_edge.device.worker import MEMORY, TIME, MemoryRun, Request, TimedRun
from rowcol_edge.errors import MeasurementError

INFERENCE_NS = 5_000_000


class FakeExecutor:
    """Every process takes ``process_seconds``; what was asked is kept."""

    def __init__(self, process_seconds: float = 0.5, fail_at: int | None = None) -> None:
        self.now = 0.0
        self.asked: list[tuple[str, Request]] = []
        self._process_seconds = process_seconds
        self._fail_at = fail_at

    def clock(self) -> float:
        return self.now

    def time(self, request: Request, where: str) -> TimedRun:
        self.asked.append((where, request))
        if len(self.asked) == self._fail_at:
            raise MeasurementError(where, expected="a process that ends well", got="signal 11")
        self.now += self._process_seconds + request.run_seconds
        return TimedRun("1.2", 3, 4, 5, (6,), True, (INFERENCE_NS, INFERENCE_NS))

    def memory(self, request: Request, where: str) -> MemoryRun:
        self.asked.append((where, request))
        self.now += self._process_seconds + 10 * INFERENCE_NS * 1e-9
        return MemoryRun("1.2", 10, 20, 30, True, INFERENCE_NS)


def request(arm: str) -> Request:
    return Request(TIME, arm, "fake", f"{arm}.onnx", "golden.npz", {}, 1)


def run(executor: FakeExecutor, seconds: float = 75.0, rounds: int = 12) -> tuple[Session, list[tuple[str, int, int]]]:
    steps: list[tuple[str, int, int]] = []
    asked = {"a": request("a"), "b": request("b"), "c": request("c"), NULL: request("b")}
    session = run_session(
        asked, executor, rounds, seconds, lambda what, done, total: steps.append((what, done, total)), executor.clock
    )
    return session, steps


def test_memory_runs_come_first_and_every_block_is_a_process_of_its_own() -> None:
    executor = FakeExecutor()
    session, _ = run(executor)
    modes = [asked.mode for _, asked in executor.asked]
    assert modes == [MEMORY] * (3 * MEMORY_REPEATS) + [TIME] * 48
    assert {name: len(blocks) for name, blocks in session.blocks.items()} == {"a": 12, "b": 12, "c": 12, NULL: 12}
    assert {name: len(runs) for name, runs in session.memory.items()} == {"a": 3, "b": 3, "c": 3}


def test_timed_processes_are_told_what_an_inference_took() -> None:
    executor = FakeExecutor()
    run(executor)
    assert {(asked.mode, asked.inference_seconds) for _, asked in executor.asked} == {(MEMORY, 0.0), (TIME, 0.005)}


def test_blocks_say_where_they_ran() -> None:
    executor = FakeExecutor()
    session, _ = run(executor)
    for name, blocks in session.blocks.items():
        assert [session.order[block.round][block.position] for block in blocks] == [name] * 12
        assert sorted(block.position for block in blocks) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    block = session.blocks["a"][0]
    assert (block.import_ns, block.load_ns, block.first_ns, block.warmups_ns) == (3, 4, 5, (6,))
    assert block.samples_ns == (INFERENCE_NS, INFERENCE_NS)


def test_the_null_arm_runs_the_file_of_its_baseline() -> None:
    executor = FakeExecutor()
    run(executor)
    null = [asked.artifact for where, asked in executor.asked if where.startswith(f"arm {NULL},")]
    assert null == ["b.onnx"] * 12


def test_the_session_keeps_to_its_budget() -> None:
    executor = FakeExecutor()
    session, _ = run(executor, seconds=75.0)
    assert session.elapsed_seconds == pytest.approx(75.0, abs=1.0)
    assert session.warnings == ()


def test_short_time_drops_rounds_and_says_so() -> None:
    session, _ = run(FakeExecutor(), seconds=30.0)
    assert len(session.order) == 8
    assert session.elapsed_seconds <= 31.0
    assert session.warnings == ("8 rounds instead of 12: 30 s are short; allow more --seconds",)


def test_a_machine_that_slows_down_ends_the_session_at_a_whole_round() -> None:
    class Slowing(FakeExecutor):
        def time(self, request: Request, where: str) -> TimedRun:
            self.now += 3.0
            return super().time(request, where)

    session, steps = run(Slowing(), seconds=75.0)
    assert 6 <= len(session.order) < 12
    assert {len(blocks) for blocks in session.blocks.values()} == {len(session.order)}
    assert "the order is not balanced" in session.warnings[0]
    assert steps[-1][1] == steps[-1][2]


def test_progress_counts_processes() -> None:
    _, steps = run(FakeExecutor())
    assert [done for _, done, _ in steps] == list(range(58))
    assert {total for _, _, total in steps} == {57}
    assert [what for what, _, _ in steps[:9]] == ["memory"] * 9
    assert {what for what, _, _ in steps[9:]} == {"latency"}


def test_a_failed_process_is_named_by_arm_and_block() -> None:
    with pytest.raises(MeasurementError, match=r"arm [abc]|arm null, block 1: .*signal 11"):
        run(FakeExecutor(fail_at=10))
