"""Adapters of the real `peft` library: in, around, and out again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from saves import backbone_in
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TextClassificationPipeline,
)

import bhpeft_pyro as bh
from bhpeft_pyro.cli.saved import open_run
from bhpeft_pyro.data import Examples
from bhpeft_pyro.errors import (
    ArchitectureError,
    ConfigError,
    DataError,
    LikelihoodError,
    SaveError,
)
from bhpeft_pyro.model.head import final_layer, set_final_layer
from bhpeft_pyro.testing import (
    tiny_backbone,
    tiny_classifier,
    tiny_examples,
    tiny_model,
    tiny_tokenizer,
)

peft = pytest.importorskip("peft")

TYPES = [name for name in tiny.MODEL_TYPES if name != "t5"]  # whose classifier has a decoder
# Linear layers of other sorts, which peft calls linear too.
OTHERS = ["pre_classifier", "embeddings_project", "embedding_hidden_mapping_in", "project_.*"]
SHARED = [r".*(query|key)_proj"]  # DeBERTa's, which project relative positions too
TRAIN, TEST = tiny_examples(24), tiny_examples(10, seed=1)


def classifier(
    model_type: str = "bert", labels: int = 3, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """The classifier as a checkpoint has it; `seed` is that of the layers that it lacks."""
    auto = AutoModelForSequenceClassification
    model = tiny.build(model_type, auto=auto, num_labels=labels, pad_token_id=0, **options)
    if seed:
        inside = f"{model.base_model_prefix}."
        for name, value in model.named_parameters():
            if not name.startswith(inside) or name.startswith(f"{inside}pooler"):
                value.data = 0.3 * torch.randn(value.shape)
    return model


def adapted(model: PreTrainedModel, name: str = "default", **options: Any) -> Any:
    """A `PeftModel` as training leaves it: everything that can be trained was moved."""
    options = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 6, **options}
    config = peft.LoraConfig(**options)
    found = peft.get_peft_model(model, config, adapter_name=name)
    moved(found)
    return found.eval()


def moved(model: Any) -> None:
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.2 * torch.randn_like(value))


def padded() -> dict[str, Any]:
    inputs = tiny.inputs()
    return inputs | {"input_ids": inputs["input_ids"] * inputs["attention_mask"]}


def logits(model: Any, examples: Examples | None = None) -> Tensor:
    inputs = padded() if examples is None else next(examples.batches(99)).inputs
    with torch.no_grad():
        return model(**inputs).logits


def ours(posterior: bh.Posterior, examples: Examples | None = None) -> Tensor:
    inputs = padded() if examples is None else next(examples.batches(99)).inputs
    with torch.no_grad():
        return posterior.model.network(posterior.guide.means(), bh.data.Batch(dict(inputs)))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rows_that_choose_a_width_need_rows_that_give_one() -> None:
    with pytest.raises(ConfigError, match="validation: a point estimate has no width to choose"):
        bh.from_peft(adapted(classifier("bert")), validation=tiny_examples())


@pytest.mark.parametrize("model_type", TYPES)
def test_in_and_out_again(model_type: str, tmp_path: Path) -> None:
    """LoRA on all linear layers: the same logits here, from peft again, and merged."""
    without = "|".join(f".*{name}" for name in OTHERS + SHARED)
    model = adapted(
        classifier(model_type),
        target_modules="all-linear",
        exclude_modules=without,
        use_rslora=True,
    )
    before = logits(model)
    posterior = bh.from_peft(model)
    close(ours(posterior), before)
    assert torch.equal(logits(model), before), "the model given has changed"
    posterior.to_peft(tmp_path)
    again = peft.PeftModel.from_pretrained(classifier(model_type, seed=1), tmp_path).eval()
    close(logits(again), before)
    merged = posterior.merge()
    close(logits(merged), before)
    assert type(merged) is type(model.get_base_model())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
    close(ours(posterior), before)  # merging and writing leave it as it is
    assert all(value.requires_grad for value in merged.parameters())
    merged.save_pretrained(tmp_path / "merged")
    close(logits(type(merged).from_pretrained(tmp_path / "merged")), before)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "deberta-v2", "gpt2"])
def test_folder_onto_a_checkpoint_that_lacks_the_head(model_type: str, tmp_path: Path) -> None:
    """What the adapter has trained before the last layer comes from the adapter, and is saved."""
    layers = ["pre_classifier"] if model_type == "distilbert" else []
    layers += ["pooler"] if model_type in ("bert", "deberta-v2") else []
    targets = ["c_attn"] if model_type == "gpt2" else ["query", "value", "value_proj", "q_lin"]
    model = adapted(classifier(model_type), target_modules=targets, modules_to_save=layers)
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    other = classifier(model_type, seed=1)
    untouched = logits(other)
    posterior = bh.from_peft(tmp_path / "adapter", backbone=other)
    close(ours(posterior), before)
    assert torch.equal(logits(other), untouched)
    posterior.save(tmp_path / "saved")
    loaded = bh.Posterior.load(tmp_path / "saved", other)
    close(ours(loaded), before)
    assert torch.equal(logits(other), untouched)
    last = final_layer(other)[1]
    bias = None if last.bias is None else last.bias[:2]
    set_final_layer(other, last.weight[:2], bias)  # another number of labels does no harm
    close(ours(bh.Posterior.load(tmp_path / "saved", other)), before)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "value"]},
        {"target_modules": ["query"], "layers_to_transform": [1]},
        {"target_modules": ["query", "value"], "rank_pattern": {"layer.0.*query": 2}},
        {"target_modules": ["query", "key"], "alpha_pattern": {"key": 12}, "use_rslora": True},
        {"target_modules": r".*layer\.0.*query|.*layer\.1.*value"},
        {"target_modules": ["query", "classifier"], "task_type": None},
        {"target_modules": ["query"], "lora_dropout": 0.5},
    ],
    ids=["plain", "one-layer", "ranks", "scales", "ragged", "head-by-lora", "dropout"],
)
def test_places_ranks_and_scales(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(classifier(), **options)
    posterior = bh.from_peft(model)
    close(ours(posterior), logits(model))
    posterior.to_peft(tmp_path)
    again = peft.PeftModel.from_pretrained(classifier(), tmp_path).eval()
    close(logits(again), logits(model))
    close(logits(posterior.merge()), logits(model))


def test_a_rank_above_the_width_of_grouped_heads(tmp_path: Path) -> None:
    """The value projection is 4 wide, and its rank of 2 is filled up to 8."""
    base = {"num_key_value_heads": 1, "head_dim": 4}
    model = adapted(
        classifier("llama", **base),
        r=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
    )
    posterior = bh.from_peft(model)
    close(ours(posterior), logits(model))
    posterior.to_peft(tmp_path)
    again = peft.PeftModel.from_pretrained(classifier("llama", **base), tmp_path).eval()
    close(logits(again), logits(model))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoRA cannot become a posterior: its magnitudes"),
        ({"bias": "all"}, "bias='all' cannot"),
        ({"lora_bias": True}, "lora_bias cannot"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' cannot"),
        ({"target_modules": ["word_embeddings"]}, "LoRA on bert.embeddings.word_embeddings"),
        ({"modules_to_save": ["position_embeddings"]}, "trains 'bert.embeddings.position_embedd"),
        ({"trainable_token_indices": [5]}, "trains 'bert.embeddings.word_embeddings'"),
    ],
)
def test_what_has_no_counterpart_is_refused(options: dict[str, Any], reason: str) -> None:
    model = adapted(classifier(), **{"target_modules": ["query"], **options})
    with pytest.raises((ArchitectureError, ConfigError), match=reason):
        bh.from_peft(model)


def test_a_folder_names_its_backbone(tmp_path: Path) -> None:
    """As a Trainer leaves it: as many labels as were trained, the tokenizer beside the adapter."""
    classifier("roberta", labels=2).save_pretrained(tmp_path / "base")
    auto = AutoModelForSequenceClassification
    base = auto.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    model = adapted(base, target_modules=["query", "value"])
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    posterior = bh.from_peft(tmp_path / "adapter")
    close(ours(posterior), logits(model))
    assert posterior.predict(["w5 w20"]).probabilities.shape == (1, 3)


def test_a_model_of_several_labels_comes_in_and_goes_out() -> None:
    model = adapted(classifier(), target_modules=["query", "value"])
    model.config.problem_type = "multi_label_classification"
    data = {"text": ["w5 w20", "w6 w21"] * 4, "label": [["LABEL_0", "LABEL_2"], []] * 4}
    names = {"columns": bh.Columns(label_names=["LABEL_0", "LABEL_1", "LABEL_2"])}
    posterior = bh.from_peft(model, data, tokenizer=tiny_tokenizer(), **names)
    close(ours(posterior), logits(model))
    assert posterior.model.likelihood == bh.likelihoods.MultiLabel()
    assert posterior.novelty is not None and posterior.novelty.count == 2  # different texts
    assert bh.from_peft(model).novelty is None  # without data
    assert posterior.predict(["w5 w20"]).by_label("epistemic").shape == (1, 3)
    merged = posterior.merge()
    close(logits(merged), logits(model))
    assert merged.config.problem_type == "multi_label_classification"


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    other = peft.IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])
    with pytest.raises(
        ConfigError, match="an adapter of the type IA3 cannot become a posterior: only LoRA"
    ):
        bh.from_peft(peft.get_peft_model(classifier(), other))
    model = adapted(classifier(), target_modules=["query"])
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        bh.from_peft(model)
    model.unmerge_adapter()
    model.disable_adapter_layers()
    with pytest.raises(ConfigError, match=r"switched off .* call enable_adapter_layers\(\) first"):
        bh.from_peft(model)
    model.enable_adapter_layers()
    bh.from_peft(model)
    with pytest.raises(ConfigError, match=r"folder, a peft\.PeftModel or a transformers model"):
        bh.from_peft(3)
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        bh.from_peft(tmp_path)
    for use in (bh.from_peft, lambda b: bh.RandomPEFT(b, (), bh.ClassifierHead(2))):
        with pytest.raises(ConfigError, match="BertModel is not a sequence classifier"):
            use(tiny_backbone())


def test_shared_projections_of_relative_positions() -> None:
    """There, LoRA of peft changes positions as well, ours the hidden states alone."""
    model = adapted(classifier("deberta-v2"), target_modules=["query_proj", "value_proj"])
    with pytest.raises(ArchitectureError, match="'query' also projects relative positions"):
        bh.from_peft(model)
    network = bh.RandomPEFT(classifier("deberta-v2"), bh.presets.lora(), bh.ClassifierHead(3))
    guide = bh.autoguide("delta", model := bh.Model(network))
    posterior = bh.Posterior(model, guide, ())
    for export in (posterior.merge, lambda: posterior.to_peft("unused")):
        with pytest.raises(ArchitectureError, match="'query' also projects relative positions"):
            export()
    separate = classifier("deberta-v2", share_att_key=False)
    model = adapted(separate, target_modules=["query_proj", "value_proj"])
    posterior = bh.from_peft(model)
    close(ours(posterior), logits(model))
    close(logits(posterior.merge()), logits(model))


def test_an_adapter_without_its_classifier_needs_one(tmp_path: Path) -> None:
    base = classifier()
    backbone_in(tmp_path / "base", base)
    model = adapted(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"),
        target_modules=["query", "classifier"],
        task_type=None,
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(DataError, match="holds no weights for 'classifier'"):
        bh.from_peft(tmp_path / "adapter", tokenizer=tiny_tokenizer())
    posterior = bh.from_peft(tmp_path / "adapter", backbone=base, tokenizer=tiny_tokenizer())
    close(ours(posterior), logits(model))


def trained(labels: int = 2, **options: Any) -> Any:
    """A `PeftModel` that peft has trained for some steps on the tiny data."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **options)
    base = tiny_classifier(labels)
    base.config.id2label = {0: "even", 1: "odd"}
    model = peft.get_peft_model(base, config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for batch in [*TRAIN.batches(8)] * 4:
        loss = model(**batch.inputs, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_width_predictions_and_rounds(tmp_path: Path) -> None:
    """Two lines to uncertainty: the mean stays, times the output scale; rounds follow, and it comes
    back from disk."""
    model = trained()
    point = bh.from_peft(model, tokenizer=tiny_tokenizer())
    plain = bh.from_peft(model, TRAIN, tokenizer=tiny_tokenizer())
    close(ours(plain, TEST), logits(model, TEST))
    posterior = bh.from_peft(
        model, TRAIN, validation=tiny_examples(12, seed=2), tokenizer=tiny_tokenizer()
    )
    close(ours(posterior, TEST), posterior.report.output_scale * logits(model, TEST))
    close(ours(posterior, TEST), logits(posterior.merge(), TEST))
    assert plain.report.output_scale == 1 != posterior.report.output_scale
    assert point.columns.label_names == ("even", "odd")
    assert point.report.examples == 0 and posterior.report.examples == len(TRAIN)
    assert posterior.report.component_nll <= posterior.report.point_nll * 1.003
    forecast = posterior.predict(TEST)
    assert (forecast.epistemic > 0).all() and (point.predict(TEST).epistemic.abs() < 1e-6).all()
    posterior.save(tmp_path / "saved")
    again = bh.Posterior.load(tmp_path / "saved", tiny_classifier(), tokenizer=tiny_tokenizer())
    torch.testing.assert_close(again.predict(TEST).probabilities, forecast.probabilities)
    named = {"text": ["w5 w20", "w6 w21"] * 4, "label": ["even", "odd"] * 4}
    updated = again.update(named, max_steps=2, progress=False)
    assert len(updated.lineage) == 2
    with pytest.raises(DataError, match="learnt"):
        again.update(TRAIN)
    updated.to_peft(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path / "adapter").eval()
    close(logits(loaded, TEST), ours(updated, TEST))
    assert updated.merge().config.id2label == {0: "even", 1: "odd"}


def test_ratings_and_their_noise() -> None:
    """Without validation rows the noise is that of the errors."""
    adapter = adapted(tiny_classifier(1), target_modules=["query"])
    rated = {"text": ["w5 w20", "w6 w21", "w5 w22", "w6 w9"] * 3, "label": [1.0, 4.0, 2.0, 5.0] * 3}
    others = {**rated, "text": [f"{text} w7" for text in rated["text"]]}
    posterior = bh.from_peft(adapter, rated, validation=others, tokenizer=tiny_tokenizer())
    forecast = posterior.predict(rated)
    close(forecast.mean, logits(adapter, posterior.encode(rated))[:, 0])
    assert (forecast.epistemic > 0).all() and posterior.report.noise > 0
    model = tiny_classifier(1)
    texts = [f"w{5 + i % 40} w{6 + i % 17}" for i in range(60)]
    exact = bh.from_peft(model, tokenizer=tiny_tokenizer()).predict(texts, 0).mean
    away = 0.01 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    data = {"text": texts, "label": (exact + away).tolist()}
    posterior = bh.from_peft(model, data, tokenizer=tiny_tokenizer())
    assert posterior.report.noise == pytest.approx(away.square().mean().sqrt().item(), rel=0.01)
    later = bh.from_peft(model, tokenizer=tiny_tokenizer()).widen(data)
    assert later.report.noise == posterior.report.noise


@pytest.mark.parametrize(
    "likelihood",
    [
        bh.likelihoods.Normal(),
        bh.likelihoods.StudentT(2.0, 3.0),
        bh.likelihoods.Normal(3.0, 20.0, low=1.0, high=5.0),
    ],
)
def test_ratings_go_out_on_their_scale(likelihood: Any, tmp_path: Path) -> None:
    rated = {"text": ["w5 w20", "w6 w21", "w5 w22", "w6 w9"] * 3, "label": [1.0, 4.0, 2.0, 5.0] * 3}
    network = bh.RandomPEFT(
        tiny_classifier(1), bh.presets.lora(rank=2), bh.ClassifierHead(1), tiny_tokenizer()
    )
    posterior = bh.fit(
        bh.Model(network, likelihood=likelihood), "normal", rated, max_steps=3, progress=False
    )
    examples = posterior.encode(rated)
    mean = posterior.predict(examples, samples=0).free_mean  # before the scale cuts it
    close(logits(posterior.merge(), examples)[:, 0], mean)
    posterior.to_peft(tmp_path / "adapter")
    adapter = peft.PeftModel.from_pretrained(tiny_classifier(1), str(tmp_path / "adapter"))
    close(logits(adapter, examples)[:, 0], mean)
    assert posterior.merge().config.problem_type == "regression"  # pipelines show it as it is


@pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [(bh.likelihoods.OrderedLogistic(3), 1), (bh.likelihoods.HeteroscedasticNormal(), 2)],
)
def test_outputs_of_another_meaning_do_not_go_out(
    likelihood: Any, outputs: int, tmp_path: Path
) -> None:
    head = bh.ClassifierHead(outputs)
    network = bh.RandomPEFT(
        tiny_classifier(outputs), bh.presets.lora(rank=2), head, tiny_tokenizer()
    )
    rows = {"text": ["w5 w20", "w6 w21", "w5 w22"] * 4, "label": [0, 1, 2] * 4}
    model = bh.Model(network, likelihood=likelihood)
    posterior = bh.fit(model, "delta", rows, max_steps=1, progress=False)
    for export in (posterior.merge, lambda: posterior.to_peft(tmp_path / "adapter")):
        with pytest.raises(LikelihoodError, match="a Hugging Face classifier cannot express"):
            export()
    assert not (tmp_path / "adapter").exists()


def test_a_rating_without_a_bias_has_no_centre() -> None:
    weights = {"head.weight": torch.ones(1, 3)}
    scaled = bh.likelihoods.Normal(0.0, 2.0).exported(weights)
    assert torch.equal(scaled["head.weight"], torch.full((1, 3), 2.0))
    assert torch.equal(weights["head.weight"], torch.ones(1, 3))
    with pytest.raises(LikelihoodError, match="no bias; expected center=0"):
        bh.likelihoods.Normal(1.0, 2.0).exported(weights)


def test_a_full_classifier_gets_a_random_head(tmp_path: Path) -> None:
    """The backbone is loaded by its name."""
    backbone_in(tmp_path / "base", tiny_classifier())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    posterior = bh.from_peft(model, TRAIN)
    assert [site.name for site in posterior.model.sites] == ["head.weight", "head.bias"]
    close(ours(posterior, TEST), logits(model, TEST))
    close(logits(posterior.merge(), TEST), logits(model, TEST))
    with pytest.raises(ConfigError, match=r"no LoRA weights; merge\(\)"):
        posterior.to_peft("unused")
    posterior.save(tmp_path / "run")
    close(ours(bh.Posterior.load(tmp_path / "run", device="cpu"), TEST), ours(posterior, TEST))
    close(ours(open_run(tmp_path / "run", None, "cpu"), TEST), ours(posterior, TEST))


def fitted(kinds: Any = None, guide: str = "delta", **options: Any) -> bh.Posterior:
    kinds = bh.presets.lora(rank=2) if kinds is None else kinds
    network = bh.RandomPEFT(tiny_classifier(), kinds, bh.ClassifierHead(2), tiny_tokenizer())
    return bh.fit(bh.Model(network), guide, TRAIN, max_steps=3, progress=False, **options)


@pytest.fixture(scope="module")
def mixture() -> bh.Posterior:
    return fitted(guide="laplace", components=2)


def test_components_are_adapters_of_one_model(mixture: bh.Posterior, tmp_path: Path) -> None:
    posterior = mixture
    posterior.to_peft(both := tmp_path / "both")
    model = peft.PeftModel.from_pretrained(
        tiny_classifier(), both / "component-0", adapter_name="component-0"
    ).eval()
    model.load_adapter(both / "component-1", adapter_name="component-1")
    for number, part in enumerate(posterior.components):
        model.set_adapter(f"component-{number}")
        close(logits(model, TEST), ours(part, TEST))
        close(logits(posterior.merge(number), TEST), ours(part, TEST))
    posterior.to_peft(tmp_path / "one", component=1)
    one = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path / "one").eval()
    close(logits(one, TEST), ours(posterior.components[1], TEST))
    with pytest.raises(ConfigError, match="component=None"):
        posterior.merge()
    with pytest.raises(ConfigError, match=r"component=2"):
        posterior.merge(2)
    with pytest.raises(SaveError, match="not empty"):
        posterior.to_peft(both, component=0)
    (tmp_path / ".next.new" / "component-7").mkdir(parents=True)  # by a process that was killed
    posterior.to_peft(tmp_path / "next")
    assert {path.name for path in (tmp_path / "next").iterdir()} == {"component-0", "component-1"}
    assert {path.name for path in tmp_path.iterdir()} == {"both", "one", "next"}


def test_what_cannot_be_exported() -> None:
    for kind in ("adapter", "prefix"):
        posterior = fitted(getattr(bh.presets, kind)())
        with pytest.raises(ConfigError, match=f"merge: {kind} cannot be merged"):
            posterior.merge()
        with pytest.raises(ConfigError, match=f"to_peft: {kind} is unknown to peft"):
            posterior.to_peft("unused")
    with pytest.raises(ConfigError, match="gated lora"):
        fitted(bh.peft.LoRA(gated=True)).merge()
    own = bh.fit(tiny_model(), "delta", TRAIN, max_steps=1, progress=False)
    with pytest.raises(ConfigError, match=r"a Head pools .* fit again with .*Head\(\d\)"):
        own.merge()


def test_outputs_have_sd_one_under_units() -> None:
    """A classifier head's unit takes the size of what it reads into account."""
    for model_type in ("bert", "roberta", "llama"):
        network = bh.RandomPEFT(classifier(model_type), (), bh.ClassifierHead(3))
        sites = network.sites
        draws = {s.name: s.unit * torch.randn(500, *s.shape) for s in sites if "weight" in s.name}
        draws |= {s.name: torch.zeros(s.shape) for s in sites if "bias" in s.name}
        ids = torch.randint(5, tiny.VOCABULARY, (16, 8))
        sd = network(draws, bh.data.Batch({"input_ids": ids})).std(0).mean()
        assert 0.6 < sd < 1.6, (model_type, sd)


def test_a_decoder_without_a_padding_token_takes_batches() -> None:
    model = classifier("llama")
    before = logits(model)
    model.config.pad_token_id = None
    network = bh.RandomPEFT(model, (), bh.ClassifierHead(3))
    weights = {"head.weight": final_layer(model)[1].weight.detach()}
    assert [site.name for site in network.sites] == ["head.weight"]
    close(network(weights, bh.data.Batch(padded())), before)


@pytest.mark.parametrize(
    ("model_type", "option"),
    [
        ("gemma", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("llama", {"is_causal": False}),
        ("gpt2", {"is_causal": False}),
    ],
)
def test_a_decoder_that_attends_in_both_directions(
    model_type: str, option: dict[str, bool]
) -> None:
    model = classifier(model_type, **option)
    posterior = bh.from_peft(model)
    assert not posterior.model.network.causal
    close(ours(posterior), logits(model))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_texts_that_end_with_the_padding_token(model_type: str, causal: bool) -> None:
    """As where the tokenizer appends an end that pads too: the token before it is scored."""
    options = {} if causal else {"is_causal": False}
    model = adapted(classifier(model_type, **options), target_modules="all-linear")
    inputs = padded()
    ids = inputs["input_ids"]
    ids[0, -1] = ids[1, -2:] = ids[2, 5] = ids[3] = 0  # the last text has nothing else
    with torch.no_grad():
        before = model(**inputs).logits
        posterior = bh.from_peft(model)
        assert posterior.model.network.causal == causal
        batch = bh.data.Batch(inputs)
        close(posterior.model.network(posterior.guide.means(), batch), before)
        close(posterior.merge()(**inputs).logits, before)


def test_new_labels_get_rows_of_the_classifier() -> None:
    posterior = bh.from_peft(
        tiny_classifier(), TRAIN, validation=tiny_examples(12, seed=2), tokenizer=tiny_tokenizer()
    )
    grown = posterior.grow(["2"])
    close(ours(grown, TEST)[:, :2], ours(posterior, TEST))
    assert grown.merge().config.num_labels == 3


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_a_classifier_without_a_bias_grows(guide: str) -> None:
    network = bh.RandomPEFT(classifier("llama"), (), bh.ClassifierHead(2), tiny_tokenizer())
    options: dict[str, Any] = {"components": 1, "max_steps": 2, "progress": False}
    grown = bh.fit(bh.Model(network), guide, TRAIN, **options).grow(["2"])
    assert {k: tuple(v.shape) for k, v in grown.guide.means().items()} == {"head.weight": (3, 32)}
    assert grown.update(tiny_examples(9, seed=4), max_steps=2).report.examples == 9


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'bhpeft_pyro\[peft\]'"):
        bh.from_peft(object())


@pytest.mark.parametrize("left_over", ["multi_label_classification", "regression"])
def test_classes_go_out_as_classes(left_over: str, tmp_path: Path) -> None:
    backbone = tiny_classifier()
    backbone.config.problem_type = left_over
    network = bh.RandomPEFT(backbone, bh.presets.lora(2), bh.ClassifierHead(2), tiny_tokenizer())
    posterior = bh.fit(bh.Model(network), "delta", TRAIN, max_steps=9, progress=False)
    merged, texts = posterior.merge(), ["w5 w20", "w6 w21"]
    pipeline = TextClassificationPipeline(model=merged.eval(), tokenizer=tiny_tokenizer())
    scores = [{each["label"]: each["score"] for each in row} for row in pipeline(texts, top_k=None)]
    found = torch.tensor([[row["0"], row["1"]] for row in scores])
    close(found, posterior.predict(texts, samples=0).probabilities.float())
    assert backbone.config.problem_type == left_over
    with pytest.raises(ConfigError, match=f"to_peft: .* one label; .* not '{left_over}'; merge"):
        posterior.to_peft(tmp_path / "adapter")
    backbone.config.problem_type = "single_label_classification"
    posterior.to_peft(tmp_path / "adapter")


def test_several_labels_go_out_only_where_the_backbone_says_so(tmp_path: Path) -> None:
    backbone = tiny_classifier()
    network = bh.RandomPEFT(backbone, bh.presets.lora(2), bh.ClassifierHead(2), tiny_tokenizer())
    model = bh.Model(network, likelihood=bh.likelihoods.MultiLabel())
    rows = {"text": ["w5", "w6", "w7"] * 4, "label": [[0, 1], [1, 1], [0, 0]] * 4}
    posterior = bh.fit(model, "delta", rows, max_steps=2, progress=False)
    with pytest.raises(ConfigError, match=r"to_peft: .* several labels; .* problem_type=.*merge"):
        posterior.to_peft(tmp_path)
    backbone.config.problem_type = "multi_label_classification"
    posterior.to_peft(tmp_path)
    again = bh.from_peft(tmp_path, backbone=backbone, tokenizer=tiny_tokenizer())
    assert again.model.likelihood == bh.likelihoods.MultiLabel()


def test_a_model_that_peft_has_changed_is_no_backbone(tmp_path: Path) -> None:
    base = classifier()
    adapted(base, target_modules=["query"]).save_pretrained(tmp_path)
    for use in (
        lambda: bh.from_peft(base),
        lambda: bh.from_peft(tmp_path, backbone=base),
        lambda: bh.RandomPEFT(base.base_model),
    ):
        with pytest.raises(ConfigError, match="backbone: it carries an adapter of the peft lib"):
            use()


def test_a_folder_that_names_no_backbone_or_fits_another(tmp_path: Path) -> None:
    adapted(classifier(), target_modules=["query"]).save_pretrained(tmp_path)
    described, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, tensors = json.loads(described.read_text()), load_file(weights)
    for name in (None, ""):  # as `to_peft` writes for a backbone without a name
        described.write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(ConfigError, match="does not say which model"):
            bh.from_peft(tmp_path)

    def refused(message: str, model_type: str = "bert") -> None:
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            bh.from_peft(tmp_path, backbone=classifier(model_type))

    refused("does not fit the backbone, a DistilBert", "distilbert")
    described.write_text("{")
    refused(r"adapter: .*adapter_config\.json cannot be read")
    described.write_text(json.dumps(config))
    first = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {first: tensors[first] * torch.nan}, weights)
    refused("the weights 'base_model.*lora_A.weight' are not finite")
    save_file(tensors | {first: tensors[first][:1].clone()}, weights)
    refused("does not fit the backbone, a Bert.*size mismatch")
    save_file(tensors, weights)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    refused("tokenizer: none can be loaded")
    (tmp_path / "tokenizer_config.json").unlink()
    weights.write_bytes(weights.read_bytes()[:-9])
    refused("adapter: the weights in .* cannot be read")
    weights.unlink()
    refused("adapter: the weights in .* cannot be read")
