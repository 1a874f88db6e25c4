"""A posterior knows its backbone again: by its weights, and by what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODEL_TYPES, build
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

import bhpeft_pyro as bh
from bhpeft_pyro.errors import SaveError
from bhpeft_pyro.model.backbone import check_identity, check_outputs, fixed_outputs, identity
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer


def test_any_weight_and_any_setting_makes_another_backbone() -> None:
    config = {**tiny_backbone().config.to_dict(), "vocab_size": 3000}
    first = BertModel(BertConfig(**config))
    saved = {"name": "first", **identity(first)}

    def other(**changes: Any) -> BertModel:
        model = BertModel(BertConfig(**{**config, **changes}))
        model.load_state_dict(first.state_dict())
        return model

    check_identity(other(hidden_dropout_prob=0.3), saved)  # which has no effect on predictions
    changed = other()
    with torch.no_grad():
        changed.embeddings.word_embeddings.weight[49, 1] += 1e-4
    with pytest.raises(SaveError, match=r"fitted on another one \('first'\); its weights differ"):
        check_identity(changed, saved)
    for name, value in (("num_attention_heads", 2), ("hidden_act", "gelu")):
        wider = saved | {"settings": {name: value}}
        check_identity(first, wider)
        with pytest.raises(SaveError, match=f"its {name} was {value!r}, not"):
            check_identity(other(**{name: {2: 4, "gelu": "relu"}[value]}), wider)


def test_exchanged_rows_make_another_backbone() -> None:
    """Sums of all bits stay the same."""
    first, second = tiny_backbone(), tiny_backbone()
    with torch.no_grad():
        words = second.embeddings.word_embeddings.weight
        words[[7, 8]] = words[[8, 7]]
    with pytest.raises(SaveError, match=r"its weights differ from those of .* is in float32"):
        check_identity(second, {"name": "", **identity(first)})


def test_the_digest_leaves_out_a_pooler_that_the_checkpoint_lacks(tmp_path) -> None:
    """`from_pretrained` draws it at random each time, as for roberta-base."""
    BertForMaskedLM(tiny_backbone().config).save_pretrained(tmp_path)
    first, second = (AutoModel.from_pretrained(tmp_path) for _ in range(2))
    assert not torch.equal(first.pooler.dense.weight, second.pooler.dense.weight)
    assert identity(first) == identity(second)


def test_the_digest_is_of_what_the_head_reads() -> None:
    """`AutoModelForSequenceClassification` draws a classifier, which a `Head` has no use for."""
    first, second = (BertForSequenceClassification(tiny_backbone().config) for _ in range(2))
    second.bert.load_state_dict(first.bert.state_dict())
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    assert identity(first) == identity(second) == identity(first.bert)


THETA = {"rope_type": "default", "rope_theta": 500_000.0}
FULL = ["full_attention", "full_attention"]
SETTINGS: list[tuple[str, str, Any]] = [
    ("bert", "num_attention_heads", 2),
    ("bert", "hidden_act", "relu"),
    ("bert", "is_decoder", True),
    ("roberta", "pad_token_id", 0),
    ("llama", "rope_parameters", THETA),
    ("llama", "rms_norm_eps", 1e-3),
    ("mistral", "sliding_window", 4),
    ("gemma2", "query_pre_attn_scalar", 64),
    ("gemma2", "layer_types", FULL),
    ("gemma2", "attn_logit_softcapping", 5.0),
    ("gemma3_text", "layer_types", FULL),
    ("modernbert", "local_attention", 8),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("deberta-v2", "pos_att_type", ["c2p"]),
    ("t5", "relative_attention_max_distance", 16),
]


def outputs(backbone: PreTrainedModel, head: Any = None) -> list[list[float]]:
    return fixed_outputs(bh.RandomPEFT(backbone, (), head or bh.Head(2)))


@pytest.mark.parametrize(("model_type", "name", "value"), SETTINGS)
def test_a_setting_that_changes_the_outputs_makes_another_backbone(
    model_type: str, name: str, value: Any
) -> None:
    """Their weights are the same."""
    eager = {"attn_implementation": "eager"}  # the only one with soft capping
    first, other = build(model_type, **eager), build(model_type, **eager, **{name: value})
    other.load_state_dict(first.state_dict())
    saved = {"name": "first", "outputs": outputs(first)}
    check_outputs(first, outputs(first), saved)
    with pytest.raises(SaveError, match=r"fitted on another one \('first'\); the weights are the"):
        check_outputs(other, outputs(other), saved)


def test_a_setting_of_the_classifier_counts_under_its_head() -> None:
    auto: Any = AutoModelForSequenceClassification
    first = build("modernbert", auto=auto, classifier_pooling="cls")
    other = build("modernbert", auto=auto, classifier_pooling="mean")
    other.load_state_dict(first.state_dict())
    assert outputs(first) == outputs(other)  # a `Head` has a pooling of its own
    head = bh.ClassifierHead(2)
    with pytest.raises(SaveError, match="the outputs differ"):
        check_outputs(other, outputs(other, head), {"name": "", "outputs": outputs(first, head)})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rounding_makes_no_other_backbone(model_type: str) -> None:
    """That of another attention function, and in bfloat16 of half of the digits."""
    if model_type == "gemma2":
        pytest.skip("only eager attention has its soft capping")
    first, other = build(model_type), build(model_type, attn_implementation="eager")
    check_outputs(other, outputs(other), {"name": "", "outputs": outputs(first)})
    exact, half = outputs(first), first.to(torch.bfloat16)
    check_outputs(half, outputs(half), {"name": "", "outputs": exact})


def test_outputs_are_found_without_a_trace() -> None:
    network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(2))
    expected = fixed_outputs(network)
    network.backbone.train()
    network.backbone.encoder.layer[0].eval()
    modes = [module.training for module in network.backbone.modules()]
    random = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert fixed_outputs(network) == expected
    assert [module.training for module in network.backbone.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_another_setting_is_refused_at_load(tmp_path: Path) -> None:
    first, other = build("gpt2"), build("gpt2", scale_attn_weights=False)
    other.load_state_dict(first.state_dict())
    network = bh.RandomPEFT(first, (), bh.Head(2), tiny_tokenizer())
    posterior = bh.fit(bh.Model(network), "normal", tiny_examples(), max_steps=1, progress=False)
    posterior.save(tmp_path)
    bh.Posterior.load(tmp_path, first, tokenizer=tiny_tokenizer())
    with pytest.raises(SaveError, match="the outputs differ"):
        bh.Posterior.load(tmp_path, other, tokenizer=tiny_tokenizer())
