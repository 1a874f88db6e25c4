"""From outcomes made by hand to tables: which rows are compared with which."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

import bhpeft_pyro as bh
from tools.experiments import report
from tools.experiments.budgets import BUDGETS
from tools.experiments.catalogue import EXPERIMENTS, REFERENCE
from tools.experiments.differences import difference
from tools.experiments.methods import method
from tools.experiments.outcome import Outcome

TINY = BUDGETS["tiny"]
COUNT = 40


def outcome(name: str, draws: torch.Tensor, rows: int = 24, seed: int = 0) -> Outcome:
    """Of one method, by probabilities (N,) of the class that every text has."""
    draws = torch.stack([draws, 1 - draws], -1)[None]
    forecast = bh.forecast.ClassForecast.from_draws(
        draws, labels=torch.zeros(len(draws[0]), dtype=torch.long)
    )
    setting = {"task": "t", "method": name, "rows": rows, "seed": seed, "temperature": 0.0}
    facts = {
        **setting,
        **TINY.setting(),
        "commit": "c",
        "device": "CPU",
        "backbone": "b",
        "source": "s",
    }
    return Outcome(facts, {"test": forecast})


def gaps(
    experiment: str, names: list[str], made: list[Outcome]
) -> dict[tuple[str, ...], dict[str, float]]:
    _, table = report.tables(EXPERIMENTS[experiment], [method(name) for name in names], made)
    return {key[:2]: row.to_dict() for key, row in table.means.iterrows()}


def test_differences_are_paired_by_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [REFERENCE, "head only, deterministic", "LoRA, deterministic"]
    sure = {
        (name, seed): 0.5 + 0.4 * torch.rand(COUNT, generator=generator)
        for name in names
        for seed in range(3)
    }
    found = gaps("tasks", names, [outcome(n, p, seed=s) for (n, s), p in sure.items()])
    assert [key[0] for key in found] == names[1:]
    nll = {name: [-sure[name, seed].log().mean().item() for seed in range(3)] for name in names}
    for name in names[1:]:
        test = stats.ttest_rel(nll[name], nll[REFERENCE])
        assert found[name, "0"]["p"] == pytest.approx(test.pvalue, rel=1e-3)
        behind = sum(nll[name]) / 3 - sum(nll[REFERENCE]) / 3
        assert found[name, "0"]["nll"] == pytest.approx(behind, rel=1e-3)


def test_one_seed_has_the_error_over_its_rows() -> None:
    ours, theirs = torch.rand(2, COUNT, generator=torch.Generator().manual_seed(1))
    found = difference({3: ours}, {3: theirs, 4: theirs})
    expected = stats.sem((ours - theirs).numpy())
    assert found["nll"] == (
        pytest.approx((ours - theirs).mean().item(), rel=1e-4),
        pytest.approx(expected, rel=1e-4),
    )
    same = {0: ours, 1: theirs}
    assert difference(same, same)["p"][0] == 1


def test_other_numbers_of_rows_are_not_mixed_up() -> None:
    """At 24 rows nothing differs from the reference there; at 48 everything does."""
    names = [REFERENCE, "head only, deterministic"]
    same = torch.full((COUNT,), 0.6)
    made = [outcome(name, same, rows) for name in names for rows in (24, 48)]
    made[-1] = outcome(names[1], same + 0.3, 48)
    found = gaps("rows", names, made)
    assert found.keys() == {(names[1], "24"), (names[1], "48")}
    assert found[names[1], "24"]["nll"] == 0 and found[names[1], "48"]["nll"] < -0.3
