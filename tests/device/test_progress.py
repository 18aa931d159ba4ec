from __future__ import annotations

import pytest

from rowcol_edge.device.progress import on_stderr


def test_progress_tells_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 6.0, 9.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    show = on_stderr(interactive=False)
    for done in (2, 4, 5):
        show("latency", done, 5)
    assert capsys.readouterr().err.splitlines() == ["latency 2/5", "latency 4/5, 3 s left", "latency 5/5"]


def test_progress_at_a_terminal_clears_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    show = on_stderr(interactive=True)
    show("verify", 1, 2)
    show("verify", 2, 2)
    assert capsys.readouterr().err == "\r\x1b[Kverify 1/2\r\x1b[K"
