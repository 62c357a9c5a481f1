"""Progress: a bar on a terminal, few plain lines elsewhere, and nothing from other ranks."""

from __future__ import annotations

import io
import sys

import pytest

from utils import progress
from utils.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_and_no_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with caplog.at_level("INFO"), Progress("run", done=2, total=10, shown=True) as shown:
        for _ in range(8):
            shown.step()
        shown.tell({"critic/loss": 0.5})
    assert "run: 100%" in terminal.getvalue()
    assert "10/10 [" in terminal.getvalue()
    assert caplog.messages == []


def test_in_a_file_lines_say_what_is_left_every_half_minute_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    now = iter([0.0, 10.0, 40.0, 50.0, 60.0])  # begun, then told four times
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with caplog.at_level("INFO"), Progress("run", done=10, total=14, shown=True) as shown:
        for _ in range(4):
            shown.step()
            shown.tell({"critic/loss": 0.5, "seconds_per_step": 10.0})
    assert caplog.messages == [
        "step 12 of 14, 20 s each, 0:00:40 left, critic/loss 0.5",
        "step 14 of 14, 15 s each, 0:00:00 left, critic/loss 0.5",
    ]
    assert capsys.readouterr().err == ""  # no bar


def test_other_ranks_show_nothing(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), Progress("run", done=0, total=1, shown=False) as shown:
        shown.step()
        shown.tell({})
    assert (capsys.readouterr().err, caplog.messages) == ("", [])


def test_durations_are_hours_minutes_and_seconds() -> None:
    assert [duration(s) for s in (0, 59.6, 3723, 360000)] == [
        "0:00:00", "0:01:00", "1:02:03", "100:00:00",
    ]  # fmt: skip
