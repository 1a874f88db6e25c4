"""Who is shown which text."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from pools import pool, session_in

from bhpeft_pyro.data import table
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.review import Decision, Session, labelled
from bhpeft_pyro.review import session as module


def label(session: Session, who: str, count: int = 1, option: str = "0") -> list[str]:
    keys = []
    for _ in range(count):
        key = session.next_for(who)
        assert key is not None
        session.decide(who, key, "label", [option], "")
        keys.append(key)
    return keys


def test_texts_come_in_order_and_none_is_shown_to_two_people(tmp_path, monkeypatch):
    session = session_in(tmp_path)
    assert session.next_for("Ana") == session.next_for("Ana") == "t0"
    assert session.next_for("Bo") == "t1"
    assert label(session, "Ana", 2) == ["t0", "t2"]
    assert session.next_for("Ana") == "t3" and session.next_for("Cy") == "t4"
    assert session.next_for("Di") is None
    monkeypatch.setattr(module, "_LEASE", 0.0)  # Bo has gone
    assert session.next_for("Di") == "t1"


def test_what_was_decided_is_not_asked_again_after_a_restart(tmp_path):
    label(session_in(tmp_path), "Ana", 3)
    again = session_in(tmp_path)
    assert again.labels == 3 and again.next_for("Ana") == again.next_for("Ana") == "t3"


def test_one_file_has_decisions_about_several_tables(tmp_path):
    label(session_in(tmp_path), "Ana", 3)
    other = session_in(tmp_path, pool(1))
    assert other.labels == 3 and [one.key for one in other.recent("Ana")] == ["t0"]
    texts = table(str(tmp_path / "labels.db"))["text"].tolist()
    assert texts == ["text 0", "text 1", "text 2"]
    with pytest.raises(DataError, match=r"out: .* has the columns text, label, person"):
        session_in(tmp_path, replace(pool(), column="stars"))


def test_skipped_texts_come_at_the_end_and_at_once_to_others(tmp_path):
    session = session_in(tmp_path, pool(3))
    session.decide("Ana", "t0", "skip", [], "")
    assert session.next_for("Bo") == "t0"
    session.decide("Bo", "t0", "skip", [], "")
    assert label(session, "Ana", 2) == ["t1", "t2"]
    assert session.next_for("Ana") == "t0"
    assert session.next_for("Bo") is None  # Ana sees it
    assert label(session, "Ana") == ["t0"] and session.next_for("Ana") is None


def test_undo_shows_the_text_again_and_takes_the_label_out_of_the_table(tmp_path):
    session = session_in(tmp_path)
    label(session, "Ana", 2)
    label(session, "Bo")
    assert session.undo("Ana") == "t1" and session.next_for("Ana") == "t1"
    assert session.labels == 2
    assert table(str(tmp_path / "labels.db"))["text"].tolist() == ["text 0", "text 2"]
    assert session.undo("Ana") == "t0" and session.undo("Ana") is None


def test_two_for_each_text_and_whether_they_agree(tmp_path):
    session = session_in(tmp_path, pool(3), people=2)
    assert label(session, "Ana", 3) == [*label(session, "Bo", 2, "1"), "t2"]
    label(session, "Bo")
    found = session.agreement()
    assert (found.texts, found.same, found.distance, found.open) == (3, 1, None, ("t0", "t1"))
    assert session.labels == 1  # those on which they agree
    session.decide("Ana", "t0", "label", ["1"], "")
    assert session.agreement().same == 2 and session.labels == 2
    assert session.next_for("Cy") is None


def test_ratings_of_several_people(tmp_path):
    session = session_in(tmp_path, pool(2, "rating"), people=2)
    for who, rating in (("Ana", "2"), ("Bo", "3.5")):
        session.decide(who, "t0", "label", [rating], "")
    assert session.agreement().distance == 1.5
    assert table(str(tmp_path / "labels.db"))["label"].tolist() == [2.75]
    for wrong in ("6", "", "nan", "good", "1,000"):
        with pytest.raises(DataError, match="rating"):
            session.decide("Ana", "t1", "label", [wrong], "")


def test_several_labels_are_kept_as_the_data_have_them(tmp_path):
    session = session_in(tmp_path, pool(3, "labels"))
    session.decide("Ana", "t0", "label", ["2", "0"], "")
    session.decide("Ana", "t1", "none", [], "")
    labels = table(str(tmp_path / "labels.db"))["label"].tolist()
    assert labels == ['["billing", "praise"]', "[]"]


def test_progress(tmp_path):
    session = session_in(tmp_path, pool(4))
    label(session, "Ana")
    session.decide("Ana", "t1", "skip", [], "")
    label(session, "Bo")
    assert vars(session.progress("Ana")) == {"mine": 1, "left": 2, "labels": 2}
    assert vars(session.progress("Cy")) == {"mine": 0, "left": 2, "labels": 2}
    session.people = 2
    assert [session.progress(who).left for who in ("Ana", "Bo", "Cy")] == [3, 3, 4]


@pytest.mark.parametrize("given", [[], ["3"], ["-1"], ["x"], ["0", "9"]])
def test_labels_that_are_not_shown_are_refused(tmp_path, given):
    with pytest.raises(DataError, match="one of those that are shown"):
        session_in(tmp_path).decide("Ana", "t0", "label", given, "")


def test_a_new_queue_keeps_what_was_decided(tmp_path):
    session = session_in(tmp_path)
    label(session, "Ana", 2)
    session.take(pool(order=("t4", "t3", "t2"), round="r2", number=2))
    assert session.next_for("Ana") == "t4" and session.labels == 2
    assert [one.key for one in session.recent("Ana")] == ["t1", "t0"]
    with pytest.raises(DataError, match="there is none with the key"):
        session.item("t9")


def test_reading_while_others_label(tmp_path):
    session, failed = session_in(tmp_path, pool(400)), []

    def work(who: str) -> None:
        try:
            for _ in range(60):
                for act in (label, Session.undo, label):
                    act(session, who)
                    session.progress("Cy")
                    session.agreement()
                    assert who in session.names or act is Session.undo
        except BaseException as error:  # of a thread, which pytest would not see
            failed.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in ("Ana", "Bo")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and session.labels == 120 and session.progress("Cy").left == 280


def test_what_another_page_or_an_import_keeps_is_there_and_the_last_by_time_counts(tmp_path):
    mine, theirs = session_in(tmp_path), session_in(tmp_path)
    label(theirs, "Bo")
    assert mine.names == ["Bo"] and mine.next_for("Ana") == "t1"
    old = [Decision("t0", "Bo", "label", "praise", time="2026-01-01T00:00:00Z")]
    mine.keep(old)
    assert [one.label for one in mine.snapshot().decisions] == ["billing"]
    decisions = [*mine.snapshot().decisions, *old, Decision("gone", "Bo", "label", "praise")]
    (row,) = labelled(decisions, mine.pool)
    assert (row["text"], row["label"], row["person"]) == ("text 0", "billing", "Bo")
