"""Heads: from the transformer's output to the numbers a likelihood needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..base.values import Count, Flag, checked_dataclass
from ..errors import ConfigError, DataError
from ..peft.signals import random_tokens
from ..peft.sites import Site, zeros

Pooling = Literal["auto", "mean", "first", "last"]


class _Linear:
    """A linear layer whose weights are random."""

    mergeable: ClassVar[bool] = False
    """Whether its weights are those of a Hugging Face classifier's last layer."""

    def tail(self, backbone: PreTrainedModel) -> dict[str, Tensor]:
        """Weights of the backbone between the transformer and this layer: none."""
        return {}

    def __call__(self, features: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """(S, M, D) features under (S, ...) weights to (S, M, outputs)."""
        weight, bias = weights["head.weight"], weights.get("head.bias")
        with torch.autocast(features.device.type, enabled=False):  # logits keep full precision
            if bias is None:
                return torch.bmm(features.float(), weight.mT)
            return torch.baddbmm(bias.unsqueeze(-2), features.float(), weight.mT)


@checked_dataclass
class Head(_Linear):
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
            "auto" takes "last" for decoders, unless they attend in both directions, and "mean"
            otherwise.
        principal: turn the features to principal axes. False leaves them as they are, for example
            to compare weights between networks fitted on different texts.

    Raises:
        ConfigError: `outputs` is not a whole number of at least 1, or `pooling` is unknown.

    >>> [(site.name, site.shape) for site in Head(4).sites(8)]
    [('head.weight', (4, 8)), ('head.bias', (4,))]
    """

    outputs: Count
    pooling: Pooling = "auto"
    principal: Flag = True

    def sites(self, width: int, backbone: PreTrainedModel | None = None) -> tuple[Site, ...]:
        """The head's random tensors, for features of `width` entries, whatever the backbone."""
        return _linear_sites(
            self.outputs, torch.full((1, 1), width**-0.5, dtype=torch.float32), width
        )

    def read(
        self, backbone: PreTrainedModel, inputs: Mapping[str, Any], mask: Tensor, causal: bool
    ) -> Tensor:
        """Run a backbone on R rows of inputs, for (R, D) features."""
        hidden = backbone.base_model(**inputs)[0]  # a tuple, if its configuration says so
        return self.pool(hidden, mask, causal)

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


_SEEN: ContextVar[list[Tensor] | None] = ContextVar("bhpeft_classifier_inputs", default=None)


@checked_dataclass
class ClassifierHead(_Linear):
    """The last linear layer of an `AutoModelForSequenceClassification`, made random.

    Up to this layer the model runs as Hugging Face wrote it. What lies between the transformer and
    the layer (BERT's pooler, the dense layer of RoBERTa's head) stays frozen. So weights can come
    from a Hugging Face classifier (`from_peft`) and go back to one (`Posterior.to_peft`,
    `Posterior.merge`) without any change of the logits.

    A prior scale means the same as under `Head`: with weights N(0, unit^2), each output has sd 1,
    given the RMS of the layer's input on random tokens. A decoder's features are those of the last
    token that is not the padding token of its configuration, as in Hugging Face, even where that
    token ends the text itself; without a padding token, those of the last valid token.

    Sites: "head.weight" (output, feature) and, unless the layer has no bias, "head.bias" (output,).

    Args:
        outputs: as for `Head`; the backbone's own number of labels may be another.

    Raises:
        ConfigError: `outputs` is not a whole number of at least 1; when a network is made, the
            backbone is not a sequence classifier.

    >>> ClassifierHead(3)
    ClassifierHead(outputs=3)
    """

    outputs: Count
    principal: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True

    def sites(self, width: int, backbone: PreTrainedModel) -> tuple[Site, ...]:
        """The head's random tensors, in units that are measured on the backbone."""
        _, final = final_layer(backbone)
        if _see not in final._forward_pre_hooks.values():
            final.register_forward_pre_hook(_see)
        ids = random_tokens(cast(PreTrainedModel, backbone.base_model)).to(backbone.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            features = self.read(backbone, inputs, inputs["attention_mask"], is_causal(backbone))
        rms = features.square().mean().sqrt().clamp_min(1e-6)
        unit = (rms * final.in_features**0.5).reciprocal().reshape(1, 1)
        return _linear_sites(self.outputs, unit, final.in_features, final.bias is not None)

    def tail(self, backbone: PreTrainedModel) -> dict[str, Tensor]:
        """The weights between the transformer and the last layer, by their names in the backbone.

        The pooler of the transformer is among them: checkpoints may lack it, and adapters may
        train it.
        """
        last, inside = final_layer(backbone)[0], f"{backbone.base_model_prefix}."
        return {
            name: value
            for name, value in backbone.state_dict().items()
            if not name.startswith(f"{last}.")
            and (not name.startswith(inside) or name.startswith(f"{inside}pooler."))
        }

    def read(
        self, backbone: PreTrainedModel, inputs: Mapping[str, Any], mask: Tensor, causal: bool
    ) -> Tensor:
        """Run a backbone on R rows of inputs, for (R, D) features."""
        if causal:  # nothing is in between
            states = backbone.base_model(**inputs)[0]
            return _at(states.float(), _scored(backbone, inputs["input_ids"], mask))
        seen: list[Tensor] = []
        token = _SEEN.set(seen)
        try:
            backbone(**inputs)
        finally:
            _SEEN.reset(token)
        states = seen[-1]
        if states.dim() == 3:  # a decoder that attends both ways scores every token, then takes one
            states = _at(states, _scored(backbone, inputs["input_ids"], mask))
        return states.float()


def _see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A hook that keeps what the last layer reads; it does nothing outside `ClassifierHead`."""
    seen = _SEEN.get()
    if seen is not None:
        seen.append(args[0])


def is_causal(backbone: PreTrainedModel) -> bool:
    """Whether a backbone is a decoder, whose last token alone has seen the whole text."""
    if not getattr(backbone.config, "is_causal", True):  # it attends in both directions
        return False
    return any(getattr(module, "is_causal", False) for module in backbone.modules())


def final_layer(backbone: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The name and the module of a sequence classifier's last linear layer."""
    inside = f"{backbone.base_model_prefix}."
    layers = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inside)
    ]
    if not layers or not type(backbone).__name__.endswith("ForSequenceClassification"):
        raise ConfigError(
            f"backbone: {type(backbone).__name__} is not a sequence classifier; expected a model "
            "of AutoModelForSequenceClassification.from_pretrained(...)"
        )
    return layers[-1]


def set_final_layer(model: PreTrainedModel, weight: Tensor, bias: Tensor | None) -> None:
    """Give a classifier another last layer, with as many labels as that has."""
    name, old = final_layer(model)
    outputs, inputs = weight.shape
    new = nn.Linear(inputs, outputs, bias is not None).to(old.weight)
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    model.set_submodule(name, new)
    if model.config.num_labels != outputs:
        model.config.num_labels = outputs
    model.num_labels = outputs  # type: ignore[assignment]


def with_tail(backbone: PreTrainedModel, tail: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of a classifier that shares its transformer, with a `ClassifierHead.tail` between that
    and the head."""
    state = backbone.state_dict(keep_vars=True)
    shared: dict[int, Any] = {id(value): value for key, value in state.items() if key not in tail}
    new = copy.deepcopy(backbone, shared)
    new.load_state_dict(dict(tail), strict=False)
    return new


def _linear_sites(outputs: int, unit: Tensor, width: int, biased: bool = True) -> tuple[Site, ...]:
    """The sites of a linear layer, with the sd of its weights at which each output has sd 1."""
    shape, one, dims = (outputs, width), unit.new_ones(1), ("output", "feature")
    weight = Site("head.weight", shape, dims, unit, zeros(shape, unit), role="head")
    if not biased:
        return (weight,)
    bias = Site("head.bias", shape[:1], dims[:1], one, zeros(shape[:1], one), role="head")
    return weight, bias


def _last(mask: Tensor) -> Tensor:
    """The position of each row's last valid token."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def _scored(backbone: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The position that a decoder's classifier scores in each row, by Hugging Face's rule: the last
    token other than the padding token, even where that ends the text itself; if there is no other,
    the first."""
    pad = backbone.config.get_text_config().pad_token_id
    if pad is None:  # Hugging Face takes single texts only, and their last token
        return _last(mask)
    first = mask.long().cumsum(1) == 1
    return _last(mask.bool() & (first | (ids != pad)))


def _at(states: Tensor, places: Tensor) -> Tensor:
    """One of the T states (R, T, D) for each row."""
    return states[torch.arange(len(states), device=states.device), places]


def check_features(features: Tensor) -> Tensor:
    """The features, if they are finite; otherwise a DataError."""
    if not features.isfinite().all():
        raise DataError(
            "the backbone's features are not finite for some of these texts: its weights are "
            "damaged, or its dtype overflows; load it with dtype=torch.float32 or torch.bfloat16"
        )
    return features
