"""How large the signals in the frozen transformer are, from one forward pass over random tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.isolation import without_autocast
from ..errors import ArchitectureError
from .architectures import Layer, Projection
from .binding import Binding, activate, install

ROWS, LENGTH = 8, 32
_NO_CALL = "never called Hugging Face's attention interface"


@dataclass(frozen=True, eq=False)
class Scales:
    """Root mean squares in the frozen transformer, over tokens and features, as 0-d tensors.

    `beside` is what each layer returns beside the hidden states: None if it returns them alone,
    otherwise the rest of a tuple. Layers that return other tensors too, such as T5's bias of
    positions, are left out.
    """

    device: torch.device
    hidden_size: int
    rms: Mapping[tuple[nn.Module, str | int], Tensor]
    beside: Mapping[nn.Module, tuple[object, ...] | None]

    def inputs(self, projection: Projection) -> Tensor:
        """RMS of the projection's input."""
        return self._of(projection.module, "inputs", "was never run")

    def outputs(self, projection: Projection) -> Tensor:
        """RMS of the projection's own columns of its module's output."""
        return self._of(projection.module, projection.start, "was never run")

    def keys(self, layer: Layer) -> Tensor:
        """RMS of the keys as they enter attention (rotated and normalised)."""
        return self._of(layer.attention, "keys", _NO_CALL)

    def values(self, layer: Layer) -> Tensor:
        """RMS of the values as they enter attention."""
        return self._of(layer.attention, "values", _NO_CALL)

    def _of(self, module: nn.Module, what: str | int, fault: str) -> Tensor:
        if (module, what) not in self.rms:
            raise ArchitectureError(
                f"{type(module).__name__} {fault} in a pass over tokens; expected another "
                "declaration of this architecture (register_architecture)"
            )
        return self.rms[module, what]


@without_autocast()
def measure(base: PreTrainedModel, layers: Sequence[Layer], attention: bool) -> Scales:
    """Run `base` on 8 x 32 random token ids (seeded) and measure every projection.

    `attention` asks for keys and values too; it needs the attention function of `prefix.py`.
    """
    squares: dict[tuple[nn.Module, str | int], list[Tensor]] = {}
    device = next(base.parameters()).device

    def record(module: nn.Module, what: str | int, x: Tensor) -> None:
        # A module that runs several times is averaged over.
        square = x.detach().float().square().mean().to(device)
        squares.setdefault((module, what), []).append(square)

    beside: dict[nn.Module, tuple[object, ...] | None] = {}

    def after(projection: Projection, x: Tensor, output: Tensor) -> Tensor:
        if x.shape[0] > 1:  # one row is shared by all texts (DeBERTa's relative positions)
            start, stop = projection.start, projection.start + projection.outputs
            record(projection.module, "inputs", x)
            record(projection.module, start, output[..., start:stop])
        return output

    def note(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        rest = output[1:] if isinstance(output, tuple) else None
        if args and not any(isinstance(part, Tensor) for part in rest or ()):
            beside[layer] = rest

    def attend(module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        record(module, "keys", key)
        record(module, "values", value)
        return key, value

    binding = Binding(uuid4().int, base, 1, None)
    for layer in layers:
        for projection in layer.projections.values():
            binding.after[projection.module].append(partial(after, projection))
        if attention:
            binding.attend[layer.attention] = partial(attend, layer.attention)
    handles = install(binding)
    handles += [layer.module.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad(), activate(binding):
            ids = random_tokens(base).to(device)
            output = base(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    rms = {key: torch.stack(s).mean().sqrt().clamp_min(1e-6) for key, s in squares.items()}
    return Scales(device, output[0].shape[-1], rms, beside)


def token_limits(base: PreTrainedModel, most: int) -> tuple[int, int]:
    """The number of tokens a transformer knows, and of those, at most `most`, that a text may
    have."""
    config, embedding = base.config, base.get_input_embeddings()
    # Learned positions may start at an offset of a few, so stay clear of the end.
    longest = getattr(config, "max_position_embeddings", None) or most + 4
    vocabulary = int(getattr(embedding, "num_embeddings", None) or config.vocab_size)
    return vocabulary, max(1, min(most, longest - 4))


def random_tokens(base: PreTrainedModel) -> Tensor:
    """(8, 32) token ids, the same on every machine, without the special ones."""
    vocabulary, length = token_limits(base, LENGTH)
    special: set[int | None] = set()
    for name in ("pad", "bos", "eos", "cls", "sep", "mask", "unk", "decoder_start"):
        value = getattr(base.config, f"{name}_token_id", None)
        special.update(value if isinstance(value, list | tuple) else [value])
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    generator = torch.Generator().manual_seed(0)
    return ordinary[torch.randint(len(ordinary), (ROWS, length), generator=generator)]
