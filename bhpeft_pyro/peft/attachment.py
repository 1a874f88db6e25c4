"""PEFT kinds on a frozen transformer."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ArchitectureError, ConfigError
from .adapter import Adapter
from .architectures import architecture_of, blocks_of
from .attention import claim, measure, release
from .binding import Binding, activate, install, new_token
from .checkpointing import check_gradients, install_checkpointing, wants_checkpointing
from .kinds import Kind
from .lora import LoRA
from .prefix import Prefix
from .sites import Site

__all__ = ["Attachment"]

ORDER = (LoRA, Adapter, Prefix)


class Attachment:
    """The sites of some PEFT kinds on a backbone, and the backbone under given weights of theirs.

    The backbone is frozen (no gradients, evaluation mode, so no dropout) and gets permanent hooks
    that do nothing outside `bind`, where its outputs are exactly as before. They go when the
    attachment is garbage-collected. With a `Prefix`, `backbone.config._attn_implementation` reads
    "bhpeft_sdpa" (or "bhpeft_eager", under which Hugging Face refuses to set
    `config.output_attentions`; the argument works) meanwhile.

    Args:
        backbone: any supported Hugging Face model, with or without a head of its own.
        kinds: any union of `LoRA`, `Adapter` and `Prefix`, each at most once; () is allowed.

    Attributes:
        sites: all random tensors: LoRA's, the adapter's, the prefix's.
        hidden_size: width of the base model's last hidden states.

    >>> from transformers import BertConfig, BertModel
    >>> size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    >>> backbone = BertModel(BertConfig(intermediate_size=32, **size))
    >>> attachment = Attachment(backbone, [LoRA(("query",), rank=4)])
    >>> [(site.name, site.shape) for site in attachment.sites]
    [('lora.query.A', (2, 4, 16)), ('lora.query.B', (2, 16, 4))]
    >>> weights = {site.name: torch.randn(3, *site.shape) for site in attachment.sites}
    >>> with attachment.bind(weights, None):  # 3 particles with 2 of the 6 rows each
    ...     backbone(torch.ones(6, 5, dtype=torch.long)).last_hidden_state.shape
    torch.Size([6, 5, 16])
    """

    def __init__(self, backbone: PreTrainedModel, kinds: Sequence[Kind]) -> None:
        self.backbone = backbone
        self.kinds = _checked(kinds)
        self._base = cast(PreTrainedModel, backbone.base_model)
        self._token = new_token()
        self._blocks = blocks_of(self._base)
        self._architecture = architecture_of(self._base.config.model_type)
        self._wired = tuple((kind, kind.blocks(self._blocks)) for kind in self.kinds)
        for kind, blocks in self._wired:
            kind.check(blocks)
        self._prefixed = any(isinstance(kind, Prefix) for kind in self.kinds)
        if self._prefixed and not self._architecture.prefix:
            raise ArchitectureError(
                f"prefix: {self._base.config.model_type!r} computes its attention itself, so "
                "that it cannot carry a prefix; LoRA and Adapter work"
            )

        self._undo: list[Callable[[], None]] = []
        self._finalizer = weakref.finalize(self, _undo_all, self._undo)
        if self._prefixed:
            claim(self._base.config, self._token)
            self._undo.append(partial(release, self._base.config, self._token))
        backbone.requires_grad_(False)
        backbone.eval()
        scales = measure(self._base, self._blocks, attention=self._prefixed)
        if self.kinds:
            check_gradients(self._base, self._blocks)
        self.hidden_size = scales.hidden_size
        self.sites: tuple[Site, ...] = tuple(
            site for kind, blocks in self._wired for site in kind.sites(blocks, scales)
        )
        shapes = {site.name: torch.empty(1, *site.shape, device="meta") for site in self.sites}
        self._undo += [handle.remove for handle in install(self._binding(shapes, None))]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same kinds on a copy of the backbone, with hooks of its own."""
        backbone = copy.deepcopy(self.backbone, memo)
        _undo_all(copy.deepcopy(self._undo, memo))  # this one's hooks came with the copy
        new = memo[id(self)] = type(self)(backbone, self.kinds)
        return new

    @contextmanager
    def bind(
        self, weights: Mapping[str, Tensor], attention_mask: Tensor | None = None
    ) -> Iterator[None]:
        """Run the backbone under these weights: `with attachment.bind(weights, mask): ...`.

        Only in this thread, and until the block is left (gradient checkpointing takes the weights
        along). An inner `bind` on the same backbone replaces an outer one.

        Args:
            weights: for every site a tensor `(S, *site.shape)`, of S particles; other names
                are ignored. The backbone must be run on R rows, R a multiple of S; row r belongs to
                particle r // (R // S).
            attention_mask: (R, T), over which gates average; needed by gated kinds if there is
                padding. The backbone gets its own mask as usual.
        """
        self.check_mode()
        if self._prefixed:
            claim(self._base.config, self._token)  # in case the implementation was set meanwhile
        if any(wants_checkpointing(block.layer) for block in self._blocks):
            for block in self._blocks:
                remove = install_checkpointing(block.layer)
                if remove is not None:
                    self._undo.append(remove)
        with activate(self._binding(weights, attention_mask)):
            yield

    def check_mode(self) -> None:
        """Refuse a backbone in training mode."""
        if self._base.training:
            raise ConfigError(
                "the backbone is in training mode, in which dropout would change it: call "
                "backbone.eval()"
            )

    def _binding(self, weights: Mapping[str, Tensor], mask: Tensor | None) -> Binding:
        particles = self._particles(weights)
        if mask is not None and mask.ndim != 2:
            raise ConfigError(f"attention_mask must be (rows, tokens), got {tuple(mask.shape)}")
        parameter = next(self._base.parameters())
        device = parameter.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self._base.dtype
        binding = Binding(self._token, self._base, particles, mask, dtype)
        binding.layers = frozenset(block.layer for block in self._blocks)
        if self._architecture.positions:
            binding.content = {
                block.projections[target].module: block.attention
                for block in self._blocks
                for target in ("query", "key")
            }
        for kind, blocks in self._wired:
            kind.wire(weights, blocks, binding)
        return binding

    def _particles(self, weights: Mapping[str, Tensor]) -> int:
        """S, after a check of every shape."""
        counts = {}
        for site in self.sites:
            if site.name not in weights:
                raise ConfigError(f"weights lacks the site {site.name!r} of shape {site.shape}")
            shape = tuple(weights[site.name].shape)
            if shape[1:] != site.shape or len(shape) != site.ndim + 1:
                raise ConfigError(
                    f"weights[{site.name!r}] must have shape (particles, *{site.shape}), "
                    f"got {shape}"
                )
            counts[shape[0]] = site.name
        if len(counts) > 1:
            raise ConfigError(f"sites differ in their number of particles: {counts}")
        return next(iter(counts), 1)


def _checked(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """In the order in which they act: an adapter sees what LoRA did to the block it follows."""
    for kind in kinds:
        if not isinstance(kind, ORDER):
            raise ConfigError(f"kinds must be LoRA, Adapter or Prefix objects, got {kind!r}")
    names = [kind.name for kind in kinds]
    if len(set(names)) < len(names):
        raise ConfigError(f"kinds={names}: each kind at most once")
    return tuple(sorted(kinds, key=lambda kind: ORDER.index(type(kind))))


def _undo_all(undo: list[Callable[[], None]]) -> None:
    for function in undo:
        function()
