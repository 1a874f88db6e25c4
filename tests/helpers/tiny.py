"""Tiny random transformers of every supported architecture: two layers, width 16 to 32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel, T5EncoderModel

from bhpeft_pyro.peft import Attachment

VOCABULARY = 60
MODEL_TYPES = (
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "electra",
    "albert",
    "modernbert",
    "gpt2",
    "opt",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "t5",
    "mpnet",
    "deberta-v2",
)
WITHOUT_PREFIX = ("deberta-v2", "mpnet", "gemma2")
CAUSAL = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")

_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_OPTIONS: dict[str, dict[str, Any]] = {
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "mpnet": {"pad_token_id": 1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16, "num_hidden_groups": 1},
    "modernbert": {
        "pad_token_id": 0,
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "t5": {
        "d_model": 32,
        "d_ff": 48,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
    },
}


def config(model_type: str, **options: Any) -> Any:
    """A tiny configuration; `options` go over the defaults."""
    base: dict[str, Any] = {}
    if model_type in CAUSAL and model_type not in ("gpt2", "opt"):
        base = dict(_DECODER)
    elif model_type == "opt":
        base = {k: v for k, v in _ENCODER.items() if k != "intermediate_size"}
    elif model_type not in ("gpt2", "distilbert", "t5"):
        base = dict(_ENCODER)
    base.update({"vocab_size": VOCABULARY})
    base.update(_OPTIONS.get(model_type, {}))
    base.update({"bos_token_id": 2, "eos_token_id": 3, **options})
    return AutoConfig.for_model(model_type, **base)


def build(model_type: str, seed: int = 0, auto: Any = AutoModel, **options: Any) -> PreTrainedModel:
    """A tiny model with random weights, in evaluation mode.

    The weights are drawn wider than Hugging Face's 0.02, so that every part of the network has a
    visible effect on its output.
    """
    attention = options.pop("attn_implementation", None)
    chosen = config(model_type, **options)
    if model_type == "t5" and auto is AutoModel:
        auto = T5EncoderModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if attention is not None:
            chosen._attn_implementation = attention
        model = auto(chosen) if auto is T5EncoderModel else auto.from_config(chosen)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.3)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.1)
    return model.eval()


def inputs(rows: int = 4, length: int = 9, seed: int = 1, padded: int = 3) -> dict[str, Any]:
    """Random token ids with a mask; the second half of the rows ends in `padded` pads."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[rows // 2 :, -padded:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def drawn(
    sites: Iterable[Any], *particles: int, seed: int | None = None, scale: float = 1.0
) -> dict[str, Tensor]:
    """N(0, (scale * unit)^2) weights (*particles, *shape) for every site; without a seed, by the
    global random state."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return {
        s.name: scale * s.unit * torch.randn((*particles, *s.shape), generator=generator)
        for s in sites
    }


def draw(sites: Any, particles: int = 1, seed: int = 2, scale: float = 1.0) -> dict[str, Any]:
    """The same (S, *shape), ready for gradients."""
    weights = drawn(sites, particles, seed=seed, scale=scale)
    return {name: value.requires_grad_() for name, value in weights.items()}


def take(weights: dict[str, Tensor], *index: int) -> dict[str, Tensor]:
    """One draw."""
    return {name: value[index] for name, value in weights.items()}


def weights_for(model_type: str, kinds: Any, particles: int = 1) -> dict[str, Any]:
    """`draw` for the sites of some kinds on such a model."""
    return draw(Attachment(build(model_type), kinds).sites, particles)


def run(model: Any, batch: dict[str, Any]) -> Tensor:
    """A model's first output: the last hidden states, or a head's logits."""
    with torch.no_grad():
        return model(**batch)[0]


def bound(attachment: Attachment, weights: dict[str, Any], batch: dict[str, Any]) -> Tensor:
    """The first output under these weights."""
    with attachment.bind(weights, batch["attention_mask"]):
        return run(attachment.backbone, batch)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def attention_calls(attachment, layer=0):
    """A list that gets an entry whenever the attention of that layer runs."""
    calls = []
    attachment._layers[layer].attention.register_forward_hook(lambda *_: calls.append(1))
    return calls
