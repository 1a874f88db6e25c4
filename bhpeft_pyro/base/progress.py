"""Signs of progress: one bar for a piece of work, with the time that is left of all of it.

A terminal shows a bar, and so does a notebook with widgets; a log gets a line a minute. There are
none in workers and in a fit with `progress=False`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from importlib.util import find_spec
from time import monotonic
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

Item = TypeVar("Item")
Listener = Callable[[str, float | None, str], object]  # title, share done if known, and note

_DELAY = 1.0  # seconds after which a bar is shown
_EVERY = 60.0  # seconds between the lines of a log


def _times(elapsed: float, share: float | None) -> str:
    past, left = (
        f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"
        for seconds in (elapsed, elapsed * (1 / share - 1) if share else 0.0)
    )
    if share is None:
        return past
    return f"{100 * share:.0f} %, {past}, {left if share else '?'} left"


class _Times(ProgressColumn):
    """Time past and left, by the mean speed: steps of different parts differ."""

    def render(self, task: Task) -> Text:
        share = None if task.total is None else task.completed
        return Text(_times(task.elapsed or 0.0, share))


@contextmanager
def _live(console: Console, delay: float) -> Iterator[Listener]:
    live = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        _Times(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=True,
        refresh_per_second=4,
        # What goes to a file by stdout stays there: rich would print it to stderr.
        redirect_stdout=sys.stdout.isatty(),
    )
    task, began = live.add_task("", total=None, note=""), monotonic()

    def show(title: str, share: float | None, note: str) -> None:
        total = None if share is None else 1.0
        live.update(task, description=title, completed=share or 0.0, total=total, note=note)
        if monotonic() - began >= delay:
            live.start()

    try:
        yield show
    finally:
        if live.live.is_started:
            live.stop()


def _lines(console: Console) -> Listener:
    began = printed = monotonic()

    def show(title: str, share: float | None, note: str) -> None:
        nonlocal printed
        now = monotonic()
        if now - printed >= _EVERY:
            printed = now
            line = f"{title}: {_times(now - began, share)}"
            print(", ".join(filter(None, (line, note))), file=console.file, flush=True)

    return show


def _display(delay: float) -> AbstractContextManager[Listener]:
    console = Console(stderr=True)
    if console.is_jupyter:
        widgets = find_spec("ipywidgets") is not None
        return _live(console, delay) if widgets else _nothing(delay)
    if console.file.isatty() and not console.is_dumb_terminal:
        return _live(console, delay)
    return nullcontext(_lines(console))


def _nothing(_: float) -> AbstractContextManager[Listener]:
    return nullcontext(lambda *_: None)


_make: ContextVar[Callable[[float], AbstractContextManager[Listener]]] = ContextVar(
    "make", default=_display
)


class Work:
    """A piece of work in parts of equal length. Work that is done within a part moves the same bar
    through that part.

    Args:
        title: what it is, in a word or two.
        parts: how many, the last of which may be less than one; None if that is not known.
        outer: the work that this is a part of.
        at_once: show the bar before the first second has passed.
        share: of an outer part, what this takes of it; 0 if it is only named. What comes after it
            in the same part moves the bar through the rest.
    """

    def __init__(
        self,
        title: str,
        parts: float | None,
        outer: Work | None,
        at_once: bool = False,
        share: float = 1.0,
    ) -> None:
        self.parts, self.done, self.outer = parts, 0, outer
        self.begin, self.length = 0.0, 1.0
        self.share, self.taken = share, 0.0  # taken: of the part that is being done
        self.shown, self.note = 0.0, ""
        self.whole: Work = self if outer is None else outer.whole
        if outer is None:
            self.display = _make.get()(0.0 if at_once else _DELAY)
            self.tell = self.display.__enter__()
        else:
            part = outer.length / (outer.parts or 1)
            end = outer.begin + outer.length
            self.begin = min(end, outer.begin + (outer.done + outer.taken) * part)
            self.length = min(min(share, 1 - outer.taken) * part, end - self.begin)
        self.name(title)

    def name(self, title: str) -> None:
        """Say what is being done."""
        before = "" if self.outer is None else self.outer.title
        self.title: str = ", ".join(filter(None, (before, title)))
        self._tell()

    def next(self, note: str = "", parts: int = 1) -> None:
        """Some parts are done; `note` is shown behind the bar."""
        self.done, self.taken = self.done + parts, 0.0
        self.whole.note = note or self.whole.note
        share = self.done / self.parts if self.parts else 0.0
        self.whole.shown = max(self.whole.shown, min(1.0, self.begin + share * self.length))
        self._tell()

    def _tell(self) -> None:
        whole = self.whole
        whole.tell(self.title, None if whole.parts is None else whole.shown, whole.note)

    def close(self) -> None:
        """Leave the bar to the outer work, or remove it."""
        if self.outer is None:
            self.display.__exit__(None, None, None)
        else:
            self.outer.taken = min(1.0, self.outer.taken + self.share)


_work: ContextVar[Work | None] = ContextVar("work", default=None)


@contextmanager
def work(title: str = "", parts: float | None = 1, **how: Any) -> Iterator[Work]:
    """Show a piece of work, within which more may be done; `how` is for `Work`."""
    begun = Work(title, parts, _work.get(), **how)
    token = _work.set(begun)
    try:
        yield begun
    finally:
        _work.reset(token)
        begun.close()


def tracked(
    items: Iterable[Item], title: str, parts: int | None = None, share: float = 0.0
) -> Iterator[Item]:
    """Items one after the other, as the parts of a piece of work that has no other within it."""
    # Not `work`: a generator cannot set the context of its caller.
    begun = Work(title, parts, _work.get(), share=share)
    try:
        for item in items:
            yield item
            begun.next()
    finally:
        begun.close()


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Within the block, a function is told what else a bar shows, at each change."""
    before = _make.set(lambda _: nullcontext(listener))
    try:
        yield
    finally:
        _make.reset(before)


@contextmanager
def bars(wanted: bool) -> Iterator[None]:
    """Within the block there are bars if they are wanted, unless an outer block has hidden them."""
    if wanted:
        yield
        return
    before, around = _make.set(_nothing), _work.set(None)  # the outer bar is to stay still
    try:
        yield
    finally:
        _work.reset(around)
        _make.reset(before)
