"""Heads: from the transformer's output to the numbers a likelihood needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from .errors import ConfigError
from .peft.sites import Site
from .plain import make_plain

__all__ = ["Head", "OwnHead", "Pooling"]

Pooling = Literal["auto", "mean", "first", "last"]


@dataclass(frozen=True)
class Head:
    """A random linear layer on pooled, standardised features.

    The pooled feature vector is standardised (zero mean, unit variance over its D entries, no
    weights), so that a prior scale means the same on every backbone: with weights N(0, unit^2),
    unit = 1 / sqrt(D), each output has sd 1. Then it is turned to the principal axes of the first
    round's texts (`axes.PrincipalAxes`), where a mean-field posterior is nearly exact.

    Args:
        outputs: numbers per example (per choice, for multiple choice): classes for
            `Categorical`, 1 for `Normal`, `OrderedLogistic` and `MultipleChoice`, 2 for
            `HeteroscedasticNormal`.
        pooling: "mean" over the valid tokens, the "first" of them (CLS), or the "last";
            "auto" takes "last" for decoders and "mean" otherwise.
        principal: turn the features to principal axes; without, the head sees them as they are.

    >>> Head(4).sites(8)[0].dims
    ('output', 'feature')
    """

    outputs: int
    pooling: Pooling = "auto"
    principal: bool = True

    def __post_init__(self) -> None:
        make_plain(self)
        if not isinstance(self.outputs, int) or self.outputs < 1:
            raise ConfigError(f"Head: outputs={self.outputs!r} must be a whole number, 1 or more")
        if self.pooling not in ("auto", "mean", "first", "last"):
            raise ConfigError(
                f"Head: pooling={self.pooling!r} is not one of 'auto', 'mean', 'first', 'last'"
            )

    def sites(self, width: int) -> tuple[Site, ...]:
        """The head's random tensors, for features of `width` entries."""
        weight, bias = (self.outputs, width), (self.outputs,)
        return (
            Site(
                "head.weight",
                weight,
                ("output", "feature"),
                unit=torch.full((1, 1), width**-0.5),
                init=lambda: torch.zeros(weight),
                role="head",
            ),
            Site(
                "head.bias",
                bias,
                ("output",),
                unit=torch.ones(1),
                init=lambda: torch.zeros(bias),
                role="head",
            ),
        )

    def pool(self, hidden: Tensor, mask: Tensor, causal: bool) -> Tensor:
        """(R, T, D) token states and (R, T) mask to (R, D) standardised features."""
        pooling = self.pooling
        if pooling == "auto":
            pooling = "last" if causal else "mean"
        hidden = hidden.float()
        if pooling == "first":  # where texts are padded on the left, not at 0
            pooled = _at(hidden, mask.long().argmax(1))
        elif pooling == "last":
            pooled = _at(hidden, _last(mask))
        else:
            weight = mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        return functional.layer_norm(pooled, pooled.shape[-1:])

    def __call__(self, features: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """(S, M, D) features under (S, ...) weights to (S, M, outputs)."""
        weight, bias = weights["head.weight"], weights["head.bias"]
        with torch.autocast(features.device.type, enabled=False):  # logits keep full precision
            return torch.baddbmm(bias.unsqueeze(-2), features.float(), weight.mT)


@dataclass(frozen=True)
class OwnHead:
    """The backbone's own head, as it is: zero-shot use, or a fine-tuned classifier as a start.

    Args:
        label_ids: for language models, one vocabulary id per label ("label words"): the outputs
            are their logits after the last valid token. None takes the logits of a model
            that has a classification or regression head.

    >>> OwnHead(label_ids=(17, 42)).sites(8)
    ()
    """

    label_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.label_ids is not None and min(self.label_ids, default=-1) < 0:
            raise ConfigError(
                f"OwnHead: label_ids={self.label_ids} must be vocabulary ids, one a label"
            )

    def sites(self, width: int) -> tuple[Site, ...]:
        """None: a model's own head stays frozen."""
        return ()

    def read(self, output: Any, mask: Tensor) -> Tensor:
        """The model's output to (R, outputs)."""
        logits: Tensor | None = getattr(output, "logits", None)
        if logits is None:
            raise ConfigError(
                "OwnHead: the backbone has no head of its own (its output has no `logits`); "
                "load it with AutoModelForSequenceClassification or AutoModelForCausalLM, "
                "or use Head"
            )
        if logits.dim() == 2:
            if self.label_ids is not None:
                raise ConfigError(
                    f"OwnHead: label_ids={self.label_ids} are for a language model, and the "
                    f"backbone has a head with {logits.shape[1]} outputs; expected None"
                )
            return logits.float()
        if self.label_ids is None:
            raise ConfigError(
                "OwnHead: a language model needs label_ids, one vocabulary id per label"
            )
        if max(self.label_ids) >= logits.shape[-1]:
            raise ConfigError(
                f"OwnHead: label_ids={self.label_ids} exceed the vocabulary of {logits.shape[-1]}"
            )
        return _at(logits, _last(mask))[:, list(self.label_ids)].float()


def _last(mask: Tensor) -> Tensor:
    """The place of each row's last valid token."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def _at(states: Tensor, places: Tensor) -> Tensor:
    """One of the T states (R, T, D) for each row."""
    return states[torch.arange(len(states), device=states.device), places]
