"""Lines and numbers on the terminal."""

from __future__ import annotations

import errno
import sys

import pytest
from paralm_launch.console import ProgressLine, duration, quantity, say, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (185, "3m 05s"), (3599.6, "1h 00m"), (7620, "2h 07m"), (-1, "0s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.14159, "3.14"), (950, "950"), (999.7, "1k"), (12_345, "12.3k"), (4.56e6, "4.56M"), (7.3e9, "7.3G")],
)
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text


def test_without_a_terminal_progress_is_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """The first and the last state of each stage are printed, each once, and what is said in between."""
    with ProgressLine(terminal=False, every=3600.0) as line:
        for step in range(1, 6):
            line.update("reading", step, 5, f"{step} of 5")
            if step == 3:
                line.say("halfway")
        line.update("reading", 5, 5, "5 of 5")
        line.update("writing", 0, None, "")
        line.update("writing", 0, None, "")
    expected = ["reading: 1 of 5", "halfway", "reading: 5 of 5", "writing …"]
    assert capsys.readouterr().out.splitlines() == expected


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are markup to rich; here they are text, and long lines are not cut."""
    text = "[bold]x[/bold] " + "y" * 300
    say(text)
    table(None, ("a", "b"), [("[red]r", 12345)])
    out = capsys.readouterr().out
    assert text in out
    assert "[red]r" in out
    assert "12,345" in out


def test_a_table_too_wide_for_the_terminal_is_a_line_a_cell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folded, a word would stand letter below letter."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    table(None, ("run", "parameters", "loss"), [("first", 1234, "1.5"), ("second", 5678, "")])
    assert capsys.readouterr().out == "run: first\nparameters: 1,234\nloss: 1.5\n\nrun: second\nparameters: 5,678\n"
    table(None, ("run", "loss"), [("a run of words", "1.5")])
    assert "run: " not in capsys.readouterr().out


def test_a_log_on_a_full_disk_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Log:
        error: OSError = OSError(errno.ENOSPC, "No space left on device")

        def write(self, text: str) -> int:
            raise self.error

        def flush(self) -> None:
            raise self.error

    monkeypatch.setattr(sys, "stdout", Log())
    say("x")
    with ProgressLine(terminal=False) as line:
        line.update("reading", 1, 2, "1 of 2")
        line.say("halfway")
        line.update("reading", 2, 2, "2 of 2")
    monkeypatch.setattr(Log, "error", BrokenPipeError())  # but a reader that has left does
    with pytest.raises(BrokenPipeError):
        say("x")


def test_only_rank_0_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    say("x")
    assert capsys.readouterr().out == ""
