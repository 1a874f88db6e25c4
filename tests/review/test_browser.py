"""The page in a browser: by keyboard alone, on a phone, in the dark, with two people at once."""

from __future__ import annotations

import pytest
from browsers import press, shown
from pools import changed, pool

from bhpeft_pyro.review import State

pytestmark = pytest.mark.slow
pytest.importorskip("uvicorn")

# Contrast of every text with what is behind it, by WCAG 2.2, 1.4.3: those below 4.5.
FAINT = """() => {
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !element.checkVisibility()) continue;
    const two = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(...two) + 0.05) / (Math.min(...two) + 0.05);
    if (ratio < 4.5) faint.push([walk.currentNode.data, ratio]);
  }
  return faint;
}"""
# What can be pressed and has no name, or is smaller than 24 pixels (2.5.8).
NAMELESS = """() => [...document.querySelectorAll('a, button, input, textarea, summary')]
  .filter(e => e.checkVisibility() && !e.closest('.unseen'))
  .filter(e => !(e.textContent.trim() || e.ariaLabel || [...(e.labels || [])].length)
    || (!e.matches('a') && !e.closest('label') && e.getBoundingClientRect().height < 24))
  .map(e => e.outerHTML)"""


def test_thirty_texts_by_keyboard(serve, tab, tmp_path):
    served = serve(pool(32))
    page = tab(served.of("Ana"))
    for i in range(30):
        assert shown(page) == f"text {i}"
        assert page.evaluate("document.activeElement.id") == "text"  # what a reader reads first
        assert page.get_by_role("group", name=f"text {i}", exact=True).count() == 1
        press(page, "132"[i % 3])
    labels = [one.label for one in reversed(served.session.recent("Ana", 40))]
    assert labels == ["delivery", "billing", "praise"] * 10
    press(page, "u")
    assert shown(page) == "text 29" and "You said" not in page.inner_text("main")
    press(page, "n")
    press(page, "s")
    assert shown(page) == "text 31"
    page.keyboard.press("e")
    page.keyboard.type("sun 1?")  # no key acts while one writes
    page.keyboard.press("Escape")
    press(page, "2")
    assert served.session.recent("Ana", 1)[0].note == "sun 1?"
    assert shown(page) == "text 30"  # what was skipped
    press(page, "1")
    assert "Nothing is left" in page.inner_text("main")
    with page.expect_navigation():
        page.click("aside li a >> nth=2")
    press(page, "3")
    assert served.session.labels == 32 and served.session.progress("Ana").mine == 32


def test_a_second_press_does_not_decide_the_next_text(serve, tab):
    served = serve(pool(5))
    page = tab(served.of("Ana"))
    with page.expect_navigation():
        page.evaluate("""() => { for (const _ of [1, 2, 3]) document.body.dispatchEvent(
            new KeyboardEvent('keydown', {key: '1', bubbles: true})) }""")
    assert shown(page) == "text 1" and len(served.session.recent("Ana")) == 1
    page.uncheck("#keys")
    page.keyboard.press("1")
    page.reload()
    assert shown(page) == "text 1" and not page.is_checked("#keys")


def test_two_people_at_once(serve, tab):
    served = serve(pool(8))
    ana, bo = tab(served.of("Ana")), tab(served.of("Bo"))
    for _ in range(4):
        assert shown(ana) != shown(bo)
        press(ana, "1")
        press(bo, "2")
    assert served.session.labels == 8
    assert [len(served.session.recent(who)) for who in ("Ana", "Bo")] == [4, 4]
    ana.reload()
    assert "Nothing is left" in ana.inner_text("main")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1100])
@pytest.mark.parametrize("kind", ["class", "labels", "rating", "choice"])
def test_it_can_be_read_and_pressed_everywhere(serve, tab, kind, width, scheme):
    long = "שלום עולם. " + "a" * 400 + " word" * 600
    odd = {"texts": (long,), "nearest": "was learnt", "queued": "x"}
    served = serve(changed(pool(4, kind), "t1", **odd))
    view = {"width": width, "height": 700}
    page = tab(served.of("Ana"), viewport=view, color_scheme=scheme)
    press(page, "1") if kind != "labels" else served.session.decide("Ana", "t0", "none", [], "")
    page.goto(served.of("Ana"))
    assert shown(page).startswith("שלום")
    assert page.evaluate(FAINT) == [] and page.evaluate(NAMELESS) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("getComputedStyle(document.querySelector('#text p')).direction") == "rtl"


def test_several_labels_by_keyboard(serve, tab):
    served = serve(pool(3, "labels"))
    page = tab(served.of("Ana"))
    for key in "133":
        page.keyboard.press(key)
    page.keyboard.press("2")
    press(page, "Enter")
    press(page, "Enter")
    assert "one of those that are shown" in page.inner_text("[role=alert]")
    press(page, "n")
    first, second = reversed(served.session.recent("Ana"))
    assert (first.label, second.label) == (["delivery", "praise"], [])


def test_ratings_by_key_slider_and_number(serve, tab):
    served = serve(pool(4, "rating"))
    page = tab(served.of("Ana"))
    press(page, "4")
    page.focus("#slider")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.input_value("#number") == "3.5"
    page.fill("#number", "2.25")
    press(page, "Enter")  # not the first of the buttons
    page.focus("#slider")
    page.keyboard.press("ArrowLeft")
    with page.expect_navigation():
        page.click(".exact button")
    assert [one.label for one in served.session.recent("Ana")] == [3.1, 2.25, 4.0]


def test_without_a_script_forms_do(serve, tab):
    served = serve(pool(3))
    page = tab(served.of("Ana"), java_script_enabled=False)
    page.click("button:has-text('praise')")
    assert shown(page) == "text 1"
    page.fill("#note", "why")
    page.click("button:has-text('None of these')")
    assert [one.action for one in served.session.recent("Ana")] == ["none", "label"]


def test_the_bar_of_an_update_moves_and_the_next_text_is_of_the_new_queue(serve, tab):
    served = serve(pool(5))
    page = tab(served.of("Ana"))
    press(page, "1")

    def begin() -> None:
        served.learning.state = State(True, 0.25, "learning the labels")

    served.learning.start = begin
    with page.expect_navigation():
        page.click("#update")
    page.wait_for_function("document.getElementById('bar').value === 0.25")
    served.session.take(pool(5, order=("t4", "t3"), number=2))
    served.learning.state = State(False, 1.0, "Round 2 has learnt 1 label.", 1)
    page.wait_for_selector("text=The next text comes from the new queue.")
    press(page, "1")
    assert shown(page) == "text 4" and "round 2" in page.inner_text("header")


def test_a_name_is_asked_for(serve, tab):
    served = serve(pool(3))
    page = tab(served.of("Ana"))
    press(page, "1")
    with page.expect_navigation():
        page.click("text=someone else")
    page.keyboard.type("Ünal")
    press(page, "Enter")
    assert shown(page) == "text 2" and "Ünal" in page.inner_text("header")
    page.click("text=someone else")
    page.click("li >> text=Ana")
    assert "Ana" in page.inner_text("header")
