"""What a prediction takes over that of `transformers`' own pipeline on the same texts.

Both start from texts and take one pass of the same transformer; ours is of a point estimate, by
kind of PEFT weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextClassificationPipeline,
)

from bhpeft_pyro.model.head import ClassifierHead, Head
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.model.network import RandomPEFT
from bhpeft_pyro.peft import Kind, presets
from bhpeft_pyro.posterior.fit import fit
from bhpeft_pyro.posterior.posterior import Posterior

from .job import Load
from .machine import Step, clock, in_turn, over
from .steps import CLASSES

__all__ = ["BATCH_SIZES", "KINDS", "made_texts", "serving"]

BATCH_SIZES = (1, 8, 32)
"""Of the pipeline, of which the fastest counts."""
_ONE = 10  # calls with a single text
_SHORT, _MORE, _LONG = (
    20,
    35,
    180,
)  # tokens: the least, what there is beyond it on average, the most


@dataclass(frozen=True)
class _Variant:
    kinds: Sequence[Kind]
    head: Head | ClassifierHead


KINDS: Mapping[str, _Variant] = {
    "head only": _Variant(presets.head_only(), Head(CLASSES)),
    "LoRA, Hugging Face's head": _Variant(presets.lora(), ClassifierHead(CLASSES)),
    "hybrid": _Variant(presets.bh_peft(), Head(CLASSES)),
}


def serving(load: Load, count: int, rounds: int) -> list[dict[str, Any]]:
    """By number of texts and kind, the time over that of the pipeline."""
    backbone, tokenizer = load()
    texts = made_texts(tokenizer, count)
    pipeline = TextClassificationPipeline(
        model=_classifier(backbone, tokenizer), tokenizer=tokenizer, device=backbone.device
    )
    posteriors = {name: _fitted(load, variant, texts) for name, variant in KINDS.items()}
    records: list[dict[str, Any]] = []
    for asked, calls in ((texts, 1), (texts[:1], _ONE)):
        peers = {f"pipeline, batches of {size}": size for size in BATCH_SIZES}
        runs: dict[str, Step] = {
            name: partial(pipeline, asked, batch_size=size, truncation=True, top_k=None)
            for name, size in peers.items()
        }
        runs |= {name: partial(of.predict, asked, 0) for name, of in posteriors.items()}
        repeated = {name: partial(_repeat, run, calls) for name, run in runs.items()}
        seconds = in_turn(repeated, rounds, clock(backbone.device))
        best = min(peers, key=lambda name: sum(seconds[name]))
        what = f"{len(asked)} text{'s' * (len(asked) > 1)}"
        records += [
            {"what": f"{name}, {what}", "/ pipeline": over(taken, seconds[best])}
            for name, taken in seconds.items()
        ]
    return records


def made_texts(tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Random words, as many as short news have."""
    generator = torch.Generator().manual_seed(0)
    most = min(_LONG, tokenizer.model_max_length - tokenizer.num_special_tokens_to_add())
    more = _MORE * torch.empty(count).exponential_(generator=generator)
    lengths = (_SHORT + more).int().clamp_max(most)
    ids = [
        torch.randint(5, len(tokenizer), (length,), generator=generator).tolist()
        for length in lengths.tolist()
    ]
    return [str(tokenizer.decode(some, skip_special_tokens=True)) for some in ids]


def _classifier(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """An ordinary classifier of the backbone's shape; its weights do not change what it costs."""
    config = type(backbone.config).from_dict(
        backbone.config.to_dict() | {"num_labels": CLASSES, "pad_token_id": tokenizer.pad_token_id}
    )
    model = AutoModelForSequenceClassification.from_config(config)
    return model.to(backbone.device, backbone.dtype).eval()


def _fitted(load: Load, variant: _Variant, texts: Sequence[str]) -> Posterior:
    """A point estimate after one step."""
    backbone, tokenizer = load()
    if isinstance(variant.head, ClassifierHead):
        backbone = _classifier(backbone, tokenizer)
    model = Model(RandomPEFT(backbone, variant.kinds, variant.head, tokenizer))
    rows = {"text": [*texts[:8]], "label": [i % CLASSES for i in range(8)]}
    return fit(model, "delta", rows, components=1, max_steps=1, progress=False)


def _repeat(run: Step, calls: int) -> None:
    for _ in range(calls):
        run()
