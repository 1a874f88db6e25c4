"""What the page shows of a posterior's forecast, for each kind of labels."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from program import write_csv
from students import fitted

import bhpeft_pyro as bh
from bhpeft_pyro.data import table
from bhpeft_pyro.data.columns import as_choices
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.review import Pool, Session
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

TEXTS = [f"w{5 + i % 2} w{10 + i} w{40 - i}" for i in range(24)]
NAMED = {"text": ["w10", "w11"], "label": ["A", "B"]}


@pytest.fixture(scope="module")
def classes() -> bh.Posterior:
    names = ["good" if i % 2 else "bad" for i in range(24)]
    table = {"text": TEXTS, "label": names}
    return bh.fit(tiny_model(()), "normal", table, max_steps=30, progress=False)


def test_classes_in_the_order_of_the_queue_and_then_by_uncertainty(classes, tmp_path, monkeypatch):
    monkeypatch.setattr("bhpeft_pyro.review.pool._FIRST", 3)
    new = ["w30 w31", "W30  w31", *(f"w{i} w{i + 1} w9" for i in range(12, 22))]
    file = write_csv(tmp_path / "new.csv", id=[f"0{i}" for i in range(14)], text=[*TEXTS[:2], *new])
    pool = Pool.of(classes, file)
    queue = classes.queue([*TEXTS[:2], *new], 3)
    rows = [pool.items[key].row for key in pool.order]
    assert rows[:3] == queue.rows.tolist() and [*map(bool, queue.reasons)] == [True] * 3
    forecast = classes.predict([*TEXTS[:2], *new])
    rest = [row for row in range(2, 14) if row not in rows[:3] and row != 3]  # 3 is a copy of 2
    assert rows[3:] == sorted(rest, key=lambda row: -forecast.total[row])
    assert len(pool.items) == 13  # the learnt ones are there, to be corrected
    item = pool.items[pool.order[0]]
    assert item.options == item.values == ("bad", "good") and item.nearest is None
    assert item.probabilities == tuple(forecast.probabilities[item.row].tolist())
    assert item.reason == forecast.reasons()[item.row]
    assert pool.records[0] == {"text": TEXTS[0]} and pool.columns == ("text", "label")


def test_texts_that_the_promise_answers_are_not_asked_for(classes, tmp_path, monkeypatch):
    monkeypatch.setattr("bhpeft_pyro.review.pool._FIRST", 1)
    calibration = {
        "text": [f"w{5 + i % 2} w{10 + i % 37} w{46 + i // 74}" for i in range(200)],
        "label": ["good" if i % 2 else "bad" for i in range(200)],
    }
    promised = classes.promise(calibration, error=0.3)
    assert promised.promised is not None
    texts = [f"w{i} w{i + 1} w9" for i in range(12, 40)]
    middle = float(classes.predict(texts).confidence.median())
    promised = promised.replace(promised=replace(promised.promised, threshold=middle))
    copies = [*texts, *texts[::2], *(text.replace(" ", "  ") for text in texts[:9])]
    pool = Pool.of(promised, write_csv(tmp_path / "new.csv", text=copies))
    answered = promised.predict(texts).answered
    assert answered is not None and 0 < int(answered.sum()) < 28
    rows = [pool.items[key].row for key in pool.order]
    assert sorted(rows) == [row for row in range(28) if not answered[row]]
    queue = promised.queue([texts[row] for row in sorted(rows)], 1)
    assert pool.items[pool.order[0]].texts == queue.texts
    assert pool.answered == int(answered.sum()) and len(pool.items) == 28


def test_the_most_similar_learnt_text_where_texts_are_kept(tmp_path):
    table = {"text": TEXTS, "label": ["good" if i % 2 else "bad" for i in range(24)]}
    how = {"max_steps": 3, "progress": False}
    file = write_csv(tmp_path / "new.csv", text=["w30 w31", "w12 w9"])
    kept = bh.fit(tiny_model(()), "normal", table, keep_texts=True, **how)
    items = sorted(Pool.of(kept, file).items.values(), key=lambda item: item.row)
    assert [item.nearest for item in items] == [*kept.predict(["w30 w31", "w12 w9"]).nearest]
    assert {item.nearest for item in items} <= {*TEXTS}


def test_all_learnt(classes, tmp_path):
    pool = Pool.of(classes, write_csv(tmp_path / "old.csv", text=TEXTS[:3]))
    assert pool.order == () and len(pool.items) == 3


def test_files_that_cannot_be_used(classes, tmp_path):
    with pytest.raises(DataError, match="column 'text' is missing; columns there: body"):
        Pool.of(classes, write_csv(tmp_path / "new.csv", body=["w5"]))


def test_a_column_that_the_log_has_is_refused_before_texts_are_predicted(
    classes, tmp_path, monkeypatch
):
    monkeypatch.setattr(bh.Posterior, "predict", lambda *_, **__: pytest.fail("predicted"))
    label = classes.replace(columns=replace(classes.columns, label="note"))
    with pytest.raises(DataError, match=r"column 'note'.* rename yours"):
        Pool.of(label, write_csv(tmp_path / "new.csv", text=["w5"]))


def test_a_point_estimate_asks_for_the_least_certain_first(tmp_path):
    point = bh.fit(tiny_model(()), "delta", tiny_examples(), max_steps=30, progress=False)
    texts = [f"w{i} w9" for i in range(12, 20)]
    pool = Pool.of(point, write_csv(tmp_path / "new.csv", text=texts))
    total = point.predict(texts).uncertainty("total")
    rows = [pool.items[key].row for key in pool.order]
    assert rows == total.argsort(descending=True, stable=True).tolist()
    item = pool.items[pool.order[0]]
    assert item.queued == "" and item.values == item.options == ("0", "1")


@pytest.mark.parametrize("limits", [False, True])
def test_ratings_with_their_interval_on_a_scale_of_whole_numbers(tmp_path, limits):
    model = bh.tasks.ratings(
        tiny_backbone(), 1.5, 4.6, limits=limits, kinds=(), tokenizer=tiny_tokenizer()
    )
    table = {"text": TEXTS, "rating": [2.0 + i % 3 for i in range(24)]}
    columns = bh.Columns(label="rating")
    posterior = bh.fit(model, "normal", table, columns=columns, max_steps=5, progress=False)
    pool = Pool.of(posterior, write_csv(tmp_path / "new.csv", text=["w30 w31", "w5"]))
    assert pool.kind == "rating" and pool.column == "rating" and pool.limited == limits
    assert pool.scale == ((1.5, 4.6) if limits else (1, 5))
    forecast = posterior.predict(["w30 w31", "w5"])
    item = next(item for item in pool.items.values() if item.row == 0)
    lower, upper = forecast.interval(0.9)
    assert item.rating == (forecast.mean[0].item(), lower[0].item(), upper[0].item())
    assert item.options == item.probabilities == ()


@pytest.mark.parametrize("named", [False, True])
def test_choices_have_the_texts_of_each_question(tmp_path, named):
    def cell(*texts: str) -> object:
        return {"text": [*texts], "label": ["A", "B", "C"][: len(texts)]} if named else [*texts]

    model = bh.tasks.multiple_choice(tiny_backbone(), kinds=(), tokenizer=tiny_tokenizer())
    answers = ["A" if named else 0, "B" if named else 1] * 6
    choices = [cell("w6", f"w{10 + i}") for i in range(12)]
    table = {"question": TEXTS[:12], "choices": choices, "answer": answers}
    posterior = bh.fit(model, "normal", table, max_steps=5, progress=False)
    new = [json.dumps(cell("w7", "w8", "w9")), json.dumps(cell("w7", "w6"))]
    pool = Pool.of(posterior, write_csv(tmp_path / "new.csv", question=["w30", "w31"], choices=new))
    items = sorted(pool.items.values(), key=lambda item: item.row)
    assert [item.texts for item in items] == [("w30",), ("w31",)]
    assert [item.options for item in items] == [("w7", "w8", "w9"), ("w7", "w6")]
    assert items[1].values == (("A", "B") if named else ("w7", "w6"))
    assert [len(item.probabilities) for item in items] == [3, 2] and pool.column == "answer"


@pytest.mark.parametrize(
    ("choices", "other"),
    [
        (NAMED, NAMED | {"text": ["w11", "w10"]}),
        (NAMED, NAMED | {"label": ["B", "A"]}),
        (["w10", "w10", "w11"], ["w11", "w10", "w10"]),
        (["w10", "w11"], ["W11", "W10"]),
    ],
)
def test_answers_stay_with_their_choices_when_copies_in_another_order_come(
    tmp_path, choices, other
):
    posterior, file = fitted("choice"), tmp_path / "new.jsonl"
    first, copy = ({"question": "w5 w9", "choices": cell} for cell in (choices, other))

    def reopened(*rows: object) -> Session:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Session(Pool.of(posterior, file), tmp_path / "labels.db")

    session = reopened(first)
    (key,) = session.pool.order
    place = len(session.item(key).options) - 1
    session.decide("Ana", key, "label", [str(place)], "")
    again = reopened(copy, first)
    assert again.labels == 1 and again.next_for("Ana") not in (key, None)
    (row,) = table(str(tmp_path / "labels.db")).to_dict("records")
    assert as_choices(row["choices"]) == as_choices(choices)
    assert posterior.encode(str(tmp_path / "labels.db")).labels.tolist() == [place]


def test_labels_of_choices_that_are_numbers_come_back_as_they_were_chosen(tmp_path):
    """In a CSV file 1 would be the choice "1", which is the first; the same choice twice has only
    its position."""
    model = bh.tasks.multiple_choice(tiny_backbone(), kinds=(), tokenizer=tiny_tokenizer())
    cells = [["1", "2", "3"], ["w6", "w6", "w7"]]
    table = {"question": TEXTS[:12], "choices": cells * 6, "answer": [0, 2] * 6}
    posterior = bh.fit(model, "normal", table, max_steps=2, progress=False)
    new = {"question": ["w30", "w31"], "choices": [*map(json.dumps, cells)]}
    pool = Pool.of(posterior, write_csv(tmp_path / "new.csv", **new))
    for row, item in enumerate(sorted(pool.items.values(), key=lambda item: item.row)):
        for chosen in range(3):
            cell = {name: [values[row]] for name, values in new.items()}
            file = write_csv(tmp_path / "labels.csv", **cell, answer=[pool.label(item, [chosen])])
            assert posterior.encode(file).labels.tolist() == [chosen]


def test_several_labels_have_a_probability_each(tmp_path):
    model = tiny_model((), 3, likelihood=bh.likelihoods.MultiLabel())
    cells = [["art", "sport"], ["sport"], ["money"]] * 8
    table = {"text": TEXTS, "label": cells}
    posterior = bh.fit(model, "normal", table, max_steps=5, progress=False)
    pool = Pool.of(posterior, write_csv(tmp_path / "new.csv", text=["w30 w31"]))
    (item,) = pool.items.values()
    assert item.options == ("art", "money", "sport") and pool.kind == "labels"
    assert item.probabilities == tuple(posterior.predict(["w30 w31"]).probabilities[0].tolist())
