"""What a log file is told of a long task."""

from __future__ import annotations

import pytest

from regrow.cli import console


def test_a_line_a_minute_with_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run resumed at 100 of 400: a tenth a second, whatever was done before."""
    clock = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    say = console.lines()
    for second in range(301):
        clock[0] = 1000.0 + 10 * second
        say("recovery", 100 + second, 400)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "recovery: 400 to do"
    assert told[1] == "recovery: 106 of 400, 49 min left"
    assert told[-1] == "recovery: 400 done in 3000 s"
    assert len(told) == 2 + 49, "every sixth step, and not beside the last"


def test_a_short_task_has_two_lines_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    say = console.lines()
    for _ in range(2):
        for done in (1, 2, 3):
            say("text", done, 3)
    assert capsys.readouterr().err.splitlines() == 2 * ["text: 3 to do", "text: 3 done in 0 s"]
