"""Bars and lines: in a terminal, in a log, and how much time they think is left."""

import io
import sys
import time

import pytest

from lesa.util import progress
from lesa.util.progress import Bar, Progress, clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    """A clock that a test moves."""
    at = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: at[0])
    return at


def test_the_time_left_follows_the_mean_rate_and_runs_down_between_steps(now):
    bar = Bar("collect", total=10, completed=2)
    assert bar.left is None  # what was there before tells no rate
    now[0] += 6
    bar.advance(2)
    assert bar.left == pytest.approx(18)
    now[0] += 5
    assert bar.left == pytest.approx(13)
    now[0] += 60
    assert bar.left == 0
    bar.extend(10)  # 16 more at 3 s each, 65 s of which are over
    assert bar.left == 0 and bar.total == 20
    assert str(bar) == "collect: 20%, 0:00 left"


def test_a_phase_of_unknown_length_tells_no_time_left(now):
    bar = Bar("load", total=0)
    now[0] += 83
    bar.advance()
    assert bar.left is None and str(bar) == "load: 1:23"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (83.4, "1:23"), (4000, "1:06:40"), (59.6, "1:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_log_gets_a_line_per_phase_and_one_now_and_then(now, capsys):
    shown = Progress()
    with shown.bar("collect [/y]", 10) as bar:
        for _ in range(10):
            now[0] += 8
            bar.advance()
        bar.detail = "10 prompts"
    assert capsys.readouterr().err.splitlines() == [
        "collect [/y]: 40%, 0:48 left",
        "collect [/y]: 80%, 0:16 left",
        "collect [/y]: 80.0 s, 10 prompts",
    ]
    assert shown.lines == ["collect [/y]: 80.0 s, 10 prompts"]


def test_quiet_keeps_lines_and_writes_nothing(capsys):
    shown = Progress(quiet=True)
    with shown.bar("fit", 1):
        pass
    shown.line("fitted")
    assert shown.lines[1:] == ["fitted"] and shown.lines[0].startswith("fit: 0.0 s")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_moving_bar_with_the_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress().bar("collect [/y]", 4) as bar:
        bar.advance(1, "a [/red] circle")
        time.sleep(0.6)  # nothing advances, yet the bar is drawn again
    drawn = terminal.getvalue()
    assert "left  a [/red] circle" in drawn and drawn.count("collect [/y]") >= 3


def test_an_interrupted_phase_leaves_no_line(capsys):
    shown = Progress()
    with pytest.raises(KeyboardInterrupt), shown.bar("fit", 3):
        raise KeyboardInterrupt
    assert shown.lines == [] and capsys.readouterr().err == ""
