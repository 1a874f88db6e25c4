"""What the experiments are made of: splits, rival methods, tests of significance, tables."""

from __future__ import annotations

import csv
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from bhpeft_pyro.experiments.laplace import LastLayer
from datasets import Dataset
from pyro import poutine
from pyro.infer.autoguide import AutoLaplaceApproximation, init_to_value
from scipy import stats

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.experiments.budgets import BUDGETS
from bhpeft_pyro.experiments.catalogue import EXPERIMENTS
from bhpeft_pyro.experiments.dropout import dropout
from bhpeft_pyro.experiments.methods import method, mixture
from bhpeft_pyro.experiments.significance import fits_p, holm, permutation_p
from bhpeft_pyro.experiments.tables import Cell, Row, Table
from bhpeft_pyro.experiments.tasks import Shift, Task, split
from bhpeft_pyro.guides import FunctionGuide
from bhpeft_pyro.inference.draws import draw
from bhpeft_pyro.inference.feed import Feed
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer

TASK = Task("toy", 2, bh.likelihoods.Categorical)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"text": f"w{5 + i % 3} w{10 + i}", "label": i % 3} for i in range(36)]
    rows += rows[:6]  # some texts are there twice
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_splits_share_no_text_and_depend_on_the_seed(folder: Path) -> None:
    parts = split(folder, TASK, 12, 8, 16, seed=0)
    texts = [set(part["text"]) for part in (parts.train, parts.validation, parts.tests["test"])]
    assert [len(each) for each in texts] == [12, 8, 16]
    assert len(set.union(*texts)) == 36
    again = split(folder, TASK, 12, 8, 16, seed=0)
    assert again.train["text"][:] == parts.train["text"][:]
    assert split(folder, TASK, 12, 8, 16, seed=1).train["text"][:] != parts.train["text"][:]
    with pytest.raises(DataError, match="36 rows, 52 are needed"):
        split(folder, TASK, 12, 20, 20, seed=0)
    with pytest.raises(DataError, match=r"there is no nothing\.jsonl"):
        split(folder, Task("nothing", 2, bh.likelihoods.Categorical), 1, 1, 1, seed=0)


def test_a_test_of_its_own_holds_no_text_that_was_learnt(folder: Path) -> None:
    rows = [{"text": f"w{5 + i % 3} w{10 + i}", "label": i % 3} for i in range(20, 60)]
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task("toy", 3, bh.likelihoods.Categorical, test="other")
    parts = split(folder, task, 20, 16, 24, seed=0)
    assert not set(parts.tests["test"]["text"]) & {*parts.train["text"], *parts.validation["text"]}


def test_shifts_and_classes_left_out(folder: Path) -> None:
    shifts = {"unseen": Shift("toy", label=2), "known": Shift("toy", label=1, labelled=True)}
    task = Task("toy", 2, bh.likelihoods.Categorical, classes=2, shifts=shifts)
    parts = split(folder, task, 8, 8, 8, seed=0)
    assert {*parts.train["label"], *parts.tests["test"]["label"]} == {0, 1}
    assert len(parts.tests["unseen"]) == 8
    assert parts.tests["unseen"].column_names == ["text"]  # its labels are none of the task's
    assert all(text.startswith("w7 ") for text in parts.tests["unseen"]["text"])
    assert set(parts.tests["known"]["label"]) == {1}
    learnt = {*parts.train["text"], *parts.validation["text"]}
    assert not learnt & {*parts.tests["known"]["text"]}
    other = split(folder, task, 8, 8, 7, seed=0)  # a row less, of the tests
    assert len({parts.digest, other.digest, split(folder, task, 8, 8, 8, seed=1).digest}) == 3
    assert split(folder, task, 8, 8, 8, seed=0).digest == parts.digest


def test_shuffled_labels_are_those_of_other_rows(folder: Path) -> None:
    plain = split(folder, TASK, 12, 8, 16, seed=0)
    mixed = split(folder, Task("toy", 2, bh.likelihoods.Categorical, shuffled=True), 12, 8, 16, 0)
    assert mixed.train["text"][:] == plain.train["text"][:]
    agree = [a == b for a, b in zip(mixed.train["label"], plain.train["label"], strict=True)]
    assert sum(agree) < 10


def test_every_task_of_a_plan_is_there_and_every_method_known() -> None:
    for budget in BUDGETS.values():
        assert budget.plan.keys() == EXPERIMENTS.keys()
        assert {name for names in budget.plan.values() for name in names} <= budget.tasks.keys()
    for experiment in EXPERIMENTS.values():
        assert [str(method(name)) for name in experiment.methods] == list(experiment.methods)
    with pytest.raises(ConfigError, match="'hybrid, magic' is unknown"):
        method("hybrid, magic")


# Rivals.


@pytest.fixture(scope="module")
def fitted() -> tuple[bh.Posterior, Dataset]:
    """A point, on three classes; and what it was fitted to."""
    examples = tiny_examples(32)
    assert examples.labels is not None
    data = Dataset.from_dict({"text": list(examples.texts), "label": examples.labels.tolist()})
    network = bh.RandomPEFT(
        tiny_backbone(), bh.presets.lora(2), bh.Head(2), tiny_tokenizer(), aligned=False
    )
    options = {"temperature": 0.0, "lr": 0.02, "max_steps": 6, "progress": False}
    return bh.fit(bh.Model(network), "delta", data, **options), data


def test_last_layer_laplace_is_pyros_on_the_fitted_features(
    fitted: tuple[bh.Posterior, Dataset],
) -> None:
    posterior, data = fitted
    layer, scale = LastLayer(posterior, data), 0.5
    held = {k: v for k, v in layer.weights.items() if not k.startswith("head.")}
    prior = {"head.*": lambda site: dist.Normal(0.0, scale * site.unit), "*": dist.Normal(0.0, 1.0)}
    model = bh.Model(posterior.model.network, prior)
    examples = posterior.text.encode(model, data, labelled=True)
    batch = Feed(model, examples, frozen=True, weights=layer.weights).whole()
    with pyro.get_param_store().scope():
        peer = AutoLaplaceApproximation(
            poutine.condition(model, data=held), init_loc_fn=init_to_value(values=layer.weights)
        )
        peer(batch)
        normal = peer.laplace_approximation(batch)
    factor = normal.scale.unsqueeze(-1) * normal.scale_tril
    units = torch.cat([site.unit.expand(site.shape).flatten() for site in layer.head])
    precision = layer.information + (scale * units).pow(-2).diag()
    assert layer.information.diagonal().max() > 1  # the prior's precision is 4 at most, in units
    assert torch.allclose(precision.inverse(), factor @ factor.T, rtol=1e-3, atol=1e-5)
    assert torch.allclose(layer.loc, normal.loc)


def test_the_information_of_choices_is_that_of_their_softmax() -> None:
    rows = [
        {"question": f"w{5 + i}", "choices": [f"w{20 + j + i}" for j in range(2 + i % 2)]}
        for i in range(8)
    ]
    data = Dataset.from_list([row | {"answer": i % 2} for i, row in enumerate(rows)])
    model = bh.tasks.multiple_choice(tiny_backbone(), kinds=(), tokenizer=tiny_tokenizer())
    posterior = bh.fit(model, "delta", data, temperature=0.0, max_steps=3, progress=False)
    layer, exact = LastLayer(posterior, data), torch.zeros(17, 17)
    for row, probabilities in zip(rows, posterior.predict(data, 0).probabilities, strict=True):
        count = len(row["choices"])
        one = posterior.text.encode(model, Dataset.from_list([row]), labelled=False)
        inputs = model.network.features(next(one.batches(1)))[0]
        inputs = torch.cat([inputs, torch.ones(count, 1)], 1)
        p = probabilities[:count]
        exact += inputs.T @ (p.diag() - p.outer(p)) @ inputs
    assert torch.allclose(layer.information, exact, atol=1e-4)


def test_laplace_with_a_narrow_prior_is_the_point_and_with_a_wide_one_less_sure(
    fitted: tuple[bh.Posterior, Dataset],
) -> None:
    posterior, data = fitted
    layer = LastLayer(posterior, data)
    point = posterior.predict(data, 0)
    narrow, wide = layer.predict(data, 1e-4, 8), layer.predict(data, 3.0, 64)
    assert torch.allclose(narrow.probabilities, point.probabilities, atol=1e-3)
    assert wide.epistemic.mean() > 0.01 > narrow.epistemic.mean()
    assert wide.confidence.mean() < point.confidence.mean()


def test_fitted_features_are_what_the_head_reads(fitted: tuple[bh.Posterior, Dataset]) -> None:
    """Under PEFT weights too: the head alone, on them, gives the network's outputs."""
    posterior, data = fitted
    model, layer = posterior.model, LastLayer(posterior, data)
    batch = next(posterior.text.encode(model, data, labelled=True).batches(32))
    features = model.network.features(batch, layer.weights)
    outputs = features @ layer.weights["head.weight"].T + layer.weights["head.bias"]
    assert torch.allclose(outputs, model.outputs(layer.weights, batch), atol=1e-5)
    assert not torch.allclose(features, model.network.features(batch), atol=1e-3)


def test_dropout_drops_whole_inputs_and_keeps_the_mean(
    fitted: tuple[bh.Posterior, Dataset],
) -> None:
    posterior, _ = fitted
    module = FunctionGuide(dropout(posterior.model, 0.25))
    with torch.no_grad():
        module.parameters_["head/weight/point"].fill_(2.0)
    drawn = draw(posterior.model, module, 2000)
    weight = drawn["head.weight"][:, 0]
    assert weight.unique().tolist() == [0.0, pytest.approx(2 / 0.75)]
    assert (weight[:, 0] == weight[:, 1]).all()  # a column, for both outputs
    assert weight.mean().item() == pytest.approx(2.0, abs=0.05)
    other = drawn["lora.query.A"][:, 0]
    start = module.parameters_["lora/query/A/point"]
    assert ((other == 0) | torch.isclose(other, start / 0.75)).all()
    assert (drawn["lora.query.B"] == module.parameters_["lora/query/B/point"]).all()


def test_an_ensembles_forecast_is_the_mean_of_its_members() -> None:
    first = torch.tensor([[0.8, 0.2], [0.5, 0.5]])
    members = [bh.ClassForecast.from_draws(p[None], labels=[0, 1]) for p in (first, first.flip(1))]
    joint = mixture(members)
    assert torch.allclose(joint.probabilities, torch.full((2, 2), 0.5))
    assert joint.draws == 2 and joint.epistemic[0] > joint.epistemic[1] == 0
    means = [torch.tensor([[value]]) for value in (1.0, 3.0)]
    ratings = mixture([bh.RatingForecast.from_draws(mean, torch.ones(1, 1)) for mean in means])
    assert ratings.mean.item() == 2 and ratings.epistemic.item() == 1


# Significance.


@pytest.mark.parametrize("count", [7, 40])
def test_the_permutation_test_is_scipys(count: int) -> None:
    """With 7 pairs over all signs; with 40 by 10,000 of them, to within 4 sds of each."""
    generator = torch.Generator().manual_seed(count)
    ours, theirs = torch.rand(2, count, generator=generator, dtype=torch.float64)
    peer = stats.permutation_test(
        ((ours - theirs).numpy(),), np.mean, permutation_type="samples", n_resamples=9999, rng=0
    )
    noise = 0 if count == 7 else 4 * (2 * peer.pvalue * (1 - peer.pvalue) / 1e4) ** 0.5
    assert permutation_p(ours, theirs) == pytest.approx(peer.pvalue, abs=noise + 1e-9)


def test_the_permutation_tests_false_alarms_are_as_rare_as_it_says() -> None:
    """Of 400 tests without a difference, 5 % at a level of 5 %: 20, with sd 4.4."""
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(400, 10, generator=generator) ** 4  # skew, as losses are
    flip = torch.rand(400, 10, generator=generator) < 0.5
    ours, theirs = torch.where(flip, values, 0.0), torch.where(flip, 0.0, values)
    alarms = sum(permutation_p(a, b) <= 0.05 for a, b in zip(ours, theirs, strict=True))
    assert 5 <= alarms <= 37  # within four sds
    assert permutation_p(ours[0] + 1, ours[0] * 0) < 0.01


def test_a_test_over_fits_has_few_false_alarms_where_one_over_texts_has_many() -> None:
    """Two methods that are the same, whose fits are better or worse by chance, as a whole."""
    generator = torch.Generator().manual_seed(2)
    alarms = {"texts": 0, "fits": 0}
    for _ in range(200):
        luck = torch.randn(2, 5, 1, generator=generator)
        ours, theirs = luck + torch.randn(2, 5, 100, generator=generator)
        alarms["texts"] += stats.ttest_rel(ours.flatten(), theirs.flatten()).pvalue < 0.05
        means = ([value.mean().item() for value in of] for of in (ours, theirs))
        alarms["fits"] += fits_p(*means) < 0.05
    assert alarms["fits"] <= 22  # 10 and four sds
    assert alarms["texts"] > 100  # why there are both
    with pytest.raises(DataError, match="1 and 2 fits: expected as many, and 2 at least"):
        fits_p([0.1], [0.1, 0.2])


def test_holm_is_the_closed_testing_procedure_with_bonferroni() -> None:
    """A hypothesis is rejected when every set of hypotheses that has it is, by Bonferroni."""
    values = [0.001, 0.04, 0.012, 0.2, 0.03]
    found = holm(values)
    for i, _ in enumerate(values):
        worst = 0.0
        for size in range(1, 6):
            for chosen in itertools.combinations(range(5), size):
                if i in chosen:
                    worst = max(worst, min(1.0, size * min(values[j] for j in chosen)))
        assert found[i] == pytest.approx(worst)


# Tables.


def test_a_table_says_the_same_in_markdown_csv_and_latex() -> None:
    rows = [
        Row(("a_b", "1"), {"nll": Cell.of([0.1, 0.3]), "p (nll)": Cell(0.04)}),
        Row(("c", "2"), {"nll": Cell(0.5)}),
    ]
    table = Table("50 % of it", ("method", "seeds"), ("nll", "p (nll)"), rows, "Commit x.")
    text = table.markdown().splitlines()
    assert text[2:6] == [
        "| method | seeds | nll | p (nll) |",
        "|---|---|---|---|",
        "| a_b | 1 | 0.200 ± 0.100 | 0.040 |",
        "| c | 2 | 0.500 |  |",
    ]
    read = list(csv.DictReader(io.StringIO(table.csv())))
    assert float(read[0]["nll"]) == 0.2 and float(read[0]["nll se"]) == pytest.approx(0.1)
    assert read[1]["p (nll)"] == read[1]["nll se"] == "" and "p (nll) se" not in read[1]
    latex = table.latex()
    assert r"a\_b & 1 & 0.200 $\pm$ 0.100 & 0.040 \\" in latex
    assert r"\caption{50 \% of it. Commit x.}" in latex
