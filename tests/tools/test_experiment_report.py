"""From outcomes made by hand to tables: which rows are paired, and what p-values say."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

import bhpeft_pyro as bh
from tools.experiments import report
from tools.experiments.budgets import BUDGETS
from tools.experiments.catalogue import EXPERIMENTS, REFERENCE
from tools.experiments.methods import method
from tools.experiments.outcome import Outcome
from tools.experiments.significance import permutation_p

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
    return Outcome(facts, {"test": forecast}, {})


def table_of(
    experiment: str, names: list[str], made: list[Outcome]
) -> dict[tuple[str, ...], dict[str, float]]:
    (table,) = report.tables(EXPERIMENTS[experiment], [method(name) for name in names], made)
    return {key: row.dropna().to_dict() for key, row in table.means.iterrows()}


def test_p_values_are_of_all_seeds_and_corrected_for_all_rivals() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [REFERENCE, "head only, deterministic", "LoRA, deterministic", "prefix, deterministic"]
    better = (0.0, 0.02, 0.05, -0.01)
    sure = {
        (name, seed): 0.6 + more + 0.1 * torch.rand(COUNT, generator=generator)
        for name, more in zip(names, better, strict=True)
        for seed in range(3)
    }
    found = table_of("tasks", names, [outcome(n, p, seed=s) for (n, s), p in sure.items()])
    nll = {name: [-sure[name, seed].log() for seed in range(3)] for name in names}
    texts, fits = [], []
    for name in names[1:]:
        texts.append(permutation_p(*(torch.cat(nll[of]).numpy() for of in (name, REFERENCE))))
        means = [[each.mean().item() for each in nll[of]] for of in (name, REFERENCE)]
        fits.append(float(stats.ttest_rel(*means).pvalue))
    # Accuracies, three comparisons more, are all 1: never the least of six.
    for column, values in (("p (nll)", texts), ("p (nll, fits)", fits)):
        order = sorted(range(3), key=values.__getitem__)
        corrected = [0.0] * 3
        for rank, i in enumerate(order):
            corrected[i] = max([(6 - rank) * values[i], *(corrected[j] for j in order[:rank])])
        for name, expected in zip(names[1:], corrected, strict=True):
            own = found[name, "0", "3"]
            assert own[column] == pytest.approx(min(1.0, expected), rel=1e-3), (name, column)
            assert own["p (accuracy)"] == own["p (accuracy, fits)"] == 1
    assert not any(name.startswith("p (") for name in found[REFERENCE, "0", "3"])


def test_p_values_of_other_rows_are_not_mixed_up() -> None:
    """At 24 rows nothing differs from the reference there; at 48 everything does."""
    names = [REFERENCE, "head only, deterministic"]
    same = torch.full((COUNT,), 0.6)
    made = [outcome(name, same, rows) for name in names for rows in (24, 48)]
    made[-1] = outcome(names[1], same + 0.3, 48)
    found = {
        head[:2]: cells.get("p (nll)") for head, cells in table_of("rows", names, made).items()
    }
    assert found[names[0], "24"] is None and found[names[0], "48"] is None
    assert found[names[1], "24"] == 1 and (found[names[1], "48"] or 1) < 0.01
