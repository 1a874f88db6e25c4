"""What steps, whole fits and predictions cost: by method, layers and rows.

What is compared takes turns. Times are those of the processor, so that other work does not count,
or of the GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import torch

from bhpeft_pyro.base.fit_options import FitOptions
from bhpeft_pyro.data import Examples, encode
from bhpeft_pyro.data.examples import Tokens
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.model.cached_batches import CachedBatches
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.peft import presets
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.posterior.posterior import Posterior
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer

from .budgets import Budget
from .job import Load
from .machine import Step, clock, device_name, in_turn, over
from .methods import upper_hybrid
from .runs import Experiment, Given
from .steps import CLASSES, hf_peft_step, svi_step, token_batch
from .tables import Table, distinct

__all__ = ["experiment"]

_TRAINED, _HELD_OUT, _PREDICTED = 128, 32, 64  # rows
_ROUNDS = 3  # of what is short
_FIRST = 8  # rows of a prediction that is little but the start of the program
_STEP, _PEER = "training step", "training step, LoRA of Hugging Face peft"
_UPPER = ", upper half"
_FITTED = {  # guide, components, PEFT weights on the upper half of the layers alone
    f"{guide}{what}": (guide, components, upper)
    for guide in ("delta", "laplace")
    for what, components, upper in (("", 1, False), (_UPPER, 1, True), (", 2 components", 2, False))
}
# A process inherits the peak memory of the one that starts it, so a small one does.
_WATCH = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""

Records = list[dict[str, Any]]
_NOTES = {
    "fits and predictions": "Of a hybrid with four classes; sizes: texts and tokens of a step, and "
    f"steps of a fit to {_TRAINED} rows, {_HELD_OUT} held out, {_PREDICTED} predicted. Times are "
    "in steps: of `delta`, and of Hugging Face peft's LoRA.",
    "bhpeft predict": f"A tiny transformer; ms a row beyond the first {_FIRST}.",
}


def experiment(budget: Budget) -> Experiment:
    """What is measured, once for each seed."""
    titles = [("fits and predictions", *budget.fitted), ("bhpeft predict", *budget.predicted)]
    return Experiment(
        "What do steps, whole fits and predictions cost?",
        lambda setting, seeds: [
            ("cost", *title, seed) for title in titles for seed in range(seeds)
        ],
        _run,
        _tables,
        {},
    )


def _run(given: Given, _: str, title: str, *sizes: int) -> dict[str, Any]:
    *counts, _seed = sizes
    whole = title.startswith("fits")
    records = _fits(_Work(given.load, *counts)) if whole else _predict(counts)
    device = given.load()[0].device
    return {**_machine(device), "title": title, "sizes": counts, "records": records}


def _tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    made = []
    for title in dict.fromkeys(result["title"] for result in results):
        of_it = [result for result in results if result["title"] == title]
        records = [record for result in of_it for record in result["records"]]
        names = ("commit", "backbone", "device", "processors", "load at the start", "sizes")
        facts = ", ".join(f"{name} {distinct(of_it, name)}" for name in names)
        made.append(Table.over_seeds(title, ["what"], records, f"{_NOTES[title]} {facts}."))
    return made


def _machine(device: torch.device) -> dict[str, Any]:
    load = f"{os.getloadavg()[0]:.1f}"
    return {
        "device": device_name(device),
        "processors": os.cpu_count(),
        "load at the start": load,
    }


@dataclass(frozen=True)
class _Work:
    """Fits of a hybrid to random tokens, as many in each text."""

    load: Load
    batch_size: int
    tokens: int
    steps: int

    @cached_property
    def rows(self) -> list[Examples]:
        """To fit, to hold out and to predict."""
        backbone, tokenizer = self.load()
        counts = [_TRAINED, _HELD_OUT, _PREDICTED]
        batch = token_batch(backbone, sum(counts), self.tokens)
        assert batch.labels is not None
        numbers = torch.arange(len(batch))
        table = {"text": [*map(str, numbers.tolist())], "label": batch.labels.tolist()}
        examples = encode(table, tokenizer, kind="class", classes=CLASSES)
        ids = batch.inputs["input_ids"].tolist()
        examples = replace(examples, tokens=Tokens.of(tokenizer, ids, None))
        return [examples.subset(part) for part in numbers.split(counts)]

    def model(self, upper: bool) -> Model:
        backbone, tokenizer = self.load()
        depth = backbone.config.num_hidden_layers
        kinds = upper_hybrid(-(-depth // 2)) if upper else presets.bh_peft()
        return Model(RandomPEFT(backbone, kinds, Head(CLASSES), tokenizer))

    def fit(self, guide: str, components: int, upper: bool) -> Posterior:
        train, held_out, _ = self.rows
        options = FitOptions(
            batch_size=self.batch_size, max_steps=self.steps, particles=1, progress=False
        )
        how: dict[str, Any] = {"components": components, "options": options}
        return fit(self.model(upper), guide, train, validation=held_out, **how)

    def step(self, upper: bool) -> Step:
        """A training step of `delta`."""
        model, train = self.model(upper), self.rows[0]
        model.network.align(batch for _, batch in train.by_length(self.batch_size))
        batches = CachedBatches(model, train).training(
            self.batch_size, 1, torch.Generator().manual_seed(0)
        )
        return svi_step(model, MeanFieldGuide(model, "delta"), next(batches), 1)


def _fits(work: _Work) -> Records:
    """Whole fits; then single steps, widths and predictions of what was fitted."""
    train, held_out, texts = work.rows
    backbone = work.load()[0]
    peer = hf_peft_step(backbone, next(train.batches(work.batch_size)))
    steps = {_STEP: work.step(upper=False), _PEER: peer}
    fitted: dict[str, Posterior] = {}

    def whole(name: str) -> None:
        fitted[name] = work.fit(*_FITTED[name])

    def repeat(step: Step) -> None:
        for _ in range(work.steps):
            step()

    def measured(runs: Mapping[str, Step], rounds: int, together: int) -> Records:
        seconds, records = in_turn(runs, rounds, clock(backbone.device)), []
        for name, taken in seconds.items():
            record: dict[str, Any] = {"what": name}
            record["steps"] = together * over(taken, seconds[_STEP])
            record["steps of HF peft's LoRA"] = together * over(taken, seconds[_PEER])
            if name.startswith("fit, laplace"):
                record["/ delta"] = over(taken, seconds[name.replace("laplace", "delta")])
            records.append(record)
        return records

    with pyro.validation_enabled(False):  # as in `fit`, after its first step
        many = {name: partial(repeat, step) for name, step in steps.items()}
        fits = {f"fit, {name}": partial(whole, name) for name in _FITTED}
        whole_fits = measured(many | fits, 1, work.steps)[len(many) :]
        short = {**steps, f"{_STEP}{_UPPER}": work.step(upper=True)}
        for where in ("", _UPPER):
            point = fitted[f"delta{where}"]
            short[f"width{where}"] = partial(point.widen, train, validation=held_out)
        for name, posterior in fitted.items():
            short[f"prediction, {name}"] = partial(posterior.predict, texts)
        return whole_fits + measured(short, _ROUNDS, 1)


def _predict(counts: Sequence[int]) -> Records:
    """`bhpeft predict` in processes of its own, on larger and larger files."""
    records: Records = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        tiny_backbone().save_pretrained(folder / "tiny")
        tiny_tokenizer().save_pretrained(folder / "tiny")
        backbone, tokenizer = load_backbone(str(folder / "tiny"), "cpu")
        model = Model(RandomPEFT(backbone, presets.bh_peft(), Head(2), tokenizer))
        posterior = fit(model, "laplace", tiny_examples(), max_steps=2, progress=False)
        posterior.save(folder / "run")
        for count in (_FIRST, *counts):
            data = folder / f"{count}.csv"
            data.write_text("text\n" + "".join(f"w{5 + i % 45} w9 w8 w7\n" for i in range(count)))
            words = [sys.executable, "-m", "bhpeft_pyro", "predict", str(folder / "run"), str(data)]
            watched = [sys.executable, "-c", _WATCH, *words]
            done = subprocess.run(watched, stdout=subprocess.PIPE, text=True, check=True)
            seconds, peak = map(float, done.stdout.split())
            size = peak / 2**20 if sys.platform == "darwin" else peak / 2**10
            record = {"what": f"{count} rows", "seconds": seconds, "peak memory (MiB)": size}
            if records:
                beyond = seconds - records[0]["seconds"]
                record["ms a row"] = 1000 * beyond / (count - _FIRST)
            records.append(record)
    return records
