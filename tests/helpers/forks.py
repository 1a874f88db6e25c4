"""Children of this process: they start at once, as everything is imported already."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

FILES = tuple(
    f"bhpeft_pyro/{name}.py"
    for name in (
        *("base/files", "base/log", "posterior/saving", "review/session"),
        *("serving/feedback", "streams/history", "streams/record"),
    )
)


def start(work: Callable[[], Any], result: Path | None = None) -> int:
    """Run `work` in a child, which writes what it returns as JSON; its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        found = work()
        if result is not None:
            result.write_text(json.dumps(found))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int, seconds: float = 300.0) -> int:
    """The exit code of a child; minus the signal that killed it. One that does not end is aborted,
    so that nobody waits for ever."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGABRT)
        time.sleep(0.002)


def in_a_child(work: Callable[[], Any], result: Path) -> Any:
    """What `work` returns in a child, by way of a file."""
    assert wait(start(work, result)) == 0
    return json.loads(result.read_text())


def at_each_line(act: Callable[[], Any]) -> None:
    """Call `act` before each line that writes, in this process from now on."""

    def trace(frame: Any, event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        if event == "line":
            act()
        return trace

    sys.settrace(trace)


def lines_of(work: Callable[[], Any], result: Path) -> int:
    """How many lines that write a child enters."""

    def child() -> int:
        lines = count()
        at_each_line(lambda: next(lines))
        work()
        sys.settrace(None)
        return next(lines)

    return int(in_a_child(child, result))


def killed_at_line(number: int, work: Callable[[], Any]) -> bool:
    """Whether a child that is killed before line `number` of those that write got there."""

    def child() -> None:
        lines = count(1)

        def act() -> None:
            if next(lines) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        at_each_line(act)
        work()

    code = wait(start(child))
    assert code in (0, -signal.SIGKILL)
    return code != 0
