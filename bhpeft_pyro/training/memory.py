"""An estimate of the memory of a fit, before any weights are loaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from ..errors import ConfigError, GuideError
from ..guides import Budget, budget
from ..model.head import Head
from ..model.network import RandomPEFT
from ..peft import Kind
from ..peft.architectures import positions_of

__all__ = ["Plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """Memory in bytes.

    Attributes:
        backbone: the frozen transformer, in the precision of its weights.
        activations: what the forward pass of a training step keeps for its backward pass.
        checkpointed: the same with gradient checkpointing, including the layer that is recomputed.
        guide: one component during its fit. Components are fitted one after the other.
    """

    backbone: int
    activations: int
    checkpointed: int
    guide: Budget

    def __str__(self) -> str:
        rows = {
            "transformer": self.backbone,
            "activations of a training step": self.activations,
            "  with gradient checkpointing": self.checkpointed,
            f"guide of {self.guide.latents:,} weights": self.guide.bytes,
        }
        return "\n".join(f"{name:32}{size / 2**30:8.2f} GiB" for name, size in rows.items())


def plan(
    backbone: PreTrainedModel,
    kinds: Sequence[Kind] | Kind | None = None,
    head: Head = Head(2),
    guide: str = "laplace",
    *,
    batch_size: int = 16,
    tokens: int = 256,
) -> Plan:
    """The memory that a fit would take, for a backbone on the device "meta".

    On that device PyTorch computes shapes but no numbers. `load_backbone(name, device="meta")`
    makes such a backbone from its configuration alone.

    Args:
        backbone: without weights.
        kinds, head: as for `RandomPEFT`.
        guide: "laplace", "normal", "delta", or one of Pyro's by name.
        batch_size: sequences in a training step.
        tokens: their length; at most what the backbone can read.

    Raises:
        ConfigError: the backbone is not on the device "meta".
        GuideError: the guide is unknown, or its size cannot be computed.

    >>> from transformers import AutoModel
    >>> from bhpeft_pyro.testing import tiny_backbone
    >>> with torch.device("meta"):
    ...     backbone = AutoModel.from_config(tiny_backbone().config)
    >>> plan(backbone).guide.latents
    2210
    """
    if backbone.device.type != "meta":
        raise ConfigError(
            f"backbone: it is on {backbone.device}, expected one without weights: "
            'load_backbone(name, device="meta")'
        )
    backbone = copy.deepcopy(backbone)  # it is computed with and without checkpointing
    if backbone.is_gradient_checkpointing:
        backbone.gradient_checkpointing_disable()
        backbone.disable_input_require_grads()
    tokens = min(tokens, positions_of(backbone) or tokens)
    network = RandomPEFT(backbone, kinds, head)
    shapes = [site.shape for site in network.sites]
    size = budget(guide, sum(map(prod, shapes)), shapes)
    if size is None:
        raise GuideError(f"guide: the size of {guide!r} is not known")
    activations = checkpointed = _kept(network, batch_size, tokens)
    if backbone.supports_gradient_checkpointing:
        backbone.gradient_checkpointing_enable()
        backbone.disable_input_require_grads()  # would keep what is below the first PEFT weights
        layer = activations // backbone.config.num_hidden_layers
        checkpointed = _kept(network, batch_size, tokens) + layer
    weights = [*backbone.base_model.parameters(), *backbone.base_model.buffers()]
    return Plan(sum(weight.nbytes for weight in weights), activations, checkpointed, size)


def _kept(network: RandomPEFT, rows: int, tokens: int) -> int:
    """Bytes that the transformer's forward pass keeps for the backward pass."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    weights = {
        site.name: torch.zeros(1, *site.shape, device="meta", requires_grad=True)
        for site in network.attachment.sites
    }
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    with saved_tensors_hooks(keep, lambda tensor: tensor), network.attachment.bind(weights):
        network.backbone.base_model(input_ids=ids)
    frozen = {weight.untyped_storage()._cdata for weight in network.backbone.parameters()}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in frozen)
