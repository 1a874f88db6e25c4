"""What each method costs: weights, time and memory of a step, passes, disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
from torch import nn
from transformers import PreTrainedModel

from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.distributions import Covariance
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.guides import Guide, LaplaceGuide, autoguide
from bhpeft_pyro.guides.guide import is_point
from bhpeft_pyro.inference.initialization import align
from bhpeft_pyro.inference.loop import as_module
from bhpeft_pyro.inference.options import FitOptions
from bhpeft_pyro.inference.report import FitReport
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.posterior.posterior import Posterior

from .budgets import Budget
from .dropout import dropout
from .job import Load
from .methods import GUIDES, PEFT, Method
from .results import commit, complete, load
from .steps import CLASSES, Step, hf_peft_step, peak_bytes, ratios, svi_step, token_batch
from .tables import Table

__all__ = ["ABOUT", "cost"]

ABOUT = "What does each method cost?"
_PEER = "LoRA of Hugging Face peft"
_STEP, _MEMORY = "step / HF peft's LoRA", "memory / HF peft's LoRA"
_PARTICLES = 4
_MEASURED = (
    *(
        Method(peft, "deterministic")
        for peft in ("head only", "adapter", "LoRA", "prefix", "MAM", "UniPELT", "hybrid")
    ),
    Method("LoRA", "Bayesian"),
    *(Method("hybrid", way) for way in ("MC dropout", *GUIDES) if way != "deterministic"),
)


def cost(load_backbone: Load, backbone: str, budget: Budget, seeds: int, out: Path) -> Table:
    """Measure what is missing, once for each seed, and make the table of what is there.

    Raises:
        ConfigError: Hugging Face peft is not there to compare with.
    """
    runs = [("cost", backbone, *budget.timed, seed) for seed in range(seeds)]

    def result(*_: object) -> dict[str, Any]:
        return {"commit": commit(), "methods": _measure(load_backbone, *budget.timed)}

    complete(out, runs, result)
    return _table(load(out, runs), backbone, budget)


def _measure(
    load_backbone: Load, batch_size: int, length: int, rounds: int
) -> dict[str, dict[str, float]]:
    """All methods in turn on the same batch, so that a slow moment slows all of them."""
    plain = load_backbone()[0]
    batch = token_batch(plain, batch_size, length)
    frozen = sum(p.numel() * p.element_size() for p in plain.parameters())
    size = sum(p.numel() for p in plain.parameters())
    models = {each: _model(load_backbone, each, batch) for each in _MEASURED}
    steps = {str(each): partial(_step, models[each], each, batch) for each in _MEASURED}
    # Hugging Face peft changes the transformer that it is given: one for each use.
    peers = [partial(_peer_step, load_backbone()[0], batch) for _ in range(2)]
    with pyro.validation_enabled(False):  # as in `fit`, after its first step
        timed = {name: start() for name, start in steps.items()} | {_PEER: peers[0]()}
        ratio = ratios(timed, _PEER, rounds)
        least = frozen + _peak(peers[1])
        peaks = {name: frozen + _peak(start) for name, start in steps.items()}
    found = {}
    for method, model in models.items():
        name = str(method)
        sites = sum(site.numel for site in model.sites)
        found[name] = {
            "weights (%)": 100 * sites / (size + sites),
            _STEP: ratio[name],
            _MEMORY: peaks[name] / least,
        }
        guide, _ = _guide(model, method, batch)
        if isinstance(guide, Guide):
            found[name]["MB on disk"] = _disk(model, guide) / 1e6
    return found


def _model(load_backbone: Load, method: Method, batch: Batch) -> Model:
    """As a fit begins with it: in its coordinates, where the guide has some."""
    backbone, tokenizer = load_backbone()
    model = Model(RandomPEFT(backbone, PEFT[method.peft](), Head(CLASSES), tokenizer))
    model.network.align([batch])
    if GUIDES.get(method.inference) not in (None, "delta", "laplace"):
        align(model, [batch])
    return model


def _guide(model: Model, method: Method, batch: Batch) -> tuple[nn.Module, int]:
    """A guide that is not fitted, and how many draws share a batch."""
    if method.inference == "MC dropout":
        return as_module(dropout(model)), len(batch)
    guide = autoguide(GUIDES[method.inference], model, components=1)
    if isinstance(guide, LaplaceGuide):  # as large as it is once it has been measured
        scale = guide.prior.covariance.scale
        axes = scale.new_zeros(len(scale), guide.rank)
        guide.covariance = Covariance(scale, axes, scale.new_ones(guide.rank))
    return guide, 1 if is_point(guide) else _PARTICLES


def _step(model: Model, method: Method, batch: Batch) -> Step:
    guide, particles = _guide(model, method, batch)
    return svi_step(model, guide, batch, particles)


def _peer_step(backbone: PreTrainedModel, batch: Batch) -> Step:
    try:
        return hf_peft_step(backbone, batch)
    except ImportError as error:
        raise ConfigError(f"cost: it is measured against Hugging Face peft: {error}") from error


def _peak(start: Callable[[], Step]) -> int:
    """Peak of two steps: the optimiser's state is there from the second step on."""

    def run() -> None:
        step = start()
        step()
        step()

    return peak_bytes(run)


def _disk(model: Model, guide: nn.Module) -> int:
    report = FitReport(0, "", FitOptions())
    with tempfile.TemporaryDirectory() as folder:
        saved = Posterior(model, guide, (report,), first_prior=model.prior).save(folder)
        return sum(file.stat().st_size for file in saved.iterdir())


def _table(results: Sequence[Mapping[str, Any]], backbone: str, budget: Budget) -> Table:
    shown = {str(method): (str(method), 1, _passes(method, budget)) for method in _MEASURED}
    point = str(Method("hybrid", "deterministic"))
    shown["hybrid, ensemble"] = (point, budget.members, budget.members)
    records = []
    for name, (measured, fits, passes) in shown.items():
        for result in results:
            head = {"method": name, "fits": str(fits), "passes a prediction": str(passes)}
            numbers = dict(result["methods"][measured])
            if "MB on disk" in numbers:
                numbers["MB on disk"] *= fits
            records.append(head | numbers)
    batch_size, length, rounds = budget.timed
    commits = "/".join(dict.fromkeys(result["commit"] for result in results))
    note = (
        f"Commit {commits}; {backbone}, {CLASSES} classes; {batch_size} texts of {length} "
        f"tokens a step. Steps are timed in turn with those of {_PEER}: medians of {rounds} "
        "ratios. Memory is the peak of the tensors of two steps, with the frozen weights. An "
        "ensemble's step is one member's, and a step of the default guide one component's; "
        "each component predicts in one pass forwards and one backwards for each class. "
        f"Mean ± standard error over {len(results)} measurements."
    )
    return Table.over_seeds("cost", ["method", "fits", "passes a prediction"], records, note)


def _passes(method: Method, budget: Budget) -> int:
    if method.inference == "deterministic":
        return 1
    if GUIDES.get(method.inference) == "laplace":
        return 1 + CLASSES
    return budget.samples
