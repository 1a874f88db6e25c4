"""The architectures that are known from the start."""

from __future__ import annotations

from .architectures import Architecture, Part, register_architecture

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
for _name in ("bert", "roberta", "xlm-roberta", "electra"):
    register_architecture(_name, _BERT)
for _name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"):
    register_architecture(_name, _LLAMA)
register_architecture(
    "distilbert",
    Architecture(
        layers="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        attention="attention",
    ),
)
register_architecture(
    "albert",
    Architecture(
        layers="encoder.albert_layer_groups.*.albert_layers",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        output="attention.dense",
        ffn_in="ffn",
        ffn_out="ffn_output",
        attention="attention",
    ),
)
register_architecture(
    "modernbert",
    Architecture(
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
)
register_architecture(
    "gpt2",
    Architecture(
        layers="h",
        query=Part("attn.c_attn", 0, 3),
        key=Part("attn.c_attn", 1, 3),
        value=Part("attn.c_attn", 2, 3),
        output="attn.c_proj",
        ffn_in="mlp.c_fc",
        ffn_out="mlp.c_proj",
        attention="attn",
    ),
)
register_architecture(
    "opt",
    Architecture(
        layers="decoder.layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
        ffn_in="fc1",
        ffn_out="fc2",
        attention="self_attn",
    ),
)
register_architecture(
    "t5",
    Architecture(
        layers="encoder.block",
        query="layer.0.SelfAttention.q",
        key="layer.0.SelfAttention.k",
        value="layer.0.SelfAttention.v",
        output="layer.0.SelfAttention.o",
        ffn_in=("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_1"),
        ffn_gate="layer.1.DenseReluDense.wi_0",
        ffn_out="layer.1.DenseReluDense.wo",
        attention="layer.0.SelfAttention",
    ),
)
register_architecture(
    "deberta-v2",
    Architecture(
        layers="encoder.layer",
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        output="attention.output.dense",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        attention="attention.self",
        prefix=False,
        positions=True,
    ),
)
