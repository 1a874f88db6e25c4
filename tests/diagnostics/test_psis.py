"""k-hat: against closed forms, on guides that are exact, biased, too narrow and too wide.

What is random here has fixed seeds; where a test could fail by chance its rate is declared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import WIDTH, Exact, KnownNoise, flat, guide_of, hierarchical, random_texts
from linearised import Linearised
from pyro.infer import MCMC, NUTS
from reference import against

import bhpeft_pyro as bh
from bhpeft_pyro.base.values import derived
from bhpeft_pyro.diagnostics import PSIS, psis
from bhpeft_pyro.diagnostics.psis import log_ratios
from bhpeft_pyro.diagnostics.sbc import _quantities
from bhpeft_pyro.errors import ConfigError, DataError, GuideError
from bhpeft_pyro.guides import FunctionGuide, PriorGuide, as_guide, prior_like
from bhpeft_pyro.model.cached_batches import CachedBatches
from bhpeft_pyro.prediction.draws import Draws, draw, draw_parts
from bhpeft_pyro.prediction.predict import simulate
from bhpeft_pyro.testing import tiny_examples, tiny_model

ELSEWHERE = random_texts(12, seed=9)
NOISE = 0.3
QUICK: dict[str, Any] = {"max_steps": 5, "progress": False}


def posterior_of(
    model: bh.Model, data: bh.data.Examples, guide: Callable[..., Any], **options: Any
) -> bh.Posterior:
    """As if the guide had been fitted to the data."""
    report = bh.training.FitReport(len(data), data.fingerprint, bh.FitOptions(), **options)
    return bh.Posterior(model, FunctionGuide(guide), (report,))


def test_ratios_are_densities_one_by_one(
    model: bh.Model, data: bh.data.Examples, exact: Exact
) -> None:
    """A biased, narrow guide against densities written out by hand, at the same draws."""
    guide = as_guide(guide_of(exact, shift=0.7, spread=0.5))
    found = log_ratios(model, guide, CachedBatches(model, data), samples=20, seed=4)
    w = flat({name: value[:, 0] for name, value in draw(model, guide, 20, seed=4).items()})
    normal = torch.distributions.Normal
    log_p = normal(0.0, exact.prior_sd).log_prob(w).sum(-1)
    log_p += normal(w @ exact.x.T, exact.noise).log_prob(exact.y).sum(-1)
    q = torch.distributions.MultivariateNormal(
        exact.mean + 0.7 * exact.sd, covariance_matrix=0.25 * exact.covariance
    )
    torch.testing.assert_close(found, log_p - q.log_prob(w), rtol=0, atol=2e-2)


def test_the_exact_guide_is_good(model: bh.Model, data: bh.data.Examples, exact: Exact) -> None:
    ratios = log_ratios(model, as_guide(guide_of(exact)), CachedBatches(model, data), samples=100)
    # For every single draw: this holds prior, likelihood, auxiliary sites and signs to account.
    assert (ratios - exact.log_evidence).abs().max() < 1e-2  # float32 densities
    found = psis(posterior_of(model, data, guide_of(exact)), data)
    assert found.verdict == "good"
    assert found.effective_samples == pytest.approx(1000, rel=1e-3)
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=1e-2)


@pytest.mark.parametrize(
    ("shift", "spread", "verdict"),
    [
        (0.0, 1.1, "good"),  # a little too wide: importance sampling can mend that
        (1.5, 1.0, "bad"),  # biased: by 1.5 sds in each of 17 weights
        (0.0, 0.5, "bad"),  # too narrow: k is 0.75 for one weight, more for 17
    ],
)
def test_biased_and_narrow_guides_are_bad(
    shift: float, spread: float, verdict: str, model: bh.Model, data: bh.data.Examples, exact: Exact
) -> None:
    for seed in range(2):
        found = psis(posterior_of(model, data, guide_of(exact, shift, spread)), data, seed=seed)
        assert found.verdict == verdict, (seed, found)
        assert verdict in str(found)


@pytest.mark.parametrize("sd", [0.5, 0.7, 0.9])
def test_k_hat_of_a_narrow_normal_has_a_closed_form(sd: float) -> None:
    """Of N(0, 1) by draws of N(0, sd^2) the ratio's tail has the shape 1 - sd^2.

    The estimate from the 949 largest of 10^5 has a sd of (1 + k) / sqrt(949) < 0.06.
    """
    x = sd * torch.randn(100_000, dtype=torch.float64)
    normal = torch.distributions.Normal
    found = PSIS.of(normal(0.0, 1.0).log_prob(x) - normal(0.0, sd).log_prob(x))
    assert found.k_hat == pytest.approx(1 - sd**2, abs=0.2)
    assert found.threshold == 0.7


def test_evidence_and_its_error() -> None:
    """Lognormal weights: log-ratios N(c, s^2) have evidence exp(c + s^2 / 2).

    Over 200 repeats the z-values must have a sd of 1: 0.85 to 1.15 is 3 of its standard errors.
    """
    z = []
    for _ in range(200):
        found = PSIS.of(-40.0 + 0.5 * torch.randn(1000, dtype=torch.float64))
        assert found.effective_samples == pytest.approx(1000 * math.exp(-0.25), rel=0.2)
        z.append((found.log_evidence - (-40 + 0.125)) / found.standard_error)
    scores = torch.tensor(z)
    assert scores.mean().abs() < 0.25
    assert 0.85 < scores.std() < 1.15


@pytest.mark.parametrize("outside", [-math.inf, -1000.0])
def test_few_draws_with_any_weight_are_bad(outside: float) -> None:
    """A tail without a body has no shape: k-hat was -1.2 here, and the evidence 4 nats too high."""
    ratios = torch.full((4000,), outside, dtype=torch.float64)
    ratios[:120] = 0.1 * torch.randn(120, generator=torch.Generator().manual_seed(0)).double()
    found = PSIS.of(ratios)
    assert (found.k_hat, found.verdict) == (math.inf, "bad")
    assert found.log_evidence == pytest.approx(ratios.logsumexp(0).item() - math.log(4000))
    # As of a guide that is wider than the posterior.
    ratios[:2000] = 0.1 * torch.randn(2000, generator=torch.Generator().manual_seed(1)).double()
    assert PSIS.of(ratios).verdict == "good"


def test_a_tail_without_a_shape_is_never_vouched_for() -> None:
    """Half of it is equal: ArviZ 1 gives NaN, which was "ok"; ArviZ 0 fits a shape all the same."""
    ratios = torch.zeros(4000, dtype=torch.float64)
    ratios[:60] = 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(0)).abs().double()
    found = PSIS.of(ratios)
    assert found.verdict == ("bad" if found.k_hat == math.inf else "good")
    assert not math.isnan(found.k_hat) and math.isfinite(found.log_evidence)


def test_threshold_grows_with_the_number_of_draws() -> None:
    limits = {samples: PSIS(0.6, 1.0, 0.0, 0.0, samples) for samples in (100, 1000, 10_000)}
    assert {n: round(found.threshold, 3) for n, found in limits.items()} == {
        100: 0.5,
        1000: 0.667,
        10_000: 0.7,
    }
    assert [found.verdict for found in limits.values()] == ["bad", "ok", "ok"]


def test_the_tempered_posterior_is_what_a_tempered_fit_is_held_against(
    model: bh.Model, data: bh.data.Examples, exact: Exact
) -> None:
    tempered = Exact(exact.x, exact.y, exact.prior_sd, exact.noise * 0.5**0.5)
    guide = guide_of(tempered)  # p(y | w)^2 has half the variance
    cold = posterior_of(model, data, guide, temperature=0.5)
    assert psis(cold, data).effective_samples == pytest.approx(1000, rel=1e-3)
    assert psis(posterior_of(model, data, guide), data).effective_samples < 900
    with pytest.raises(ConfigError, match="temperature=0"):
        psis(posterior_of(model, data, guide, temperature=0.0), data)


@pytest.mark.parametrize(
    "guide", ["normal", "AutoNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal"]
)
def test_guides_of_every_kind_have_densities(guide: str) -> None:
    """With a positive latent, so that Jacobians count; against Pyro's own Trace_ELBO."""
    model = tiny_model((), prior=hierarchical)
    data = tiny_examples(12)
    posterior = bh.fit(model, guide, data, max_steps=5, progress=False)
    found = log_ratios(model, posterior.guide, CachedBatches(model, data), samples=2000, seed=1)
    batch = next(data.batches(12))
    features = bh.data.Batch({}, batch.labels, features=model.network.features(batch))
    with pyro.get_param_store().scope(), torch.no_grad():
        elbo = pyro.infer.Trace_ELBO(
            num_particles=2000, vectorize_particles=True, max_plate_nesting=1
        )
        loss = elbo.loss(model, posterior.guide, features)
    # Both are means over 2,000 draws: apart by 4 standard errors once in 16,000.
    assert found.mean().item() == pytest.approx(-loss, abs=4 * found.std().item() / 1000**0.5)


def test_what_a_prior_computes_is_no_latent() -> None:
    def computing(sites: Any) -> Any:
        values = hierarchical(sites)
        pyro.deterministic("total", values["head.bias"].sum(-1))
        pyro.factor("push", values["head.bias"].sum(-1))
        return values

    data = tiny_examples(12)
    plain, pushed = tiny_model((), prior=hierarchical), tiny_model((), prior=computing)
    guide = bh.fit(plain, "normal", data, max_steps=2, progress=False).guide
    push = draw(plain, guide, 20)["head.bias"][:, 0].sum(-1).double()
    for temperature in (1.0, 0.5):  # by which the ELBO divides what is observed
        found = [
            log_ratios(model, guide, CachedBatches(model, data), 20, temperature=temperature)
            for model in (plain, pushed)
        ]
        expected = push / temperature
        torch.testing.assert_close(found[1] - found[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("components", [1, 2])
def test_rows_that_a_fit_has_held_out_are_no_part_of_it(components: int) -> None:
    given = tiny_examples(60)
    learnt, held_out = given.hold_out(0)
    assert held_out is not None and len(held_out) == 12
    options = QUICK | {"components": components}
    posterior = bh.fit(tiny_model(()), "laplace", given, **options)
    for part in (posterior, *posterior.components):  # each has a seed of its own
        # As text, since an evidence that is NaN equals no other from Python 3.13 on.
        assert repr(psis(part, given, 200)) == repr(psis(part, learnt, 200))
    with pytest.raises(DataError, match="are not the 48 that the last round was fitted to"):
        psis(posterior, held_out, 200)
    with pytest.raises(DataError, match="all rows that were given, in their order"):
        psis(posterior, given.subset(range(59, -1, -1)), 200)
    point = bh.fit(tiny_model(()), "delta", given, **options)  # which the prior has not pulled
    with pytest.raises(ConfigError, match="maximum likelihood: there is no posterior"):
        psis(point, given)


def test_components_are_compared_under_the_priors_of_their_own() -> None:
    first, second = tiny_examples(24), tiny_examples(24, seed=1)
    before = bh.fit(tiny_model(()), "normal", first, components=2, **QUICK)  # they end far apart
    after = before.update(second, max_steps=100)
    logs = [
        psis(part, second, 200, seed).log_evidence for seed, part in enumerate(after.components)
    ]
    together = torch.tensor(logs).logsumexp(0).item() - math.log(2)
    assert psis(after, second, 400).log_evidence == pytest.approx(together, abs=0.2)


def test_bad_input(model: bh.Model, data: bh.data.Examples, exact: Exact) -> None:
    posterior = posterior_of(model, data, guide_of(exact))
    with pytest.raises(ConfigError, match="samples=99"):
        psis(posterior, data, samples=99)
    with pytest.raises(DataError, match="are not the 40 that the last round was fitted to"):
        psis(posterior, data.subset(range(39)))
    with pytest.raises(ConfigError, match="not numbers"):
        PSIS.of(torch.full((100,), math.nan))


def points(batch: Any) -> None:
    pyro.sample("head.weight", dist.Delta(torch.zeros(1, WIDTH), event_dim=2))
    pyro.sample("head.bias", dist.Normal(torch.zeros(1), 1.0).to_event(1))


def too_many(batch: Any) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0), infer={"is_auxiliary": True})
    scale = scale[..., None, None]
    pyro.sample("head.weight", dist.Normal(torch.zeros(1, WIDTH), scale).to_event(2))
    pyro.sample("head.bias", dist.Normal(torch.zeros(1), 1.0).to_event(1))


def too_few(batch: Any) -> None:
    pyro.sample("head.bias", dist.Normal(torch.zeros(1), 1.0).to_event(1))


def unknown(batch: Any) -> None:
    pyro.sample("tail", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    pyro.sample("head.weight", dist.Normal(torch.zeros(1, WIDTH), 1.0).to_event(2))
    too_few(batch)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ("delta", r"draws 0 random numbers for latents of 34"),
        (points, r"draws 1 random numbers for latents of 17 .*head.weight"),
        (too_many, r"draws 18 random numbers for latents of 17"),
        (too_few, r"does not sample head.weight"),
        (unknown, r"the model has no tail"),
    ],
)
def test_guides_without_a_density_over_the_latents(
    guide: Any, message: str, model: bh.Model, data: bh.data.Examples
) -> None:
    if guide == "delta":
        data = tiny_examples(12)
        posterior = bh.fit(tiny_model(()), guide, data, **QUICK)
    else:
        posterior = posterior_of(model, data, guide)
    with pytest.raises(GuideError, match=message):
        psis(posterior, data)


def test_data_that_are_not_known_cannot_be_compared() -> None:
    model = tiny_model(())
    draws = {site.name: torch.randn(20, *site.shape) for site in model.sites}
    posterior = bh.Posterior.from_draws(model, draws)
    with pytest.raises(DataError, match="data: it is not known what this posterior has learnt"):
        posterior.diagnose(tiny_examples())


@pytest.mark.slow
def test_a_transformer_against_nuts() -> None:
    """LoRA on one layer, and a head: 49 latents, of which the data tell on the head most.

    Mean-field sds of weights are too small. Those of predictions are too large all the same: it
    forgets that weights compensate each other. A full covariance mends both, and k-hat knows.
    """
    lora = bh.peft.LoRA(rank=1, targets=("value",), layers=(1,))
    prior = {
        "lora.*.A": lambda site: dist.Normal(0.0, (0.3 * site.unit).expand(site.shape)),
        "lora.*.B": lambda site: dist.Normal(0.0, site.unit.expand(site.shape)),
        "head.*": dist.Normal(0.0, 0.5),
    }
    model = tiny_model((lora,), 1, prior, KnownNoise(1.5))
    network = model.network
    texts = random_texts(12)
    blank = bh.data.encode(texts, network.tokenizer, kind="rating", labelled=False)
    truth = draw(model, PriorGuide(model), 1, seed=3)
    ratings = simulate(model, [Draws(truth)], CachedBatches(model, blank))[0][0].tolist()
    data = bh.data.encode({"text": texts, "label": ratings}, network.tokenizer, kind="rating")
    kernel = NUTS(model, jit_compile=False, max_tree_depth=4)
    mcmc = MCMC(kernel, num_samples=150, warmup_steps=60, disable_progbar=True)
    mcmc.run(next(data.batches(len(data))))
    nuts = mcmc.get_samples()

    def fitted(guide: str, **options: Any) -> tuple[tuple[float, float], PSIS, float]:
        chosen = bh.autoguide(guide, model, init_scale=0.1) if guide != "normal" else guide
        posterior = bh.fit(model, chosen, data, batch_size=12, progress=False, **options)
        drawn = posterior.sample(2000)["head.weight"].std(0) / nuts["head.weight"].std(0)
        weights = drawn.log().mean().exp().item()
        return (
            against(posterior, nuts, random_texts(30, seed=8), 400),
            psis(posterior, data, 500),
            weights,
        )

    # 150 draws of NUTS: a mean is known to 0.1 sds, a sd to 6 %, the mean of 16 sds to 2 %.
    (error, ratio), full_psis, weights = fitted("AutoMultivariateNormal", max_steps=1000, lr=0.01)
    assert error < 0.3 and 1 / 1.3 < ratio < 1.3, (error, ratio)
    assert 0.85 < weights < 1.1
    (error, ratio), narrow_psis, weights = fitted("normal", max_steps=400, lr=0.1)
    assert error < 0.3 and ratio > 1.35, (error, ratio)
    assert weights < 0.82
    assert narrow_psis.verdict == "bad"
    assert full_psis.k_hat < 0.75 < narrow_psis.k_hat


def test_diagnose_a_fit() -> None:
    data = tiny_examples(24)
    model = tiny_model((), prior=dist.Normal(0.0, 0.3))
    posterior = bh.fit(model, "normal", data, max_steps=150, batch_size=24, lr=0.1, progress=False)
    found = posterior.diagnose(data, samples=300)
    lines = str(found).splitlines()
    assert lines[0] == str(found.psis) and lines[0].startswith("PSIS k-hat")
    assert lines[1:] == (posterior.report.warnings or ["no warnings"])
    before = found.psis.k_hat  # then a bias of ten sds
    posterior.guide.move({"head.weight": posterior.guide.means()["head.weight"] + 3.0})
    assert posterior.diagnose(data, samples=300).psis.k_hat > max(before, 0.7)


# Of the linearised network.


def ratings() -> dict[str, list[Any]]:
    texts = random_texts(48)
    noise = NOISE * torch.randn(len(texts), generator=torch.Generator().manual_seed(2))
    labels = [0.4 * len(t.split()) - 1.5 + e for t, e in zip(texts, noise.tolist(), strict=True)]
    return {"text": texts, "label": labels}


@pytest.fixture(scope="module")
def posterior() -> bh.Posterior:
    """Of a Normal likelihood: exact for the linearised network, and wide, so that it matters."""
    prior = bh.priors.FunctionSpaceNormal(change=0.5, spread=0.5, head=1.0)
    model = tiny_model(bh.presets.lora(rank=2), 1, prior, KnownNoise(NOISE), aligned=True)
    guide = bh.autoguide("laplace", model, rank=64)
    how: dict[str, Any] = {"batch_size": 48, "lr": 0.02, "temperature": 1.0, "tau": 1.0}
    return bh.fit(model, guide, ratings(), max_steps=150, progress=False, **how)


def test_an_exact_posterior_is_good(posterior: bh.Posterior) -> None:
    found = psis(posterior, ratings(), samples=300)
    assert found.k_hat < 0.5 and found.effective_samples > 120, str(found)
    model = Linearised(posterior.model, posterior.guide.means())  # type: ignore[operator]
    slow = psis(
        posterior.replace(guides=(as_guide(Plain(posterior.guide)),), model=model), ratings(), 100
    )
    fast = psis(posterior, ratings(), 100)
    assert fast.log_evidence == pytest.approx(slow.log_evidence, abs=0.01)


@pytest.mark.parametrize("options", [(None, 1.0), (1.0, 3.0), (1.0, 1.0)])
def test_there_is_no_evidence_for_a_prior_that_is_not_the_models(options: tuple[Any, Any]) -> None:
    data, how = tiny_examples(60), dict(zip(("temperature", "tau"), options, strict=True))
    fitted = bh.fit(tiny_model(()), "laplace", data, components=1, **QUICK, **how)
    found = psis(fitted, data, samples=100)
    known = options == (1.0, 1.0)  # the plain negative ELBO
    assert math.isfinite(found.log_evidence) == known
    assert ("log evidence" in str(found)) == (known and found.verdict != "bad")


class Plain(torch.nn.Module):
    """The guide as a function, of which nothing is known."""

    def __init__(self, guide: Any) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, batch: Any = None) -> Any:
        return self.guide(batch)


def test_components_are_a_network_each() -> None:
    """Their k-hat and their prior: each component in the network linearised around its own mean."""
    data = tiny_examples(16)
    posterior = bh.fit(tiny_model(), "laplace", data, max_steps=10, components=2, progress=False)
    found = psis(posterior, data, 200)
    ratios = []
    for number, part in enumerate(posterior.components):
        model, guide, temperature = part.guide.target(part.model, part.report.temperature, False)
        seed, feed = derived(0, number), CachedBatches(part.model, data)
        ratios.append(log_ratios(model, guide, feed, 100, seed, temperature))
    assert found.log_evidence == pytest.approx(PSIS.of(torch.cat(ratios)).log_evidence, abs=1e-3)
    for part in posterior.components:
        prior = prior_like(part.model, part.guide)
        assert prior.linear
        assert torch.equal(prior.means()["head.bias"], part.guide.means()["head.bias"])


def test_sbc_ranks_what_the_posterior_predicts(posterior: bh.Posterior) -> None:
    model = posterior.model
    examples = bh.data.encode(ELSEWHERE, model.network.tokenizer, kind="rating", labelled=False)
    known = torch.zeros(len(ELSEWHERE))
    feed = CachedBatches(model, dataclasses.replace(examples, labels=known))
    draws = [*draw_parts(model, posterior.guide, 20, seed=3)]
    _, found = _quantities(model, draws, feed, feed, ())
    forecast = posterior.predict(ELSEWHERE, 20, seed=3, keep_samples=True)
    torch.testing.assert_close(found[:, 1:].float(), forecast.means, atol=1e-4, rtol=1e-4)
    density = torch.distributions.Normal(forecast.means, NOISE).log_prob(known).double().sum(-1)
    torch.testing.assert_close(found[:, 0], density, atol=1e-2, rtol=1e-4)
