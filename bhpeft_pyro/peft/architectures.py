"""Where each Hugging Face architecture keeps its projections, and how to declare another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import ArchitectureError

__all__ = ["TARGETS", "Architecture", "Layer", "Part", "Projection", "register_architecture"]


TARGETS = ("query", "key", "value", "output", "ffn_in", "ffn_gate", "ffn_out")
"""The projections of a layer. `ffn_gate` is there only in gated feed-forward blocks."""


@dataclass(frozen=True)
class Part:
    """One part of a fused projection: GPT-2's value is `Part("attn.c_attn", 2, 3)`.

    Attributes:
        path: the fused module, from the layer.
        index: which part of its output, counted from 0.
        sizes: the number of equal parts, or a function from the configuration to their sizes.
    """

    path: str
    index: int
    sizes: int | Callable[[PretrainedConfig], Sequence[int]]


Where = str | Part | tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """Paths from the base model to its layers, and from a layer to its projections.

    Attributes:
        layers: path to the list of layers; "*" stands for every member of a list on the way.
        query, key, value, output: the attention's projections.
        ffn_in, ffn_out: first and last projection of the feed-forward block. In a gated block
            (GLU) `ffn_in` is the branch without the activation, `ffn_gate` the one with it.
        attention: the module that holds the heads.
        prefix: whether that module calls Hugging Face's attention interface, and computes what
            "sdpa" does, without which it cannot carry a prefix.
        positions: whether query and key also project relative positions, which all rows of the
            batch share (DeBERTa); LoRA then acts on the hidden states only.

    A path may be a tuple of alternatives, of which the first that exists is taken; if none does, as
    in (), there is no such projection.

    >>> bert = architecture_of("bert")
    >>> bert.layers, bert.ffn_out
    ('encoder.layer', 'output.dense')
    """

    layers: str
    query: Where
    key: Where
    value: Where
    output: Where
    ffn_in: Where
    ffn_out: Where
    attention: str
    ffn_gate: Where = ()
    prefix: bool = True
    positions: bool = False


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map (in -> out) in the frozen transformer: `out` columns from `start` on."""

    module: nn.Module
    inputs: int
    outputs: int
    start: int
    total: int

    def whole(self, up: Tensor) -> Tensor:
        """Rows (..., outputs, r) of a map into the module's whole output: zeros in those of other
        projections."""
        others = (0, 0, self.start, self.total - self.start - self.outputs)
        return nn.functional.pad(up, others) if any(others) else up


@dataclass(frozen=True, eq=False)
class Layer:
    """One distinct layer; `number` counts them from 0 (shared layers count once)."""

    number: int
    module: nn.Module
    attention: nn.Module
    projections: Mapping[str, Projection]
    positions: bool

    @property
    def modules(self) -> set[nn.Module]:
        """All that are named above."""
        return {self.module, self.attention, *(p.module for p in self.projections.values())}


_POSITIONS = ("position_embeddings", "embed_positions", "wpe")  # rotary and relative ones have none

_BERT = Architecture(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    attention="attention.self",
)
_LLAMA = Architecture(
    layers="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    ffn_in="mlp.up_proj",
    ffn_gate="mlp.gate_proj",
    ffn_out="mlp.down_proj",
    attention="self_attn",
)
_REGISTRY: dict[str, Architecture] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"), _LLAMA),
    "gemma2": replace(_LLAMA, prefix=False),  # "sdpa" has no soft capping
    "deberta-v2": replace(
        _BERT,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        prefix=False,
        positions=True,
    ),
    "mpnet": replace(
        _BERT,
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        output="attention.attn.o",
        attention="attention.attn",
        prefix=False,
    ),
    "distilbert": Architecture(
        layers="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        attention="attention",
    ),
    "albert": Architecture(
        layers="encoder.albert_layer_groups.*.albert_layers",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        output="attention.dense",
        ffn_in="ffn",
        ffn_out="ffn_output",
        attention="attention",
    ),
    "modernbert": Architecture(
        layers="layers",
        query=Part("attn.Wqkv", 0, 3),
        key=Part("attn.Wqkv", 1, 3),
        value=Part("attn.Wqkv", 2, 3),
        output="attn.Wo",
        ffn_gate=Part("mlp.Wi", 0, 2),
        ffn_in=Part("mlp.Wi", 1, 2),
        ffn_out="mlp.Wo",
        attention="attn",
    ),
    "gpt2": Architecture(
        layers="h",
        query=Part("attn.c_attn", 0, 3),
        key=Part("attn.c_attn", 1, 3),
        value=Part("attn.c_attn", 2, 3),
        output="attn.c_proj",
        ffn_in="mlp.c_fc",
        ffn_out="mlp.c_proj",
        attention="attn",
    ),
    "opt": replace(
        _LLAMA,
        layers="decoder.layers",
        output="self_attn.out_proj",
        ffn_in="fc1",
        ffn_gate=(),
        ffn_out="fc2",
    ),
    "t5": Architecture(
        layers="encoder.block",
        query="layer.0.SelfAttention.q",
        key="layer.0.SelfAttention.k",
        value="layer.0.SelfAttention.v",
        output="layer.0.SelfAttention.o",
        ffn_in=("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_1"),
        ffn_gate=("layer.1.DenseReluDense.wi_0",),
        ffn_out="layer.1.DenseReluDense.wo",
        attention="layer.0.SelfAttention",
    ),
}


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Make `model_type` (as in the model's `config.model_type`) known; replaces an older entry.

    >>> register_architecture("my-bert", architecture_of("bert"))
    """
    _REGISTRY[model_type] = architecture


def architecture_of(model_type: str) -> Architecture:
    """The declaration for a model type."""
    if model_type not in _REGISTRY:
        raise ArchitectureError(
            f"unknown architecture {model_type!r}; known: {', '.join(sorted(_REGISTRY))}. Declare "
            f"it with register_architecture({model_type!r}, Architecture(layers='encoder.layer', "
            "query='attention.self.query', ...)): paths to its layers and, from a layer, to its "
            "projections"
        )
    return _REGISTRY[model_type]


def layers_of(base: PreTrainedModel) -> tuple[Layer, ...]:
    """The distinct layers of a base model with their projections."""
    config, declared = base.config, architecture_of(base.config.model_type)
    if config.is_encoder_decoder:
        raise ArchitectureError(
            f"{type(base).__name__} is an encoder-decoder, of which only the encoder is supported: "
            "load the encoder alone (for T5, T5EncoderModel)"
        )
    layers: list[Layer] = []
    for module in _members(base, declared.layers):
        found = {name: _projection(module, getattr(declared, name), config) for name in TARGETS}
        projections = {name: projection for name, projection in found.items() if projection}
        attention = module.get_submodule(declared.attention)
        layers.append(Layer(len(layers), module, attention, projections, declared.positions))
    return tuple(layers)


def positions_of(base: nn.Module) -> int | None:
    """How many tokens a base model's table of positions covers; None if it has no table."""
    for name, module in base.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in _POSITIONS:
            # RoBERTa counts from after its padding's index, OPT from an offset.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - getattr(module, "offset", first)
    return None


def _members(base: nn.Module, path: str) -> list[nn.Module]:
    """The members of the list(s) at `path`, in order; `children` gives a shared one once."""
    parents: list[nn.Module] = [base]
    for name in path.split("."):
        reached = (p.children() if name == "*" else [p.get_submodule(name)] for p in parents)
        parents = [module for modules in reached for module in modules]
    return [layer for parent in parents for layer in parent.children()]


def _projection(layer: nn.Module, where: Where, config: PretrainedConfig) -> Projection | None:
    if isinstance(where, tuple):
        paths = (path for path in where if path in dict(layer.named_modules()))
        return next((_projection(layer, path, config) for path in paths), None)
    part = where if isinstance(where, Part) else Part(where, 0, 1)
    module = layer.get_submodule(part.path)
    inputs, total = _widths(module)
    if isinstance(part.sizes, int):
        sizes = [total // part.sizes] * part.sizes
    else:
        sizes = list(part.sizes(config))
    if sum(sizes) != total or part.index >= len(sizes):
        raise ArchitectureError(
            f"{part}: parts of sizes {sizes} do not fit an output of width {total}"
        )
    return Projection(module, inputs, sizes[part.index], sum(sizes[: part.index]), total)


def _widths(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear module, of GPT-2's transposed Conv1D, or of a quantised linear."""
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):
        if hasattr(module, inputs) and hasattr(module, outputs):
            return int(getattr(module, inputs)), int(getattr(module, outputs))
    raise ArchitectureError(
        f"expected a linear module with in_features and out_features, got {type(module).__name__}"
    )
