"""Sequential updating on real text: `python -m tools.experiments.stream`.

Rounds of doubling size, domains or sources of questions in turn, weeks of news: each batch is
predicted first, then learnt, by the posterior as the prior and by what it is to be compared with.
One result file for each run, written atomically; a run that was killed continues after its last
round. Tables are made from the files alone.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModel, AutoTokenizer

from bhpeft_pyro.cli.app import quietly, spoken_errors
from bhpeft_pyro.data import Columns, CutWarning, Examples, encode
from bhpeft_pyro.data.assets import minilm
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.likelihoods import Categorical, Likelihood, MultipleChoice, Normal
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.peft import presets
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.streams import Record, prequential

from . import stream_report
from .arms import ARMS, GUIDE, OURS, Arm, Setup
from .machine import clock, in_turn, over
from .protocols import PROTOCOLS, Stream
from .results import Run, check_names, file_of, run_all
from .tasks import digest_of

__all__ = ["Encoded", "cost", "run", "setup", "stream"]

# Tokens: most sentences, and the headline of news; questions with a choice, whole.
_MAX_LENGTH = {"class": 32, "rating": 32, "choice": 64}
_LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "class": Categorical,
    "rating": partial(Normal, spread=2.0),
    "choice": MultipleChoice,
}
_TIMED = 100  # rows, at most, of the round whose cost is measured


def stream(
    data: Annotated[Path, typer.Option(help="Folder with the JSON lines files.")],
    protocol: Annotated[str, typer.Option(help=f"One of {', '.join(PROTOCOLS)}.")],
    out: Annotated[Path, typer.Option(help="Where result files go.")] = Path("runs/stream"),
    arm: Annotated[list[str] | None, typer.Option(help="An arm; again for more.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 to SEEDS - 1.")] = 5,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of the last round, of a domain, or at most of a week.", min=20),
    ] = None,
    test: Annotated[int | None, typer.Option(help="Rows of a test.")] = None,
    samples: Annotated[int, typer.Option(help="Draws of a Bayesian forecast.")] = 64,
    preset: Annotated[str, typer.Option(help="The PEFT weights.")] = "bh_peft",
) -> None:
    """Run the arms on a protocol; with all results there, only tables are made."""
    check_names("protocol", [protocol], PROTOCOLS)
    check_names("preset", [preset], presets.__all__)
    chosen = PROTOCOLS[protocol]
    arms = arm or list(ARMS)
    check_names("arm", arms, ARMS)
    sizes = (rows or chosen.rows, chosen.test if test is None else test)
    setting: dict[str, Any] = dict(zip(("rows", "test"), sizes, strict=True))
    setting |= {"samples": samples, "preset": preset}
    runs: list[Run] = [*product([protocol], range(seeds), arms), (protocol, "cost")]
    backbone = minilm()
    setting["backbone"] = backbone.parent.name

    def encoded(seed: int) -> Encoded:
        return Encoded(chosen.read(data, seed, *sizes), backbone)

    def result(*which: Any) -> dict[str, Any]:
        if which == (protocol, "cost"):
            timed = {name: arm for name, arm in ARMS.items() if name.startswith(OURS)}
            costs = cost(timed, setup(encoded(0), backbone, preset, 0))
            return {"protocol": protocol, "cost": costs}
        _, seed, method = which
        text = encoded(seed)
        folder = _rounds(out, which, setting)
        outcome = run(ARMS[method], setup(text, backbone, preset, seed), text, folder, samples)
        return {"protocol": protocol, "seed": seed, "arm": method, **outcome}

    *results, costs = run_all(out, runs, setting, result)
    for one in runs:
        shutil.rmtree(_rounds(out, one, setting), ignore_errors=True)
    made = [*stream_report.tables(results, protocol), stream_report.costs(costs["cost"])]
    typer.echo("\n\n".join(table.markdown() for table in made))


def _rounds(out: Path, run: Run, setting: Mapping[str, Any]) -> Path:
    """Where a run keeps its rounds until it is done; another setting never continues them."""
    return file_of(out, (*run, digest_of(setting)[:12]), "rounds")


class Encoded:
    """A stream as one tokenizer sees it."""

    def __init__(self, stream: Stream, backbone: Path) -> None:
        self.kind, self.classes = stream.kind, stream.classes
        self.tokenizer = AutoTokenizer.from_pretrained(backbone)
        self.batches = {name: self._encode(table) for name, table in stream.batches.items()}
        self.tests = {name: self._encode(table) for name, table in stream.tests.items()}
        self.final = None if stream.final is None else self._encode(stream.final)
        unlabelled = stream.unlabelled
        self.unlabelled = None if unlabelled is None else self._encode(unlabelled, labelled=False)

    def _encode(self, table: object, labelled: bool = True) -> Examples:
        with warnings.catch_warnings():
            # So many tokens is what this experiment reads.
            warnings.filterwarnings("ignore", category=CutWarning)
            return encode(
                table,
                self.tokenizer,
                kind=self.kind,
                classes=self.classes if self.kind == "class" else None,
                columns=Columns(max_length=_MAX_LENGTH[self.kind]),
                labelled=labelled,
            )


def setup(data: Encoded, backbone: Path, preset: str, seed: int) -> Setup:
    """What the arms have in common, on a stream."""

    def model() -> Model:
        torch.manual_seed(seed)
        network = RandomPEFT(
            AutoModel.from_pretrained(backbone),
            tuple(getattr(presets, preset)()),
            Head(data.classes),
            data.tokenizer,
        )
        if data.unlabelled is not None:
            network.align(batch for _, batch in data.unlabelled.by_length(32))
        return Model(network, likelihood=_LIKELIHOODS[data.kind]())

    return Setup(model, data.batches, seed)


def run(arm: Arm, setup: Setup, data: Encoded, folder: Path, samples: int) -> dict[str, Any]:
    """Learn a stream: its record, and metrics on the final test.

    Args:
        folder: of the rounds; a killed run continues after the last one there.
        samples: draws of a prediction, where the arm has a posterior.
    """
    last = prequential(
        setup.model(),
        arm(setup),
        data.batches,
        folder,
        tests=data.tests,
        samples=samples,
        drift=False,
        progress=False,
    )
    outcome: dict[str, Any] = {"rounds": Record.of(last).rows}
    if data.final is not None:
        outcome["final"] = last.evaluate(data.final, samples)
    return outcome


def cost(arms: dict[str, Arm], setup: Setup, repeats: int = 3) -> dict[str, float]:
    """Seconds of the processor in an arm's round, over those of a plain round on the same data.

    A plain round is a fit of the same guide under the first prior. They take turns; the median of
    the ratios.

    Args:
        arms: whose first rounds are fits of `arms.GUIDE`.
    """
    before, data = (
        batch.subset(range(min(_TIMED, len(batch)))) for batch in list(setup.batches.values())[-2:]
    )
    learners = {name: arm(setup) for name, arm in arms.items()}
    last = {name: learn(None, before) for name, learn in learners.items()}
    first = next(iter(last.values())).model

    def plain() -> None:
        fit(first, GUIDE, data, components=1, **setup.options)

    rounds = {name: partial(learn, last[name], data) for name, learn in learners.items()}
    seconds = in_turn({"": plain, **rounds}, repeats, clock(first.network.device))
    return {name: over(seconds[name], seconds[""]) for name in rounds}


if __name__ == "__main__":
    typer.run(spoken_errors()(quietly(stream)))
