"""How large the signals in the frozen transformer are, from one forward pass over random tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.isolation import without_autocast
from ..errors import ArchitectureError
from .architectures import Layer, Projection
from .hooks import Args, Bound, Kwargs, in_force

ROWS, LENGTH = 8, 32


class Scales(Bound):
    """Root mean squares in the frozen transformer, over tokens and features."""

    def __init__(self, base: PreTrainedModel, places: Mapping[nn.Module, Layer], trained: bool):
        super().__init__(places)
        self.device = base.device
        self.trained = trained  # gradients have to pass through the projections
        self.hidden_size = 0  # of the last layer's states
        # What each layer returns beside its states, as for `skipped`; layers that return other
        # tensors too, such as T5's bias of positions, are left out.
        self.beside: dict[Layer, Args | None] = {}
        # A module that runs several times is averaged over.
        self._squares: dict[tuple[Projection | Layer, str], list[Tensor]] = defaultdict(list)

    def rms(self, of: Projection | Layer, what: str) -> Tensor:
        """A projection's "inputs" or "outputs", or a layer's "keys" or "values" as they enter
        attention (rotated and normalised); a 0-d tensor."""
        if (of, what) not in self._squares:
            module = of.module if isinstance(of, Projection) else of.attention
            raise ArchitectureError(
                f"{type(module).__name__} showed no {what} in a pass over tokens: it was never run "
                "or never called Hugging Face's attention interface; expected another declaration "
                "of this architecture (register_architecture)"
            )
        return torch.stack(self._squares[of, what]).mean().sqrt().clamp_min(1e-6)

    def _record(self, of: Projection | Layer, what: str, x: Tensor) -> None:
        self._squares[of, what].append(x.detach().float().square().mean().to(self.device))

    def run(self, layer: Layer, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        output = forward(*args, **kwargs)
        rest = output[1:] if isinstance(output, tuple) else None
        if args and not any(isinstance(part, Tensor) for part in rest or ()):
            self.beside[layer] = rest
        return output

    def project(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        layer = self.places[module]
        for target, p in layer.projections.items():
            # One row is shared by all texts, as DeBERTa's relative positions.
            if p.module is module and len(x) > 1:
                self._record(p, "inputs", x)
                self._record(p, "outputs", output[..., p.start : p.start + p.outputs])
                if self.trained:
                    _check_gradient(module, x[:1], f"layer {layer.number}, {target}")
        return output

    def attend(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self._record(self.places[module], "keys", key)
        self._record(self.places[module], "values", value)
        return key, value


def _check_gradient(module: nn.Module, x: Tensor, where: str) -> None:
    """Quantised layers made for inference give an output without a gradient, and no error: a fit
    would leave all weights but those of the last layer as they were."""
    with torch.enable_grad():
        passes = module.forward(x.detach().clone().requires_grad_()).requires_grad
    if not passes:
        raise ArchitectureError(
            f"backbone: {where} ({type(module).__module__}.{type(module).__name__}) lets no "
            "gradient through, so PEFT weights below it could not learn; expected layers that can "
            "be trained through (quantised ones often cannot). The head alone needs none: "
            "presets.head_only()"
        )


@without_autocast()
def measure(base: PreTrainedModel, places: Mapping[nn.Module, Layer], trained: bool) -> Scales:
    """Run `base`, with its hooks, on 8 x 32 random token ids (seeded)."""
    ids = random_tokens(base)
    scales = Scales(base, places, trained)
    with torch.no_grad(), in_force({base: scales}):
        scales.hidden_size = base(input_ids=ids, attention_mask=torch.ones_like(ids))[0].shape[-1]
    return scales


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
    ids = ordinary[torch.randint(len(ordinary), (ROWS, length), generator=generator)]
    return ids.to(base.device)
