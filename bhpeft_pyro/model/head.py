"""Heads: from the transformer's output to the numbers a likelihood needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..checks import COUNT, boolean, check_fields, one_of
from ..errors import DataError
from ..peft.sites import Site, zeros

__all__ = ["Head", "Pooling", "check_features"]

Pooling = Literal["auto", "mean", "first", "last"]


@dataclass(frozen=True)
class Head:
    """A random linear layer on pooled, standardised features.

    The pooled feature vector is standardised (zero mean, unit variance over its D entries, no
    weights), so that a prior scale means the same on every backbone: with weights N(0, unit^2),
    unit = 1 / sqrt(D), each output has sd 1. Then it is turned to the principal axes of the first
    round's texts (`coordinates.PrincipalAxes`), where a mean-field posterior is nearly exact.

    Sites: "head.weight" (output, feature) and "head.bias" (output,).

    Args:
        outputs: how many numbers to give for each example (each choice, for multiple choice), as
            the likelihood needs them: `Categorical` one for each class, which makes it Hugging
            Face's `num_labels`; `Normal`, `OrderedLogistic` and `MultipleChoice` 1;
            `HeteroscedasticNormal` 2.
        pooling: "mean" over the valid tokens, the "first" of them (CLS), or the "last";
            "auto" takes "last" for decoders and "mean" otherwise.
        principal: turn the features to principal axes. False leaves them as they are, for example
            to compare weights between networks fitted on different texts.

    Raises:
        ConfigError: `outputs` is not a whole number of at least 1, or `pooling` is unknown.

    >>> [(site.name, site.shape) for site in Head(4).sites(8)]
    [('head.weight', (4, 8)), ('head.bias', (4,))]
    >>> states, mask = torch.randn(5, 7, 8), torch.ones(5, 7)  # 5 texts of 7 tokens
    >>> Head(4, pooling="first").pool(states, mask, causal=False).shape
    torch.Size([5, 8])
    """

    outputs: int
    pooling: Pooling = "auto"
    principal: bool = True

    def __post_init__(self) -> None:
        pooling = one_of(*get_args(Pooling))
        check_fields(self, {"outputs": COUNT, "pooling": pooling, "principal": boolean}, "Head")

    def sites(self, width: int) -> tuple[Site, ...]:
        """The head's random tensors, for features of `width` entries."""
        weight, bias = (self.outputs, width), (self.outputs,)
        unit, one, dims = torch.full((1, 1), width**-0.5), torch.ones(1), ("output", "feature")
        return (
            Site("head.weight", weight, dims, unit, zeros(weight, unit), role="head"),
            Site("head.bias", bias, dims[:1], one, zeros(bias, one), role="head"),
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


def _last(mask: Tensor) -> Tensor:
    """The position of each row's last valid token."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def _at(states: Tensor, places: Tensor) -> Tensor:
    """One of the T states (R, T, D) for each row."""
    return states[torch.arange(len(states), device=states.device), places]


def check_features(features: Tensor) -> Tensor:
    """The features, if they are numbers.

    Raises:
        DataError: they are not.
    """
    if not features.isfinite().all():
        raise DataError(
            "the backbone's features are not finite for some of these texts: its weights are "
            "damaged, or its dtype overflows; load it with dtype=torch.float32 or torch.bfloat16"
        )
    return features
