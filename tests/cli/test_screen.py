"""Interrupts, texts that would control the terminal, and signs of life in logs."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios

import pytest

from bhpeft_pyro.base import progress
from bhpeft_pyro.base.progress import work
from bhpeft_pyro.cli.screen import interactive, say, table

_STOPPED = """
import signal, sys, builtins
real, left = builtins.__import__, [{after}]
def slow(name, *rest):
    left[0] -= 1
    if left[0] == 0:
        signal.raise_signal(signal.SIGINT)
    return real(name, *rest)
from bhpeft_pyro.__main__ import main
sys.argv = ["bhpeft", "history", "."]
builtins.__import__ = slow
main()
"""


@pytest.mark.parametrize("after", [1, 40, 400, 4000])
def test_an_interrupt_during_the_imports_is_one_line(after: int) -> None:
    code = _STOPPED.format(after=after)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "interrupted; every saved posterior is whole\n" and not done.stdout


def test_bars_need_a_terminal_with_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    main, other = pty.openpty()
    with open(main, "rb"), open(other, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        for size, drawn in (((0, 0), False), ((0, 80), False), ((24, 80), True)):
            termios.tcsetwinsize(other, size)
            assert interactive() == drawn


def test_texts_do_not_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bad = "\x1b[2J\x07\x9b31m\u202eabc"
    say(bad)
    table(bad, ("a", bad), [(bad, 1.0)])
    output = "".join(capsys.readouterr())
    assert "\\x1b[2J" in output
    assert not any(sign in output for sign in "\x1b\x07\x9b\u202e")


def test_texts_stay_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say("labels: ':smile:', 'a:b:c', '[bold]'")
    assert capsys.readouterr().err == "labels: ':smile:', 'a:b:c', '[bold]'\n"


def test_letters_that_the_output_lacks_are_escaped() -> None:
    code = """
import sys, typer
from bhpeft_pyro import __main__
from bhpeft_pyro.cli import app, screen
app.app = lambda **_: screen.table("t", ("a",), [("✓",)])
__main__.main()
"""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0 and b"\\u2713" in done.stdout, done.stderr


def test_a_log_gets_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    with work("fit", 2) as whole:
        for number in range(2):
            whole.name(f"component {number + 1} of 2")
            with work("training", 50) as steps:
                for step in range(50):
                    now += 4.0
                    steps.next(f"loss {step}")
            whole.next()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "component 1 of 2, training: 15 %, 01:00, 05:40 left, loss 14",
        "component 1 of 2, training: 30 %, 02:00, 04:40 left, loss 29",
        "component 1 of 2, training: 45 %, 03:00, 03:40 left, loss 44",
    ]
    assert len(lines) == 6 and lines[3].startswith("component 2 of 2, training: 60 %")


def test_numbers_are_whole_in_a_narrow_window(capsys: pytest.CaptureFixture[str]) -> None:
    """A number that is cut, or a date, would be another one."""
    names = ["batch", *(f"drift/epistemic {k}" for k in range(7))]
    table("", names, [(f"2024-03-{day}", *[day / 7] * 7) for day in (11, 12)])
    shown = capsys.readouterr().out
    assert "2024-03-11" in shown and shown.count("1.571") == 7 and "…" not in shown
