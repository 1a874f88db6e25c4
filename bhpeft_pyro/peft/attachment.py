"""Kinds of PEFT on a frozen transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigError
from .architectures import Layer, layers_of
from .hooks import (
    BOUND,
    Args,
    Bound,
    in_force,
    install,
    install_attention,
)
from .kinds import Adapter, Kind, LoRA, Prefix, Weights, rows_of
from .signals import measure, random_tokens
from .sites import Site

ORDER = (LoRA, Adapter, Prefix)
"""In which the kinds act: an adapter sees what LoRA did to the block it follows."""


class Attachment:
    """The sites of some PEFT kinds on a backbone, and the backbone under given weights.

    The backbone is frozen (no gradients, evaluation mode, so no dropout) and gets hooks that do
    nothing outside `bind`. With a `Prefix`, `backbone.config._attn_implementation` reads
    "bhpeft_sdpa" instead of "sdpa".

    Args:
        backbone: any supported Hugging Face model, with or without a head.
        kinds: `LoRA`, `Adapter` and `Prefix`, each at most once; () is allowed.

    Attributes:
        sites: all random tensors: LoRA's, the adapter's, the prefix's.
        placed: each kind with the layers that carry it.
        places: the backbone's layers, attentions and projections, each with its layer.
        hidden_size: width of the base model's last hidden states.
        constant: the number of layers below the first with PEFT weights; 0 if what they compute
            cannot be kept (`constant_states`).

    >>> from bhpeft_pyro.testing import tiny_backbone
    >>> backbone = tiny_backbone()
    >>> attachment = Attachment(backbone, [LoRA(("query",), rank=4)])
    >>> [(site.name, site.shape) for site in attachment.sites]
    [('lora.query.A', (2, 4, 16)), ('lora.query.B', (2, 16, 4))]
    >>> weights = {site.name: torch.randn(3, *site.shape) for site in attachment.sites}
    >>> with attachment.bind(weights, None):  # 3 particles with 2 of the 6 rows each
    ...     backbone(torch.ones(6, 5, dtype=torch.long)).last_hidden_state.shape
    torch.Size([6, 5, 16])
    """

    def __init__(self, backbone: PreTrainedModel, kinds: Sequence[Kind]) -> None:
        names = [kind.name for kind in kinds]
        if len(set(names)) < len(names):
            raise ConfigError(f"kinds={names}: each kind at most once")
        self.backbone = backbone
        self._base = cast(PreTrainedModel, backbone.base_model)
        self._layers = layers_of(self._base)
        self.placed = tuple(
            (kind, kind.chosen(self._layers))
            for kind in sorted(kinds, key=lambda kind: ORDER.index(type(kind)))
        )
        self.places = {module: layer for layer in self._layers for module in layer.modules}
        self._prefixed = Prefix.name in names
        if self._prefixed:
            install_attention(self._base)
        install(self._layers)
        backbone.requires_grad_(False)
        backbone.eval()
        scales = measure(self._base, self.places, trained=bool(kinds))
        self.hidden_size = scales.hidden_size
        self.sites: tuple[Site, ...] = tuple(
            site for kind, layers in self.placed for site in kind.sites(layers, scales)
        )
        self._beside = scales.beside
        lowest = min((layer.number for _, layers in self.placed for layer in layers), default=0)
        self.constant = lowest if len(scales.beside) == len(self._layers) else 0
        if self.constant and not self._can_skip():
            self.constant = 0

    @contextmanager
    def bind(
        self,
        weights: Mapping[str, Tensor],
        attention_mask: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Iterator[None]:
        """Run the backbone under these weights: `with attachment.bind(weights, mask): ...`.

        In this thread only, and until the block is left. An inner `bind` on the same backbone
        replaces an outer one.

        Args:
            weights: for every site a tensor `(S, *site.shape)`, of S particles; other names
                are ignored. Run the backbone on R rows, R a multiple of S; row r belongs to
                particle r // (R // S).
            attention_mask: (R, T), over which gates average; gated kinds need it if there is
                padding. The backbone gets its own mask as usual.
            states: (R, T, hidden), what `constant_states` gives for these rows; the layers below
                the first with PEFT weights are then skipped.

        Raises:
            ConfigError: the backbone is in training mode.
        """
        if self._prefixed:
            install_attention(self._base)  # in case the implementation was set meanwhile
        device = next(self._base.parameters()).device.type
        available = torch.amp.is_autocast_available(device)  # not for "meta"
        autocast = available and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self._base.dtype
        bound = Weights(
            self.places,
            self._skipped(0, self.constant if states is not None else 0),
            states,
            placed=self.placed,
            rows=rows_of(self.sites, weights, dtype),
            particles=len(weights[self.sites[0].name]) if self.sites else 1,
            mask=attention_mask,
        )
        with self._in_force(bound):
            yield

    def constant_states(self, inputs: Mapping[str, Any]) -> Tensor:
        """(R, T, hidden) what the first layer with PEFT weights gets, whatever the weights are, for
        these arguments of the base model. The layers from that one on are skipped."""
        bound = Bound(self.places, self._skipped(self.constant, len(self._layers)))
        with torch.no_grad(), self._in_force(bound):
            self._base(**inputs)
        return cast(Tensor, bound.states)

    def layer_means(self, inputs: Mapping[str, Any], mask: Tensor) -> list[Tensor]:
        """(R, D) float32 means over the tokens of `mask` (R, T) of the hidden states that each
        layer gets, in order, and of the last ones; without any weights."""
        means: list[Tensor] = []
        weight = mask.unsqueeze(-1).float()

        def note(states: Tensor) -> None:
            means.append((states.float() * weight).sum(1) / weight.sum(1))

        with torch.no_grad(), self._in_force(Bound(self.places, note=note)):
            note(self._base(**inputs)[0])
        return means

    def check_mode(self) -> None:
        """Refuse a backbone in training mode, whose dropout would change it."""
        if self._base.training:
            raise ConfigError("the backbone is in training mode: call backbone.eval()")

    def _in_force(self, bound: Bound) -> AbstractContextManager[None]:
        self.check_mode()
        return in_force({**BOUND.get(), self._base: bound})

    def _skipped(self, start: int, stop: int) -> dict[Layer, Args | None]:
        return {layer: self._beside[layer] for layer in self._layers[start:stop]}

    def _can_skip(self) -> bool:
        """Whether the transformer computes the same without its constant layers, on random tokens:
        it may use what they compute in other ways than through the layers above them."""
        ids = random_tokens(self._base)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        weights = {site.name: torch.zeros(1, *site.shape).to(ids.device) for site in self.sites}
        kept, outputs = self.constant_states(inputs), []
        for states in (None, kept):
            with torch.no_grad(), self.bind(weights, inputs["attention_mask"], states):
                outputs.append(self._base(**inputs)[0])
        whole, upper = outputs
        return kept.shape[:-1] == ids.shape and torch.allclose(whole, upper, rtol=1e-4, atol=1e-5)
