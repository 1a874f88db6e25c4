"""Which round is served, and how it is loaded beside another."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from saves import backbone_in
from services import network_in
from transformers import BertConfig, BertModel

import bhpeft_pyro as bh
from bhpeft_pyro.errors import BHPEFTError, ConfigError, SaveError
from bhpeft_pyro.model.likelihoods import Normal
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.serving.rounds import Source
from bhpeft_pyro.testing import tiny_examples


def test_a_round_is_found_by_its_id_its_folder_or_its_age(folder, source, april, tmp_path) -> None:
    runs = folder / "runs"
    assert source.find() == runs / "may"
    assert source.find("april") == source.find(april.id) == source.find(april.id[:6])
    for name, why in (("june", "no round"), ("", "no round")):
        with pytest.raises(SaveError, match=f"round: {why} in .* there are .*april"):
            source.find(name)
    alone = Source(runs / "april")
    assert alone.find() == alone.find(april.id) == runs / "april"
    shutil.copytree(runs, tmp_path / "stream" / "rounds")
    assert Source(tmp_path / "stream").find() == tmp_path / "stream" / "rounds" / "may"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SaveError, match="no saved posterior in"):
        Source(tmp_path / "empty").find()


def test_a_round_beside_another_shares_its_backbone(folder, source, april, may) -> None:
    backbone = april.posterior.model.network.backbone
    assert may.posterior.model.network.backbone is backbone
    assert source.load("april").posterior.model.network.backbone is not backbone
    assert may.texts == ("text",) and may.limit == 32 and may.way == "draws"


def test_texts_are_limited_by_the_backbone_where_the_tokenizer_knows_no_limit(april) -> None:
    network = april.posterior.model.network
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network.tokenizer, "model_max_length", int(1e30))
        assert april.limit == network.backbone.config.max_position_embeddings


def test_a_round_that_answers_other_questions_is_refused(april, tmp_path, folder) -> None:
    ratings = {"text": ["w5", "w6", "w7 w8", "w9"], "label": [1.0, 2.0, 3.5, 2.5]}
    model = Model(network_in(folder, (), 1), likelihood=Normal())
    bh.fit(model, "normal", ratings, max_steps=2, progress=False).save(tmp_path / "ratings")
    with pytest.raises(ConfigError, match="kind 'rating' from text; expected one like"):
        Source(tmp_path / "ratings", device="cpu").load(beside=april)


def test_learnt_texts_are_told_to_nobody_by_default(folder, tmp_path) -> None:
    """By asking, clients could read most of those that are kept."""
    network = network_in(folder, (), 2)
    quick = {"max_steps": 3, "progress": False, "keep_texts": True}
    bh.fit(Model(network), "normal", tiny_examples(60), **quick).save(tmp_path / "kept")
    texts = {*tiny_examples(60).texts}
    source = Source(tmp_path / "kept", device="cpu")
    asked = {"text": [*tiny_examples(60).texts[:5]]}
    served = source.load()
    answers = served.answer(served.encode(asked))
    assert not any("nearest" in answer for answer in (*answers, *served.sample))
    told = replace(source, nearest=True).load(beside=served)
    assert {answer["nearest"] for answer in told.answer(told.encode(asked))} <= texts


def test_a_way_to_predict_that_there_is_not_is_refused(folder) -> None:
    with pytest.raises(BHPEFTError, match="student"):
        Source(folder / "runs", device="cpu", method="student").load()


def test_a_round_of_another_backbone_brings_its_own(april, tmp_path) -> None:
    torch.manual_seed(7)  # the tiny one has seed 0
    other = BertModel(BertConfig(**april.posterior.model.network.backbone.config.to_dict()))
    backbone_in(tmp_path / "tiny", other)
    model = Model(network_in(tmp_path, (), 2))
    fitted = bh.fit(model, "normal", tiny_examples(), max_steps=2, progress=False)
    fitted.save(tmp_path / "run")
    served = Source(tmp_path / "run", device="cpu").load(beside=april)
    assert served.posterior.model.network.backbone is not april.posterior.model.network.backbone
