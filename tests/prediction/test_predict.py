"""Predictions: against brute force, in parts, and by each method."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from counts import COUNTS, Counts
from exact import KnownNoise, dense, design, own_network
from students import fitted as fitted_students
from students import unlabelled, with_student
from torch import Tensor, nn

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, DataError, LikelihoodError
from bhpeft_pyro.forecast import ClassForecast
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.model import linearized
from bhpeft_pyro.model.likelihoods import (
    Categorical,
    Function,
    HeteroscedasticNormal,
    Likelihood,
    MultiLabel,
    MultipleChoice,
    Normal,
    OrderedLogistic,
)
from bhpeft_pyro.prediction import predict as module
from bhpeft_pyro.testing import tiny_model

TEXTS = ["w9", "w5 w30 w12 w44 w17", "w6 w7", "w8 w40 w41 w42", "w21 w22 w23", "w30 w31", "w5 w5"]
QUESTIONS = [
    ("w9 w10", ["w5", "w6 w7", "w8 w9 w11"]),
    ("w12", ["w5 w6", "w30"]),
    ("w40 w41 w42 w43", ["w9", "w10", "w11", "w12", "w13"]),
    ("w20 w22", ["w6", "w7 w14"]),
]


def posterior_of(
    likelihood: Likelihood | None = None, kinds: Any = None, outputs: int = 3, scale: float = 0.3
) -> bh.Posterior:
    """A wide posterior far from its start, so that draws differ a lot; nothing is trained."""
    likelihood = Categorical() if likelihood is None else likelihood
    model = tiny_model(kinds, likelihood.outputs or outputs, likelihood=likelihood)
    torch.manual_seed(5)
    guide = MeanFieldGuide(model)
    with torch.no_grad():
        for loc in guide.loc.values():
            loc.add_(0.3 * torch.randn_like(loc))
        for log_scale in guide.log_scale.values():
            log_scale.fill_(scale).log_()
    return bh.Posterior(model, guide, ())


def brute_force(
    posterior: bh.Posterior, data: Any, weights: dict[str, Tensor], what: str
) -> Tensor:
    """(S, N, ...) of an attribute of the distribution of labels: each draw and example alone."""
    model = posterior.model
    examples = posterior.encode(data, labelled=False)
    rows = []
    for i in range(len(examples)):
        (batch,) = list(examples.subset([i]).batches(1))
        draws = []
        for s in range(len(next(iter(weights.values())))):
            with torch.no_grad():
                one = {name: value[s] for name, value in weights.items()}
                draws.append(getattr(model.predictive(one, batch), what)[0])
        rows.append(torch.stack(draws))
    return nn.utils.rnn.pad_sequence([r.movedim(0, -1) for r in rows], True).movedim(-1, 0)


@pytest.mark.parametrize("kinds", [None, (), bh.presets.bh_peft(), bh.presets.unipelt()])
def test_folded_draws_are_a_loop_over_draws(kinds: Any) -> None:
    posterior = posterior_of(kinds=kinds)
    samples = 19  # more than are drawn at a time
    forecast = posterior.predict(TEXTS, samples, seed=4, keep_samples=True)
    weights = posterior.sample(samples, seed=4)
    expected = brute_force(posterior, TEXTS, weights, "probs")
    torch.testing.assert_close(forecast.samples, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(forecast.probabilities, expected.mean(0), atol=1e-5, rtol=1e-4)
    assert expected.std(0).max() > 0.05  # a draw is not like another
    assert forecast.draws == samples


@pytest.mark.parametrize("likelihood", [OrderedLogistic(4), Categorical()])
def test_the_central_values_are_a_single_pass(likelihood: Likelihood) -> None:
    posterior = posterior_of(likelihood)
    forecast = posterior.predict(TEXTS, samples=0)
    means = {name: value[None] for name, value in posterior.guide.means().items()}
    expected = brute_force(posterior, TEXTS, means, "probs")
    torch.testing.assert_close(forecast.probabilities, expected[0], atol=1e-5, rtol=1e-4)
    assert forecast.draws == 1
    assert forecast.epistemic.abs().max() < 1e-6


def test_multiple_choice_with_different_numbers_of_choices() -> None:
    posterior = posterior_of(MultipleChoice())
    forecast = posterior.predict(QUESTIONS, samples=5, seed=1, keep_samples=True)
    expected = brute_force(posterior, QUESTIONS, posterior.sample(5, seed=1), "probs")
    torch.testing.assert_close(forecast.samples, expected, atol=1e-5, rtol=1e-4)
    exist = torch.tensor([[k < len(choices) for k in range(5)] for _, choices in QUESTIONS])
    assert torch.equal(forecast.choices, exist)
    assert torch.equal(forecast.probabilities > 0, exist)
    assert forecast.texts == tuple(question for question, _ in QUESTIONS)
    few = posterior.predict(QUESTIONS, samples=5, seed=1, max_rows=5)
    torch.testing.assert_close(few.probabilities, forecast.probabilities, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("likelihood", [Normal(3.0, 2.0), HeteroscedasticNormal(3.0, 2.0)])
def test_ratings_obey_the_law_of_total_variance(likelihood: Likelihood) -> None:
    posterior = posterior_of(likelihood)
    forecast = posterior.predict(TEXTS, samples=20, seed=2)
    weights = posterior.sample(20, seed=2)
    mean = brute_force(posterior, TEXTS, weights, "mean").double()
    variance = brute_force(posterior, TEXTS, weights, "variance").double()
    # Var(y) from the raw moments of the mixture: E[y^2] - E[y]^2
    total = (variance + mean.square()).mean(0) - mean.mean(0).square()
    torch.testing.assert_close(forecast.mean.double(), mean.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(forecast.total.double(), total, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        forecast.epistemic.double(), mean.var(0, correction=0), atol=1e-3, rtol=1e-3
    )
    assert (forecast.epistemic > 0.01).all()


def test_the_nll_is_that_of_the_likelihood_itself() -> None:
    posterior = posterior_of(Counts())
    forecast = posterior.predict(COUNTS, samples=9, seed=2)
    weights = posterior.sample(9, seed=2)
    rates = brute_force(posterior, COUNTS, weights, "mean").double()
    draws = dist.Poisson(rates).log_prob(torch.tensor(COUNTS["label"]).double())
    expected = draws.logsumexp(0) - math.log(9)
    torch.testing.assert_close(-forecast.nlls(), expected, atol=1e-4, rtol=1e-4)
    nll = -expected.mean().item()
    assert posterior.evaluate(COUNTS, 9, seed=2)["nll"] == pytest.approx(nll, rel=1e-4)
    # Of other labels only the Normals with these means and sds are known.
    normals = bh.forecast.RatingForecast.from_draws(forecast.means, forecast.sds)
    other = torch.ones(12)
    assert torch.equal(forecast.with_labels(other).nlls(), normals.nlls(other))
    assert posterior.predict(TEXTS, samples=2).labels is None


def test_the_forecast_does_not_depend_on_how_it_is_computed() -> None:
    posterior = posterior_of()
    texts = [*TEXTS] * 3
    reference = posterior.predict(texts, samples=17, keep_samples=True)
    for rows in (3, 40, 10_000):
        other = posterior.predict(texts, samples=17, max_rows=rows, keep_samples=True)
        torch.testing.assert_close(other.samples, reference.samples, atol=1e-5, rtol=1e-4)
    back = posterior.predict(texts[::-1], samples=17)
    assert list(back.texts) == texts[::-1]
    torch.testing.assert_close(
        back.probabilities.flip(0), reference.probabilities, atol=1e-5, rtol=1e-4
    )
    alone = posterior.predict([TEXTS[2]], samples=17)
    beside_long = posterior.predict([TEXTS[2], " ".join(["w9"] * 30)], samples=17)
    torch.testing.assert_close(
        alone.probabilities[0], beside_long.probabilities[0], atol=1e-5, rtol=1e-4
    )


def test_a_seed_repeats_a_forecast_and_leaves_the_global_random_state_alone() -> None:
    posterior = posterior_of()
    torch.manual_seed(8)
    before = torch.get_rng_state()
    first = posterior.predict(TEXTS, samples=20, seed=3)
    posterior.sample(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    again = posterior.predict(TEXTS, samples=20, seed=3)
    assert torch.equal(first.probabilities, again.probabilities)
    # Neighbouring seeds have no draw in common.
    draws = [posterior.sample(40, seed=seed)["head.bias"] for seed in (3, 4)]
    assert len(torch.unique(torch.cat(draws), dim=0)) == 80


def test_draws_have_the_posterior_s_moments() -> None:
    posterior = posterior_of()
    draws = posterior.sample(1000)
    for name, value in posterior.guide.means().items():
        assert draws[name].shape == (1000, *value.shape)
        z = (draws[name] - value) / 0.3
        assert z.mean(0).abs().max() < 5 / 1000**0.5
        assert (z.std(0) - 1).abs().max() < 5 / 2000**0.5


def test_bf16_is_near() -> None:
    posterior = posterior_of(kinds=bh.presets.bh_peft(), scale=0.05)
    exact = posterior.predict(TEXTS, samples=4).probabilities
    rounded = posterior.predict(TEXTS, samples=4, bf16=True).probabilities
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.1)
    assert not torch.allclose(rounded, exact, atol=1e-6)


@pytest.mark.parametrize("name", ["delta", "AutoDelta", "mixture"])
def test_the_draws_of_a_point_take_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(bh.presets.bh_peft(), 3)
    guide = bh.autoguide("delta" if name == "mixture" else name, model)
    with pyro.get_param_store().scope():
        guide(None)  # Pyro's makes its parameters when it is first called
    for value in guide.parameters():
        value.data += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    guides = [guide] if name != "mixture" else [guide, bh.autoguide("delta", model)]
    ran: list[int] = []
    original = bh.RandomPEFT.forward

    def forward(network: bh.RandomPEFT, weights: dict[str, Tensor], batch: bh.data.Batch) -> Tensor:
        ran.append(max(map(len, weights.values())))
        return original(network, weights, batch)

    posterior = bh.Posterior(model, guides, ())
    expected = brute_force(posterior, TEXTS, posterior.sample(6), "probs")
    monkeypatch.setattr(bh.RandomPEFT, "forward", forward)
    forecast = posterior.predict(TEXTS, 6, keep_samples=True)
    assert ran == [1] * len(guides) and forecast.draws == 6
    torch.testing.assert_close(forecast.samples, expected, atol=1e-5, rtol=1e-4)


NUMBERS = {"text": [f"w{5 + i % 2} w{10 + i}" for i in range(12)], "label": [0, 1, 2] * 4}


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_a_distribution_without_moments_is_named(guide: str) -> None:
    cauchy = tiny_model((), 1, likelihood=lambda o: dist.Cauchy(o[..., 0], 1.0))
    with pytest.raises(LikelihoodError, match="its Cauchy has no mean or no stddev"):
        bh.fit(cauchy, guide, NUMBERS, max_steps=2, progress=False)
    # Whether these are infinite may depend on the outputs.
    model = tiny_model((), 1, likelihood=lambda o: dist.StudentT(1.5, o[..., 0], 1.0))
    posterior = bh.fit(model, guide, NUMBERS, max_steps=2, progress=False)
    with pytest.raises(LikelihoodError, match="mean and stddev of its StudentT are not finite"):
        posterior.predict(NUMBERS)


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_numbers_of_tries_that_differ(guide: str) -> None:
    """Their outcomes cannot be enumerated together."""
    tries = Function(
        lambda o, extra: dist.Binomial(extra["tries"], logits=o[..., 0]), columns=("tries",)
    )
    data = NUMBERS | {"tries": [2, 3, 4] * 4}
    posterior = bh.fit(
        tiny_model((), 1, likelihood=tries), guide, data, max_steps=2, progress=False
    )
    assert (posterior.predict(data).mean < torch.tensor(data["tries"])).all()


# In parts


PART_TEXTS = [f"w{5 + i % 2} w{10 + i}" + " w9" * (i % 5) for i in range(11)]
PART_CHOICES = [[f"w{20 + i}", "w6", "w7 w8", "w9"][: 2 + i % 3] for i in range(11)]
PART_DATA: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "class": (None, 2, {"text": PART_TEXTS, "label": [i % 2 for i in range(11)]}),
    "labels": (MultiLabel(), 3, {"text": PART_TEXTS, "label": [[i % 2, 1, 0] for i in range(11)]}),
    "rating": (Normal(), 1, {"text": PART_TEXTS, "label": [i / 5 for i in range(11)]}),
    "count": (Counts(), 1, {"text": PART_TEXTS, "label": [i % 4 for i in range(11)]}),
    "choice": (
        MultipleChoice(),
        1,
        {"question": PART_TEXTS, "choices": PART_CHOICES, "answer": [i % 2 for i in range(11)]},
    ),
}


def fitted(kind: str, guide: str) -> bh.Posterior:
    likelihood, outputs, data = PART_DATA[kind]
    model = tiny_model(outputs=outputs, likelihood=likelihood)
    return bh.fit(model, guide, data, components=1, max_steps=2, progress=False, seed=1)


def tensors(forecast: Any) -> dict[str, Tensor]:
    """Every tensor of a forecast."""
    found: dict[str, Tensor] = {}
    for field in fields(forecast):
        value = getattr(forecast, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif field.name == "pairs":
            found |= tensors(value)
    return found


@pytest.mark.parametrize(
    ("kind", "guide", "keep"),
    [
        ("class", "laplace", False),
        ("class", "normal", True),
        ("labels", "laplace", False),
        ("labels", "normal", True),
        ("rating", "laplace", False),
        ("rating", "normal", False),
        ("choice", "laplace", False),
        ("choice", "normal", True),
    ],
)
def test_parts_are_joined(
    kind: str, guide: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior, data = fitted(kind, guide), PART_DATA[kind][2]
    whole = posterior.predict(data, 7, keep_samples=keep)
    monkeypatch.setattr(module, "PART", 4)  # parts of 4, 4 and 3
    parts = posterior.predict(data, 7, keep_samples=keep)
    assert parts.texts == whole.texts and len(parts) == 11
    torch.testing.assert_close(tensors(parts), tensors(whole), atol=1e-5, rtol=1e-4)


def test_labels_that_are_drawn_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, data = fitted("count", "normal"), PART_DATA["count"][2]
    whole = posterior.predict(data, 5)
    monkeypatch.setattr(module, "PART", 4)
    parts = posterior.predict(data, 5)
    assert parts.outcomes is not None and whole.outcomes is not None
    assert parts.outcomes.shape == whole.outcomes.shape
    torch.testing.assert_close(parts.nlls(), whole.nlls(), atol=1e-4, rtol=1e-4)


def test_the_draws_of_one_part_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 4)
    posterior, shapes = fitted("class", "laplace"), []
    reduced = ClassForecast.from_draws

    def from_draws(draws: Tensor, **given: Any) -> ClassForecast:
        shapes.append(tuple(draws.shape))
        return reduced(draws, **given)

    monkeypatch.setattr(ClassForecast, "from_draws", from_draws)
    assert len(posterior.predict(PART_TEXTS)) == 11
    assert shapes == [(1000, 4, 2), (1000, 4, 2), (1000, 3, 2)]


@pytest.mark.parametrize("method", [None, "student"])
def test_rows_are_counted_from_the_first_part(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted("class", "normal")
    if method == "student":
        posterior = posterior.distill(unlabelled("class", 60), epochs=1, progress=False)
    words = posterior.model.network.backbone.embeddings.word_embeddings

    def spoil(_: Any, given: Any, output: Tensor) -> Tensor:
        return output.masked_fill((given[0] == 49).unsqueeze(-1), torch.nan)

    words.register_forward_hook(spoil)
    monkeypatch.setattr(module, "PART", 4)
    texts = [*PART_TEXTS[:6], "w5 w49", *PART_TEXTS[6:9], "w49"]
    named = r"data, row 6: of 'w5 w49' the backbone .* \(and 1 more: row 10\)$"
    with pytest.raises(DataError, match=named) as caught:
        posterior.replace(novelty=None).predict(texts, method=method)
    assert caught.value.rows == (6, 10)


# Methods


@contextmanager
def counted(posterior: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the rows that go through the transformer, forward and backward."""
    rows: list[int] = []
    slopes = linearized.slopes

    def backward(total: Tensor, leaves: Any) -> Any:
        if posterior.model.network.kinds:  # otherwise not through the transformer
            rows.append(len(leaves[0]))
        return slopes(total, leaves)

    hook = posterior.model.network.backbone.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    with monkeypatch.context() as patched:
        patched.setattr(linearized, "slopes", backward)
        try:
            yield rows
        finally:
            hook.remove()


@pytest.mark.parametrize("options", [
    *({"method": method} for method in ("student", "exact")),
    {"samples": 0}, {"samples": 6, "keep_samples": True},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["class", "labels", "noisy rating"])
def test_passes_are_those_that_a_forecast_takes(
    kind: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior, texts = with_student(kind), unlabelled(kind, 24, seed=6)
    with counted(posterior, monkeypatch) as rows:
        forecast = posterior.predict(texts, **options)
    assert forecast.passes == pytest.approx(sum(rows) / 24)
    assert forecast.method == options.get("method", "draws" if options.get("samples") else "point")


@pytest.mark.parametrize("guide", ["normal", "delta"])
@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": 6}, {"samples": 80}, {}])
def test_passes_of_draws(guide: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, texts = fitted_students("class", guide), unlabelled("class", 24, seed=6)
    with counted(posterior, monkeypatch) as rows:
        forecast = posterior.predict(texts, **options)
    assert forecast.passes == pytest.approx(sum(rows) / 24)
    assert forecast.method == ("point" if options.get("samples") == 0 else "draws")


def test_passes_of_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with two choices take a backward pass less than those with three. A row is a choice."""
    posterior, data = with_student("choice"), unlabelled("choice", 24, seed=6)
    counts = torch.tensor([*map(len, data["choices"])])
    posterior = posterior.replace(novelty=None)
    for method, of_count in (("student", 1), ("exact", 2 * counts)):
        with counted(posterior, monkeypatch) as rows:
            forecast = posterior.predict(data, method=method, max_rows=1)  # one by one
        expected = of_count * torch.ones(24)
        assert forecast.passes == pytest.approx(expected.mean().item())
        forward = torch.tensor(1 if method == "student" else 2) * counts
        backward = 2 * (counts - 1) if method == "exact" else 0 * counts
        assert sum(rows) == (forward + backward).sum()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "student", "samples": 3}, "method='student' takes one pass; .* samples=3"),
        ({"method": "student", "keep_samples": True}, "expected no keep_samples=True"),
        ({"method": "exact", "samples": 0}, "method='exact': samples=0 and keep_samples take"),
        ({"method": "exact", "keep_samples": True}, "method='exact': samples=0 and keep_samples"),
        ({"method": "draws"}, "method='draws': .* has 'exact' only"),
    ],
)
def test_methods_that_do_not_go_together_with_others(options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        with_student().predict(TEXTS, **options)


def test_methods_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match=r"method='exact': .* draws of the weights only"):
        fitted_students("class", "normal").predict(TEXTS, method="exact")
    posterior = fitted_students("class")
    assert posterior.predict(TEXTS).method == "exact"
    with pytest.raises(ConfigError, match="this posterior has no student"):
        posterior.predict(TEXTS, method="student")


def test_what_is_asked_for_decides_where_no_method_is_given() -> None:
    posterior = with_student()
    found = {
        name: posterior.predict(TEXTS, **options).method
        for name, options in {
            "nothing": {},
            "outputs": {"samples": 50},
            "kept": {"keep_samples": True, "samples": 4},
            "central values": {"samples": 0},
        }.items()
    }
    assert found == {
        "nothing": "student",
        "outputs": "exact",
        "kept": "draws",
        "central values": "point",
    }


class SameNoise(KnownNoise):
    """Of which predictions have a closed form."""

    linear_mean = True


def test_a_head_alone_is_exact_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance of x' w by hand."""
    model = bh.Model(own_network(), dist.Normal(0.0, 0.7), SameNoise(0.5))
    columns = unlabelled("rating", 60) | {"label": [i / 10 for i in range(60)]}
    options: dict[str, Any] = {"components": 1, "tau": 1.0, "max_steps": 20, "progress": False}
    posterior = bh.fit(model, "laplace", columns, **options)
    with counted(posterior, monkeypatch) as rows:
        forecast = posterior.replace(novelty=None).predict(TEXTS, method="exact")
    assert (forecast.method, forecast.passes, sum(rows)) == ("exact", 1, len(TEXTS))
    assert posterior.predict(TEXTS).method == "exact"
    x = design(posterior.model.network, posterior.encode(TEXTS, labelled=False))
    guide: Any = posterior.guide
    mean = x @ torch.cat([value.flatten() for value in guide.means().values()]).double()
    variance = (x @ dense(guide.covariance).double() * x).sum(1)
    torch.testing.assert_close(forecast.mean.double(), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forecast.epistemic.double(), variance, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(forecast.aleatoric, torch.full((len(TEXTS),), 0.25))
