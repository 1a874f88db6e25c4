"""The whole circle on weekly news: `python -m tools.experiments.circle`.

Each week the machine predicts under a promise, people label texts that it does not answer, and
`update` learns their labels. Other arms choose the labels at random, buy all of them, or none after
the first week. A file for each arm and seed; the table is made from the files alone.

A promise is set on random texts, which people label first, some each week. For some weeks nothing
is learnt from them; then they are learnt like others. (Earlier promises were set on some of them
too, and so had a say in which *other* texts people labelled, which the test does not know.)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor
from transformers import AutoModel

from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.data import Examples
from bhpeft_pyro.data.assets import minilm
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
from .results import check_names, run_all
from .stream import Encoded
from .tables import OVER_SEEDS, Table, distinct

__all__ = ["ARMS", "Arm", "circle", "rounds", "table"]


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


def circle(
    data: Annotated[Path, typer.Option(help="Folder with the JSON lines files.")],
    out: Annotated[Path, typer.Option(help="Where result files go.")] = Path("runs/circle"),
    arm: Annotated[list[str] | None, typer.Option(help="An arm; again for more.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 to SEEDS - 1.", min=1)] = 1,
    rows: Annotated[int, typer.Option(help="Texts of a week, at most.", min=20)] = 100,
    budget: Annotated[int, typer.Option(help="Labels a week, random ones included.")] = 30,
    drawn: Annotated[int, typer.Option(help="Random texts a week, to promise by.", min=1)] = 15,
    weeks: Annotated[int, typer.Option(help="How long these are kept apart.", min=1)] = 4,
    error: Annotated[float, typer.Option(help="The promised share of wrong answers.")] = 0.1,
) -> None:
    """Run the arms; with all results there, only the table is made."""
    arms = arm or list(ARMS)
    check_names("arm", arms, ARMS)
    rule = {"budget": budget, "drawn": drawn, "weeks": weeks, "error": error}
    setting = {"rows": rows, **rule}
    runs = list(product(range(seeds), arms))
    backbone = minilm()

    @cache
    def start(seed: int) -> tuple[Posterior, dict[str, Examples]]:
        """What has learnt the first week, which all arms have in common, and the other weeks."""
        stream = Encoded(PROTOCOLS["weekly"].read(data, seed, rows, 0), backbone)
        torch.manual_seed(seed)
        frozen, head = AutoModel.from_pretrained(backbone), Head(stream.classes)
        network = RandomPEFT(frozen, upper_hybrid(), head, stream.tokenizer)
        model, first = Model(network, likelihood=Categorical()), next(iter(stream.batches.values()))
        return fit(model, GUIDE, first, components=1, seed=seed, progress=False), stream.batches

    def result(seed: int, name: str) -> dict[str, Any]:
        weeks = rounds(ARMS[name], *start(seed), seed, rule)
        return {"arm": name, "seed": seed, "weeks of": weeks}

    with warnings.catch_warnings(action="ignore"):  # of texts that repeat earlier ones
        results = run_all(out, runs, setting, result)
    typer.echo(table(results).markdown())


def rounds(
    arm: Arm, posterior: Posterior, weeks: Mapping[str, Examples], seed: int, rule: dict[str, Any]
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


if __name__ == "__main__":
    typer.run(spoken_errors()(quietly(circle)))
