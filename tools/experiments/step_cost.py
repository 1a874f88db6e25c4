"""`python -m tools.experiments.step_cost`: what being Bayesian costs, as ratios.

Times on a shared machine drift by more than what is to be measured. So all variants take turns,
one step each a round in rotating order, and what is reported is the median over rounds of ratios
within a round, with quartiles. Absolute times are left out: they would say nothing elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyro
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from bhpeft_pyro.data.assets import minilm
from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.errors import BHPEFTError
from bhpeft_pyro.guides import DeltaGuide, NormalGuide
from bhpeft_pyro.guides.optimizers import optimizers
from bhpeft_pyro.inference.draws import draw
from bhpeft_pyro.inference.elbo import ELBO
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.options import FitOptions
from bhpeft_pyro.peft import Kind, presets
from bhpeft_pyro.testing import tiny_backbone

from .timing import Step, compare, peak_bytes

__all__ = ["hf_peft_step", "measure", "svi_step", "token_batch"]

CLASSES = 4
DRAWS = (1, 4, 16)
PARTICLES = 4
RANK, ALPHA, TARGETS = 8, 16.0, ("query", "value")
DATA_SIZE = 1000  # what the batch stands for


def measure(
    backbone: Callable[[], PreTrainedModel], batch_size: int, length: int, rounds: int
) -> dict[str, Any]:
    """All ratios on one transformer.

    Args:
        backbone: makes a new copy of the transformer.
        batch_size: B; the Bayesian step shares its B examples out over the particles.
        length: T, tokens per example; none is padding.
        rounds: how often every variant is timed, after one round of warming up.

    Raises:
        ConfigError: `batch_size` is no multiple of the particles.
    """
    model, lora = _model(backbone(), presets.bh_peft()), _model(backbone(), presets.lora(RANK))
    plain = backbone().eval()
    batch = token_batch(plain, batch_size, length)
    guide = NormalGuide(model)

    def bayesian(particles: int) -> Step:
        return svi_step(model, NormalGuide(model), batch, particles)

    def deterministic(of: Model = model) -> Step:
        return svi_step(of, DeltaGuide(of), batch, 1)

    with pyro.validation_enabled(False):  # as in `fit`, after its first step
        training = {
            "bayesian_4": bayesian(PARTICLES),
            "bayesian_1": bayesian(1),
            "deterministic": deterministic(),
            "lora_deterministic": deterministic(lora),
        }
        reason = None
        try:
            training["hf_peft_lora"] = hf_peft_step(backbone(), batch)
        except ImportError as error:
            reason = f"Hugging Face peft cannot be imported: {error}"
        prediction: dict[str, Step] = {"plain": partial(forecast_plain, plain, batch)}
        for count in DRAWS:
            weights = draw(model, guide, count)
            prediction[f"folded_{count}"] = partial(folded, model, weights, batch)
            prediction[f"looped_{count}"] = partial(looped, model, weights, batch)
        step_ratios = compare(
            training,
            [
                ("bayesian_4", "deterministic"),
                ("bayesian_1", "deterministic"),
                ("bayesian_4", "hf_peft_lora"),
                ("deterministic", "hf_peft_lora"),
                ("lora_deterministic", "hf_peft_lora"),
            ],
            rounds,
        )
        pass_ratios = compare(
            prediction, [(name, "plain") for name in prediction if name != "plain"], rounds
        )
        memory = _memory(plain, partial(bayesian, PARTICLES), deterministic)
    return {
        "sizes": {
            "batch_size": batch_size,
            "tokens": length,
            "rounds": rounds,
            "latents": sum(site.numel for site in model.sites),
            "latents_lora_only": sum(site.numel for site in lora.sites),
            "frozen_parameters": sum(p.numel() for p in plain.parameters()),
        },
        "training_step": step_ratios,
        "hf_peft_missing": reason,
        "prediction": pass_ratios,
        "memory": memory,
    }


def svi_step(model: Model, guide: nn.Module, batch: Batch, particles: int) -> Step:
    """One step of training as `fit` takes it: natural gradients for what has a width, else Adam."""
    loss = ELBO(particles)(model, guide)
    steppers = optimizers(guide, FitOptions(lr=1e-3), batch.size or len(batch))
    shared = batch.split(particles)

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

    In evaluation mode, so that there is no dropout, which ours has not either.

    Raises:
        ImportError: peft is not installed, or not made for this version of transformers.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=list(TARGETS)
    )
    network = get_peft_model(backbone, config).eval()
    last = nn.Linear(backbone.config.hidden_size, CLASSES)
    trained = [p for p in (*network.parameters(), *last.parameters()) if p.requires_grad]
    optimizer = Adam(trained, lr=1e-3)
    assert batch.labels is not None
    labels = batch.labels

    def step() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(last(_pooled(network, batch)), labels)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


@torch.no_grad()
def forecast_plain(backbone: PreTrainedModel, batch: Batch) -> Tensor:
    """(B, D) features of one pass of the transformer alone."""
    return _pooled(backbone, batch)


@torch.no_grad()
def folded(model: Model, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """(S, B, C) probabilities under S draws (S, 1, *site shape), in one pass of S * B rows."""
    return model.predictive(weights, batch).probs


@torch.no_grad()
def looped(model: Model, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The same in S passes of B rows."""
    count = len(next(iter(weights.values())))
    one = [{name: value[s : s + 1] for name, value in weights.items()} for s in range(count)]
    return torch.cat([folded(model, draws, batch) for draws in one])


def _memory(
    plain: PreTrainedModel, bayesian: Callable[[], Step], deterministic: Callable[[], Step]
) -> dict[str, Any]:
    """Peaks of setting up and taking two steps, the second with the optimiser's state in place."""

    def two(start: Callable[[], Step]) -> None:
        step = start()
        step()
        step()

    frozen = sum(p.numel() * p.element_size() for p in plain.parameters())
    ours, base = (peak_bytes(partial(two, start)) for start in (bayesian, deterministic))
    return {
        "what": "peak bytes of live tensors over guide, optimiser and two training steps",
        "bayesian_4 / deterministic": round((ours + frozen) / (base + frozen), 4),
        "bayesian_4 / deterministic, without the frozen weights": round(ours / base, 4),
    }


def _model(backbone: PreTrainedModel, kinds: tuple[Kind, ...]) -> Model:
    return Model(RandomPEFT(backbone, kinds, Head(CLASSES)))


def token_batch(backbone: PreTrainedModel, batch_size: int, length: int) -> Batch:
    """Random tokens with random labels, always the same; none is padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, length)
    ids = torch.randint(5, backbone.config.vocab_size, shape, generator=generator)
    labels = torch.randint(0, CLASSES, (batch_size,), generator=generator)
    mask = torch.ones(shape, dtype=torch.long)
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, size=DATA_SIZE)


def _pooled(network: nn.Module, batch: Batch) -> Tensor:
    hidden = network(**batch.inputs).last_hidden_state
    return Head(CLASSES).pool(hidden, batch.inputs["attention_mask"], causal=False)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "pyro-ppl", "transformers", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result to this file too.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="How often each variant is timed.")] = 15,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Tokens per example.")] = 64,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A random transformer of width 16: only a check.")
    ] = False,
) -> None:
    """Time, on the CPU, Bayesian against deterministic steps of MiniLM; print JSON with ratios."""
    logging.disable_progress_bar()

    def load() -> PreTrainedModel:
        model: PreTrainedModel = AutoModel.from_pretrained(minilm())
        return model

    try:
        result = measure(tiny_backbone if tiny else load, batch_size, length, rounds)
    except BHPEFTError as error:
        typer.echo(f"Cannot start: {error}", err=True)
        raise typer.Exit(1) from error
    result = {
        "transformer": "tiny, random" if tiny else "MiniLM-L6",
        "peft": "bh_peft",
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "versions": _versions(),
        **result,
    }
    text = json.dumps(result, indent=2)
    if json_file is not None:
        json_file.write_text(text + "\n")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
