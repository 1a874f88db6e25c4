"""The whole circle on weekly news.

Each week the machine predicts under a promise, people label texts that it does not answer, and
`update` learns their labels. Other arms choose the labels at random, buy all of them, or none after
the first week.

A promise is set on random texts, which people label first, some each week. For some weeks nothing
is learnt from them; then they are learnt like others. (Earlier promises were set on some of them
too, and so had a say in which *other* texts people labelled, which the test does not know.)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from bhpeft_pyro.data import Examples
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.likelihoods import Categorical
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.posterior.posterior import Posterior

from .arms import GUIDE
from .methods import upper_hybrid
from .protocols import PROTOCOLS
from .runs import Experiment, Given, Setting
from .stream import Encoded
from .tables import OVER_SEEDS, Table, distinct

__all__ = ["ARMS", "EXPERIMENT", "Arm", "rounds", "table"]


@dataclass(frozen=True)
class Arm:
    """Who answers a week's texts, and which labels are bought.

    Attributes:
        promises: whether the machine answers under a promise, for which people label random texts.
        asked: which of the texts without an answer people label: those that `Posterior.queue`
            chooses by this, up to the budget; or all; or none, and the machine answers all texts.
    """

    promises: bool
    asked: Literal["information", "random", "all", "none"]


ARMS = {
    "promise and queue": Arm(True, "information"),
    "promise and random labels": Arm(True, "random"),
    "everything labelled": Arm(False, "all"),
    "nothing after the first week": Arm(False, "none"),
    "promise, all others labelled": Arm(True, "all"),
}


def _start(given: Given, seed: int) -> tuple[Posterior, dict[str, Examples]]:
    """What has learnt the first week, which all arms have in common, and the other weeks."""
    backbone, tokenizer = given.load()
    rows = given.setting["rows"]
    stream = Encoded(PROTOCOLS["weekly"].read(given.data, seed, rows, 0), tokenizer)
    torch.manual_seed(seed)
    network = RandomPEFT(backbone, upper_hybrid(), Head(stream.classes), tokenizer)
    model, first = Model(network, likelihood=Categorical()), next(iter(stream.batches.values()))
    return fit(model, GUIDE, first, components=1, seed=seed, progress=False), stream.batches


def _run(given: Given, seed: int, arm: str) -> dict[str, Any]:
    with warnings.catch_warnings(action="ignore"):  # of texts that repeat earlier ones
        weeks = rounds(ARMS[arm], *_start(given, seed), seed, given.setting)
    return {"arm": arm, "seed": seed, "weeks of": weeks}


def rounds(
    arm: Arm, posterior: Posterior, weeks: Mapping[str, Examples], seed: int, rule: Setting
) -> list[dict[str, Any]]:
    """Go through the weeks: for each of them what was labelled, answered and wrong.

    Args:
        posterior: what has learnt the first of the weeks.
        rule: the budget, what is drawn, the weeks it is kept apart, and the error to promise.
    """
    generator = torch.Generator().manual_seed(seed)
    (name, first), *others = weeks.items()
    found: list[dict[str, Any]] = [{"week": name, "texts": len(first), "labels": len(first)}]
    apart: list[Examples] = []  # the random rows of each of the last weeks, none of them learnt
    count = rule["drawn"] if arm.promises else 0
    for name, week in others:
        week = week.subset(torch.randperm(len(week), generator=generator))
        learnt = []
        if arm.promises:
            apart.append(week.subset(range(count)))  # random ones, since the order is
            try:
                posterior = posterior.promise(apart[0].concat(*apart[1:]), rule["error"])
            except DataError:  # too few rows: nothing is answered
                posterior = posterior.replace(promised=None)
            if len(apart) == rule["weeks"]:
                learnt.append(apart.pop(0))
        forecast: Any = posterior.predict(week)
        wrong, answered = forecast.wrong(), torch.full((len(week),), arm.asked == "none")
        if forecast.answered is not None:
            answered = forecast.answered
        answered[:count] = False  # people have labelled these
        left = (~answered).nonzero().flatten()[count:]
        asked = _asked(arm, posterior, week, left, rule["budget"] - count, seed)
        if len(asked):
            learnt.append(week.subset(asked))
        line = {"week": name, "texts": len(week), "labels": count + len(asked)}
        line |= {"promised": forecast.answered is not None, "answered": int(answered.sum())}
        line |= {"wrong": int((wrong & answered).sum()), "open": len(left) - len(asked)}
        found.append({**line, "wrong of all": int(wrong.sum())})
        if learnt:
            new = learnt[0].concat(*learnt[1:])
            posterior = posterior.update(new, seed=seed, progress=False)
    return found


def _asked(
    arm: Arm, posterior: Posterior, week: Examples, left: Tensor, most: int, seed: int
) -> Tensor:
    """The places of those texts that people label, of those that are left."""
    if arm.asked == "none":
        return left[:0]
    if arm.asked == "all" or len(left) <= most:
        return left
    return left[posterior.queue(week.subset(left), most, by=arm.asked, seed=seed).rows]


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """What each arm spent, and how well it did, in all weeks after the first together."""
    records = []
    for result in results:
        first, *others = result["weeks of"]
        total = {name: sum(week[name] for week in others) for name in others[0] if name != "week"}
        records.append(
            {
                "arm": result["arm"],
                "labels": first["labels"] + total["labels"],
                "weeks with answers": sum(week["answered"] > 0 for week in others),
                "answered": total["answered"],
                "wrong": total["wrong"],
                "wrong / answered": total["wrong"] / (total["answered"] or 1),
                "in the worst week": max(w["wrong"] / (w["answered"] or 1) for w in others),
                "left open": total["open"],
                "accuracy on all": 1 - total["wrong of all"] / total["texts"],
            }
        )
    note = (
        f"After a first week of {first['texts']} texts, whose labels count, {len(others)} others "
        f"of {total['texts']} texts in all. The accuracy is that of the machine on each week "
        "before it is learnt, answered or not. Texts that are left open have nobody's answer. "
        f"Promised are at most {distinct(results, 'error')} wrong of those answered; a week's "
        f"budget is {distinct(results, 'budget')} labels, {distinct(results, 'drawn')} of them of "
        f"random texts, learnt after {distinct(results, 'weeks')} weeks. {OVER_SEEDS} Commits "
        f"{distinct(results, 'commit')}."
    )
    return Table.over_seeds("Weekly news: the whole circle", ["arm"], records, note)


EXPERIMENT = Experiment(
    "Labels, answers and errors, week by week",
    lambda setting, seeds: list(product(range(seeds), ARMS)),
    _run,
    lambda results: [table(results)],
    # Texts of a week, labels a week, random ones of them, weeks that these are kept apart, and the
    # promised share of wrong answers.
    {"rows": 100, "budget": 30, "drawn": 15, "weeks": 4, "error": 0.1},
)
