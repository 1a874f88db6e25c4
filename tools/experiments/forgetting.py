"""What rounds forget, and why: `python -m tools.experiments.forgetting`.

The domains are learnt in turn (`protocols`, "orders") by one component. Point estimates are then
moved, and the NLL is measured on the tests of all domains: with one part of the weights as after
the first round, and with another step between two rounds. The rise of the NLL on earlier rows is
compared with what the carried information, and the exact Gauss-Newton matrix, say of it. One result
file for each seed; tables are made from the files alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bhpeft_pyro import __version__
from bhpeft_pyro.base.distributions import LowRankNormal
from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.data import Examples
from bhpeft_pyro.data.assets import minilm
from bhpeft_pyro.guides.laplace.curvature import jacobians
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.posterior.posterior import Posterior

from .arms import GUIDE
from .protocols import PROTOCOLS
from .results import check_setting, commit, complete, file_of, load
from .stream import Encoded, setup
from .tables import OVER_SEEDS, Table, distinct

__all__ = ["forgetting", "tables"]

_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0)  # a round takes half of the step to where training ends
_FIRST_PRIOR = 1e-4  # the weight that it has in a later round

Values = Mapping[str, Tensor]
"""Weights by the names of their sites."""


def forgetting(
    data: Annotated[Path, typer.Option(help="Folder with the JSON lines files.")],
    out: Annotated[Path, typer.Option(help="Where result files go.")] = Path("runs/forgetting"),
    seeds: Annotated[int, typer.Option(help="Orders 0 to SEEDS - 1.")] = 4,
    rows: Annotated[int, typer.Option(help="Rows of each domain that are learnt.")] = 100,
    test: Annotated[int, typer.Option(help="Rows of each test.")] = 200,
) -> None:
    """Run the orders, and print what a part of the weights, and the step of a round, are worth."""
    runs = [(seed,) for seed in range(seeds)]
    setting = {"rows": rows, "test": test}
    for run in runs:
        if (path := file_of(out, run)).exists():
            check_setting(path, json.loads(path.read_text()), setting)
    code, backbone = commit(), minilm()

    def result(seed: int) -> dict[str, Any]:
        stream = Encoded(PROTOCOLS["orders"].read(data, seed, rows, test), backbone)
        common = setup(stream, backbone, "bh_peft", seed)
        batches, tests = [*stream.batches.values()], [*stream.tests.values()]
        rounds = [fit(common.model(), GUIDE, batches[0], components=1, **common.options)]
        for batch in batches[1:]:
            rounds.append(rounds[-1].update(batch, **common.options))
        facts = {"seed": seed, "version": __version__, "commit": code, **setting}
        return facts | {
            "order": [*stream.tests],
            "parts": _parts(rounds, tests),
            "steps": _steps(rounds, tests),
            "information": [*_information(rounds, batches)],
        }

    complete(out, runs, result)
    typer.echo("\n\n".join(table.markdown() for table in tables(load(out, runs))))


def _parts(rounds: Sequence[Posterior], tests: Sequence[Examples]) -> dict[str, list[float]]:
    """NLLs on all tests after the last round, as it is, and with a part of the weights as after the
    first round."""
    first, last = (one.guide.means() for one in (rounds[0], rounds[-1]))
    names = {name.split(".")[0] for name in last}
    back = {"nothing": last} | {
        part: {name: first[name] if name.startswith(part) else last[name] for name in last}
        for part in sorted(names)
    }
    return {part: _nlls(rounds[-1], values, tests) for part, values in back.items()}


def _steps(
    rounds: Sequence[Posterior], tests: Sequence[Examples]
) -> list[dict[str, dict[str, float]]]:
    """Of each later round, by the share of its step that is taken: the NLL on the tests of earlier
    domains, and on its own."""
    found = []
    for number in range(1, len(rounds)):
        before, after = (rounds[i].guide.means() for i in (number - 1, number))
        of_round = {}
        for share in _STEPS:
            there = {name: at + share * (after[name] - at) for name, at in before.items()}
            *earlier, own = _nlls(rounds[number], there, tests[: number + 1])
            of_round[f"{share:g}"] = {"earlier": sum(earlier) / number, "own": own}
        found.append(of_round)
    return found


def _information(
    rounds: Sequence[Posterior], batches: Sequence[Examples]
) -> Iterator[dict[str, float]]:
    """The rise of the NLL of a row learnt before, by each later round: what the carried information
    says, the exact Gauss-Newton matrix at the last point estimate, and what it was."""
    for number in range(1, len(rounds)):
        last: Any = rounds[number - 1].guide
        new: Any = rounds[number].guide
        step = (new.loc - last.loc).detach()
        seen = batches[0].concat(*batches[1:number]) if number > 1 else batches[0]
        carried = LowRankNormal(torch.zeros_like(step), new.prior_precision.at(_FIRST_PRIOR))
        at_zero, at_step = (carried.log_prob(x).item() for x in (torch.zeros_like(step), step))
        parts = []
        at = last.unpack(last.loc.detach())
        for _, outputs, derivatives in jacobians(rounds[number - 1].model, at, seen):
            p, moved = outputs.mean.softmax(-1), derivatives @ step
            parts.append((p * moved.square()).sum(1) - (p * moved).sum(1).square())
        before = _nlls(rounds[number - 1], last.means(), [seen])[0]
        after = _nlls(rounds[number], new.means(), [seen])[0]
        yield {
            "carried": (at_zero - at_step) / len(seen),
            "exact": torch.cat(parts).mean().item() / 2,
            "true": after - before,
        }


def _nlls(posterior: Posterior, values: Values, tests: Sequence[Examples]) -> list[float]:
    """Of the point estimate at other weights, the mean NLL of each test."""
    guide = copy.deepcopy(posterior.guide)
    guide.move(values)
    moved = posterior.replace(guide=guide, novelty=None)
    return [moved.predict(test, samples=0).nlls().mean().item() for test in tests]


def tables(results: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """Means over the orders."""
    note = (
        f"NLL of point estimates, {len(results)} orders of the domains, "
        f"{distinct(results, 'rows')} rows a round. {OVER_SEEDS} Commits "
        f"{distinct(results, 'commit')}."
    )
    records = [
        {
            "as after the first round": part,
            "first domain": first - result["parts"]["nothing"][0],
            "other domains": (sum(others) - sum(result["parts"]["nothing"][1:])) / len(others),
        }
        for result in results
        for part, (first, *others) in result["parts"].items()
        if part != "nothing"
    ]
    title = "What rounds forget: the NLL after the last one, if a part goes back"
    yield Table.over_seeds(title, ["as after the first round"], records, note)
    records = [
        {
            "share of the step": share,
            "earlier domains": mean(of[share]["earlier"] for of in result["steps"]),
            "its own domain": mean(of[share]["own"] for of in result["steps"]),
        }
        for result in results
        for share in result["steps"][0]
    ]
    yield Table.over_seeds("What rounds forget: the step", ["share of the step"], records, note)
    records = [
        {"round": str(number), **values}
        for result in results
        for number, values in enumerate(result["information"], 2)
    ]
    title = "What rounds forget: the rise of the NLL of earlier rows, and what predicts it"
    yield Table.over_seeds(title, ["round"], records, note)


if __name__ == "__main__":
    typer.run(spoken_errors()(quietly(forgetting)))
