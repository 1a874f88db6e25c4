"""Single steps of training, to be timed: of a guide here, and of Hugging Face's peft."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Adam
from transformers import PreTrainedModel

from bhpeft_pyro.base.fit_options import FitOptions
from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.guides import Guide
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.peft.architectures import layers_of
from bhpeft_pyro.training.elbo import ELBO

from .machine import Step

__all__ = ["CLASSES", "hf_peft_step", "svi_step", "token_batch"]

CLASSES = 4
RANK, ALPHA, TARGETS = 8, 16, ("query", "value")


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
    adapted = [layer.projections[name].module for layer in layers_of(backbone) for name in TARGETS]
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
