from __future__ import annotations

import gc
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rowcol_edge.device import worker
from rowcol_edge.device.bundle import Bundle
from rowcol_edge.device.records import decode
from rowcol_edge.device.worker import MemoryRun, Request, TimedRun
from rowcol_edge.errors import BundleError, MissingDependencyError

MS = 1_000_000


class Clock:
    """Time that passes only while something runs: each run takes the next of the given times."""

    def __init__(self, times: Callable[[int], int]) -> None:
        self.now = 0
        self.runs = 0
        self._times = times

    def __call__(self) -> int:
        return self.now

    def infer(self, *_: object) -> None:
        self.now += self._times(self.runs)
        self.runs += 1


def test_warm_up_ends_when_two_windows_agree() -> None:
    clock = Clock(lambda i: 20 * MS if i < 7 else 5 * MS)
    times, settled = worker.warm_up(clock.infer, 10_000 * MS, clock)
    assert settled
    # windows of five: 20 ms, then mixed with median 5 ms, then 5 ms
    assert times == [20 * MS] * 7 + [5 * MS] * 8


def test_a_slowly_falling_latency_is_not_settled_before_it_is_flat() -> None:
    clock = Clock(lambda i: max(5 * MS, 20 * MS - i * MS // 5))
    times, settled = worker.warm_up(clock.infer, 10_000 * MS, clock)
    assert settled
    assert times[-1] < 7 * MS


def test_windows_of_a_fast_model_last_long_enough() -> None:
    clock = Clock(lambda i: MS // 50)
    times, settled = worker.warm_up(clock.infer, 10_000 * MS, clock)
    assert settled
    assert sum(times) >= 2 * worker.WINDOW_NS
    assert len(times) > 2 * worker.WINDOW_SAMPLES


@pytest.mark.parametrize(("limit_ns", "most", "runs"), [(50 * MS, 2000, 5), (10**15, 30, 30)])
def test_warm_up_is_bounded_in_time_and_count(limit_ns: int, most: int, runs: int) -> None:
    clock = Clock(lambda i: 10 * MS * (1 + i // 5))
    times, settled = worker.warm_up(clock.infer, limit_ns, clock, most)
    assert not settled
    assert len(times) == runs


def test_samples_until_the_time_is_up() -> None:
    clock = Clock(lambda i: (i + 1) * MS)
    assert worker.sample(clock.infer, {}, 10 * MS, (2, 100), clock) == [1 * MS, 2 * MS, 3 * MS, 4 * MS]


@pytest.mark.parametrize(("limit_ns", "bounds", "count"), [(0, (5, 100), 5), (10**15, (1, 7), 7)])
def test_samples_are_bounded_in_count(limit_ns: int, bounds: tuple[int, int], count: int) -> None:
    clock = Clock(lambda i: MS)
    assert len(worker.sample(clock.infer, {}, limit_ns, bounds, clock)) == count


def test_nothing_is_collected_while_samples_are_taken() -> None:
    states = []
    worker.sample(lambda feed: states.append(gc.isenabled()), {}, 0, (3, 3), lambda: 0)
    assert states == [False] * 3
    assert gc.isenabled()


def test_collecting_goes_on_after_a_failure() -> None:
    def fail(feed: object) -> None:
        raise BundleError("model")

    with pytest.raises(BundleError):
        worker.sample(fail, {}, 0, (1, 1), lambda: 0)
    assert gc.isenabled()


def request(bundle: Bundle, **changes: object) -> Request:
    values = {
        "mode": worker.TIME,
        "arm": "dense@fp32",
        "runtime": "onnxruntime",
        "artifact": str(bundle.artifact("dense@fp32")),
        "golden_inputs": str(bundle.root / bundle.manifest.golden_inputs),
        "batch": {"image": 1},
        "threads": 1,
        "run_seconds": 0.05,
        "warmup_seconds": 0.02,
        "max_samples": 20,
    }
    return Request(**{**values, **changes})  # type: ignore[arg-type]


def test_requests_survive_the_pipe(bundle: Bundle) -> None:
    asked = request(bundle, providers=("CPUExecutionProvider",))
    assert Request.from_json(asked.to_json()) == asked


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"providers": []}', '{"providers": [], "more": 1}'])
def test_a_broken_request_is_an_error(text: str) -> None:
    with pytest.raises(BundleError, match="worker request"):
        Request.from_json(text)


def test_a_timed_run_of_a_real_runtime(bundle: Bundle) -> None:
    found = worker.run(request(bundle))
    assert isinstance(found, TimedRun)
    assert min(found.import_ns, found.load_ns, found.first_ns, *found.samples_ns) > 0
    assert 5 <= len(found.samples_ns) <= 20
    assert found.warmups_ns


def test_a_memory_run_of_a_real_runtime(bundle: Bundle) -> None:
    found = worker.run(request(bundle, mode=worker.MEMORY))
    assert isinstance(found, MemoryRun)
    assert found.baseline_bytes is not None
    assert found.after_load_bytes is not None
    assert found.peak_bytes is not None
    assert found.peak_bytes >= found.after_load_bytes
    assert found.inference_ns > 0


def test_the_feed_is_the_first_golden_input_at_the_models_batch(tmp_path: Path, bundle: Bundle) -> None:
    image, scale = np.arange(6, dtype=np.float32).reshape(3, 2), np.float32(7)
    np.savez(tmp_path / "golden.npz", image=image, scale=scale)

    def feed(batch: dict[str, int]) -> dict[str, np.ndarray]:
        return worker._feed(request(bundle, golden_inputs=str(tmp_path / "golden.npz"), batch=batch))

    assert feed({"image": 1})["image"].tolist() == [[0, 1]]
    assert feed({"image": 2, "scale": 0})["image"].tolist() == [[0, 1], [2, 3]]
    assert feed({"image": 2, "scale": 0})["scale"] == np.float32(7)
    assert feed({"image": 4})["image"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    with pytest.raises(BundleError, match="expected an array 'mask'"):
        feed({"mask": 1})


def test_an_unknown_runtime_is_an_error(bundle: Bundle) -> None:
    with pytest.raises((BundleError, MissingDependencyError), match="onnxruntim"):
        worker.run(request(bundle, runtime="onnxruntim"))


def test_what_libraries_print_stays_out_of_the_result(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = worker.run

    def noisy(asked: Request) -> TimedRun | MemoryRun:
        found = run(asked)
        sys.__stdout__.write("chatter\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(worker, "run", noisy)
    monkeypatch.setattr(sys, "stdin", io.StringIO(request(bundle).to_json()))
    assert worker.main([]) == 0
    out, err = capfd.readouterr()
    assert isinstance(decode(TimedRun, json.loads(out), "result"), TimedRun)
    assert "chatter" in err


def test_the_worker_takes_no_arguments() -> None:
    with pytest.raises(BundleError, match="comes on stdin"):
        worker.main(["x"])
