"""`RandomPEFT`: a frozen transformer as a function of its random PEFT weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Self

import torch
from pyro.nn import PyroModule
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batch import Batch
from ..data.encoding import probe_of
from ..errors import ConfigError, DataError
from ..peft import Attachment, Kind, presets
from ..peft.sites import Sites
from .backbone import check_weights, load_backbone, load_tokenizer
from .coordinates import Coordinates, PrincipalAxes
from .head import ClassifierHead, Head, check_features, is_causal


class RandomPEFT(PyroModule):
    """A frozen Hugging Face transformer whose PEFT weights and head are random.

    The module owns no trainable tensor: `sites` says which tensors it needs, and
    `network(weights, batch)` runs the transformer under them. The backbone is put in evaluation
    mode (dropout is off, in training too: the randomness is in the weights) and its parameters no
    longer require gradients; nothing else about it changes. `network.to(device)`, or a model's,
    moves the backbone along, but not a guide: load a saved posterior on the other device instead.

    Args:
        backbone: any `AutoModel...` of a known architecture, or its name as for `load_backbone`.
        kinds: PEFT kinds, such as `presets.lora()`, or a single one; () trains the head alone. By
            default `presets.bh_peft()`.
        head: the random output layer: a `Head`, or a `ClassifierHead` on a model that is loaded as
            `AutoModelForSequenceClassification`.
        tokenizer: for text input; by default that of the backbone's checkpoint.

    Attributes:
        sites: every random tensor: those of LoRA, adapter and prefix, then the head's.
        coordinates: from the values of the sites to the transformer's weights.
        axes: the head's principal axes, or None.

    Raises:
        ArchitectureError: the architecture is unknown, or cannot carry one of the kinds.
        ConfigError: an argument has the wrong type, a kind an option that cannot work, or the
            backbone weights that are not finite.

    >>> import torch
    >>> from bhpeft_pyro.testing import tiny_backbone
    >>> network = RandomPEFT(tiny_backbone(), presets.lora(rank=2), Head(3))
    >>> [(site.name, site.shape) for site in network.sites][-2:]
    [('head.weight', (3, 16)), ('head.bias', (3,))]
    >>> batch = Batch({"input_ids": torch.ones(5, 4, dtype=torch.long)})
    >>> draws = {site.name: torch.randn(7, *site.shape) for site in network.sites}
    >>> network(draws, batch).shape  # 7 draws of the weights, 5 texts, 3 outputs
    torch.Size([7, 5, 3])
    """

    @torch.inference_mode(False)  # tensors that are made there can't be trained with elsewhere
    def __init__(
        self,
        backbone: PreTrainedModel | str,
        kinds: Sequence[Kind] | Kind | None = None,
        head: Head | ClassifierHead = Head(2),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            backbone, _ = load_backbone(backbone, classifier=isinstance(head, ClassifierHead))
        if not isinstance(backbone, PreTrainedModel):
            raise ConfigError(  # hooks break what torch.compile has made of one
                f"backbone: got a {type(backbone).__name__}, expected a transformers model; of a "
                "compiled one its _orig_mod"
            )
        check_weights(backbone)
        kinds = (kinds,) if isinstance(kinds, Kind) else kinds
        self.kinds = tuple(presets.bh_peft() if kinds is None else kinds)
        self.head = head
        self._tokenizer = tokenizer
        # In a tuple, so that the backbone's parameters are not this module's: they are not trained,
        # saved, or put in a param store.
        self._frozen = (backbone,)
        self.attachment = Attachment(backbone, self.kinds)
        self.coordinates = Coordinates(self.attachment.sites)
        of_head = head.sites(self.attachment.hidden_size, backbone)
        self.sites = Sites((*self.coordinates.sites, *(s.to(backbone.device) for s in of_head)))
        units = {site.name: site.unit for site in self.sites}
        if bad := [name for name, unit in units.items() if not unit.isfinite().all()]:
            raise ConfigError(
                f"backbone: its hidden states are not finite on random tokens ({bad[0]}); load it "
                "with dtype=torch.float32"
            )
        axes = PrincipalAxes(self.attachment.hidden_size).to(backbone.device)
        self.axes = axes if head.principal else None
        self.in_use = False  # a posterior's weights mean what they do in these coordinates

    def unused(self) -> RandomPEFT:
        """This network, or, if a posterior uses it, another one on the same backbone."""
        if not self.in_use:
            return self
        twin = RandomPEFT(self.backbone, self.kinds, self.head, self._tokenizer)
        twin.load_state_dict(self.state_dict())
        return twin

    @property
    def backbone(self) -> PreTrainedModel:
        """The frozen transformer."""
        return self._frozen[0]

    @property
    def outputs(self) -> int:
        """How many numbers come out for each example (each choice, for multiple choice)."""
        return self.head.outputs

    def aligned(self, head_only: bool = False) -> bool:
        """Whether the head's axes and, unless `head_only`, the sites' coordinates are set."""
        axes = self.axes is None or bool(self.axes.fitted)
        sites = bool(self.coordinates.fitted) or not self.coordinates.outer
        return axes and (head_only or sites)

    @property
    def device(self) -> torch.device:
        """Where the backbone lives, and where weights are sampled."""
        device, of_sites = self.backbone.device, self.sites[-1].unit.device
        if of_sites != device:
            raise ConfigError(
                f"network: its backbone was moved to {device}, its sites are on {of_sites}; "
                f"expected network.to({str(device)!r}), which moves both"
            )
        return device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the module, as PyTorch does, with its backbone and sites."""
        moved = fn(torch.zeros((), dtype=torch.float32, device=self.backbone.device))
        if moved.dtype != torch.float32:
            raise ConfigError(
                f"network: its weights cannot be {moved.dtype}, they are torch.float32 whatever "
                "the backbone is in; for another precision load the backbone with dtype=..."
            )
        self.backbone.to(moved.device)  # type: ignore[arg-type]
        super()._apply(fn, recurse)
        self.sites = Sites(site.to(moved.device) for site in self.sites)
        return self

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the backbone's checkpoint, unless one was given."""
        if self._tokenizer is None:
            if not (name := self.backbone.config._name_or_path):
                raise ConfigError(
                    "RandomPEFT: the backbone names no checkpoint with a tokenizer; pass tokenizer="
                )
            self._tokenizer = load_tokenizer(name)
        return self._tokenizer

    def probe(self) -> list[int] | None:
        """Numbers that identify the tokenizer; None if none has been used."""
        return None if self._tokenizer is None else [*probe_of(self._tokenizer)]

    @cached_property
    def causal(self) -> bool:
        """Whether the backbone is a decoder, whose last token alone has seen the whole text."""
        return is_causal(self.backbone)

    def forward(self, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Run the transformer under `weights`.

        Args:
            weights: for each site a tensor of shape `(*P, *site.shape)`. The particle dims P
                (none: a single draw) are broadcast, so a site without any is the same for all
                draws.
            batch: B examples; `batch.particles` is 1 (every draw sees all of them) or S, the
                number of draws (each sees B/S of them).

        Returns:
            `(*P, B, outputs)`, or `(*P, B, C, outputs)` for multiple choice; B/S in place of B
            where the batch is shared out. Under a Pyro particle plate P = (S, 1), and the B
            examples take the place of the 1, as they do of any last of two or more particle dims
            that is 1.

        Raises:
            ConfigError: weights that are missing, have another shape, or are elsewhere.
            DataError: `batch` is not a `Batch`, or is empty.
        """
        return self.read(weights, batch)[0]

    def read(self, weights: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """The outputs of `forward`, and the features that the head made them of, with D entries in
        place of the outputs."""
        if not isinstance(batch, Batch):
            raise DataError(
                f"batch: expected a Batch, got {type(batch).__name__}; "
                "bh.data.encode(...).batches(...) makes them"
            )
        folded, shape = self._fold(weights, batch.particles, batch.features is not None)
        particles = math.prod(shape)
        if batch.particles not in (1, particles):
            raise ConfigError(
                f"batch.particles={batch.particles}, but the weights carry {particles} draws"
            )
        if batch.features is not None:
            features = batch.shared(batch.features, particles)
        else:
            inputs = batch.rows(particles)
            states = batch.states
            if states is not None:
                rows = batch.shared(states.flatten(-2), particles).flatten(0, 1)
                states = rows.unflatten(-1, states.shape[-2:])
            with self.attachment.bind(folded, _mask(inputs), states):
                features = self._pooled(inputs)
            features = features.unflatten(0, (particles, -1))
        outputs = self.head(features, folded)
        first = (*shape, *batch.shape)
        return outputs.reshape(*first, outputs.shape[-1]), features.reshape(*first, -1)

    def features(self, batch: Batch) -> Tensor:
        """(B, D) or (B, C, D) features of B examples, what the head reads: those of the frozen
        transformer, or inside `bind`, which takes kinds without gates, those under its weights."""
        self.attachment.check_mode()
        with torch.no_grad():
            pooled = self._pooled(batch.rows(1))
        return pooled.reshape(*batch.shape, -1)

    @contextmanager
    def bind(self, weights: Mapping[str, Tensor]) -> Iterator[PreTrainedModel]:
        """Run the backbone itself under `weights`, in this thread: `generate`, or any other pass.

        Args:
            weights: as for a call. With S draws, row r of R belongs to draw r // (R // S).

        Yields:
            The backbone. A key/value cache is valid only for the weights that it was made with.

        Raises:
            ConfigError: as for a call; or a kind is gated: a new token would change the states of
                those before it.
        """
        if any(kind.gated for kind in self.kinds):
            raise ConfigError("bind: gates average over a whole text; expected gated=False kinds")
        folded, _ = self._fold(weights)
        with self.attachment.bind(folded):
            yield self.backbone

    def constant_states(self, batch: Batch) -> Tensor | None:
        """(B, T, D) or (B, C, T, D) for `Batch.states`; None if the lowest layer has PEFT weights,
        or layers pass on more than hidden states."""
        if not self.attachment.constant:
            return None
        whole = batch.split(1)
        states = self.attachment.constant_states(self.accepted(whole.rows(1)))
        return states.unflatten(0, whole.shape)

    def align(self, batches: Iterable[Batch]) -> None:
        """Take the head's principal axes from these texts, unless it has some already.

        `fit` does this with the first round's texts. Later rounds keep the axes: otherwise weights
        would change their meaning between a posterior and the prior it becomes.
        """
        if self.axes is None or self.axes.fitted:
            return
        rows = []
        for batch in batches:
            exist = slice(None) if batch.choices is None else batch.choices.flatten()
            features = self.features(batch.to(self.device)).flatten(0, -2)
            rows.append(check_features(features[exist]))
        self.axes.fit(torch.cat(rows))

    def _fold(
        self, weights: Mapping[str, Tensor], shares: int = 1, features: bool = False
    ) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """The transformer's weights, with the particle dims folded into one leading S.

        Without any, there are as many equal draws as the batch is shared out to. With features,
        only the head's weights are needed.
        """
        device, particles = self.device, {}
        for site in self.sites:
            if site.name not in weights:
                raise ConfigError(f"weights: there is no {site.name!r}; expected every site")
            value = weights[site.name]
            lead = max(0, value.dim() - site.ndim)
            if value.shape[lead:] != site.shape:
                expected = ", ".join(map(str, ("*P", *site.shape)))
                raise ConfigError(
                    f"weights[{site.name!r}] have shape {tuple(value.shape)}, expected ({expected})"
                )
            if value.device != device:
                raise ConfigError(
                    f"weights[{site.name!r}] are on {value.device}, the network is on {device}; "
                    "expected guide and prior there: guide.to(device), or load a saved posterior"
                )
            particles[site.name] = tuple(value.shape[:lead])
        try:
            shape = tuple(torch.broadcast_shapes(*particles.values()))
        except RuntimeError as error:
            dims = ", ".join(f"{name} {lead}" for name, lead in particles.items())
            message = f"weights: the sites' particle dims do not go together: {dims}"
            raise ConfigError(message) from error
        if not shape and shares > 1:
            shape = (shares,)
        needed = [site for site in self.sites if not features or site.role == "head"]
        folded = {
            s.name: weights[s.name].expand(*shape, *s.shape).reshape(-1, *s.shape).float()
            for s in needed
        }
        if not features:
            folded = self.coordinates(folded)
        if len(shape) > 1 and shape[-1] == 1:  # the data plate's place
            shape = shape[:-1]
        return folded, shape

    def accepted(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Those inputs that the backbone takes: tokenizers may give more (`token_type_ids`)."""
        more: dict[str, Any] = {}
        if self.causal:  # positions count from the text's first token, on whichever side padding is
            more["position_ids"] = (_mask(inputs).long().cumsum(-1) - 1).clamp_min(0)
            more["use_cache"] = False
        return {k: v for k, v in {**more, **inputs}.items() if k in self._arguments}

    @cached_property
    def _arguments(self) -> Set[str]:
        return frozenset(inspect.signature(self.backbone.base_model.forward).parameters)

    def _pooled(self, inputs: Mapping[str, Tensor]) -> Tensor:
        accepted, mask = self.accepted(inputs), _mask(inputs)
        pooled = self.head.read(self.backbone, accepted, mask, self.causal)
        return pooled if self.axes is None else self.axes(pooled)


def _mask(inputs: Mapping[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask
