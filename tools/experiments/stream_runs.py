"""One run of an experiment with a stream, and what a round costs."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, logging

from bhpeft_pyro.data import CutWarning, Examples, encode
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.peft import presets
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.sequential import Record, prequential

from .arms import GUIDE, Arm, Setup
from .protocols import Stream

__all__ = ["Encoded", "cost", "run", "setup"]

_MAX_LENGTH = 32  # tokens; most sentences, and the headline of news
_TIMED = 100  # rows, at most, of the round whose cost is measured


class Encoded:
    """A stream as one tokenizer sees it."""

    def __init__(self, stream: Stream, backbone: Path) -> None:
        self.classes = stream.classes
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
                kind="class",
                num_labels=self.classes,
                max_length=_MAX_LENGTH,
                labelled=labelled,
            )


def setup(data: Encoded, backbone: Path, preset: str, epochs: int, least: int, seed: int) -> Setup:
    """What the arms have in common, on a stream."""
    logging.disable_progress_bar()

    def model() -> Model:
        torch.manual_seed(seed)
        network = RandomPEFT(
            AutoModel.from_pretrained(backbone),
            tuple(getattr(presets, preset)()),
            Head(data.classes),
            data.tokenizer,
        )
        return Model(network)

    return Setup(model, data.batches, data.unlabelled, epochs, least, seed)


def run(arm: Arm, setup: Setup, data: Encoded, folder: Path, samples: int) -> dict[str, Any]:
    """Learn a stream: its record, and metrics on the final test.

    Args:
        folder: of the rounds; what was killed goes on after the last one there.
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
    found: dict[str, Any] = {"rounds": Record.of(last).rows}
    if data.final is not None:
        found["final"] = last.evaluate(data.final, samples)
    return found


def cost(arms: dict[str, Arm], setup: Setup, repeats: int = 3) -> dict[str, float]:
    """Seconds of the processor in an arm's round, over those of a plain round on the same data.

    A plain round fits the same guide under the first prior, for as many steps. Both are timed one
    after the other; the median of the ratios.

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
        fit(first, GUIDE, data, components=1, **setup.options(len(data)))

    ratios: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, learn in learners.items():
            started = time.process_time()
            plain()
            between = time.process_time()
            learn(last[name], data)
            ended = time.process_time()
            ratios[name].append((ended - between) / (between - started))
    return {name: median(values) for name, values in ratios.items()}
