"""Heads: from the transformer's output to the numbers a likelihood needs.

Principal axes of the features: coordinates in which a mean-field head is nearly exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigError, DataError
from ..peft.sites import Site
from ..plain import make_plain

__all__ = [
    "Head",
    "OwnHead",
    "Pooling",
    "PrincipalAxes",
    "check_features",
]


# The least variance of an axis, as a share of the mean: directions that no training text takes up
# keep a little prior, so a new kind of text can still move the outputs, and widen them.
_FLOOR = 0.01


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


class PrincipalAxes(nn.Module):
    """Centres features, turns them to their principal axes and weights each axis by its sd.

    The axes come from the frozen transformer's features of the first round's texts (no
    labels), and stay. In these coordinates

    * features are uncorrelated, so a head's exact posterior is nearly independent over its weights
      and a mean-field guide loses next to nothing;
    * one prior scale for all weights says that the leading axes of the pretrained features
      matter most: the prior variance of a function along an axis goes with its squared variance.

    The mean square of a coordinate is 1, as before. Until `fit` it is the identity.

    Args:
        width: D.

    >>> axes = PrincipalAxes(2)
    >>> axes.fit(torch.tensor([[2.0, 1.0], [-2.0, 1.0], [0.0, 2.0], [0.0, 0.0]]))
    >>> axes(torch.tensor([[2.0, 1.0]])).abs().amax().item() > 1.9
    True
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))
        self.register_buffer("fitted", torch.tensor(False))
        self.center: Tensor
        self.matrix: Tensor
        self.fitted: Tensor

    def fit(self, features: Tensor) -> None:
        """Take the axes from (N, D) features.

        Raises:
            DataError: fewer than two rows, or all alike.
        """
        if len(features) < 2:
            raise DataError(f"principal axes need two or more texts, got {len(features)}")
        centred = (features - features.mean(0)).double()
        variance, vectors = torch.linalg.eigh(centred.mT @ centred / len(features))
        variance = variance.clamp_min(0)
        if not variance.sum() > 0:
            raise DataError("principal axes: all texts have the same features")
        weights = (variance + _FLOOR * variance.mean()).sqrt()
        matrix = vectors * weights
        size = (centred @ matrix).square().mean().sqrt()
        self.center.copy_(features.mean(0))
        self.matrix.copy_(matrix / size)
        self.fitted.fill_(True)

    @property
    def sds(self) -> Tensor:
        """(D,) sd of each coordinate over the texts that the axes are of, in ascending order."""
        # A column of `matrix` has the squared length c (variance + _FLOOR * mean variance), where
        # c is such that the mean square of a coordinate is 1.
        length = self.matrix.double().square().sum(0)
        variance = length - _FLOOR / (1 + _FLOOR) * length.mean()
        square = (variance * length).clamp_min(0)
        return (square / square.mean()).sqrt().float()

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        with torch.autocast(features.device.type, enabled=False):
            return (features - self.center) @ self.matrix


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
