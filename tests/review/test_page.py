"""The page as a client sees it: what it holds, what it refuses, and that forms alone are enough."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pools import changed, page_in, pool

from bhpeft_pyro.errors import BusyError, WriteError
from bhpeft_pyro.review.page import KEYS

pytest.importorskip("starlette")
from starlette.testclient import TestClient


def client(folder: Path, *texts: Any, **how: Any) -> TestClient:
    session, learning, app = page_in(folder, *texts, **how)
    made = TestClient(app, base_url="http://127.0.0.1/secret")
    made.session, made.learning = session, learning  # type: ignore[attr-defined]
    return made


def buttons(page: str) -> list[str]:
    return re.findall(r'<span class="name"><bdi>(.*?)</bdi>', page)


def test_a_label_by_a_form_alone_and_the_next_text(tmp_path):
    page = client(tmp_path)
    assert "text 0" in page.get("/by/Ana/").text
    after = page.post("/by/Ana/text/t0", data={"label": "2", "note": " late \x1b[1m"})
    assert after.status_code == 200
    assert "text 1" in after.text and "1 decided by you, 4 to go" in after.text
    (made,) = page.session.recent("Ana")
    assert (made.label, made.note, made.round) == ("praise", "late \\x1b[1m", "r1")
    again = page.post("/by/Ana/undo")
    assert str(again.url).endswith("/by/Ana/text/t0") and "0 decided" in again.text


def test_labels_stand_by_probability_or_each_in_its_place(tmp_path):
    page = client(tmp_path)
    by_probability = page.get("/by/Ana/").text
    assert buttons(by_probability) == ["delivery", "praise", "billing"]
    assert buttons(page.post("/by/Ana/order").text) == ["billing", "delivery", "praise"]
    assert buttons(page.get("/by/Bo/").text) == ["delivery", "praise", "billing"]


def test_many_labels_have_keys_that_nothing_else_has(tmp_path):
    assert len(KEYS) == len({*KEYS}) == 31 and not {*KEYS} & {*"sune?"}
    names = tuple(f"label {i}" for i in range(40))
    texts = changed(pool(), "t0", options=names, values=names, probabilities=(1 / 40,) * 40)
    page = client(tmp_path, texts).get("/by/Ana/").text
    assert page.count('class="option"') == 40 and page.count('data-key="z"') == 1
    keys = re.findall(r'data-key="(.)"', page)
    assert len(keys) == len({*keys})


def test_the_address_needs_the_secret_and_the_host_is_this_machine(tmp_path):
    page = client(tmp_path)
    for address in ("http://127.0.0.1/", "http://127.0.0.1/other/", "http://127.0.0.1/by/Ana/"):
        assert page.get(address).status_code == 404
    assert page.get("/by/Ana/", headers={"host": "evil.example"}).status_code == 400
    assert page.get("/static/../page.py").status_code == 404


def test_every_answer_has_the_strict_policy(tmp_path):
    page = client(tmp_path)
    for path in ("/", "/by/Ana/", "/static/keys.js", "/by/Ana/text/no", "/no"):
        headers = page.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer" and "set-cookie" not in headers
    wrong = page.get("/by/Ana/", headers={"host": "evil.example"})
    assert wrong.status_code == 400 and "default-src 'none'" in str(wrong.headers)


def test_texts_names_and_notes_are_escaped_and_the_page_has_nothing_from_elsewhere(tmp_path):
    evil = "<script>alert(1)</script>\"'>"
    odd = {"texts": (evil, evil), "options": (evil, "b", "c"), "nearest": evil, "reason": evil}
    page = client(tmp_path, changed(pool(), "t0", **odd))
    page.post("/by/Ana/text/t0", data={"label": "0", "note": evil})
    page.session.decide("<b>Bo", "t0", "none", [], evil)
    shown = page.get("/by/Ana/text/t0").text
    assert "<script>alert" not in shown and "<b>Bo" not in shown and "&lt;script&gt;" in shown
    assert not re.search(r"""(?:src|href|action)=["'](?!/secret/)""", shown)
    assert " style=" not in shown and "onclick" not in shown


@pytest.mark.parametrize(
    ("path", "form", "problem"),
    [
        ("text/t0", {"label": "7"}, "one of those that are shown"),
        ("text/t0", {}, "one of those that are shown"),
        ("text/t0", {"action": "burn"}, "422"),
        ("text/t9", {"label": "0"}, "none with the key"),
    ],
)
def test_what_cannot_be_a_label_is_refused_in_words(tmp_path, path, form, problem):
    answer = client(tmp_path).post(f"/by/Ana/{path}", data=form)
    assert answer.status_code == 422 and (problem == "422" or problem in answer.text)
    assert not (tmp_path / "labels.db").exists()


@pytest.mark.parametrize("name", ["", " ", "..", "a" * 41, "a/b", "a\u202eb"])
def test_names_that_cannot_be_kept_are_refused(tmp_path, name):
    page = client(tmp_path)
    assert page.post("/", data={"who": name}).status_code == 422
    assert "text 0" in page.post("/", data={"who": " Ünal  Ö."}).text


@pytest.mark.parametrize(
    ("kind", "form"), [("labels", {"label": ["0", "2"]}), ("choice", {"label": "1"})]
)
def test_other_kinds_of_labels(tmp_path, kind, form):
    page = client(tmp_path, pool(kind=kind))
    shown = page.get("/by/Ana/").text
    assert shown.count('type="checkbox" name="label"') == (3 if kind == "labels" else 0)
    page.post("/by/Ana/text/t0", data=form)
    kept = page.session.recent("Ana")[0].label
    assert kept == (["billing", "praise"] if kind == "labels" else "delivery")


def test_ratings_by_button_and_by_number(tmp_path):
    page = client(tmp_path, pool(kind="rating"))
    shown = page.get("/by/Ana/").text
    assert shown.count('class="step"') == 5 and "90 % between 2 and 4.5" in shown
    page.post("/by/Ana/text/t0", data={"label": "4", "other": "3.2"})
    page.post("/by/Ana/text/t1", data={"action": "other", "other": "2.5"})
    assert [one.label for one in page.session.recent("Ana")] == [2.5, 4.0]
    refused = page.post("/by/Ana/text/t2", data={"action": "other", "other": "9"})
    assert refused.status_code == 422 and "expected a number from 1.0 to 5.0" in refused.text


def test_ones_own_rating_stays_as_it_is_and_the_slider_has_steps_for_its_scale(tmp_path):
    page = client(tmp_path, pool(kind="rating"))
    page.post("/by/Ana/text/t0", data={"action": "other", "other": "2.25"})
    own = page.get("/by/Ana/text/t0").text
    assert own.count('value="2.25"') == 2 and 'You said <b dir="auto">2.25<' in own
    texts = changed(pool(kind="rating", scale=(0.0, 1.0)), "t1", rating=(0.6543, 0.5, 0.8))
    shown = client(tmp_path, texts).get("/by/Ana/").text
    assert 'step="0.01" value="0.65"' in shown


@pytest.mark.parametrize("note", ["one\r\ntwo", "a\r\n" * 1000])
def test_line_breaks_in_notes_stay(tmp_path, note):
    page = client(tmp_path)
    page.post("/by/Ana/text/t0", data={"label": "0", "note": note})
    assert page.session.recent("Ana")[0].note == note.replace("\r\n", "\n").strip()


def test_a_full_disk_is_told_on_the_page_of_the_text(tmp_path, monkeypatch):
    page = client(tmp_path)
    page.post("/by/Ana/text/t0", data={"label": "0"})

    def full(*_: object) -> None:
        raise WriteError("path: database or disk is full")

    for name in ("add", "undo"):
        monkeypatch.setattr(page.session.log, name, full)
    for path in ("text/t1", "undo"):
        answer = page.post(f"/by/Ana/{path}", data={"label": "0"})
        assert answer.status_code == 503 and "disk is full" in answer.text
        assert 'action="/secret/by/Ana/text/t1" class="decide"' in answer.text
    assert [one.key for one in page.session.recent("Ana")] == ["t0"]


def test_who_is_second_to_press_update_sees_the_update_of_the_first(tmp_path, monkeypatch):
    page = client(tmp_path)
    page.post("/by/Ana/text/t0", data={"label": "0"})

    def busy() -> None:
        raise BusyError("update: one is running; wait until it has ended")

    monkeypatch.setattr(page.learning, "start", busy)
    assert page.post("/by/Ana/update").status_code == 200


def test_two_people_see_what_the_other_said_only_after_their_own_answer(tmp_path):
    page = client(tmp_path, people=2)
    page.post("/by/Ana/text/t0", data={"label": "0"})
    assert "said" not in page.get("/by/Bo/text/t0").text
    page.post("/by/Bo/text/t0", data={"label": "1"})
    assert "0 of 1 texts" in page.get("/by/Bo/").text
    own = page.get("/by/Bo/text/t0").text
    assert '<span dir="auto">Ana</span> said <b dir="auto">billing</b>' in own


def test_what_the_promise_answers_is_counted(tmp_path):
    page = client(tmp_path, pool(answered=7))
    assert "5 to go; 7 more are answered under the promise" in page.get("/by/Ana/").text


def test_nothing_left(tmp_path):
    page = client(tmp_path, pool(1))
    assert "Nothing is left to decide" in page.post("/by/Ana/text/t0", data={"label": "0"}).text


@pytest.mark.parametrize("kind", ["class", "labels", "rating"])
def test_malformed_requests_are_refused_without_a_failure_of_the_server(tmp_path, kind):
    page, random = client(tmp_path, pool(kind=kind)), Random(0)
    types = ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain")
    words = ["label=", "9" * 5000, "&", "=", "%ED%A0%80", "%00", "action=label", "other=1e999"]
    words += ["-1", "--x\r\n", "--x--", "\xff"]
    words += ['Content-Disposition: form-data; name="label"\r\n\r\n']
    paths = ("/", "/by/Ana/", "/by/Ana/text/t0", "/by/%00/text/t0", "/by/../undo", "/by/é/order")
    for _ in range(300):
        body = "".join(random.choices(words, k=random.randrange(6))).encode("latin-1")
        how = {"content": body, "headers": {"content-type": random.choice(types)}}
        method = random.choice(("GET", "POST", "PUT"))
        answer = page.request(method, random.choice(paths), follow_redirects=False, **how)
        assert answer.status_code < 500
