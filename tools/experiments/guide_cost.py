"""What each guide costs: memory, and the time of a short fit, at several numbers of latents."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertModel

from bhpeft_pyro.guides import autoguide, budget, latents
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.peft import presets
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.testing import tiny_examples, tiny_tokenizer

from .grid import commit, commits
from .results import complete, load
from .tables import Cell, Row, Table

__all__ = ["ABOUT", "guide_cost"]

ABOUT = "What does each guide cost?"
_GUIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "delta": ("delta", {}),
    "normal": ("normal", {}),
    "lowrank": ("lowrank", {}),
    "laplace, one component": ("laplace", {"components": 1}),
    "full": ("full", {}),
    "AutoNormal": ("AutoNormal", {}),
    "AutoLowRankMultivariateNormal": ("AutoLowRankMultivariateNormal", {}),
    "mvn": ("mvn", {}),
    "structured": ("structured", {}),
    "iaf": ("iaf", {}),
}
_LIMIT = 2**32  # bytes; what takes more is not run
_STEPS, _ROWS = 20, 64
_TIME, _MEMORY = "fit / delta's", "MiB"


def guide_cost(sizes: Sequence[int], seeds: int, out: Path) -> Table:
    """Measure what is missing, once a seed, and make the table of what is there.

    Args:
        sizes: numbers of latents, about.
        seeds: measurements.
        out: the folder of result files.
    """
    runs = [("guides", size, seed) for size in sizes for seed in range(seeds)]

    def result(_: str, size: int, seed: int) -> dict[str, Any]:
        return {"commit": commit(), **_measure(size)}

    complete(out, runs, result)
    return _table(load(out, runs), seeds)


def _model(size: int) -> Model:
    """An adapter of about so many weights, beside one layer that costs next to nothing."""
    width = 4 * max(1, round(size**0.5 / 4))
    config = BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    kinds = presets.adapter(max(1, size // (2 * width)))
    network = RandomPEFT(BertModel(config), kinds, Head(2), tiny_tokenizer())
    return Model(network)


def _measure(size: int) -> dict[str, Any]:
    model, examples = _model(size), tiny_examples(_ROWS)
    found = latents(model)
    shapes = [tuple(latent.loc.shape) for latent in found]
    count = sum(latent.loc.numel() for latent in found)

    def seconds(guide: str, options: Mapping[str, Any]) -> float:
        module = autoguide(guide, model, **options)
        started = time.process_time()
        fit(model, module, examples, max_steps=_STEPS, progress=False)
        return time.process_time() - started

    guides: dict[str, dict[str, float]] = {}
    seconds("delta", {})  # what is done once is no guide's own
    for name, (guide, options) in _GUIDES.items():
        taken = budget(guide, count, shapes, **options)
        assert taken is not None
        guides[name] = {_MEMORY: taken.bytes / 2**20}
        if taken.bytes <= _LIMIT:
            guides[name][_TIME] = seconds(guide, options) / seconds("delta", {})
    return {"latents": count, "guides": guides}


def _table(results: Sequence[Mapping[str, Any]], seeds: int) -> Table:
    rows = []
    for name in _GUIDES:
        for count in dict.fromkeys(result["latents"] for result in results):
            runs = [r["guides"][name] for r in results if r["latents"] == count]
            cells = {
                column: Cell.of([run[column] for run in runs])
                for column in (_MEMORY, _TIME)
                if column in runs[0]
            }
            rows.append(Row((name, f"{count:,}"), cells))
    note = (
        f"Commit {commits(results)}; an adapter beside one small layer, so that what is seen is "
        "the guide. Memory is that of the guide while it is fitted, as it is known beforehand; "
        f"where it is over {_LIMIT // 2**20} MiB the guide is not run. Time is processor time of "
        f"a fit of {_STEPS} steps on {_ROWS} texts, with its start and its measurements, over that "
        f"of a fit of delta made right after it. Mean ± standard error over measurements: {seeds}."
    )
    return Table("guides", ("guide", "latents"), (_MEMORY, _TIME), rows, note)
