"""What each method costs: weights, time and memory of a step, passes of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import nn
from torch.nn import functional
from torch.optim import Adam
from transformers import PreTrainedModel

from bhpeft_pyro.base.distributions import Covariance
from bhpeft_pyro.base.fit_options import FitOptions
from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.guides import Guide, LaplaceGuide, as_guide, autoguide
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.peft.architectures import blocks_of
from bhpeft_pyro.training.elbo import ELBO
from bhpeft_pyro.training.initialization import align

from .budgets import Budget
from .job import Load
from .machine import Step, device_name, peak_bytes, ratios
from .methods import GUIDES, PEFT, Method, dropout
from .results import commit, complete, load
from .tables import Table, distinct

__all__ = ["ABOUT", "CLASSES", "cost", "hf_peft_step", "svi_step", "token_batch"]

ABOUT = "What does each method cost?"
CLASSES = 4
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

RANK, ALPHA, TARGETS = 8, 16, ("query", "value")


def cost(load_backbone: Load, backbone: str, budget: Budget, seeds: int, out: Path) -> Table:
    """Measure what is missing, once for each seed, and make the table of what is there.

    Raises:
        ConfigError: Hugging Face peft is not there to compare with.
    """
    runs = [("cost", backbone, *budget.timed, seed) for seed in range(seeds)]

    def result(*_: object) -> dict[str, Any]:
        return {"commit": commit(), **_measure(load_backbone, *budget.timed)}

    complete(out, runs, result)
    return _table(load(out, runs), backbone, budget)


def _measure(load_backbone: Load, batch_size: int, length: int, rounds: int) -> dict[str, Any]:
    """All methods in turn on the same batch, so that a slow moment slows all of them."""
    plain = load_backbone()[0]
    batch = token_batch(plain, batch_size, length)
    frozen = sum(p.numel() * p.element_size() for p in plain.parameters())
    size = sum(p.numel() for p in plain.parameters())
    models = {each: _model(load_backbone, each, batch) for each in _MEASURED}
    steps = {str(each): partial(_step, models[each], each, batch) for each in _MEASURED}
    # Hugging Face peft changes the transformer that it is given: one for each use.
    peers = [partial(hf_peft_step, load_backbone()[0], batch) for _ in range(2)]
    with pyro.validation_enabled(False):  # as in `fit`, after its first step
        timed = {name: start() for name, start in steps.items()} | {_PEER: peers[0]()}
        ratio = ratios(timed, _PEER, rounds, plain.device)
        least = frozen + _peak(peers[1], plain.device)
        peaks = {name: frozen + _peak(start, plain.device) for name, start in steps.items()}
    found = {}
    for method, model in models.items():
        name = str(method)
        sites = sum(site.numel for site in model.sites)
        found[name] = {
            "weights (%)": 100 * sites / (size + sites),
            _STEP: ratio[name],
            _MEMORY: peaks[name] / least,
        }
    return {"device": device_name(plain.device), "methods": found}


def _model(load_backbone: Load, method: Method, batch: Batch) -> Model:
    """As a fit begins with it: in its coordinates, where the guide has some."""
    backbone, tokenizer = load_backbone()
    model = Model(RandomPEFT(backbone, PEFT[method.peft](), Head(CLASSES), tokenizer))
    model.network.align([batch])
    if GUIDES.get(method.inference) not in (None, "delta", "laplace"):
        align(model, [batch])
    return model


def _guide(model: Model, method: Method, batch: Batch) -> tuple[Guide, int]:
    """A guide that is not fitted, and how many draws share a batch."""
    if method.inference == "MC dropout":
        return as_guide(dropout(model)), len(batch)
    guide = autoguide(GUIDES[method.inference], model, components=1)
    if isinstance(guide, LaplaceGuide):  # as large as it is once it has been measured
        scale = guide.prior.covariance.scale
        axes = scale.new_zeros(len(scale), guide.rank)
        guide.unscaled = Covariance(scale, axes, scale.new_ones(guide.rank))
    return guide, 1 if guide.point else _PARTICLES


def _step(model: Model, method: Method, batch: Batch) -> Step:
    guide, particles = _guide(model, method, batch)
    return svi_step(model, guide, batch, particles)


def _peak(start: Callable[[], Step], device: torch.device) -> int:
    """Peak of two steps: the optimiser's state is there from the second step on."""

    def run() -> None:
        step = start()
        step()
        step()

    return peak_bytes(run, device)


def _table(results: Sequence[Mapping[str, Any]], backbone: str, budget: Budget) -> Table:
    shown = {str(method): (str(method), 1, _passes(method, budget)) for method in _MEASURED}
    point = str(Method("hybrid", "deterministic"))
    shown["hybrid, ensemble"] = (point, budget.members, budget.members)
    records = []
    for name, (measured, fits, passes) in shown.items():
        for result in results:
            head = {"method": name, "fits": str(fits), "passes a prediction": str(passes)}
            records.append(head | result["methods"][measured])
    batch_size, length, rounds = budget.timed
    note = (
        f"Commit {distinct(results, 'commit')}; {distinct(results, 'device')}; {backbone}; "
        f"{CLASSES} classes; {batch_size} texts of {length} tokens a step. Steps are timed in turn "
        f"with those of {_PEER}: medians of {rounds} ratios. Memory is that of the frozen weights, "
        "and at most of a step's tensors. "
        "An ensemble's step is one member's, and a step of the default guide one component's; "
        "each component predicts in one pass forwards and one backwards for each class but one. "
        f"Mean ± standard error over {len(results)} measurements."
    )
    return Table.over_seeds("cost", ["method", "fits", "passes a prediction"], records, note)


def _passes(method: Method, budget: Budget) -> int:
    if method.inference == "deterministic":
        return 1
    if GUIDES.get(method.inference) == "laplace":
        return CLASSES
    return budget.samples


def svi_step(model: Model, guide: Guide, batch: Batch, particles: int) -> Step:
    """One step of training as `fit` takes it; the particles share the batch."""
    loss = ELBO(particles)(model, guide)
    steppers = guide.optimizers(FitOptions(lr=1e-3), batch.size or len(batch))
    shared = batch.to(model.network.device).split(particles)

    def step() -> float:
        for optimizer in steppers:
            optimizer.zero_grad()
        value = loss(shared)
        value.backward()
        for optimizer in steppers:
            optimizer.step()
        return float(value.item())

    return step


def hf_peft_step(backbone: PreTrainedModel, batch: Batch) -> Step:
    """One step of Hugging Face peft's LoRA under the same head, in a plain loop.

    In evaluation mode, so that there is no dropout, as in ours.

    Raises:
        ConfigError: peft is not installed, or not made for this version of transformers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"cost: it is measured against Hugging Face peft: {error}") from error
    adapted = [block.projections[name].module for block in blocks_of(backbone) for name in TARGETS]
    names = [name for name, module in backbone.named_modules() if module in adapted]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=names)
    network = get_peft_model(backbone, config).eval()
    device = backbone.device
    head, last = Head(CLASSES), nn.Linear(backbone.config.hidden_size, CLASSES, device=device)
    trained = [p for p in (*network.parameters(), *last.parameters()) if p.requires_grad]
    optimizer = Adam(trained, lr=1e-3)
    batch = batch.to(device)
    assert batch.labels is not None
    labels = batch.labels

    def step() -> float:
        optimizer.zero_grad()
        hidden = network(**batch.inputs).last_hidden_state
        pooled = head.pool(hidden, batch.inputs["attention_mask"], causal=False)
        loss = functional.cross_entropy(last(pooled), labels)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def token_batch(backbone: PreTrainedModel, batch_size: int, length: int) -> Batch:
    """Random tokens with random labels, always the same; none is padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, length)
    ids = torch.randint(5, backbone.config.vocab_size, shape, generator=generator)
    labels = torch.randint(0, CLASSES, (batch_size,), generator=generator)
    mask = torch.ones(shape, dtype=torch.long)
    batch = Batch({"input_ids": ids, "attention_mask": mask}, labels, size=1000)
    return batch.to(backbone.device)
