"""The page, and windows of a browser that show it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browsers import chromium
from pools import page_in
from services import listening


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    """The page in a thread, what it shares with the test, and the address `of` a person."""
    with ExitStack() as ends:

        def begin(texts: Any, **how: Any) -> SimpleNamespace:
            session, learning, app = page_in(tmp_path, texts, **how)
            address = ends.enter_context(listening(app))
            return SimpleNamespace(
                session=session, learning=learning, of=lambda who: f"{address}/secret/by/{who}/"
            )

        yield begin


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as made:
        yield made


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """Opens an address in a window of its own; anything on the console is a failure."""
    said: list[str] = []
    windows = []

    def begin(address: str, **how: Any) -> Any:
        windows.append(browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **how}))
        page = windows[-1].new_page()
        page.on("console", lambda message: message.type == "error" and said.append(message.text))
        page.on("pageerror", lambda problem: said.append(str(problem)))
        page.goto(address)
        return page

    yield begin
    for window in windows:
        window.close()
    expected = ("status of 422", "ERR_FAILED")  # an answer, and none
    assert [line for line in said if not any(words in line for words in expected)] == []
