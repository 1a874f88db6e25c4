"""Keys that are pressed while the next text loads, in a browser."""

from __future__ import annotations

import time
from typing import Any

import pytest
from browsers import press, shown
from pools import pool
from services import until

pytestmark = pytest.mark.slow
pytest.importorskip("uvicorn")


def slowed(session: Any, seconds: float) -> None:
    """Each decision takes so long, as on a busy machine."""
    decide = session.decide

    def slow(*arguments: Any) -> None:
        time.sleep(seconds)
        decide(*arguments)

    session.decide = slow


def test_no_key_is_lost_at_five_a_second(serve, tab):
    served = serve(pool(10))
    slowed(served.session, 0.15)
    page = tab(served.of("Ana"))
    for key in "11231122":
        page.keyboard.press(key)
        page.wait_for_timeout(200)
    page.wait_for_selector("#text:has-text('text 8')")
    kept = [(one.key, one.label) for one in reversed(served.session.recent("Ana"))]
    names = {"1": "delivery", "2": "praise", "3": "billing"}
    assert kept == [(f"t{i}", names[key]) for i, key in enumerate("11231122")]


@pytest.mark.parametrize("seconds", [0.3, 1.5])
def test_a_note_that_is_typed_too_early_is_a_note(serve, tab, seconds):
    served = serve(pool(5))
    page = tab(served.of("Ana"))
    press(page, "3")
    slowed(served.session, seconds)
    page.keyboard.press("1")
    page.keyboard.type("esunn 1?")
    page.keyboard.press("Backspace")
    page.wait_for_selector("#text:has-text('text 2')")
    page.keyboard.type("!")
    assert page.input_value("#note") == "sunn 1!"
    assert [one.key for one in served.session.recent("Ana")] == ["t1", "t0"]
    page.keyboard.press("Escape")
    press(page, "2")
    assert served.session.recent("Ana", 1)[0].note == "sunn 1!"


def test_a_key_from_long_before_a_text_was_shown_does_not_decide_it(serve, tab):
    served = serve(pool(5))
    slowed(served.session, 1.5)
    page = tab(served.of("Ana"))
    page.keyboard.press("1")
    page.keyboard.press("2")
    page.wait_for_selector("text=were not used: 2")
    assert shown(page) == "text 1" and len(served.session.recent("Ana")) == 1


def test_opening_an_earlier_text_and_going_back(serve, tab):
    served = serve(pool(5))
    page = tab(served.of("Ana"))
    press(page, "1")
    with page.expect_navigation():
        page.click("aside li a")
    assert shown(page) == "text 0"
    with page.expect_navigation():
        page.go_back()
    page.wait_for_selector("#text:has-text('text 1')")


def test_a_program_that_has_ended_is_told_and_the_text_stays(serve, tab):
    served = serve(pool(5))
    page = tab(served.of("Ana"))
    page.route("**/text/*", lambda route: route.abort())
    page.fill("#note", "why")
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.wait_for_selector("text=The page does not answer")
    assert shown(page) == "text 0" and page.input_value("#note") == "why"
    page.unroute("**/text/*")
    page.wait_for_timeout(150)  # a person's second press, and no bounce
    page.keyboard.press("1")
    until(lambda: served.session.recent("Ana"))
    assert served.session.recent("Ana")[0].note == "why"
