"""Rounds on disk: whole or not there, never changed, found again, never learnt twice unasked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import saves
import torch
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.decisions import novelty
from bhpeft_pyro.errors import BusyError, DataError, PriorError, SaveError
from bhpeft_pyro.posterior.forgetting import forget
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

TEXTS = ["w5 w9 w12", "w6 w30", "w5"]
DATA = [tiny_examples(12, seed=seed) for seed in range(4)]
QUICK: dict[str, Any] = {"max_steps": 3, "lr": 0.3, "progress": False}


def fit(prior: Any = None) -> bh.Posterior:
    return bh.fit(tiny_model((), prior=prior), "normal", DATA[0], **QUICK)


def load(history: bh.streams.History, id: str, **options: Any) -> bh.Posterior:
    return history.load(id, tiny_backbone(), tokenizer=tiny_tokenizer(), **options)


def predicted(posterior: bh.Posterior) -> Tensor:
    return posterior.predict(TEXTS, samples=5).probabilities  # type: ignore[union-attr]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_earlier_rounds_never_change_and_come_back_bit_by_bit(tmp_path: Path) -> None:
    history = bh.streams.History(tmp_path)
    posterior = fit()
    posteriors, ids, seen = [posterior], [history.add(posterior)], [files(tmp_path)]
    for data in DATA[1:]:
        posterior = posterior.update(data)
        posteriors.append(posterior)
        ids.append(history.add(posterior))
        now = files(tmp_path)
        assert seen[-1].items() <= now.items()
        seen.append(now)
    for id, expected in zip(ids, posteriors, strict=True):
        again = load(history, id)
        assert torch.equal(predicted(again), predicted(expected))
        assert again.lineage == expected.lineage
    assert list(history.rounds) == ids and history.leaves == ids[-1:]
    parents = [report.parent for report in history.rounds.values()]
    assert parents == [None, *ids[:-1]]


def test_a_round_takes_the_same_room_however_many_were_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(novelty, "MOST", 20)  # learnt texts whose states are kept
    history = bh.streams.History(tmp_path / "rounds")
    posterior = fit()
    sizes = []
    for data in (None, *(tiny_examples(12, seed=20 + i) for i in range(5))):
        posterior = posterior if data is None else posterior.update(data)
        file = history.folder / history.add(posterior) / "posterior.safetensors"
        sizes.append(file.stat().st_size)
    assert max(sizes[2:]) < 1.1 * min(sizes[2:])  # but for the digits of numbers
    # Saved by itself it is whole, and so is one whose earlier rounds were not added.
    alone = saves.load(posterior.save(tmp_path / "alone"))
    late = bh.streams.History(tmp_path / "late")
    late.add(posterior)
    last = posterior.update(DATA[3])
    late.add(last)
    assert alone.lineage == posterior.lineage
    assert load(late, last.report.id).lineage == last.lineage
    assert list(late.rounds) == [posterior.report.id, last.report.id]
    # Taken away from the others it predicts, and says what it does not know.
    moved = tmp_path / "moved"
    (history.folder / posterior.report.id).rename(moved)
    with pytest.warns(UserWarning, match="the rounds before .* are not beside it"):
        again = saves.load(moved)
    assert torch.equal(predicted(again), predicted(posterior)) and len(again.lineage) == 1


def test_roll_back_and_branch(tmp_path: Path) -> None:
    history = bh.streams.History(tmp_path / "new" / "folder")
    assert history.rounds == {} and history.leaves == []
    first = fit()
    scores: dict[str, Any] = {"accuracy": torch.tensor(0.75)}
    root = history.add(first, name="monday", metrics=scores)
    left = history.add(first.update(DATA[1], keep=0.5), name="left")
    right = history.add(load(history, root[:6]).update(DATA[1], keep=0.25), name="right")
    assert sorted(history.leaves) == sorted([left, right])
    assert history.rounds[root].metrics == {"accuracy": 0.75}
    assert repr(history) == f"History({str(history.folder)!r})"
    assert {id: report.parent for id, report in history.rounds.items()} == {
        root: None,
        left: root,
        right: root,
    }
    assert first.report.metrics == {}
    for id in ("", "zzz", "-5"):
        with pytest.raises(SaveError, match="round"):
            load(history, id)
    with pytest.raises(SaveError, match="history"):
        history.add(first)


def test_a_round_that_was_renamed_is_found_by_those_that_continue_it(tmp_path: Path) -> None:
    """Otherwise what it learnt could be learnt again."""
    history = bh.streams.History(tmp_path)
    first = fit()
    root = history.add(first)
    leaf = history.add(first.update(DATA[1]))
    history.folders[root].rename(tmp_path / "monday")
    assert load(history, "monday").report.id == root
    again = load(history, leaf)
    assert [report.id for report in again.lineage] == [root, leaf]
    with pytest.raises(DataError, match="has learnt"):
        again.update(DATA[0])


def test_half_written_rounds_are_no_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = bh.streams.History(tmp_path)
    first = fit()
    replace = os.replace

    def killed(source: Path, goal: Path) -> None:
        if goal.suffix == ".safetensors":
            raise OSError("killed")
        replace(source, goal)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(OSError, match="killed"):
        history.add(first, "monday", {"acc": 0.5})
    assert first.report.name == "" and first.report.metrics == {}
    monkeypatch.undo()
    first.update(DATA[1]).save(tmp_path / ".new")  # by a process that was killed then
    assert history.rounds == {}
    id = history.add(first)
    assert torch.equal(predicted(load(history, id)), predicted(first))
    assert {path.name for path in tmp_path.iterdir()} == {id, ".lock"}


def test_a_round_that_is_there_twice_is_named(tmp_path: Path) -> None:
    history, first = bh.streams.History(tmp_path), fit()
    one, two = history.add(first), history.add(first.update(DATA[1]))
    shutil.rmtree(tmp_path / one)
    shutil.copytree(tmp_path / two, tmp_path / one)
    for read in (lambda: history.rounds, lambda: history.folders):
        with pytest.raises(
            SaveError, match=f"{one} .*{two} hold the same round, {two}|{two} .*{one}"
        ):
            read()


def test_of_copies_with_names_of_their_own_the_one_written_last_counts(tmp_path: Path) -> None:
    first = fit()
    first.save(tmp_path / "monday")
    student = first.distill(tiny_examples(60, seed=5), epochs=1, progress=False)
    student.save(tmp_path / "fast")
    history = bh.streams.History(tmp_path)
    assert history.folders == {first.report.id: tmp_path / "fast"}
    assert load(history, first.report.id).student is not None
    os.utime(tmp_path / "monday" / "posterior.safetensors", ns=(2**62, 2**62))
    assert load(history, first.report.id).student is None


def test_one_branch_stays_and_the_others_are_moved_aside(tmp_path: Path) -> None:
    history, first = bh.streams.History(tmp_path), fit()
    left = first.update(DATA[1])
    right = first.update(DATA[2])
    more = right.update(DATA[3])
    for each in (first, left, right, more):
        history.add(each)
    before = files(tmp_path)
    with pytest.raises(SaveError, match="no round"):
        history.keep_only("zzz")
    missing = bh.streams.History(tmp_path / "typo")
    with pytest.raises(SaveError, match="no round"):
        missing.keep_only("zzz")
    assert not missing.folder.exists()
    moved = history.keep_only(left.report.id[:8])
    assert moved == [tmp_path / "aside" / each.report.id for each in (more, right)]
    assert history.leaves == [left.report.id] and len(history.rounds) == 2
    assert len(load(history, left.report.id).lineage) == 2
    assert sorted(files(tmp_path).values()) == sorted(before.values())  # nothing is lost
    assert history.keep_only(left.report.id) == []
    for path in moved:
        path.rename(tmp_path / path.name)
    assert len(history.rounds) == 4
    # A round before the branches, too: all that came after it goes.
    assert len(history.keep_only(first.report.id)) == 3
    (tmp_path / "aside" / left.report.id).rename(tmp_path / left.report.id)
    (tmp_path / "aside" / left.report.id).mkdir()
    with pytest.raises(SaveError, match=r"aside.* exists already"):
        history.keep_only(first.report.id)


def test_one_process_at_a_time_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bhpeft_pyro.streams.history._WAIT", 0.1)
    mine, other, first = bh.streams.History(tmp_path), bh.streams.History(tmp_path), fit()
    with mine.writing():
        writes = (
            lambda: other.add(first),
            lambda: other.keep_only(""),
            lambda: run_in_thread(lambda: mine.keep_only("")),
        )
        for write in writes:
            with pytest.raises(BusyError, match="another process is writing into"):
                write()
        assert other.rounds == {}  # anyone may read
        mine.add(first)  # the writer itself may
    assert other.keep_only(first.report.id) == []
    assert list(other.rounds) == [first.report.id]


def run_in_thread(task: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(task).result()


def test_the_same_data_are_refused_in_the_whole_lineage(tmp_path: Path) -> None:
    second = fit().update(DATA[1])
    second.save(tmp_path)
    loaded = saves.load(tmp_path)
    for posterior in (second, loaded):
        for number, data in enumerate(DATA[:2], 1):
            with pytest.raises(
                DataError, match=rf"round {number} \({posterior.lineage[number - 1].id}\)"
            ):
                posterior.update(data)
        with pytest.raises(DataError, match="they would count twice"):  # in another order
            posterior.update(DATA[0].subset(range(len(DATA[0]))[::-1]))
        assert len(posterior.update(DATA[0], again=True).lineage) == 3
        # A branch that never saw the data may learn them.
    assert len(fit().update(DATA[1]).lineage) == 2


def test_the_first_prior_is_found_again(tmp_path: Path) -> None:
    """After two rounds, from the file, forgetting goes where it goes in memory."""
    for number, prior in enumerate((None, dist.Normal(0.0, 0.5))):
        second = fit(prior).update(DATA[1])
        second.save(tmp_path / str(number))
        own = {} if prior is None else {"prior": prior}
        again = saves.load(tmp_path / str(number), **own)
        here, there = (each.update(DATA[2], keep=0.3) for each in (second, again))
        assert torch.equal(predicted(here), predicted(there))
    # A prior of one's own is needed for forgetting only.
    again = saves.load(tmp_path / "1")
    assert again.first_priors == (None,)
    again.update(DATA[2])
    with pytest.raises(PriorError, match=r"pass prior=\.\.\. to Posterior.load"):
        again.update(DATA[2], keep=0.9)


def test_the_power_prior_is_the_normalised_product() -> None:
    """By brute force on a grid: log q^k p0^(1-k) and the log density differ by a constant."""
    posterior = fit()
    mixed = forget(0.3, posterior.as_prior(), posterior.first_priors[0], posterior.model.sites)
    (q, new) = (
        prior.distributions["head.bias"].base_dist  # type: ignore[attr-defined]
        for prior in (posterior.as_prior(), mixed)
    )
    bias = next(site for site in posterior.model.sites if site.name == "head.bias")
    p0 = dist.Normal(0.0, posterior.model.prior.sd(bias).item())  # type: ignore[union-attr]
    grid = torch.linspace(-40, 40, 80_001, dtype=torch.float64)
    for i in range(2):
        mean, sd = q.mean[i].double(), q.stddev[i].double()
        weights = (0.3 * dist.Normal(mean, sd).log_prob(grid) + 0.7 * p0.log_prob(grid)).softmax(0)
        centre = (weights * grid).sum()
        assert new.mean[i].item() == pytest.approx(centre.item(), abs=1e-4)
        variance = (weights * (grid - centre).square()).sum()
        assert new.variance[i].item() == pytest.approx(variance.item(), rel=1e-4)
