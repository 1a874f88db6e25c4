"""One optimiser step of ours and of Hugging Face peft, and what steps cost.

Times on a shared machine drift by more than what is to be measured. So all variants take turns, one
step each in a round, and what is reported is the median over rounds of the ratios within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Adam
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.inference.elbo import ELBO
from bhpeft_pyro.inference.optimizers import optimizers
from bhpeft_pyro.inference.options import FitOptions
from bhpeft_pyro.model.head import Head
from bhpeft_pyro.model.model import Model

__all__ = ["CLASSES", "Step", "hf_peft_step", "peak_bytes", "ratios", "svi_step", "token_batch"]

CLASSES = 4
RANK, ALPHA, TARGETS = 8, 16, ("query", "value")
DATA_SIZE = 1000  # what the batch stands for

Step = Callable[[], Any]


def svi_step(model: Model, guide: nn.Module, batch: Batch, particles: int) -> Step:
    """One step of training as `fit` takes it; the particles share the batch."""
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

    In evaluation mode, so that there is no dropout, as in ours.

    Raises:
        ImportError: peft is not installed, or not made for this version of transformers.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS))
    network = get_peft_model(backbone, config).eval()
    head, last = Head(CLASSES), nn.Linear(backbone.config.hidden_size, CLASSES)
    trained = [p for p in (*network.parameters(), *last.parameters()) if p.requires_grad]
    optimizer = Adam(trained, lr=1e-3)
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
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, size=DATA_SIZE)


def ratios(variants: Mapping[str, Step], base: str, rounds: int) -> dict[str, float]:
    """Median time of each variant over that of `base`, which is one of them.

    >>> sorted(ratios({"ours": bool, "theirs": int}, "theirs", rounds=3))
    ['ours', 'theirs']
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            variants[name]()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {
        name: statistics.median(a / b for a, b in zip(own, seconds[base], strict=True))
        for name, own in seconds.items()
    }


def peak_bytes(run: Step) -> int:
    """The most bytes of tensors alive at once among those that `run` allocates on the CPU.

    Counted from the allocator's own events, so it is exact and repeatable, which the resident
    memory of a process is not. Scratch memory inside matrix libraries is left out.

    >>> def run():
    ...     torch.zeros(1000)
    ...     return torch.zeros(500) + torch.ones(500)
    >>> peak_bytes(run)
    6000
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = peak = 0
    for _, size in memory:
        alive += size
        peak = max(peak, alive)
    return peak
