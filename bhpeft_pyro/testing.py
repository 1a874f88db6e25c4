"""A tiny random transformer and batch, for examples and tests that need no checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from .base.isolation import seeded
from .data import Examples, encode
from .data.batch import Batch
from .model.head import Head
from .model.likelihoods import Likelihood
from .model.model import Model
from .model.network import RandomPEFT
from .peft import Kind, presets
from .priors import PriorLike

__all__ = [
    "tiny_backbone",
    "tiny_batch",
    "tiny_classifier",
    "tiny_examples",
    "tiny_model",
    "tiny_tokenizer",
]


def tiny_backbone() -> BertModel:
    """A BERT of two layers and width 16 with random weights, always the same ones.

    >>> tiny_backbone().config.hidden_size
    16
    """
    with seeded(0):
        return BertModel(_config())


def tiny_classifier(labels: int = 2) -> BertForSequenceClassification:
    """A `tiny_backbone` with Hugging Face's pooler and classifier.

    >>> tiny_classifier(3).config.num_labels
    3
    """
    with seeded(0):
        return BertForSequenceClassification(_config(num_labels=labels))


def _config(**changes: Any) -> BertConfig:
    return BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,
        **changes,
    )


def tiny_model(
    kinds: Sequence[Kind] | None = None,
    outputs: int = 2,
    prior: PriorLike | None = None,
    likelihood: Likelihood | None = None,
    aligned: bool = False,
) -> Model:
    """A `Model` on `tiny_backbone`, by default with LoRA.

    Its coordinates are fitted to texts only if `aligned`; otherwise tests can predict values.

    >>> len(tiny_model(kinds=()).sites)
    2
    """
    kinds = presets.lora(rank=2) if kinds is None else kinds
    head = Head(outputs, principal=aligned)
    network = RandomPEFT(tiny_backbone(), kinds, head, tiny_tokenizer())
    if not aligned and network.kinds:
        _fix_coordinates(network)
    return Model(network, prior, likelihood)


def _fix_coordinates(network: RandomPEFT) -> None:
    """Set the state that a fit leaves which chose the weights themselves as coordinates."""
    coordinates = network.coordinates
    state = coordinates.state_dict() | {"fitted": torch.tensor(True)}
    for site in coordinates.sites:
        if site.name in coordinates.outer:
            layers, out, inner = site.shape
            for side, size in (("left", out), ("right", inner)):
                key = f"{site.name}.{side}".replace(".", "/")
                state[key] = torch.eye(size).expand(layers, size, size)
    coordinates.load_state_dict(state)


def tiny_batch(examples: int = 8, labels: int = 2, seed: int = 0) -> Batch:
    """Random tokens of varying length with random labels.

    >>> tiny_batch(3).labels.shape
    torch.Size([3])
    """
    generator, length = torch.Generator().manual_seed(seed), 6
    lengths = torch.randint(2, length + 1, (examples, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return Batch(
        {
            "input_ids": torch.randint(5, 50, (examples, length), generator=generator) * mask,
            "attention_mask": mask,
        },
        torch.randint(0, labels, (examples,), generator=generator),
    )


def tiny_examples(examples: int = 12, seed: int = 0) -> Examples:
    """A learnable toy data set for `tiny_backbone`: the first word determines the class.

    >>> len(tiny_examples(5))
    5
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (examples,), generator=generator).tolist()
    words = [torch.randint(10, 50, (length,), generator=generator).tolist() for length in lengths]
    labels = [i % 2 for i in range(examples)]
    texts = [" ".join(f"w{k}" for k in [5 + i % 2, *words[i]]) for i in range(examples)]
    return encode({"text": texts, "label": labels}, tiny_tokenizer(), kind="class", classes=2)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words "w2" to "w49" have their number as id; 0 pads and 1 is any other word.

    >>> tiny_tokenizer()("w7 w18 word")["input_ids"]
    [7, 18, 1]
    """
    # Special tokens are recognised within words too, so none may begin a word.
    vocabulary = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 50)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", model_max_length=32
    )
