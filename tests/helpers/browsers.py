"""Chromium without a window, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is none, or nothing to drive it."""
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"needs one of {', '.join(NAMES)} on the path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def press(page: Any, key: str) -> None:
    """Press a key, and wait for the page that follows."""
    page.wait_for_timeout(100)  # two presses of a key in less count as one
    with page.expect_navigation():
        page.keyboard.press(key)


def shown(page: Any) -> str:
    """The text to label."""
    return page.inner_text("#text")
