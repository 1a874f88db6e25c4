"""Kinds of PEFT on a frozen transformer."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from uuid import uuid4

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base.checks import shown
from ..errors import ArchitectureError, ConfigError
from .architectures import Layer, architecture_of, layers_of
from .binding import Binding, LayerForward, activate, install
from .kinds import Kind
from .low_rank import Adapter, LoRA
from .prefix import Prefix, claim, release
from .signals import measure, random_tokens
from .sites import Site

ORDER = (LoRA, Adapter, Prefix)


class Attachment:
    """The sites of some PEFT kinds on a backbone, and the backbone under given weights.

    The backbone is frozen (no gradients, evaluation mode, so no dropout) and gets permanent hooks
    that do nothing outside `bind`. They are removed when the attachment is garbage-collected. With
    a `Prefix`, `backbone.config._attn_implementation` reads "bhpeft_sdpa" or "bhpeft_eager" until
    then. A copy, or one from a pickle, has a backbone and hooks of its own.

    Args:
        backbone: any supported Hugging Face model, with or without a head.
        kinds: `LoRA`, `Adapter` and `Prefix`, each at most once; () is allowed.

    Attributes:
        sites: all random tensors: LoRA's, the adapter's, the prefix's.
        wired: each kind with the layers that carry it.
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
        self.backbone = backbone
        self.kinds = _checked(kinds)
        self._base = cast(PreTrainedModel, backbone.base_model)
        self._layers = layers_of(self._base)
        self._architecture = architecture_of(self._base.config.model_type)
        self.wired = tuple((kind, kind.chosen(self._layers)) for kind in self.kinds)
        self._prefixed = any(isinstance(kind, Prefix) for kind in self.kinds)
        if self._prefixed and not self._architecture.prefix:
            raise ArchitectureError(
                f"prefix: {self._base.config.model_type!r} computes its attention itself and "
                "cannot carry a prefix; LoRA and Adapter work (--preset lora)"
            )

        self._register()
        backbone.requires_grad_(False)
        backbone.eval()
        scales = measure(self._base, self._layers, attention=self._prefixed)
        if self.kinds:
            _check_gradients(self._base, self._layers)
        self.hidden_size = scales.hidden_size
        self.sites: tuple[Site, ...] = tuple(
            site for kind, layers in self.wired for site in kind.sites(layers, scales)
        )
        lowest = min((layer.number for _, layers in self.wired for layer in layers), default=0)
        self.constant = lowest if all(b.module in scales.beside for b in self._layers) else 0
        self._beside = scales.beside
        self._install()
        if not self._can_skip():
            self.constant = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or from a pickle: hooks of its own take the place of the original's."""
        vars(self).update(state)
        _undo_all(self._undo)
        self._register()
        self._install()

    def _register(self) -> None:
        """Take a token, and the attention under a prefix, until this is garbage-collected."""
        self._token = uuid4().int  # of no other attachment, in any process
        self._undo: list[Callable[[], None]] = []
        weakref.finalize(self, _undo_all, self._undo)
        if self._prefixed:
            claim(self._base.config, self._token)
            self._undo.append(partial(release, self._base.config, self._token))

    def _install(self) -> None:
        shapes = {site.name: torch.empty(1, *site.shape, device="meta") for site in self.sites}
        self._undo += [handle.remove for handle in install(self._binding(shapes, None))]

    def bare_copy(self) -> PreTrainedModel:
        """A copy of the backbone without this attachment's hooks, which come with it at first."""
        memo: dict[int, Any] = {}
        backbone = copy.deepcopy(self.backbone, memo)
        _undo_all(copy.deepcopy(self._undo, memo))
        return backbone

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
            ConfigError: the backbone is in training mode, weights are missing or misshapen, or no
                layers can be skipped.
        """
        self.check_mode()
        if self._prefixed:
            claim(self._base.config, self._token)  # in case the implementation was set meanwhile
        if states is not None and not self.constant:
            raise ConfigError("states: all layers have to run here; expected None")
        with self._in_force(self._binding(weights, attention_mask, states)):
            yield

    def constant_states(self, inputs: Mapping[str, Any]) -> Tensor:
        """(R, T, hidden) what the first layer with PEFT weights gets, whatever the weights are.

        Args:
            inputs: keyword arguments of the base model, for R rows. Its layers from that one on are
                skipped.
        """
        self.check_mode()
        seen: list[Tensor] = []
        skipped = {b.module: self._beside[b.module] for b in self._layers[self.constant :]}
        binding = Binding(self._token, self._base, 1, None, skipped=skipped)
        binding.before[self._layers[self.constant].module].append(seen.append)
        with torch.no_grad(), self._in_force(binding):
            self._base(**inputs)
        return seen[0]

    def layer_means(self, inputs: Mapping[str, Any], mask: Tensor) -> list[Tensor]:
        """(R, D) float32 means over tokens of the hidden states that each layer gets, in order, and
        of the last ones; without any weights.

        Args:
            inputs: keyword arguments of the base model, for R rows.
            mask: (R, T), 1 for real tokens.
        """
        self.check_mode()
        means: list[Tensor] = []
        weight = mask.unsqueeze(-1).float()

        def note(states: Tensor) -> None:
            means.append((states.float() * weight).sum(1) / weight.sum(1))

        binding = Binding(self._token, self._base, 1, None)
        for layer in self._layers:
            binding.before[layer.module].append(note)
        with torch.no_grad(), activate(binding):
            note(self._base(**inputs)[0])
        return means

    def _can_skip(self) -> bool:
        """Whether the transformer computes the same without its constant layers, on random tokens.

        It may use what they compute in other ways than through the layers above them.
        """
        if not self.constant:
            return False
        ids = random_tokens(self._base).to(self._base.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        weights = {site.name: torch.zeros(1, *site.shape).to(ids.device) for site in self.sites}
        kept, outputs = self.constant_states(inputs), []
        with torch.no_grad():
            for states in (None, kept):
                with self.bind(weights, inputs["attention_mask"], states):
                    outputs.append(self._base(**inputs)[0])
        whole, upper = outputs
        return kept.shape[:-1] == ids.shape and torch.allclose(whole, upper, rtol=1e-4, atol=1e-5)

    @contextmanager
    def _in_force(self, binding: Binding) -> Iterator[None]:
        """Put a binding in force, also on layers that are skipped."""
        for layer in binding.skipped:
            if not isinstance(layer.forward, LayerForward):
                self._undo.append(LayerForward(layer).remove)
        with activate(binding):
            yield

    def check_mode(self) -> None:
        """Refuse a backbone in training mode, whose dropout would change it."""
        if self._base.training:
            raise ConfigError("the backbone is in training mode: call backbone.eval()")

    def _binding(
        self, weights: Mapping[str, Tensor], mask: Tensor | None, states: Tensor | None = None
    ) -> Binding:
        particles = self._particles(weights)
        if mask is not None and mask.ndim != 2:
            raise ConfigError(f"attention_mask must be (rows, tokens), got {tuple(mask.shape)}")
        device = next(self._base.parameters()).device.type
        available = torch.amp.is_autocast_available(device)  # not for "meta"
        autocast = available and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self._base.dtype
        binding = Binding(self._token, self._base, particles, mask, dtype)
        if self._architecture.positions:
            binding.content = {
                layer.projections[target].module: layer.attention
                for layer in self._layers
                for target in ("query", "key")
            }
        for layer in self._layers:  # `layer_means` has them all
            binding.before[layer.module] = []
        if self.constant:
            binding.before[self._layers[self.constant].module].append(lambda _: states)
        if states is not None:
            below = self._layers[: self.constant]
            binding.skipped = {layer.module: self._beside[layer.module] for layer in below}
        for kind, layers in self.wired:
            kind.wire(weights, layers, binding)
        return binding

    def _particles(self, weights: Mapping[str, Tensor]) -> int:
        """S, after a check of every shape."""
        particles: int | None = None
        for site in self.sites:
            shape = tuple(getattr(weights.get(site.name), "shape", ()))
            if shape[1:] != site.shape or not shape or particles not in (None, shape[0]):
                raise ConfigError(
                    f"weights[{site.name!r}]: expected shape (S, *{site.shape}), S the number of "
                    f"particles and the same for every site; got {shape}"
                )
            particles = shape[0]
        return 1 if particles is None else particles


def _checked(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """In the order in which they act: an adapter sees what LoRA did to the block it follows."""
    for kind in kinds:
        if not isinstance(kind, ORDER):
            raise ConfigError(f"kinds must be LoRA, Adapter or Prefix objects, got {shown(kind)}")
    names = [kind.name for kind in kinds]
    if len(set(names)) < len(names):
        raise ConfigError(f"kinds={names}: each kind at most once")
    return tuple(sorted(kinds, key=lambda kind: ORDER.index(type(kind))))


def _undo_all(undo: list[Callable[[], None]]) -> None:
    for function in undo:
        function()


def _check_gradients(base: PreTrainedModel, layers: Sequence[Layer]) -> None:
    """Run each projection on one row, and back; raise at the first that lets no gradient through.

    Quantised layers made for inference give an output without a gradient, and no error: a fit
    would leave all weights but those of the last layer as they were.
    """
    inputs = {
        projection.module: (f"layer {layer.number}, {target}", projection.inputs)
        for layer in layers
        for target, projection in layer.projections.items()
    }
    for module, (where, width) in inputs.items():
        try:
            weight = getattr(module, "weight", None)  # a layer may be kept in float32
            dtype = base.dtype
            if isinstance(weight, Tensor) and weight.is_floating_point():
                dtype = weight.dtype
            with torch.enable_grad():  # the caller may have turned it off
                x = torch.zeros(1, width, device=base.device, dtype=dtype, requires_grad=True)
                gradient = torch.autograd.grad(module(x).sum(), x, allow_unused=True)[0]
            cause = None
        except RuntimeError as error:  # the output needs no gradient, or there is no way back
            gradient, cause = None, error
        if gradient is None:
            raise ArchitectureError(
                f"backbone: {where} ({type(module).__module__}.{type(module).__name__}) lets no "
                "gradient through, so PEFT weights below it could not learn; expected layers that "
                "can be trained through (quantised ones often cannot). The head alone needs none: "
                "presets.head_only()"
            ) from cause
