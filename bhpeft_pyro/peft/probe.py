"""One forward pass of the frozen transformer that measures how large its signals are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import Block, Projection
from .binding import Binding, activate, install, new_token

__all__ = ["Scales", "measure"]

ROWS, LENGTH = 8, 32


@dataclass(eq=False)
class Scales:
    """Root mean squares in the frozen transformer, over tokens and features, as 0-d tensors."""

    hidden_size: int
    device: torch.device
    _squares: dict[tuple[nn.Module, str | int], list[Tensor]] = field(default_factory=dict)

    def record(self, module: nn.Module, what: str | int, x: Tensor) -> None:
        """Note the mean square of `x`; a module that runs several times is averaged over."""
        self._squares.setdefault((module, what), []).append(x.detach().float().square().mean())

    def _rms(self, module: nn.Module, what: str | int) -> Tensor:
        mean = torch.stack([s.to(self.device) for s in self._squares[module, what]]).mean()
        return mean.sqrt().clamp_min(1e-6)

    def inputs(self, projection: Projection) -> Tensor:
        """Of what the projection is applied to."""
        return self._rms(projection.module, "inputs")

    def outputs(self, projection: Projection) -> Tensor:
        """Of what it gives."""
        return self._rms(projection.module, projection.start)

    def keys(self, block: Block) -> Tensor:
        """Of the keys as they enter attention (rotated and normalised)."""
        return self._rms(block.attention, "keys")

    def values(self, block: Block) -> Tensor:
        """Of the values as they enter attention."""
        return self._rms(block.attention, "values")


def measure(base: PreTrainedModel, blocks: Sequence[Block], attention: bool) -> Scales:
    """Run `base` on 8 x 32 random token ids (seeded) and measure every projection.

    `attention` asks for keys and values too; it needs the attention function of
    `attention.py` in place.
    """
    device = next(base.parameters()).device
    scales = Scales(0, device)
    binding = Binding(new_token(), base, 1, None)
    for block in blocks:
        for projection in block.projections.values():
            _watch(binding, scales, projection)
        if attention:
            _watch_attention(binding, scales, block.attention)
    handles = install(binding)
    try:
        with torch.no_grad(), activate(binding):
            ids = _token_ids(base).to(device)
            output = base(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    scales.hidden_size = output[0].shape[-1]
    return scales


def _watch(binding: Binding, scales: Scales, projection: Projection) -> None:
    module, start, stop = projection.module, projection.start, projection.start + projection.outputs

    def after(x: Tensor, output: Tensor) -> Tensor:
        # One row is something that all rows share (DeBERTa's relative positions).
        if x.shape[0] > 1:
            scales.record(module, "inputs", x)
            scales.record(module, start, output[..., start:stop])
        return output

    binding.add_after(module, after)


def _watch_attention(binding: Binding, scales: Scales, attention: nn.Module) -> None:
    def attend(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        scales.record(attention, "keys", key)
        scales.record(attention, "values", value)
        return key, value

    binding.attend[attention] = attend


def _token_ids(base: PreTrainedModel) -> Tensor:
    """(8, 32) token ids, the same on every machine, without the special ones."""
    config = base.config
    embedding = base.get_input_embeddings()
    vocabulary = int(getattr(embedding, "num_embeddings", config.vocab_size))
    special: set[int | None] = set()
    for name in ("pad", "bos", "eos", "cls", "sep", "mask", "unk", "decoder_start"):
        value = getattr(config, f"{name}_token_id", None)
        special.update(value if isinstance(value, list | tuple) else [value])
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    # Learned positions may start at an offset of a few, so stay clear of the end.
    longest = getattr(config, "max_position_embeddings", None) or LENGTH + 4
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(
        len(ordinary), (ROWS, max(1, min(LENGTH, longest - 4))), generator=generator
    )
    return ordinary[picks]
