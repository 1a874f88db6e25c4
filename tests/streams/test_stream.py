"""A stream: predict first, learn then."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from counts import COUNTS, Counts
from exact import independent
from program import read_csv
from pyro.infer.autoguide import AutoNormal

import bhpeft_pyro as bh
from bhpeft_pyro.data import Columns, encode
from bhpeft_pyro.errors import (
    BusyError,
    ConfigError,
    DataError,
    FitError,
    GuideError,
    LikelihoodError,
    PriorError,
    SaveError,
)
from bhpeft_pyro.priors import FunctionSpaceNormal
from bhpeft_pyro.streams import Record
from bhpeft_pyro.testing import tiny_examples, tiny_model, tiny_tokenizer

WEEKS = {f"week {i}": tiny_examples(12, seed=i) for i in range(3)}
TESTS = {name: tiny_examples(10, seed=50 + i) for i, name in enumerate(WEEKS)}
GROWING = {
    "a": {"text": ["w5 w9", "w6 w8"] * 4, "label": ["no", "yes"] * 4},
    "b": {"text": ["w7 w9", "w6 w8"] * 4, "label": ["perhaps", "yes"] * 4},
}
AGAIN = pytest.mark.filterwarnings("ignore:.*data. .* that an earlier round has learnt")
QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}
OPTIONS: dict[str, Any] = {
    "max_steps": 2,
    "lr": 0.3,
    "progress": False,
    "components": 2,
}


def run(
    folder: Path,
    batches: Any = WEEKS,
    likelihood: Any = None,
    kinds: Any = (),
    prior: Any = None,
    **options: Any,
) -> bh.Posterior:
    model = tiny_model(kinds, 2 if likelihood is None else 1, likelihood=likelihood, prior=prior)
    return bh.stream(model, batches, folder, **{**OPTIONS, **options})


def test_that_texts_were_cut_is_said_once(tmp_path: Path) -> None:
    def week(words: int, seed: int) -> dict[str, Any]:
        texts = [" ".join(f"w{5 + (i + seed) % 40}" for i in range(words + j)) for j in range(8)]
        return {"text": texts, "label": [0, 1] * 4}

    weeks = {"short": week(3, 0), "long": week(36, 1), "longer": week(40, 2)}
    with pytest.warns(bh.data.CutWarning) as told:
        run(tmp_path, weeks)
    assert [str(each.message)[:6] for each in told if each.category is bh.data.CutWarning] == [
        "8 of 8"
    ]
    with pytest.warns(bh.data.CutWarning):  # elsewhere it is said as before
        bh.data.encode(weeks["long"], tiny_tokenizer(), kind="class")


def test_each_batch_is_predicted_before_it_is_learnt(tmp_path: Path) -> None:
    posterior = run(tmp_path, tests=TESTS, components=None)
    record = Record.of(posterior)
    first, second, _ = record.rows
    assert "nll" not in first and [row["batch"] for row in record.rows] == list(WEEKS)
    by_hand = bh.fit(
        tiny_model(()), "laplace", WEEKS["week 0"], max_steps=2, lr=0.3, progress=False
    )  # fmt: skip
    assert second["nll"] == by_hand.evaluate(WEEKS["week 1"])["nll"]
    drift = by_hand.assess(WEEKS["week 1"])
    assert second["drift/nll_z"] == drift.nll.z  # type: ignore[union-attr]
    tested = by_hand.evaluate(TESTS["week 2"])
    assert (first["test/week 2"], first["test_nll/week 2"]) == (tested["accuracy"], tested["nll"])
    # The record on disk is this one.
    assert json.loads((tmp_path / "record.json").read_text()) == record.rows
    table = read_csv(tmp_path / "record.csv")
    assert [float(row["test/week 1"]) for row in table] == record.column("test/week 1").tolist()
    assert table[0]["nll"] == "" and float(table[1]["nll"]) == second["nll"]


@AGAIN
def test_new_labels_appear_on_the_way(tmp_path: Path) -> None:
    posterior = run(tmp_path, GROWING, grow=True)
    assert posterior.columns.label_names == ("no", "yes", "perhaps")
    first = tmp_path / "rounds" / posterior.lineage[0].id
    backbone = posterior.model.network.backbone
    before = bh.Posterior.load(first, backbone, tokenizer=tiny_tokenizer())
    known = before.predict(GROWING["b"]["text"][1::2], 40).label.tolist()  # the others are new
    share = known.count(1) / 8
    assert share <= Record.of(posterior).rows[1]["accuracy"] <= share + 0.5
    assert len(run(tmp_path, GROWING, grow=True).lineage) == 2


def test_examples_may_be_from_before_new_labels(tmp_path: Path) -> None:
    """Read once with the names of their time; a stream that goes on has more."""
    names = ("no", "yes", "perhaps")
    texts = [f"w{5 + i % 2} w{9 + i}" for i in range(16)]
    rows = {
        name: {"text": own, "label": ["no", "yes"] * 4}
        for name, own in (("a", texts[:8]), ("b", texts[8:]))
    }
    rows["b"]["label"] = ["perhaps", "yes"] * 4
    batches = {
        name: encode(rows[name], tiny_tokenizer(), kind="class", columns=Columns(label_names=known))
        for name, known in (("a", names[:2]), ("b", names))
    }
    options: dict[str, Any] = {"grow": True}
    tests = {"a": batches["a"].subset([0, 1])}
    learnt = batches | {"a": batches["a"].subset(range(2, 8))}
    for _ in range(2):
        posterior = run(tmp_path, learnt, tests=tests, **options)
        assert posterior.columns.label_names == names and len(posterior.lineage) == 2


def test_a_test_that_does_not_fit_costs_no_round(tmp_path: Path) -> None:
    wrong = {"a": {"text": ["w5"], "label": [7]}}
    with pytest.raises(DataError, match="tests: 'a': "):
        run(tmp_path, {"a": GROWING["a"]}, tests=wrong)
    history = bh.streams.History(tmp_path / "rounds")
    assert len(history.rounds) == 1
    assert run(tmp_path, {"a": GROWING["a"]}).report.id in history.rounds


def test_an_interrupt_while_tests_are_scored_costs_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = {"a": {"text": ["w5 w7"], "label": ["no"]}}
    with monkeypatch.context() as patch:
        module = sys.modules["bhpeft_pyro.streams.stream"]  # the name is that of the function too
        patch.setattr(module, "_score", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, {"a": GROWING["a"]}, tests=tests)
    (id,) = bh.streams.History(tmp_path / "rounds").rounds
    posterior = run(tmp_path, {"a": GROWING["a"]}, tests=tests)
    assert posterior.report.id == id
    whole = run(tmp_path / "whole", {"a": GROWING["a"]}, tests=tests).report
    for name in ("test/a", "test_nll/a"):  # scored when it goes on
        assert posterior.report.metrics[name] == whole.metrics[name]
    assert posterior.report.data_with_held_out == whole.data_with_held_out
    (saved,) = bh.streams.History(tmp_path / "rounds").rounds.values()
    assert saved.metrics == posterior.report.metrics


def test_another_stream_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    posterior = run(tmp_path, dict(list(WEEKS.items())[:2]))
    swapped = {"week 0": WEEKS["week 1"], "week 1": WEEKS["week 0"]}
    with pytest.raises(ConfigError, match="'week 0' with other data"):
        run(tmp_path, swapped)
    with pytest.raises(ConfigError, match="learnt 'week 0', and batch 1 is 'x'"):
        run(tmp_path, {"x": WEEKS["week 0"]})
    with pytest.raises(DataError, match=r"batches: 'week 0 again': .*learnt 12 of these examples"):
        run(tmp_path, {**dict(list(WEEKS.items())[:2]), "week 0 again": WEEKS["week 0"]})
    bh.streams.History(tmp_path / "rounds").add(bh.fit(tiny_model(()), "normal", WEEKS["week 2"],
                                               max_steps=2, progress=False))  # fmt: skip
    with pytest.raises(ConfigError, match="2 branches"):
        run(tmp_path)
    with pytest.raises(DataError, match="batches is empty"):
        run(tmp_path / "none", {})
    assert len(posterior.lineage) == 2


def test_a_stream_beside_another_in_one_folder_is_refused_at_once(tmp_path: Path) -> None:
    """Overlapping cron jobs made two branches, which no later call could continue."""

    def learn(last: bh.Posterior | None, data: object) -> bh.Posterior:
        with pytest.raises(BusyError, match="another process is writing into"):
            run(tmp_path)
        if last is not None:
            return last.update(data).with_report(metrics={"own": 7.0})
        return bh.fit(tiny_model(()), "normal", data, max_steps=2, progress=False)

    options: dict[str, Any] = {"drift": False, "progress": False}
    last = bh.streams.prequential(tiny_model(()), learn, WEEKS, tmp_path, **options)
    assert last.report.metrics["own"] == 7 and "nll" in last.report.metrics  # beside the stream's
    assert len(bh.streams.History(tmp_path / "rounds").leaves) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("record.csv", "record.json", "rounds")
    ]


@pytest.mark.parametrize("kept", [False, True])
def test_a_learner_has_to_continue_the_last_posterior(tmp_path: Path, kept: bool) -> None:
    """A new fit in every round left one row in the record, and branches that nothing continues."""

    def learn(last: Any, data: object) -> Any:
        return last if kept else bh.fit(tiny_model(()), "normal", data, **QUICK)

    first = "1" if kept else "2"
    with pytest.raises(ConfigError, match=rf"learn: .* in round {first}; expected a bh.Posterior"):
        bh.streams.prequential(tiny_model(()), learn, WEEKS, tmp_path, drift=False, progress=False)
    assert len(bh.streams.History(tmp_path / "rounds").rounds) == int(not kept)


@AGAIN
def test_tests_wait_for_labels_that_are_still_to_come(tmp_path: Path) -> None:
    tests = {name: {**rows, "text": ["w5 w7", "w6 w7"] * 4} for name, rows in GROWING.items()}
    posterior = run(tmp_path, GROWING, tests=tests, grow=True)
    record = Record.of(posterior)
    assert all("test/a" in row for row in record.rows)
    assert ["test/b" in row for row in record.rows] == [False, True]


def test_a_folder_of_more_rounds_than_batches_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError, match="holds 3 rounds, of more batches than the 1 given"):
        run(tmp_path, {"week 0": WEEKS["week 0"]})


def test_a_stream_under_a_likelihood_of_one_s_own_continues(tmp_path: Path) -> None:
    model = tiny_model((), outputs=1, likelihood=Counts())
    weeks = {"monday": COUNTS, "tuesday": {**COUNTS, "text": ["w7 w9", "w8", "w9 w30", "w6"] * 3}}
    how: dict[str, Any] = {"guide": "normal", "max_steps": 2, "progress": False}
    bh.stream(model, {"monday": COUNTS}, tmp_path, **how)
    last = bh.stream(model, weeks, tmp_path, **how)
    assert len(last.lineage) == 2 and type(last.model.likelihood) is Counts


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_a_stream_under_a_prior_of_one_s_own_continues(tmp_path: Path, guide: str) -> None:
    """Whether the file needs it, as under `normal`, or has it as numbers."""
    how: dict[str, Any] = {"guide": guide, "components": 1}

    def wide(sites: Any) -> Any:
        return independent(sites, 2.0)

    for prior in (wide, {"*": dist.Normal(0.0, 2.0)}):
        folder = tmp_path / type(prior).__name__
        run(folder, {"week 0": WEEKS["week 0"]}, prior=prior, **how)
        assert len(run(folder, prior=prior, **how).lineage) == 3
        with pytest.raises(ConfigError, match=r"^prior: .*, not FunctionSpace"):
            run(folder, **how)


class Wide:
    """A prior of one's own with an option."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, sites: Any) -> Any:
        return independent(sites, self.scale)


def test_a_prior_with_options_and_one_that_moved_and_the_last_posterior_s(tmp_path: Path) -> None:
    how: dict[str, Any] = {"guide": "laplace", "components": 1}
    first = dict(list(WEEKS.items())[:1])
    run(tmp_path / "own", first, prior=Wide(0.5), **how)
    with pytest.raises(ConfigError, match=r"^prior: .* Wide\(scale=0\.5\), not Wide\(scale=9\.0\)"):
        run(tmp_path / "own", prior=Wide(9.0), **how)

    def inside() -> Any:
        return lambda site: dist.Normal(0.0, 2.0)

    last = run(tmp_path / "moved", first, prior={"*": inside()}, **how)
    run(tmp_path / "moved", first, prior={"*": lambda site: dist.Normal(0.0, 2.0)}, **how)
    assert len(run(tmp_path / "moved", prior=last.model.prior, **how).lineage) == 3


class Own(AutoNormal):
    """Of no library that could make it again."""


class Varied(Counts):
    """With a state that no file can hold."""

    def __init__(self) -> None:
        self.rates = torch.zeros(2)


STARS = bh.likelihoods.OrderedLogistic(2)
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tests": {"t": {"text": ["w5 w6"]}}}, DataError, "tests: 't': column 'label'"),
    ({"tests": {"t": {"text": ["w5"], "label": [None]}}}, DataError, "tests: 't'"),
    ({"tests": {"t": {"text": ["w5", " "], "label": [0, 1]}}}, DataError, "tests: 't': .*row 1"),
    ({"keep": 1.5}, ConfigError, "keep"),
    ({"keep": 0.5, "guide": "normal", "prior": dist.Laplace(0.0, 1.0)}, PriorError, "Laplace"),
    # What cannot be a prior, be saved, or grow.
    ({"guide": "delta"}, GuideError, "guide"),
    ({"guide": "iaf"}, GuideError, "guide"),
    ({"guide": Own}, SaveError, "Own"),
    ({"likelihood": Varied()}, SaveError, "likelihood"),
    ({"guide": "delta", "grow": True}, GuideError, "grow"),
    ({"guide": "AutoNormal", "grow": True}, GuideError, "grow"),
    ({"likelihood": STARS, "grow": True}, LikelihoodError, "OrderedLogistic"),
    ({"promise": {"error": 0.1}}, ConfigError, "promise"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_what_would_cost_a_round_is_refused_before_it_is_learnt(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setitem(bh.streams.stream.__globals__, "fit", None)  # would be called
    with pytest.raises(error, match=message):
        run(tmp_path, **options)
    assert not bh.streams.History(tmp_path / "rounds").rounds


def test_a_test_may_have_labels_of_one_class(tmp_path: Path) -> None:
    last = run(tmp_path, tests={"t": {"text": ["w5", "w6"], "label": [1, 1]}})
    scores = [report.metrics["test/t"] for report in last.lineage]
    assert len(scores) == len(WEEKS) and all(0 <= score <= 1 for score in scores)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"kinds": bh.presets.lora(rank=2)}, "peft"),
        ({"likelihood": bh.likelihoods.Normal()}, "likelihood"),
        ({"prior": FunctionSpaceNormal(head=9.0)}, "prior"),
        ({"prior": {"*": dist.Normal(0, 1)}}, "prior"),
        ({"guide": "normal"}, "guide"),
        ({"guide": "mvn"}, "guide"),
        ({"components": 3}, "components"),
        ({"columns": Columns(label_names=("a", "b"))}, "label_names"),
        ({"columns": Columns(text="body")}, "columns.text"),
        ({"columns": Columns(max_length=9)}, "columns.max_length"),
    ],
)
def test_rounds_of_other_settings_are_not_gone_on_with(
    finished: Path, options: dict[str, Any], argument: str
) -> None:
    """Even if no batch is new."""
    with pytest.raises(ConfigError, match=f"^({argument}): .* holds rounds with "):
        run(finished, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


def test_rounds_that_are_learnt_otherwise_than_the_last_are_noted(tmp_path: Path) -> None:
    first, second, _ = WEEKS.items()
    run(tmp_path, dict([first]))
    with pytest.warns(UserWarning, match=r"learnt with lr=0.1 \(until now 0.3\)$"):
        run(tmp_path, dict([first, second]), lr=0.1, keep=0.5)
    expected = r"with temperature=0.5 \(until now None\), seed=7 .*, keep=0.9 \(until now 0.5\)$"
    with pytest.warns(UserWarning, match=expected):
        last = run(tmp_path, lr=0.1, keep=0.9, seed=7, temperature=0.5)
    reports = last.lineage
    assert [each.keep for each in reports] == [1.0, 0.5, 0.9]
    assert [each.options.lr for each in reports] == [0.3, 0.1, 0.1]
    assert [each.options.seed for each in reports] == [0, 0, 7]


def test_names_may_be_numbers_or_dates(tmp_path: Path) -> None:
    batches, tests = (dict(enumerate(data.values())) for data in (WEEKS, TESTS))
    record = Record.of(run(tmp_path, batches, tests=tests))
    assert [row["batch"] for row in record.rows] == ["0", "1", "2"]
    assert all(f"test/{number}" in row for row in record.rows for number in range(3))
    assert len(run(tmp_path, batches, components=None).lineage) == 3


def test_batches_may_be_read_but_once(tmp_path: Path) -> None:
    weeks = {
        name: [{"text": f"w{k} w{i}", "label": i % 2} for i in range(5, 11)]
        for name, k in (("a", 20), ("b", 30))
    }
    tests = {"all": iter([{"text": "w5 w9", "label": 0}, {"text": "w6 w8", "label": 1}])}
    once = run(tmp_path / "once", ((k, iter(rows)) for k, rows in weeks.items()), tests=tests)
    assert Record.of(once).column("test/all").isfinite().all()
    assert [report.examples for report in once.lineage] == [6, 6]
    assert once.report.data == run(tmp_path / "kept", weeks).report.data


@AGAIN
def test_stars_are_tested_and_gone_on_with_whatever_their_scale_is_made_of(tmp_path: Path) -> None:
    """NumPy's numbers are neither plain data nor written alike."""
    ordered = tiny_model((), 1, likelihood=bh.likelihoods.OrderedLogistic(np.int64(3)))
    weeks = {"a": {"text": ["w5", "w6", "w7"], "label": [0, 1, 2]}}
    tests = {"a": {"text": ["w5 w8", "w6 w8", "w7 w8"], "label": [0, 1, 2]}}
    record = Record.of(
        bh.stream(ordered, weeks, tmp_path / "o", tests=tests, max_steps=2, progress=False)
    )
    assert "test/a" in record.rows[0]
    rows = {"text": ["w5", "w6"], "label": [1.0, 5.0]}
    later = {"text": ["w7", "w6"], "label": [1.0, 5.0]}
    # Without numbers of its own, the likelihood's unit is that of the first round.
    for name, unit in (("given", (np.float64(3.0), np.float32(1.0))), ("open", ())):
        for batches in ({"a": rows}, {"a": rows, "b": later}):
            model = tiny_model((), 1, likelihood=bh.likelihoods.Normal(*unit))
            last = bh.stream(model, batches, tmp_path / name, max_steps=2, progress=False)
        assert len(last.lineage) == 2


def test_what_is_wrong_with_a_batch_is_said_with_its_name(tmp_path: Path) -> None:
    for label, message in (
        (None, "column 'label', row 1: the label is missing"),
        ("perhaps", r"'perhaps' is not among .*grow=True"),
    ):
        bad = {"text": ["w7", "w8"], "label": ["no", label]}
        with pytest.raises(DataError, match=f"batches: 'b': .*{message}"):
            run(tmp_path / str(label), {"a": GROWING["a"], "b": bad})
    file = tmp_path / "first.csv"
    file.write_text("text,label\nw5 w6,0\nw6 w7,\n")
    with pytest.raises(DataError, match=r"batches: 'a': first\.csv, .* row 3: .*missing") as error:
        run(tmp_path / "file", {"a": file})
    assert (error.value.file, error.value.rows) == ("first.csv", (1,))


def test_a_test_has_the_same_rows_in_all_rounds(tmp_path: Path) -> None:
    first, rows = dict(list(WEEKS.items())[:1]), {"text": ["w5 w9", "w6"], "label": [0, 1]}
    run(tmp_path, first, tests={"t": rows})
    for other in ({**rows, "label": [1, 0]}, {**rows, "text": ["w5 w9", "w7"]}):
        with pytest.raises(ConfigError, match="tests: 't' has other rows than those that earlier"):
            run(tmp_path, tests={"t": other})
    last = run(tmp_path, tests={"u": other, "t": {k: v[::-1] for k, v in rows.items()}})
    learnt = Record.of(last).rows
    assert all("test/t" in row for row in learnt)
    assert ["test/u" in row for row in learnt] == [False, True, True]


def test_all_of_a_batch_is_known_whichever_rows_were_held_out(tmp_path: Path) -> None:
    batch = tiny_examples(20, seed=9)
    train, test = batch.subset(range(15)), batch.subset(range(15, 20))
    weeks = {**WEEKS, "week 3": train}
    last = run(tmp_path, weeks, tests={"week 3": test})
    for known in (batch, batch.subset(range(19, -1, -1)), train):
        with pytest.raises(DataError, match=r"round 4 .* has learnt 15 of these"):
            last.update(known)
    assert len(last.update(test, max_steps=1, progress=False).lineage) == 5


def test_rows_that_a_first_round_holds_out_itself_are_known_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default guide learns four fifths of 50 rows or more, whatever was held out before."""
    weeks = {name: tiny_examples(60, seed=i) for i, name in enumerate(WEEKS)}
    last = run(tmp_path, weeks, tests={"week 0": TESTS["week 0"]})
    assert [report.examples for report in last.lineage] == [48, 60, 60]
    assert [report.held_out for report in last.lineage] == [12, 0, 0]
    for number, (week, learnt) in enumerate(zip(weeks.values(), (48, 60, 60), strict=True), 1):
        with pytest.raises(DataError, match=f"round {number} .* has learnt {learnt} of these"):
            last.update(week)
    monkeypatch.setattr(bh.Posterior, "update", None)  # would be called
    assert run(tmp_path, weeks).lineage == last.lineage


def test_a_student_after_each_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metrics are those of the posterior; a finished round stays as it is."""
    weeks, texts = dict(list(WEEKS.items())[:2]), tiny_examples(60, seed=9)
    plain = run(tmp_path / "plain", weeks, tests=TESTS)
    last = run(tmp_path / "own", weeks, tests=TESTS, distill=texts)
    history = bh.streams.History(tmp_path / "own" / "rounds")
    network = last.model.network
    for id in history.rounds:
        saved = history.load(id, network.backbone, tokenizer=network.tokenizer)
        assert saved.student is not None and saved.student.report.round == id
        assert saved.predict(["w5"]).method == "student"
    for row, other in zip(Record.of(last).rows, Record.of(plain).rows, strict=True):
        assert {**row, "id": 0, "seconds": 0} == {**other, "id": 0, "seconds": 0}
    files = {path: path.read_bytes() for path in history.folder.rglob("*.safetensors")}
    run(tmp_path / "own", weeks, tests=TESTS, distill=tiny_examples(70, seed=8))
    assert files == {path: path.read_bytes() for path in history.folder.rglob("*.safetensors")}
    more = run(tmp_path / "own", tests=TESTS)
    assert more.student is None and len(more.lineage) == 3


def test_a_stream_checks_its_texts_first_and_saves_no_round_without_a_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="distill: got 20 different texts"):
        run(tmp_path, distill=tiny_examples(20, seed=9))
    assert not tmp_path.joinpath("rounds").exists()
    texts = tiny_examples(60, seed=9)
    monkeypatch.setattr(
        "bhpeft_pyro.posterior.distill.distil", Mock(side_effect=FitError("not finite"))
    )
    with pytest.raises(FitError, match="distill: not finite"):
        run(tmp_path, distill=texts)
    assert not bh.streams.History(tmp_path / "rounds").rounds
    monkeypatch.undo()
    assert len(run(tmp_path, distill=texts).lineage) == 3
