"""A posterior knows its backbone again: by what it computes."""

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
from bhpeft_pyro.model.backbone import check_fingerprint, fingerprint
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer


def network(backbone: PreTrainedModel, head: Any = None) -> bh.RandomPEFT:
    return bh.RandomPEFT(backbone, (), head or bh.Head(2))


def check(other: PreTrainedModel, first: PreTrainedModel, head: Any = None) -> None:
    check_fingerprint(network(other, head), fingerprint(network(first, head)))


def test_other_weights_make_another_backbone() -> None:
    """Rounding does not, nor does dropout, which has no effect on predictions."""
    config = tiny_backbone().config.to_dict()
    first = BertModel(BertConfig(**config))
    for size in (1e-6, 1e-2):
        changed = BertModel(BertConfig(**{**config, "hidden_dropout_prob": 0.3}))
        changed.load_state_dict(first.state_dict())
        with torch.no_grad():
            changed.encoder.layer[1].output.dense.weight.mul_(1 + size)
        if size < 1e-4:
            check(changed, first)
        else:
            with pytest.raises(SaveError, match=r"^backbone: .* another one \('unnamed'\)"):
                check(changed, first)


def test_exchanged_rows_make_another_backbone() -> None:
    first, second = tiny_backbone(), tiny_backbone()
    with torch.no_grad():
        words = second.embeddings.word_embeddings.weight
        words[[7, 8]] = words[[8, 7]]
    with pytest.raises(SaveError, match=r"^backbone: "):
        check(second, first)


def test_a_backbone_of_another_size_is_another_one() -> None:
    other = BertModel(BertConfig(**{**tiny_backbone().config.to_dict(), "hidden_size": 32}))
    with pytest.raises(SaveError, match=r"^backbone: "):
        check(other, tiny_backbone())


def test_a_pooler_that_the_checkpoint_lacks_does_not_count(tmp_path: Path) -> None:
    """`from_pretrained` draws it at random each time, as for roberta-base."""
    BertForMaskedLM(tiny_backbone().config).save_pretrained(tmp_path)
    first, second = (AutoModel.from_pretrained(tmp_path) for _ in range(2))
    assert not torch.equal(first.pooler.dense.weight, second.pooler.dense.weight)
    assert fingerprint(network(first)) == fingerprint(network(second))


def test_the_fingerprint_is_of_what_the_head_reads() -> None:
    """`AutoModelForSequenceClassification` draws a classifier, which a `Head` has no use for."""
    first, second = (BertForSequenceClassification(tiny_backbone().config) for _ in range(2))
    second.bert.load_state_dict(first.bert.state_dict())
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    check(second, first)
    check(first.bert, first)


THETA = {"rope_type": "default", "rope_theta": 500_000.0}
FULL = ["full_attention", "full_attention"]
SETTINGS: list[tuple[str, str, Any]] = [
    ("roberta", "pad_token_id", 0),
    ("llama", "rope_parameters", THETA),
    ("mistral", "sliding_window", 4),
    ("gemma2", "attn_logit_softcapping", 5.0),
    ("gemma3_text", "layer_types", FULL),
    ("modernbert", "local_attention", 8),
    ("deberta-v2", "pos_att_type", ["c2p"]),
    ("t5", "relative_attention_max_distance", 16),
]


@pytest.mark.parametrize(("model_type", "name", "value"), SETTINGS)
def test_a_setting_that_changes_the_outputs_makes_another_backbone(
    model_type: str, name: str, value: Any
) -> None:
    """Their weights are the same."""
    eager = {"attn_implementation": "eager"}  # the only one with soft capping
    first, other = build(model_type, **eager), build(model_type, **eager, **{name: value})
    other.load_state_dict(first.state_dict())
    check(first, first)
    with pytest.raises(SaveError, match=r"^backbone: "):
        check(other, first)


def test_a_setting_of_the_classifier_counts_under_its_head() -> None:
    auto: Any = AutoModelForSequenceClassification
    first = build("modernbert", auto=auto, classifier_pooling="cls")
    other = build("modernbert", auto=auto, classifier_pooling="mean")
    other.load_state_dict(first.state_dict())
    check(other, first)  # a `Head` has a pooling of its own
    with pytest.raises(SaveError, match=r"^backbone: "):
        check(other, first, bh.ClassifierHead(2))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rounding_makes_no_other_backbone(model_type: str) -> None:
    """That of another attention function, and in bfloat16 of half of the digits."""
    if model_type == "gemma2":
        pytest.skip("only eager attention has its soft capping")
    first, other = build(model_type), build(model_type, attn_implementation="eager")
    other.load_state_dict(first.state_dict())
    check(other, first)
    exact, half = fingerprint(network(first)), first.to(torch.bfloat16)
    check_fingerprint(network(half), exact)


def test_a_fingerprint_leaves_no_trace() -> None:
    of_tiny = network(tiny_backbone())
    expected = fingerprint(of_tiny)
    of_tiny.backbone.train()
    of_tiny.backbone.encoder.layer[0].eval()
    modes = [module.training for module in of_tiny.backbone.modules()]
    random = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert fingerprint(of_tiny) == expected
    assert [module.training for module in of_tiny.backbone.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_another_setting_is_refused_at_load(tmp_path: Path) -> None:
    first, other = build("gpt2"), build("gpt2", scale_attn_weights=False)
    other.load_state_dict(first.state_dict())
    model = bh.Model(bh.RandomPEFT(first, (), bh.Head(2), tiny_tokenizer()))
    posterior = bh.fit(model, "normal", tiny_examples(), max_steps=1, progress=False)
    posterior.save(tmp_path)
    bh.Posterior.load(tmp_path, first, tokenizer=tiny_tokenizer())
    with pytest.raises(SaveError, match=r"^backbone: "):
        bh.Posterior.load(tmp_path, other, tokenizer=tiny_tokenizer())
