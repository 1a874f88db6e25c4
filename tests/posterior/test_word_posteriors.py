"""Named entities through fits, forecasts, rounds and files."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from counts import Counts
from saves import load

import bhpeft_pyro as bh
from bhpeft_pyro.errors import BHPEFTWarning, DataError
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.integrations.huggingface.hub import card
from bhpeft_pyro.model.likelihoods import Normal
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

# Some sentences are there twice.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* repeat another's text"),
    pytest.mark.filterwarnings("ignore:batches. .* has the texts of"),
    pytest.mark.filterwarnings("ignore:data. .* that an earlier round has learnt"),
]

NAMES = ("O", "B-PER", "I-PER")
COLUMNS = bh.Columns(text="tokens", label="ner_tags", label_names=NAMES)
QUICK: dict[str, Any] = {"max_steps": 4, "batch_size": 48, "progress": False}


def model(kinds: Any = ()) -> bh.Model:
    return bh.tasks.categories(
        tiny_backbone(), 3, each_word=True, kinds=kinds, tokenizer=tiny_tokenizer()
    )


def sentences(count: int = 60, seed: int = 0) -> dict[str, list[Any]]:
    """Each has a name of two words, "w5 w6", and one to four others."""
    generator = torch.Generator().manual_seed(seed)
    tokens, tags = [], []
    for i in range(count):
        others = torch.randint(10, 50, (1 + i % 4,), generator=generator).tolist()
        at = i % (len(others) + 1)
        words = [f"w{other}" for other in others]
        tokens.append([*words[:at], "w5", "w6", *words[at:]])
        tags.append([*("O",) * at, "B-PER", "I-PER", *("O",) * (len(others) - at)])
    return {"tokens": tokens, "ner_tags": tags}


@pytest.fixture(scope="module")
def laplace() -> bh.Posterior:
    options: dict[str, Any] = {"max_steps": 40, "batch_size": 24, "lr": 0.03, "progress": False}
    return bh.fit(
        model(bh.presets.lora(rank=2)), "laplace", sentences(), columns=COLUMNS, components=2,
        **options,
    )  # fmt: skip


def test_laplace_learns_names(laplace: bh.Posterior) -> None:
    report = laplace.report
    assert report.held_out > 0 and report.examples + report.held_out == 270
    assert metrics.evaluate(laplace.predict(sentences(20, seed=1)))["accuracy"] > 0.9
    forecast = laplace.predict([["w5", "w6", "w30"], ["w20", "w5", "w6"], ["w21"]])
    assert forecast.probabilities.shape == (7, 3)
    assert forecast.between is not None and (forecast.epistemic > 0).all()
    assert forecast.texts == ("w5", "w6", "w30", "w20", "w5", "w6", "w21")
    assert forecast.by_row(forecast.predicted) == [
        ["B-PER", "I-PER", "O"], ["O", "B-PER", "I-PER"], ["O"]
    ]  # fmt: skip
    uncertainty = forecast.by_row(forecast.epistemic)
    assert [len(row) for row in uncertainty] == [3, 3, 1]
    assert [*chain.from_iterable(uncertainty)] == forecast.epistemic.tolist()
    assert forecast.to_dataset()["row"][:] == [0, 0, 0, 1, 1, 1, 2]
    with pytest.raises(DataError, match="values: got 2 for 7 examples"):
        forecast.by_row([1, 2])
    assert laplace.predict(["w20 w5 w6"]).predicted == ["O", "B-PER", "I-PER"]


def test_held_out_sentences_are_whole(laplace: bh.Posterior) -> None:
    rest, held_out = laplace.report.parted(laplace.encode(sentences()))
    assert held_out is not None and len(held_out.rows.unique()) == 12
    assert not {*rest.rows.tolist()} & {*held_out.rows.tolist()}
    assert len(held_out) == laplace.report.held_out


def test_truth_and_predictions_have_the_same_words(laplace: bh.Posterior) -> None:
    data = sentences(5)
    data["ner_tags"][1] = [None, *data["ner_tags"][1][1:]]
    forecast = laplace.predict(laplace.encode(data))
    assert forecast.labels is not None
    truth = forecast.by_row([NAMES[label] for label in forecast.labels.tolist()])
    expected = [[tag for tag in tags if tag] for tags in data["ner_tags"]]
    assert truth == expected
    assert [*map(len, forecast.by_row(forecast.predicted))] == [*map(len, expected)]
    with pytest.warns(BHPEFTWarning, match="1 of 21 words have no label"):
        everything = laplace.predict(data)  # it is predicted too
    assert everything.labels is None and [*map(len, everything.by_row(everything.predicted))] == [
        *map(len, data["tokens"])
    ]
    tempered, _ = forecast.tempered(forecast)
    assert tempered.by_row(tempered.label) == forecast.by_row(forecast.label)


def test_lists_belong_to_rows_where_sentences_have_no_label(laplace: bh.Posterior) -> None:
    data = sentences(5)
    for i in (0, 2, 4):
        data["ner_tags"][i] = [None] * len(data["tokens"][i])
    forecast = laplace.predict(laplace.encode(data))
    names = [NAMES[label] for label in forecast.observed().tolist()]
    assert forecast.by_row(names) == [[], data["ner_tags"][1], [], data["ner_tags"][3]]
    assert [*map(len, forecast.summary()["prediction"])] == [0, 4, 0, 6]


def test_a_forecast_of_texts_has_a_value_for_each() -> None:
    forecast = bh.forecast.ClassForecast.from_draws(torch.full((1, 3, 2), 0.5))
    assert forecast.by_row(forecast.label) == [0, 0, 0]


def test_predictions_do_not_depend_on_how_words_are_batched(laplace: bh.Posterior) -> None:
    words = laplace.encode(sentences(12, seed=2))
    whole = laplace.predict(words, keep_samples=True, samples=4)
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    mixed = laplace.predict(words.subset(order), keep_samples=True, samples=4, max_rows=8)
    torch.testing.assert_close(mixed.probabilities, whole.probabilities[order], atol=1e-5, rtol=0)


def test_students_do_not_depend_on_it_either() -> None:
    options: dict[str, Any] = {"columns": COLUMNS, "components": 2, **QUICK}
    fresh = bh.Model(model(bh.presets.lora(rank=2)).network.unused())
    posterior = bh.fit(fresh, "laplace", sentences(), **options)
    learnt = {"tokens": sentences(60, seed=3)["tokens"]}
    done = posterior.distill(learnt, epochs=1, progress=False)
    assert done.student is not None and done.student.report.texts > 100  # words
    words = done.encode(sentences(12, seed=2))
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    for method in ("student", "exact"):
        whole = done.predict(words, method=method)
        assert [*map(len, whole.by_row(whole.predicted))] == [
            *map(len, sentences(12, seed=2)["tokens"])
        ]
        mixed = done.predict(words.subset(order), method=method, max_rows=3)
        torch.testing.assert_close(mixed.epistemic, whole.epistemic[order], atol=1e-5, rtol=1e-3)


def test_a_pass_has_as_many_sentences_as_of_texts() -> None:
    posterior = bh.fit(
        model(bh.presets.lora(rank=2)), "normal", sentences(), columns=COLUMNS, **QUICK
    )
    rows: list[int] = []
    posterior.model.network.backbone.register_forward_pre_hook(
        lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    posterior.replace(novelty=None).predict(posterior.encode(sentences(64)), samples=4)
    # Four draws of 64 sentences, of which two draws share a pass of 64 rows.
    assert 4 * 64 <= sum(rows) < 1.1 * 4 * 64 and len(rows) <= 6


def test_rounds_and_files(laplace: bh.Posterior, tmp_path: Path) -> None:
    folder = laplace.save(tmp_path / "run")
    again = load(folder)
    new = sentences(20, seed=3)
    expected = laplace.predict(new)
    found = again.predict(new)
    assert torch.equal(found.probabilities, expected.probabilities)
    assert found.by_row(found.predicted) == expected.by_row(expected.predicted)
    newer = again.update(new, **QUICK)
    assert len(newer.lineage) == 2 and newer.report.examples == len(expected)
    with pytest.raises(DataError, match="'LOC' is not among the labels"):
        newer.update({"tokens": [["w5", "w9"]], "ner_tags": [["B-PER", "LOC"]]}, **QUICK)
    grown = newer.update(
        {"tokens": [["w5", "w9"]] * 4, "ner_tags": [["B-PER", "LOC"]] * 4}, grow=True, **QUICK
    )
    assert grown.columns.label_names == (*NAMES, "LOC")
    idata = newer.to_arviz(sentences(3), samples=2)
    assert idata.log_likelihood["label"].shape == (2, 2, 12)
    assert "pipeline_tag: token-classification" in str(card(newer, "me/names"))


def test_a_round_after_loading_is_judged_by_its_words(tmp_path: Path) -> None:
    posterior = bh.fit(
        model(bh.presets.lora(rank=2)), "normal", sentences(20), columns=COLUMNS, particles=4,
        **QUICK,
    )  # fmt: skip
    folder = posterior.save(tmp_path / "run")
    again = load(folder)
    newer = again.update(sentences(10, seed=4), **QUICK)
    drift = newer.assess(sentences(8, seed=5), 20)
    assert drift.nll is not None and drift.examples == len(drift.forecast)


def test_a_stream_of_sentences(tmp_path: Path) -> None:
    last = bh.stream(
        model(), {"mon": sentences(10), "tue": sentences(10, seed=1)}, tmp_path,
        tests={"t": sentences(4, seed=2)}, guide="normal", columns=COLUMNS, **QUICK,
    )  # fmt: skip
    assert len(last.lineage) == 2 and "test/t" in last.report.metrics


def test_numbers_of_words() -> None:
    head = bh.Head(1, each_word=True)
    network = bh.RandomPEFT(tiny_backbone(), (), head, tiny_tokenizer())
    times = {"text": ["w5 w6", "w7 w8 w9"] * 8, "label": [[0.1, 0.4], [0.2, 0.3, None]] * 8}
    posterior = bh.fit(bh.Model(network, likelihood=Normal(0.2, 0.1)), "normal", times, **QUICK)
    forecast = posterior.predict(["w5 w6 w7", "w8"])
    assert [len(row) for row in forecast.by_row(forecast.mean)] == [3, 1]
    counter = bh.Model(network, likelihood=Counts())
    with pytest.raises(DataError, match="column 'label', row 1: -3 has probability 0"):
        counter.encode({"text": ["w5 w6", "w7 w8"], "label": [[0, 1], [2, -3]]})


def test_the_batch_size_counts_sentences() -> None:
    """180 words of 60 sentences: an epoch has as many steps as that of 60 texts."""
    data = {"tokens": [["w5", "w6", "w20"]] * 60, "ner_tags": [["B-PER", "I-PER", "O"]] * 60}
    how: dict[str, Any] = {"epochs": 1, "batch_size": 12, "progress": False, "columns": COLUMNS}
    posterior = bh.fit(model(bh.presets.lora(rank=2)), "AutoNormal", data, **how)
    assert posterior.report.examples == 180 and posterior.report.steps == 5
    assert posterior.report.options.batch_size == 12
