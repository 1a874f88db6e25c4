"""Signs of progress: one bar for a piece of work, with the time that is left of all of it.

Bars are shown in terminals and notebooks; the program's logs get a line a minute (`Lines`). There
are none in workers and in a fit with `progress=False`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm as plain
from tqdm.auto import tqdm

Item = TypeVar("Item")

_DELAY = 1.0  # seconds after which a bar is shown
_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
_LINE = "{desc}: {percentage:.0f} %, {elapsed}, {remaining} left{postfix}"
_ENDLESS = "{desc} {elapsed}"  # of work of unknown length


def _in_terminals(**how: Any) -> Any:
    return tqdm(disable=None, **how)  # in notebooks too, if they have widgets


_make: ContextVar[Callable[..., Any] | None] = ContextVar("make", default=_in_terminals)


class Lines(plain):
    """A line a minute in place of a bar."""

    every = 60.0  # seconds

    def __init__(self, **how: Any) -> None:
        how |= {"delay": self.every, "mininterval": self.every}
        super().__init__(**how | {"bar_format": _LINE if how.get("total") else _ENDLESS})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the state; an empty message, which would clear a bar, is nothing here."""
        if msg is None:
            self.write(str(self), self.fp)

    def set_description_str(self, desc: str | None = None, refresh: bool = True) -> None:
        """Say it in the next line."""
        super().set_description_str(desc, refresh=False)

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Print a line; there is no bar to draw again below it."""
        print(s, file=file, end=end, flush=True)


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
        self.bar: Any = _bar(title, parts is not None, at_once) if outer is None else outer.bar
        if outer is not None:
            part = outer.length / (outer.parts or 1)
            end = outer.begin + outer.length
            self.begin = min(end, outer.begin + (outer.done + outer.taken) * part)
            self.length = min(min(share, 1 - outer.taken) * part, end - self.begin)
        self.name(title)

    def name(self, title: str) -> None:
        """Say what is being done."""
        before = "" if self.outer is None else self.outer.title
        self.title: str = ", ".join(filter(None, (before, title)))
        # At once, in a bar that is shown: what comes may take long.
        seen = not self.bar.disable and self.bar.format_dict["elapsed"] > _DELAY
        self.bar.set_description_str(self.title, refresh=seen)

    def next(self, note: str = "", parts: int = 1) -> None:
        """Some parts are done; `note` is shown behind the bar."""
        if self.bar.disable:
            return
        self.done, self.taken = self.done + parts, 0.0
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        share = self.done / self.parts if self.parts else 0.0
        self.bar.update(max(0.0, min(1.0, self.begin + share * self.length) - self.bar.n))

    def close(self) -> None:
        """Leave the bar to the outer work, or remove it."""
        if self.outer is None:
            self.bar.close()
        else:
            self.outer.taken = min(1.0, self.outer.taken + self.share)
            self.bar.set_description_str(self.outer.title, refresh=False)


_work: ContextVar[Work | None] = ContextVar("work", default=None)


def _bar(title: str, ends: bool, at_once: bool) -> Any:
    make = _make.get()
    if make is None:
        return tqdm(disable=True)
    how: dict[str, Any] = {"miniters": 0, "smoothing": 0, "dynamic_ncols": True}
    how |= {"desc": title, "delay": 0.0 if at_once else _DELAY}
    how |= {"total": 1.0, "bar_format": _FORMAT} if ends else {"bar_format": _ENDLESS}
    return make(leave=False, **how)


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
def made_by(make: Callable[..., Any] | None) -> Iterator[None]:
    """Within the block, bars are made by this class; by None, there are no bars."""
    before = _make.set(make)
    around = _work.set(_work.get() if make else None)  # whose bar is to stay still
    try:
        yield
    finally:
        _work.reset(around)
        _make.reset(before)


def bars(wanted: bool) -> AbstractContextManager[None]:
    """Within the block there are bars if they are wanted, unless an outer block has hidden them."""
    make = _make.get()
    if make is _in_terminals and "ipykernel" in sys.modules:
        make = tqdm  # which is text where a notebook has no widgets
    return made_by(make if wanted else None)
