"""The experiments with streams: what each arm learns, being killed, tables from files alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onehot import assert_posterior, model, solve, words
from saves import backbone_in

import bhpeft_pyro as bh
from bhpeft_pyro.data.copies import plain
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.guides.laplace import width
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.streams import History
from tools.experiments import protocols, stream
from tools.experiments.arms import ARMS, AT_ONCE, Arm, Setup
from tools.experiments.runs import Given, results

ROUNDS = {str(count): words(count, seed) for seed, count in enumerate((48, 32, 64))}


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit ends at the exact mode, so what is left to go wrong is the accounts: no row is held
    out, and the width is measured on all of them."""
    monkeypatch.setattr("bhpeft_pyro.posterior.learn.optimise", solve)
    monkeypatch.setattr(bh.data.Examples, "hold_out", lambda data, seed: (data, None))
    monkeypatch.setattr(width, "_EXAMPLES", 1000)


@pytest.mark.usefixtures("exactly")
@pytest.mark.filterwarnings("ignore:.* repeat another")
@pytest.mark.filterwarnings("ignore:data. .* that an earlier round has learnt")
@pytest.mark.parametrize("arm", ["posterior as prior", "all data so far"])
def test_what_an_arm_has_learnt_is_known_in_closed_form(arm: str) -> None:
    learn = ARMS[arm](Setup(model, ROUNDS))
    posterior = None
    for number, data in enumerate(ROUNDS.values(), 1):
        posterior = learn(posterior, data)
        batches = list(ROUNDS.values())[:number]
        assert_posterior(posterior.guide, [(batch, 1.0) for batch in batches])
        assert [report.data for report in posterior.lineage] == [b.fingerprint for b in batches]


@pytest.mark.filterwarnings("ignore:.* repeat another")
@pytest.mark.parametrize(
    ("arm", "again"),
    [("deterministic sequential", 0), ("deterministic sequential, 5 % replay", 3)],
)
def test_fine_tuning_goes_on_from_where_it_was(
    monkeypatch: pytest.MonkeyPatch, arm: str, again: int
) -> None:
    starts = []

    def optimise(setup: Any, report: Any) -> None:
        weights = setup.guide.loc["head/weight"]
        starts.append(weights.detach().clone())
        with torch.no_grad():
            weights += len(setup.data)

    monkeypatch.setattr("bhpeft_pyro.posterior.learn.optimise", optimise)
    learn = ARMS[arm](Setup(model, ROUNDS))
    posterior = None
    for data in ROUNDS.values():
        posterior = learn(posterior, data)
    assert (starts[1] - starts[0] == 48).all() and (starts[2] - starts[1] == 32 + again).all()
    assert posterior is not None
    for last, following in zip(posterior.lineage, posterior.lineage[1:], strict=False):
        assert following.parent == last.id


@pytest.mark.usefixtures("exactly")
@pytest.mark.filterwarnings("ignore:.* repeat another")
def test_all_data_at_once_are_learnt_before_the_first_round() -> None:
    learn = ARMS[AT_ONCE](Setup(model, ROUNDS))
    posterior = None
    for data in ROUNDS.values():
        posterior = learn(posterior, data)
        assert_posterior(posterior.guide, [(batch, 1.0) for batch in ROUNDS.values()])
    assert posterior is not None
    assert len({report.id for report in posterior.lineage}) == 3
    assert [r.data for r in posterior.lineage] == [b.fingerprint for b in ROUNDS.values()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data as the files have them, and a tiny backbone."""

    def write(name: str, rows: Iterator[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)

    def texts(words: int, number: int) -> Iterator[str]:
        return (f"w{5 + i % words} w{10 + number} w{20 + i // 30} w{i % 30}" for i in range(90))

    train, dev = (
        [{"text": t, "stars": (0, 4, 2)[i % 3]} for i, t in enumerate(texts(3, number))]
        for number in range(2)
    )
    write("sentiment-sst-train", iter(train + dev))  # as it is in the treebank
    write("sentiment-sst-dev", iter(dev))
    for number, domain in enumerate(protocols.DOMAINS):
        rated = [
            {"text": space.join(t.split()), "rating": (-3.0, 2.5, 0.2)[i % 3]}
            for space in (" ", "  ")  # each text twice
            for i, t in enumerate(texts(3, 3 + number))
        ]
        write(f"sentiment-{domain}", iter(rated))
    news = (
        {"date": f"1987-03-{1 + i // 4:02}T10:00:00", "text": t, "label_name": ("a", "b")[i % 2]}
        for i, t in enumerate(texts(2, 9))
    )
    write("news-reuters-1987", news)
    for number, source in enumerate(protocols.QUESTIONS.values()):
        asked = (
            {"question": t, "choices": ["w5", "w6", "w7"][: 2 + i % 2], "answer": i % 2}
            for i, t in enumerate(texts(3, 11 + number))
        )
        write(source, asked)
    backbone_in(tmp_path / "backbone")
    return tmp_path


def learn(folder: Path, out: str, protocol: str, arms: list[str], **changes: Any) -> list[Any]:
    """The results of one seed."""
    setting = {"rows": 20, "test": 4, "samples": 2, "preset": "head_only", **changes}
    load = partial(load_backbone, str(folder / "backbone"), "cpu")
    given = Given(setting, load, "tiny", folder, folder / out)
    return results(stream.EXPERIMENT, given, [(protocol, 0, arm) for arm in arms])


def read(name: str, folder: Path, **changes: int) -> protocols.Stream:
    sizes = {"seed": 0, "rows": 20, "test": 6, **changes}
    return protocols.PROTOCOLS[name].read(folder, *sizes.values())


def test_protocols_share_no_text_and_come_in_their_order(folder: Path) -> None:
    rounds = read("rounds", folder)
    assert list(rounds.batches) == ["10", "20"] and rounds.final is not None
    texts = [text for batch in rounds.batches.values() for text in batch["text"]]
    assert len(set(texts)) == 30 and not set(texts) & set(rounds.final["text"])
    assert rounds.unlabelled is not None and rounds.unlabelled.column_names == ["text"]
    others = set(rounds.unlabelled["text"])
    assert len(others) == 84 and not others & {*texts, *rounds.final["text"]}
    there = read("orders", folder)
    orders = [list(read("orders", folder, seed=seed).batches) for seed in range(24)]
    assert len({*map(tuple, orders)}) == 24 and all(len({*order}) == 4 for order in orders)
    assert orders[0] == orders[17][::-1] == list(protocols.DOMAINS)
    assert {order[0] for order in orders[:4]} == {*protocols.DOMAINS}
    for name, number in {"tweets-first": 0, "nyt-first": 17}.items():
        assert all(list(read(name, folder, seed=s).batches) == orders[number] for s in range(3))
    for name, batch in there.batches.items():
        assert not {*map(plain, batch["text"])} & {*map(plain, there.tests[name]["text"])}
        # Words 5 and 6 stand for 0 and 1; what is rated 0.2 begins with word 7.
        assert [text.split()[0] for text in batch["text"]] == [f"w{5 + k}" for k in batch["label"]]
    assert read("orders", folder, seed=1).batches["nyt"]["text"] != there.batches["nyt"]["text"]
    rated = read("orders-ratings", folder)
    assert rated.kind == "rating" and {*rated.batches["nyt"]["label"]} == {-3.0, 2.5, 0.2}
    first, second = (read("questions", folder, seed=seed) for seed in (0, 1))
    assert list(first.batches) == list(second.batches)[::-1] == ["OpenBookQA", "ARC"]
    assert not {*first.batches["ARC"]["question"]} & {*first.tests["ARC"]["question"]}
    weeks = read("weekly", folder)
    assert [(name, len(batch)) for name, batch in weeks.batches.items()] == [
        *(("1987-02-23", 4), ("1987-03-02", 20), ("1987-03-09", 20)),
        *(("1987-03-16", 20), ("1987-03-23", 2)),
    ]
    dates = [date for batch in weeks.batches.values() for date in batch["date"]]
    assert dates == sorted(dates)
    with pytest.raises(DataError, match="150 rows are needed, there are 114"):
        read("rounds", folder, rows=80)


OURS, PLAIN = "posterior as prior", "deterministic sequential"


class Killed(BaseException):
    """Nothing catches it by mistake."""


def test_a_killed_run_goes_on_and_learns_no_round_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = learn(folder, "whole", "orders", [OURS])
    add, rounds = History.add, []

    def dying(self: History, posterior: bh.Posterior) -> str:
        name = posterior.report.name
        if name == "movies" and "movies" not in rounds:
            rounds.append(name)
            raise Killed
        rounds.append(name)
        return add(self, posterior)

    monkeypatch.setattr(History, "add", dying)
    with pytest.raises(Killed):
        learn(folder, "killed", "orders", [OURS])
    assert not list((folder / "killed").glob("*.json"))
    shutil.copytree(folder / "killed", folder / "other")
    (killed,) = learn(folder, "killed", "orders", [OURS])
    assert rounds == ["tweets", "amazon", "movies", "movies", "nyt"]
    learn(folder, "other", "orders", [OURS], samples=9)
    assert rounds[5:] == ["tweets", "amazon", "movies", "nyt"]  # of another setting: all anew
    for row in (*whole["rounds"], *killed["rounds"]):
        del row["id"], row["seconds"]
    assert killed["rounds"] == whole["rounds"]
    assert not list((folder / "killed").glob("*.rounds"))


@pytest.mark.parametrize(
    ("protocol", "arms", "preset"),
    [
        ("rounds", list(ARMS), "lora"),
        ("orders", [OURS, PLAIN, AT_ONCE], "head_only"),
        ("orders-ratings", [OURS, AT_ONCE], "head_only"),
        ("questions", [OURS, AT_ONCE], "head_only"),
        ("weekly", [OURS, PLAIN], "head_only"),
    ],
)
def test_every_protocol_is_learnt_by_its_arms(
    protocol: str, arms: list[str], preset: str, folder: Path
) -> None:
    done = learn(folder, "out", protocol, arms, preset=preset)
    shown = "\n".join(table.markdown() for table in stream.EXPERIMENT.tables(done))
    assert all(f"\n| {name} " in shown for name in arms)
    assert ("| forgetting |" in shown) == protocol.startswith(("orders", "questions"))
    score = "mse" if protocol == "orders-ratings" else "accuracy"
    assert (f"{score} at the end" in shown) == (protocol != "weekly")
    with pytest.raises(ConfigError, match=r"was run with samples \d+, not 5"):
        learn(folder, "out", protocol, arms, preset=preset, samples=5)


def test_the_cost_of_a_round_is_that_of_its_neighbour_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that only plain rounds, of 2 s, and those of the arms move."""
    now = [0.0]

    def fit(model: Any, guide: Any, data: bh.data.Examples, **options: Any) -> None:
        now[0] += 2.0 * len(data)

    def taking(seconds: float) -> Arm:
        def learn(last: Any, data: Any) -> Any:
            now[0] += seconds * len(data)
            return SimpleNamespace(model=model())

        return lambda setup: learn

    monkeypatch.setattr(stream, "clock", lambda device: lambda: now[0])
    monkeypatch.setattr(stream, "fit", fit)
    setup = Setup(model, ROUNDS)
    ratios = stream.cost({"slow": taking(3.0), "fast": taking(1.0)}, setup)
    assert ratios == {"slow": 1.5, "fast": 0.5}
