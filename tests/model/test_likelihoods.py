"""Likelihoods against SciPy, Pyro and written-out formulas."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from saves import load
from scipy import special, stats
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, DataError, GuideError, LikelihoodError
from bhpeft_pyro.model.likelihoods import (
    Categorical,
    Function,
    HeteroscedasticNormal,
    Likelihood,
    MultiLabel,
    MultipleChoice,
    Normal,
    OrderedLogistic,
    Outputs,
    StudentT,
)
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.testing import tiny_backbone, tiny_batch, tiny_model, tiny_tokenizer


def log_prob(
    likelihood: Likelihood,
    outputs: Tensor,
    labels: Tensor,
    weights: Mapping[str, Tensor] | None = None,
    choices: Tensor | None = None,
) -> Tensor:
    return likelihood.distribution(Outputs(outputs, weights or {}, choices)).log_prob(labels)


def test_categorical_is_the_softmax() -> None:
    outputs, labels = torch.randn(3, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    expected = torch.from_numpy(special.log_softmax(outputs.numpy(), axis=-1))
    found = log_prob(Categorical(), outputs, labels)
    torch.testing.assert_close(found, expected[:, torch.arange(5), labels])
    assert Categorical().num_labels(4) == 4


@pytest.mark.parametrize("levels", [2, 5])
def test_ordered_logistic_equals_pyros(levels: int) -> None:
    likelihood = OrderedLogistic(levels)
    outputs, raw = 2 * torch.randn(3, 6, 1), torch.randn(levels - 1)
    cutpoints = torch.cat([torch.zeros(1), raw[1:].exp()]).cumsum(0)
    cutpoints += raw[0] - cutpoints.mean()
    theirs = dist.OrderedLogistic(outputs[..., 0], cutpoints)
    for level in range(levels):
        labels = torch.full((6,), level)
        found = log_prob(likelihood, outputs, labels, {"cutpoints": raw})
        torch.testing.assert_close(found, theirs.log_prob(labels), rtol=1e-3, atol=1e-4)
    assert likelihood.num_labels(1) == levels


def test_ordered_logistic_is_finite_however_wide_the_posterior() -> None:
    likelihood, raw = OrderedLogistic(4), torch.tensor([0.0, 100.0, -200.0])
    assert likelihood.cutpoints({"cutpoints": raw}).isfinite().all()
    labels = torch.tensor([0, 1, 2, 3])
    assert log_prob(likelihood, torch.zeros(4, 1), labels, {"cutpoints": raw}).isfinite().all()


@pytest.mark.parametrize("predictor", [-40.0, -20.0, 20.0, 40.0])
def test_ordered_logistic_far_out_is_exact_and_has_a_gradient(predictor: float) -> None:
    # Differences of probabilities near 1 are 0 in float32; of those near 0 they are not.
    outputs = torch.tensor([[predictor]], requires_grad=True)
    raw = torch.tensor([0.0, math.log(2.0)])  # cutpoints at -1 and 1
    for level in range(3):
        found = log_prob(OrderedLogistic(3), outputs, torch.tensor([level]), {"cutpoints": raw})
        lower, upper = [-math.inf, -1.0, 1.0, math.inf][level : level + 2]
        # P(lower < predictor + logistic noise < upper), on the side where it is small
        if predictor > 0:
            exact = special.expit(upper - predictor) - special.expit(lower - predictor)
        else:
            exact = special.expit(predictor - lower) - special.expit(predictor - upper)
        assert found.item() == pytest.approx(math.log(exact), rel=1e-4, abs=1e-6)
        (slope,) = torch.autograd.grad(found.sum(), outputs)
        right = level == (2 if predictor > 0 else 0)
        assert slope.isfinite().all()
        assert abs(slope.item()) < 1e-3 if right else abs(slope.item()) > 0.9


def test_cutpoints_increase_and_start_where_levels_are_spread_about_zero() -> None:
    (site,) = OrderedLogistic(5).sites
    start = OrderedLogistic(5).cutpoints({"cutpoints": site.init()})
    assert start.tolist() == [-1.5, -0.5, 0.5, 1.5]
    wild = OrderedLogistic(5).cutpoints({"cutpoints": 3 * torch.randn(7, 4)})
    assert (wild.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("levels", [2, 5, 10])
def test_the_default_prior_favours_neither_end_of_the_levels(levels: int) -> None:
    """Level for level as likely as its mirror image, within 4 standard errors."""
    model = tiny_model((), 1, likelihood=OrderedLogistic(levels))
    torch.manual_seed(0)
    with pyro.plate("draws", 4000, dim=-2):
        weights = model.prior(model.sites)
    outputs = weights["head.bias"].reshape(4000, 1, 1)
    cuts = weights["cutpoints"].reshape(4000, 1, levels - 1)
    shares = model.likelihood.distribution(Outputs(outputs, {"cutpoints": cuts})).probs[:, 0]
    lean = shares - shares.flip(-1)
    assert (lean.mean(0).abs() <= 4 * lean.std(0) / 4000**0.5 + 1e-6).all()


def test_multiple_choice_leaves_out_choices_that_do_not_exist() -> None:
    scores, labels = torch.randn(2, 3, 4, 1), torch.tensor([1, 0, 2])
    counts = [2, 4, 3]
    exist = torch.arange(4) < torch.tensor(counts).unsqueeze(1)
    found = log_prob(MultipleChoice(), scores, labels, choices=exist)
    probs = MultipleChoice().distribution(Outputs(scores, choices=exist)).probs  # type: ignore[attr-defined]
    for s in range(2):
        for i, count in enumerate(counts):
            row = special.log_softmax(scores[s, i, :count, 0].numpy())
            assert found[s, i].item() == pytest.approx(row[labels[i]], abs=1e-5)
            assert (probs[s, i, count:] == 0).all()


def test_multiple_choice_of_a_batch_that_is_shared_out() -> None:
    scores = torch.randn(2, 2, 3, 1)  # 2 draws, 2 of the 4 examples each
    exist = torch.arange(3) < torch.tensor([[2], [3], [3], [2]])
    labels = torch.tensor([[1, 2], [0, 1]])
    found = log_prob(MultipleChoice(), scores, labels, choices=exist)
    for s in range(2):
        alone = log_prob(MultipleChoice(), scores[s], labels[s], choices=exist[2 * s : 2 * s + 2])
        torch.testing.assert_close(found[s], alone)


@pytest.mark.parametrize("kind", [Normal, HeteroscedasticNormal, StudentT])
def test_ratings_are_in_units_of_spread_around_center(kind: Any) -> None:
    """The noise scale is that of the draw; under HeteroscedasticNormal times the text's factor."""
    likelihood = kind(3.0, 2.0)
    outputs, ratings = torch.randn(2, 5, likelihood.outputs), 3 + 2 * torch.randn(5)
    log_scale = torch.tensor([[-0.5], [0.3]])  # of two draws
    middle, scale = 3 + 2 * outputs[..., 0].numpy(), 2 * log_scale.exp().numpy()
    if kind is HeteroscedasticNormal:
        scale = scale * np.log1p(np.exp(outputs[..., 1].numpy() + math.log(math.e - 1)))
    found = log_prob(likelihood, outputs, ratings, {"noise.log_scale": log_scale})
    theirs = stats.t(4.0, middle, scale) if kind is StudentT else stats.norm(middle, scale)
    expected = torch.from_numpy(theirs.logpdf(ratings.numpy())).float()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_noise_is_never_zero_and_the_factor_of_a_text_starts_at_1() -> None:
    at_zero, wide = (
        {"noise.log_scale": torch.tensor(0.0)},
        {"noise.log_scale": torch.tensor(-500.0)},
    )
    by_text = HeteroscedasticNormal(0.0, 2.0)
    plain = by_text.distribution(Outputs(torch.zeros(1, 2), at_zero)).stddev
    assert plain.item() == pytest.approx(2.0, rel=1e-3)
    assert by_text.distribution(Outputs(torch.tensor([[0.0, -1e4]]), at_zero)).stddev.item() > 0
    assert StudentT().distribution(Outputs(torch.zeros(1, 1), wide)).stddev > 0


@pytest.mark.parametrize(("size", "factor"), [(None, 1.0), (8, 1.0), (80, 10.0)])
def test_a_mini_batch_stands_for_size_examples(size: int | None, factor: float) -> None:
    model, batch = tiny_model(()), tiny_batch(8)
    batch = bh.data.Batch(batch.inputs, batch.labels, size=size)
    trace = poutine.trace(model).get_trace(batch)
    trace.compute_log_prob()
    site = trace.nodes["label"]
    weights = {name: trace.nodes[name]["value"] for name in ("head.weight", "head.bias")}
    assert batch.labels is not None
    expected = model.predictive(weights, batch).log_prob(batch.labels).sum()
    torch.testing.assert_close(site["log_prob_sum"], factor * expected)
    torch.testing.assert_close(site["unscaled_log_prob"].sum(), expected)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "needed"),
    [
        (OrderedLogistic(3), 3, 1),
        (MultipleChoice(), 2, 1),
        (Normal(), 2, 1),
        (HeteroscedasticNormal(), 1, 2),
    ],
)
def test_a_head_of_another_width_is_an_error(
    likelihood: Likelihood, outputs: int, needed: int
) -> None:
    network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(outputs), tiny_tokenizer())
    message = f"{type(likelihood).__name__} needs a head with outputs={needed}, got {outputs}"
    with pytest.raises(LikelihoodError, match=message):
        bh.Model(network, None, likelihood)


def test_classes_of_ones_own_are_counted_by_the_outputs() -> None:
    class Own(Categorical):
        def num_labels(self, outputs: int) -> int | None:
            return Likelihood.num_labels(self, outputs)

    model = tiny_model((), 2, likelihood=Own())
    with pytest.raises(DataError, match=r"has 3 classes, .* and the model has 2"):
        rows = {"text": ["w5", "w6", "w7"], "label": [0, 1, 2]}
        bh.fit(model, "normal", rows, progress=False)


def test_several_labels_are_independent_given_the_weights() -> None:
    outputs, labels = torch.randn(3, 5, 4), torch.randint(0, 2, (5, 4)).float()
    found = log_prob(MultiLabel(), outputs, labels)
    signs = (2 * labels - 1).numpy()
    expected = special.log_expit(signs * outputs.numpy()).sum(-1)
    torch.testing.assert_close(found, torch.from_numpy(expected))
    assert MultiLabel().num_labels(4) == 4


BY_THE_HOUR = Function(
    lambda outputs, extra: dist.Poisson(extra["hours"] * outputs[..., 0].exp()), columns=("hours",)
)


def test_a_function_of_the_outputs() -> None:
    """Alone, and with a column of the data, against SciPy."""
    network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(1), tiny_tokenizer())
    table = {"text": ["w5", "w6", "w7"], "label": [0, 2, 1], "hours": [1.0, 2.0, 0.5]}
    plain = bh.Model(network, likelihood=lambda outputs: dist.Poisson(outputs[..., 0].exp()))
    with_hours = bh.Model(network, likelihood=BY_THE_HOUR)
    weights = {"head.weight": torch.randn(4, 1, 1, 16), "head.bias": torch.randn(4, 1, 1)}
    for model, hours in ((plain, np.ones(3)), (with_hours, np.array(table["hours"]))):
        batch = next(model.encode(table).batches(3))
        outputs = network(weights, batch)[..., 0]
        found = model.predictive(weights, batch).log_prob(batch.labels)
        expected = stats.poisson.logpmf(table["label"], hours * outputs.exp().numpy())
        assert found.shape == (4, 3)
        torch.testing.assert_close(found, torch.from_numpy(expected).float())
    # Of all extra columns it gets those that it names.
    columns, table["rater"] = bh.Columns(extra=("rater",)), [1.0, 2.0, 3.0]
    names: list[str] = []

    def by_name(outputs: Tensor, extra: dict[str, Tensor]) -> dist.Poisson:
        names.extend(extra)
        return dist.Poisson(outputs[..., 0].exp())

    model = bh.Model(network, likelihood=Function(by_name, columns=("hours",)))
    model.predictive(weights, next(model.encode(table, columns).batches(3)))
    assert {*names} == {"hours"}
    batch = bh.data.Batch({"input_ids": torch.ones(2, 1, dtype=torch.long)})
    with pytest.raises(LikelihoodError, match="reads the column 'hours', and the batch has no ext"):
        with_hours.predictive(weights, batch)
    with pytest.raises(LikelihoodError, match=r"or a function.*did you forget \(\)"):
        bh.Model(network, likelihood=Normal)  # type: ignore[arg-type]


@pytest.mark.parametrize("label", [-1.0, 2.5])
def test_a_label_that_cannot_be_is_named_before_a_fit(label: float) -> None:
    table = {"text": ["w5", "w6", "w7"], "label": [0.0, label, 1.0]}
    model = tiny_model((), 1, likelihood=lambda o: dist.Poisson(o[..., 0].exp()))
    with pytest.raises(
        DataError, match=f"'label', row 1: {label:g} has probability 0 under Function"
    ):
        model.encode(table)
    assert tiny_model((), 1, likelihood=StudentT()).encode(table).labels is not None


@dataclasses.dataclass(frozen=True)
class Doubled(Normal):
    def distribution(self, outputs: Outputs) -> Any:
        return dist.Normal(self._middle(Outputs(2 * outputs.values)), self._scale(outputs))


@dataclasses.dataclass(frozen=True)
class Free(Doubled):
    linear_mean = False


def test_a_normal_of_one_s_own_does_not_inherit_a_closed_form_that_is_not_its_own() -> None:
    table = {"text": ["w5", "w6"] * 4, "label": [1.0, 2.0] * 4}
    with pytest.raises(LikelihoodError, match="Doubled: linear_mean says that its mean"):
        tiny_model((), 1, likelihood=Doubled(1e5, 0.5)).encode(table)
    assert len(tiny_model((), 1, likelihood=Normal(1e5, 0.5)).encode(table)) == 8
    assert len(tiny_model((), 1, likelihood=Free(0.0, 0.5)).encode(table)) == 8


def test_a_function_of_choices_has_none_that_do_not_exist() -> None:
    rows = [{"question": "w5", "choices": ["w6", "w7"], "answer": 1}]
    rows += [{"question": "w8", "choices": ["w6", "w7 w9", "w5"], "answer": 2}]
    own = Function(lambda outputs: dist.Categorical(logits=outputs[..., 0]), kind="choice")
    forecasts = []
    for likelihood in (own, MultipleChoice()):
        model = tiny_model((), 1, likelihood=likelihood)
        fitted = bh.fit(model, "normal", rows * 4, max_steps=2, progress=False)
        forecasts.append(fitted.predict(rows, samples=3).probabilities)
    assert forecasts[0][0, 2] == 0
    torch.testing.assert_close(*forecasts)


def moved(outputs: Tensor) -> Any:
    shift = dist.transforms.AffineTransform(3.0, 2.0)
    return dist.TransformedDistribution(dist.Normal(outputs[..., 0], 1.0), [shift])


def test_what_is_no_likelihood_is_refused_by_name() -> None:
    table = {"text": ["w5", "w6"] * 4, "label": [1.0, 2.0] * 4}

    class Kindless(Likelihood):
        def distribution(self, outputs: Outputs) -> Any:
            raise AssertionError

    with pytest.raises(LikelihoodError, match="Kindless: it has no kind"):
        tiny_model((), 1, likelihood=Kindless())
    for function, message in (
        (lambda outputs: None, "got a NoneType in place of a distribution"),
        (lambda outputs: outputs[..., 0], "got a Tensor in place of a distribution"),
        (lambda outputs: dist.Cauchy(outputs[..., 0], 1.0), "its Cauchy has no mean or no stddev"),
        (moved, "its TransformedDistribution has no mean or no stddev"),
        (lambda outputs: dist.Categorical(logits=outputs), "Function.*kind='class'"),
        (lambda outputs: dist.Bernoulli(logits=outputs).to_event(1), "Function.*kind='labels'"),
    ):
        outputs = 2 if "kind=" in message else 1
        with pytest.raises(LikelihoodError, match=message):
            tiny_model((), outputs, likelihood=function).encode(table)


def test_a_distribution_of_another_kind_is_an_error() -> None:
    for kind, function, expected in (
        ("labels", lambda z: dist.Bernoulli(logits=z[..., 0]), r"dist.Bernoulli\(...\).to_event"),
        ("class", lambda z: dist.Bernoulli(logits=z[..., 0]), "dist.Categorical over the classes"),
        ("rating", lambda z: dist.Normal(z, 1.0).to_event(1), "a distribution of one number"),
    ):
        likelihood = bh.likelihoods.Function(function, kind)  # type: ignore[arg-type]
        with pytest.raises(LikelihoodError, match=expected):
            likelihood.checked(Outputs(torch.zeros(5, 2)))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: StudentT(df=2.0), "df"),
        (lambda: OrderedLogistic(1), "levels"),
        (lambda: Normal(spread=0.0), "spread"),
        (lambda: Normal(low=5.0, high=1.0), "low"),
    ],
)
def test_options_that_cannot_be(make: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}="):
        make()


def ratings(label: list[float], **extra: list[float]) -> dict[str, Any]:
    return {"text": ["w5", "w6", "w7"], "label": label, **extra}


def test_a_support_that_the_outputs_move_is_not_checked_and_one_of_the_data_is() -> None:
    model = tiny_model((), 1, likelihood=lambda o: dist.Pareto(o[..., 0].exp(), 3.0))
    assert model.encode(ratings([0.1, 0.5, 2.0])).labels is not None  # at 0 all are above 1
    shares = Function(
        lambda o, extra: dist.Binomial(extra["tries"], logits=o[..., 0]), columns=["tries"]
    )
    model = tiny_model((), 1, likelihood=shares)
    assert model.encode(ratings([2, 3, 4], tries=[2, 5, 9])).labels is not None
    with pytest.raises(DataError, match=r"row 1: 6 has probability 0 .*=tensor\(\[5\.\]\)\)$"):
        model.encode(ratings([2, 6, 4], tries=[2, 5, 9]))


def test_a_label_of_density_zero_is_refused_with_its_row() -> None:
    """0 is in the support of this Beta, and impossible under it whatever the outputs are."""

    def share(outputs: Tensor) -> Any:
        mean = outputs[..., 0].sigmoid()
        return dist.Beta(1.1 + 5 * mean, 1.1 + 5 * (1 - mean))

    model = tiny_model((), 1, likelihood=share)
    model.encode({"text": ["w5", "w6"], "label": [0.2, 0.9]})
    with pytest.raises(DataError, match="row 1: 0 has probability 0"):
        model.encode({"text": ["w5", "w6"], "label": [0.2, 0.0]})


def test_the_own_weights_of_a_likelihood_are_on_the_networks_device() -> None:
    seen: list[str] = []

    class Own(Likelihood):
        kind, outputs = "rating", 1
        sites = (Site("own", (2,), ("part",), torch.ones(()), lambda: torch.zeros(2)),)

        def distribution(self, outputs: Outputs) -> Any:
            seen.extend(each.device.type for each in (outputs.values, outputs.weights["own"]))
            raise InterruptedError  # nothing can be read on this device

    model = tiny_model((), 1, likelihood=Own()).to("meta")
    with pytest.raises(InterruptedError):
        model.encode(ratings([1.0, 2.0, 3.0]))
    assert seen == ["meta", "meta"]


# Ratings in their own units: by default a likelihood takes those of the first round


@pytest.mark.parametrize(("rating", "end"), [(5.5, 5), (0.25, 1)])
def test_ratings_beyond_the_ends_of_forecasts_are_named(rating: float, end: int) -> None:
    model = tiny_model((), 1, likelihood=Normal(3.0, 1.0, low=1.0, high=5.0))
    data = {"text": [f"w5 w{10 + i}" for i in range(20)], "label": [1.0, 5.0] * 9 + [2.0, rating]}
    with pytest.warns(UserWarning, match=f"a rating of {rating} is beyond {end}, where forecasts"):
        bh.fit(model, "normal", data, max_steps=1, progress=False)


def test_ratings_of_0_and_1000(tmp_path: Path) -> None:
    texts = [f"w{5 + i % 2} w{10 + i}" for i in range(24)]
    data = {"text": texts, "label": [1000.0 * (i % 2) for i in range(24)]}
    model = tiny_model((), 1, likelihood=Normal())
    posterior = bh.fit(model, "normal", data, epochs=40, progress=False)
    low, high = posterior.predict(["w5 w11", "w6 w11"]).mean.tolist()
    assert low < 350 and high > 650
    own = Normal(center=500.0, spread=500.0)
    assert posterior.model.likelihood == own and model.likelihood == Normal()
    new = {"text": texts, "label": [3.0] * 23 + [2.5e5]}
    with pytest.warns(UserWarning, match="250000 is 499 spreads from the centre of Normal"):
        later = posterior.update(new, max_steps=1, progress=False, again=True)
    assert later.model.likelihood == own
    saved = load(later.save(tmp_path / "it"))
    assert saved.model.likelihood == own


def test_ratings_that_rounding_makes_alike_are_refused() -> None:
    """Of 1.7e9 and 1.7e9 + 60 single precision makes the same number, and metrics an error of 0."""
    texts = [f"w{5 + i % 2} w{10 + i}" for i in range(24)]

    def learn(low: float, high: float, **given: float) -> bh.Posterior:
        model = tiny_model((), 1, likelihood=Normal(**given))
        data = {"text": texts, "label": [low, high] * 12}
        return bh.fit(model, "normal", data, max_steps=1, progress=False)

    for given in ({}, {"center": 1.7e9, "spread": 30.0}):
        with pytest.raises(DataError, match=r"1\.7e\+09 are rounded to steps of 2e\+02 .* offset"):
            learn(1.7e9, 1.7e9 + 60, **given)
    assert learn(0, 60).model.likelihood == Normal(30.0, 30.0)
    assert learn(1.7e9, 1.73e9).model.likelihood == Normal(1.715e9, 1.5e7)  # a year of seconds


@pytest.mark.parametrize("kind", [Normal, HeteroscedasticNormal, StudentT])
def test_what_is_given_stays(kind: type[Normal | StudentT]) -> None:
    labels = torch.tensor([2.0, 4.0])
    assert kind().standardised(labels) == kind(3.0, 1.0)
    assert kind(center=5.0).standardised(labels) == kind(5.0, 1.0)
    assert kind(5.0, 2.0).standardised(labels) == kind(5.0, 2.0)
    assert kind().standardised(torch.full((3,), 7.0)) == kind(7.0, 1.0)
    assert kind().standardised(None) == kind(0.0, 1.0)


def test_what_a_likelihood_cannot_train_or_sample_is_refused() -> None:
    """It would stay as it is, in silence."""
    weight = torch.nn.Parameter(torch.tensor(0.0))

    def own(outputs: Any) -> Any:
        return dist.Normal(outputs[..., 0], weight.exp())

    def stored(outputs: Any) -> Any:
        return dist.Normal(outputs[..., 0], pyro.param("noise", torch.tensor(1.0)).abs())

    def sampled(outputs: Any) -> Any:
        return dist.Normal(outputs[..., 0], pyro.sample("noise", dist.HalfNormal(1.0)))

    ratings = {"text": ["w5", "w6", "w7"], "label": [1.0, 2.0, 3.0]}
    for likelihood, guide, message in (
        (own, "normal", r"trainable tensors of the shapes \(\) are no parameters of the guide"),
        (own, "laplace", r"trainable tensors of the shapes \(\) are no parameters of the guide"),
        (stored, "normal", "weights of a likelihood are its `sites`"),
        (sampled, "normal", "'noise' of the model is not sampled .*if it is the likelihood's"),
    ):
        model = tiny_model((), 1, likelihood=likelihood)
        with pytest.raises(GuideError, match=message), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found vars in model but not guide")
            bh.fit(model, guide, ratings, max_steps=2, progress=False)
    assert weight.grad is None
    pyro.clear_param_store()
