"""Labels that come back: on the disk, counted, watched, and learnt by an update."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from program import bhpeft
from services import LIMITS
from starlette.testclient import TestClient
from students import fitted, fresh, unlabelled, with_student

from bhpeft_pyro.base.log import Log
from bhpeft_pyro.serving.feedback import FILE, Answers, Feedback, Seen, Tally, read
from bhpeft_pyro.serving.requests import Refused
from bhpeft_pyro.serving.rounds import Served
from bhpeft_pyro.serving.service import Service
from bhpeft_pyro.testing import tiny_examples

TEXTS = [*tiny_examples(60, seed=21).texts]
TRUE = ["bad", "good"] * 30
FALSE = ["good", "bad"] * 30


def rows(texts: Any, labels: Any) -> list[dict[str, Any]]:
    return [{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)]


def take(feedback: Feedback, served: Any, texts: Any, labels: Any, **more: Any) -> Seen:
    return feedback.take(served, read({"rows": rows(texts, labels), **more}, served))


def lines(folder: Path) -> list[Any]:
    return Log(folder / FILE).rows()


def test_labels_are_kept_as_an_update_takes_them(copied, tmp_path) -> None:
    feedback = Feedback(16_384)
    feedback.take(copied, read({"text": "w5 w49", "label": "bad", "by": "Ana"}, copied))
    assert take(feedback, copied, TEXTS[:30], TRUE[:30]).tally.labels == 31
    kept = lines(copied.folder)
    given = rows(TEXTS[:30], TRUE[:30])
    assert [{k: row[k] for k in ("text", "label")} for row in kept[1:]] == given
    entry = kept[0]
    assert entry["person"] == "Ana" and entry["round"] == copied.id and entry["promised"] == 0.4
    forecast = copied.posterior.predict(given)
    wrong = [row["wrong"] for row in kept[1:]]
    assert wrong == forecast.wrong().tolist()
    quick = ("--max-steps", 2, "--device", "cpu", "--out", tmp_path / "june", "--validation", 0)
    bhpeft("update", copied.folder, copied.folder / FILE, *quick, code=0)
    (_, last) = json.loads(bhpeft("history", tmp_path / "june", "--json").stdout)["rounds"][-2:]
    assert last["examples"] == 31


def test_a_new_start_and_another_process_read_what_is_there(copied) -> None:
    first, second = Feedback(16_384), Feedback(16_384)
    take(first, copied, TEXTS[:20], TRUE[:20])
    two = take(second, copied, TEXTS[20:40], TRUE[20:40])
    assert two == first.seen(copied) == Feedback(16_384).seen(copied)
    assert two.tally.labels == 40 and two.tally.newest.answered > 0
    assert two.promise is not None and f"of {two.tally.newest.answered} answers" in two.promise


def test_wrong_answers_break_the_promise(copied) -> None:
    seen = take(Feedback(16_384), copied, TEXTS, FALSE)
    tally = seen.tally
    assert tally.newest.wrong > 0.8 * tally.newest.answered > 0 and tally.newest.evidence > 20
    assert seen.holds is False
    assert str(tally).endswith("answers wrong, more than was promised")
    assert str(Tally.of(copied.folder, copied.id)) == str(tally)


def test_a_new_promise_of_the_same_round_begins_anew(copied) -> None:
    feedback = Feedback(16_384)
    assert take(feedback, copied, TEXTS, FALSE).holds is False
    texts = tiny_examples(200, seed=33).texts
    posterior = copied.posterior.promise({"text": texts, "label": ["bad", "good"] * 100}, error=0.4)
    again = replace(copied, posterior=posterior)
    for seen in (feedback.seen(again), Feedback(16_384).seen(again)):
        assert seen.holds and seen.tally.labels == 60 and seen.tally.newest == Answers()
    seen = take(feedback, again, TEXTS[:30], TRUE[:30])
    assert seen.holds and seen.tally.newest.answered <= 30 and seen.tally.newest.evidence < 20
    assert "more than was promised" not in str(Tally.of(copied.folder, copied.id))
    back = feedback.seen(copied)
    assert back.holds is False and back.tally.newest.evidence > 20


def test_a_promise_for_forecasts_by_another_method_is_none(copied, source) -> None:
    promised = replace(copied.posterior.promised, method="student")
    other = replace(copied, posterior=copied.posterior.replace(promised=promised))
    seen = take(Feedback(16_384), other, TEXTS, FALSE)
    assert seen.holds is None and seen.tally.plain["answered"] == 0
    for served, there in ((other, False), (copied, True)):
        with TestClient(Service(source, served, LIMITS).application) as client:
            assert (client.get("/info").json()["promise"] is not None) == there


def test_a_file_that_is_moved_away_while_it_grows(copied) -> None:
    """Labels that were learnt, say."""
    feedback = Feedback(16_384)
    for moved in range(2):
        take(feedback, copied, TEXTS[:30], TRUE[:30])
        (copied.folder / FILE).rename(copied.folder / f"learnt-{moved}.db")
    assert take(feedback, copied, TEXTS, FALSE) == Feedback(16_384).seen(copied)
    assert feedback.seen(copied).tally.labels == 60 and feedback.seen(copied).holds is False
    (copied.folder / FILE).unlink()
    assert feedback.seen(copied).tally.labels == 0


def test_many_tokens_are_refused(copied) -> None:
    labels = read({"rows": rows(["w5 w6 w7", "w8"], ["bad", "good"])}, copied)
    with pytest.raises(Refused, match="6 tokens with padding; expected 5 at most") as refused:
        Feedback(5).take(copied, labels)
    assert refused.value.status == 413 and not (copied.folder / FILE).exists()
    assert Feedback(6).take(copied, labels).tally.labels == 2


def test_texts_that_were_chosen_or_learnt_are_kept_and_not_counted(copied) -> None:
    feedback = Feedback(16_384)
    take(feedback, copied, TEXTS[:9], TRUE[:9], random=False)
    seen = take(feedback, copied, tiny_examples(60, 1).texts[:8], TRUE[:8])
    assert (seen.tally.labels, seen.tally.newest.answered) == (17, 0) and str(
        seen.tally
    ) == "17 labels"
    assert seen.holds and seen.promise == Feedback(16_384).seen(copied).promise


def test_labels_of_an_earlier_round_in_the_same_folder_are_left_out(copied, may) -> None:
    feedback = Feedback(16_384)
    take(feedback, copied, TEXTS[:3], TRUE[:3])
    here = replace(may, folder=copied.folder)
    assert feedback.seen(here) == Seen(Tally(), None, None)
    assert Tally.of(copied.folder, may.id) is None
    tally = feedback.take(here, read({"text": "w5", "label": "bad"}, here)).tally
    assert (tally.labels, tally.newest.answered) == (1, 0)  # nothing is promised
    assert feedback.seen(copied).tally.labels == 3


@pytest.mark.parametrize(
    "payload",
    [
        *(None, [], {}, {"text": "w5"}, {"label": "bad"}, {"text": "w5", "label": None}),
        *({"text": "w5", "label": "bad", "random": 1}, {"text": "w5", "label": "bad", "by": 3}),
        *({"rows": wrong} for wrong in (None, [], ["w5"], [{"text": "w5"}])),
    ],
)
def test_what_has_no_label_is_refused(april, payload) -> None:
    with pytest.raises(Refused) as refused:
        read(payload, april)
    assert refused.value.status == 422


def test_a_file_that_cannot_be_written(copied, caplog) -> None:
    (copied.folder / FILE).mkdir()
    with pytest.raises(Refused, match="cannot be kept; the server's log says why") as refused:
        Feedback(16_384).take(copied, read({"text": "w5", "label": "bad"}, copied))
    assert refused.value.status == 503
    assert "unable to open" in caplog.text and str(copied.folder) not in str(refused.value)


@pytest.mark.skipif(sys.platform == "win32", reason="it limits no files")
def test_labels_of_a_full_disk_are_not_counted_twice(copied) -> None:
    from resource import RLIMIT_FSIZE, getrlimit, setrlimit

    feedback, limits = Feedback(16_384), getrlimit(RLIMIT_FSIZE)
    take(feedback, copied, TEXTS[:2], TRUE[:2])
    before = lines(copied.folder)
    try:
        setrlimit(RLIMIT_FSIZE, ((copied.folder / FILE).stat().st_size, limits[1]))
        with pytest.raises(Refused, match="cannot be kept"):
            take(feedback, copied, TEXTS[:30], TRUE[:30])
    finally:
        setrlimit(RLIMIT_FSIZE, limits)
    assert lines(copied.folder) == before
    assert take(feedback, copied, TEXTS[:30], TRUE[:30]).tally.labels == 32


def test_over_http(copied, source) -> None:
    with TestClient(Service(source, copied, LIMITS).application) as client:
        taken = client.post("/feedback", json={"rows": rows(TEXTS[:12], TRUE[:12])}).json()
        assert (taken["taken"], taken["labels"], taken["round"]) == (12, 12, copied.id)
        said = client.get("/feedback").json()
        assert said["labels"] == 12 and "answers with labels are wrong" in said["promise"]
        assert client.post("/feedback", json={"text": "w5", "label": "ugly"}).status_code == 422
        many = {"rows": rows(["w5"] * 17, ["bad"] * 17)}
        assert client.post("/feedback", json=many).status_code == 413
        text = client.get("/metrics").text
        assert 'bhpeft_feedback{what="labels"} 12.0' in text and "bhpeft_promise_holds 1.0" in text
    shown = bhpeft("history", copied.folder.parent).stdout
    assert f"{copied.id}: 12 labels, " in shown and "answers wrong" in shown
    facts = json.loads(bhpeft("history", copied.folder.parent, "--json").stdout)["rounds"]
    assert [fact["feedback"] and fact["feedback"]["labels"] for fact in facts] == [None, 12, None]


def test_labels_under_two_promises_in_turn_are_counted_apart(copied) -> None:
    """As workers write them that change to a new promise one after the other."""
    texts = tiny_examples(200, seed=33).texts
    posterior = copied.posterior.promise({"text": texts, "label": ["bad", "good"] * 100}, error=0.4)
    again = replace(copied, posterior=posterior)
    feedback = {here: Feedback(16_384) for here in (copied, again)}
    for k in range(0, 60, 10):
        for here, each in feedback.items():
            take(each, here, TEXTS[k : k + 10], FALSE[k : k + 10])
    tally = Tally.of(copied.folder, copied.id)
    assert tally is not None and tally.plain["labels"] == 120
    alone = Feedback(16_384).seen(again)
    assert alone.holds is False and str(tally).endswith("more than was promised")


def test_labels_are_kept_in_one_form_whatever_they_are_called(copied, tmp_path) -> None:
    feedback = Feedback(16_384)
    for label in ("good", 1):  # a class by its name and by its number
        feedback.take(copied, read({"text": f"w5 w{40 + len(str(label))}", "label": label}, copied))
    assert [row["label"] for row in lines(copied.folder)] == ["good", "good"]
    copied.posterior.encode(str(copied.folder / FILE))  # as an update reads it


def test_a_prediction_of_several_labels_can_be_sent_back(tmp_path) -> None:
    served = Served(fitted("labels"), tmp_path)
    texts = TEXTS[:8]
    labels = [row["prediction"] for row in served.answer(served.encode({"text": texts}))]
    assert {name for row in labels for name in row} <= {"0", "1", "2"}
    take(Feedback(16_384), served, texts, labels)
    assert [row["wrong"] for row in lines(tmp_path)] == [False] * 8


def test_rows_are_kept_in_one_form_whatever_a_request_has(tmp_path) -> None:
    """Else one client's form would keep all labels from being learnt."""
    served = Served(fitted("choice"), tmp_path)
    named = {"text": ["w11", "w10"], "label": ["1", "2"]}
    for cell, answer in ((["w10", "w11"], 1), (named, "1"), (json.dumps(named), 2)):
        row = {"question": "w30 w5", "choices": cell, "answer": answer}
        Feedback(16_384).take(served, read(row, served))
    assert [row["answer"] for row in lines(served.folder)] == [1, 0, 1]
    # The last two are labels of one text.
    assert served.posterior.encode(str(served.folder / FILE)).labels.tolist() == [1, 1]


@pytest.mark.parametrize(("name", "value"), [("random", False), ("by", "Bo")])
def test_what_is_said_of_all_rows_stands_beside_them(copied, name, value) -> None:
    plain = {"text": "w5 w9", "label": "good"}
    row = plain | {name: value}
    for rows in ([row], [plain, row], {k: [v] for k, v in row.items()}):
        with pytest.raises(Refused, match=f"got '{name}'; expected .* or beside \"rows\""):
            read({"rows": rows}, copied)
    assert getattr(read(row, copied), name) == value
    many = {"rows": [plain]}
    for wrong in (plain | {name.title(): value}, many | {name.upper(): value}, many | {"raw": 1}):
        with pytest.raises(Refused, match='expected "random" and "by"'):
            read(wrong, copied)
    assert read(plain | {"id": 3}, copied).table.keys() == {"text", "label"}


def test_a_row_without_a_label_is_named(copied) -> None:
    rows = [{"label": "bad"}, {"text": "w5"}]
    with pytest.raises(Refused, match=r"text\.0"):
        read({"rows": rows}, copied)
    with pytest.raises(Refused, match=r"label\.1"):
        read({"rows": [{"text": "w5", **rows[0]}, rows[1]]}, copied)


def test_ratings_are_kept_with_their_digits(tmp_path) -> None:
    served = Served(fitted("rating"), tmp_path)
    take(Feedback(16_384), served, ["w5 w6", "w7"], [4.3, 0.1])
    assert [row["label"] for row in lines(tmp_path)] == [4.3, 0.1]


def test_texts_that_its_student_has_learnt_are_not_counted(tmp_path) -> None:
    posterior = with_student().promise(fresh("class", 200, 9), error=0.6)
    served = Served(posterior, tmp_path)
    texts = unlabelled("class")["text"][:8]
    take(Feedback(16_384), served, [*texts, "w49 w48 w47"], [0] * 9)
    counts = [row["counts"] for row in lines(tmp_path)]
    assert counts == [False] * 8 + [True]
