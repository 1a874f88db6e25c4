"""The loss against `torch.distributions`, brute-force loops and Pyro's own ELBO.

Where an expectation is compared, the tolerance is five standard errors, which are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import hierarchical, independent
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import bhpeft_pyro as bh
from bhpeft_pyro.base.distributions import Covariance, LowRankNormal
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.guides.guide import key, prior_of
from bhpeft_pyro.model.cached_batches import CachedBatches
from bhpeft_pyro.priors import JointPrior, PosteriorPrior
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model

PRIOR_SD = 0.5


def normal_model(kinds: Any = None) -> bh.Model:
    return tiny_model(kinds, prior=dist.Normal(0.0, PRIOR_SD))


def stirred(guide: MeanFieldGuide, loc_sd: float = 0.5) -> MeanFieldGuide:
    """The guide with every loc moved away from 0 and sds of different size."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in guide.loc.parameters():
            parameter.add_(loc_sd * torch.randn(parameter.shape, generator=generator))
        for parameter in guide.log_scale.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return guide


def on_features(model: bh.Model, examples: int) -> bh.data.Batch:
    """The whole data as one batch, on features computed once: cheap for many draws."""
    feed = CachedBatches(model, tiny_examples(examples))
    return next(feed.training(examples, 1, torch.Generator().manual_seed(0)))


def spied(guide: Callable[..., Any], drawn: dict[str, Tensor]) -> Callable[..., Any]:
    def spy(batch: bh.data.Batch) -> Any:
        values = guide(batch)
        drawn.update({name: value.detach() for name, value in values.items()})
        return values

    return spy


def nll_of_one(model: bh.Model, weights: dict[str, Tensor], batch: bh.data.Batch, i: int) -> Tensor:
    """-log p(label_i | w), an example at a time, written out."""
    single = bh.data.Batch({name: value[i : i + 1] for name, value in batch.inputs.items()})
    logits = model.network(weights, single)[0]
    assert batch.labels is not None
    return torch.logsumexp(logits, 0) - logits[int(batch.labels.flatten()[i])]


def normal_kl(guide: MeanFieldGuide) -> Tensor:
    return sum(
        kl_divergence(
            Normal(guide.loc[key(name)], guide.log_scale[key(name)].exp()),
            Normal(torch.zeros(()), PRIOR_SD),
        ).sum()
        for name in guide.scales()
    )  # type: ignore[return-value]


@pytest.mark.parametrize(("particles", "split"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("size", [None, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_it_is_n_times_the_mean_nll_plus_the_kl(
    particles: int, split: bool, size: int | None, temperature: float
) -> None:
    model = normal_model()
    guide = stirred(MeanFieldGuide(model, ("normal", {"init_scale": 0.3})))
    batch = tiny_batch(6)
    batch = bh.data.Batch(batch.inputs, batch.labels, size=size)
    elbo = bh.training.ELBO(particles, temperature)
    drawn: dict[str, Tensor] = {}
    with torch.no_grad():
        loss = elbo.differentiable_loss(
            model, spied(guide, drawn), batch.split(particles) if split else batch
        )
        nll = torch.zeros(())
        for s in range(particles):
            weights = {
                name: value.reshape(-1, *value.shape[-site.ndim :])[s]
                for site in model.sites
                for name, value in [(site.name, drawn[site.name])]
            }
            share = range(s * 2, s * 2 + 2) if split else range(6)
            terms = [nll_of_one(model, weights, batch, i) for i in share]
            # The average over the draws of the log-likelihood, not of the likelihood or logits.
            nll += (size or 6) * sum(terms) / len(terms) / particles  # type: ignore[arg-type]
        kl = normal_kl(guide)
    assert elbo.parts is not None
    torch.testing.assert_close(elbo.parts.nll, nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum(elbo.parts.kl.values()), kl, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, nll + temperature * kl, rtol=1e-4, atol=1e-4)


def test_it_equals_pyros_at_the_same_seed() -> None:
    model = normal_model()
    guide = stirred(MeanFieldGuide(model, ("normal", {"init_scale": 0.3})))
    batch = tiny_batch(6)
    batch = bh.data.Batch(batch.inputs, batch.labels, size=50).split(3)
    theirs = TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    losses, gradients = [], []
    for elbo in (bh.training.ELBO(3), theirs):
        guide.zero_grad()
        torch.manual_seed(7)
        loss = elbo.differentiable_loss(model, guide, batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in guide.parameters()])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3)


def with_fixed_weights(kinds: Any) -> tuple[bh.Model, MeanFieldGuide]:
    """A guide so narrow that all draws are the same: what is left is the choice of batches."""
    model = normal_model(kinds)
    guide = MeanFieldGuide(model, ("normal", {"init_scale": 1e-6}))
    with torch.no_grad():
        for parameter in guide.loc.parameters():
            parameter.normal_(0.0, 0.5)
    return model, guide


def whole_loss(model: bh.Model, guide: MeanFieldGuide, data: bh.data.Examples) -> float:
    with torch.no_grad():
        batch = next(data.batches(len(data)))
        return bh.training.ELBO().differentiable_loss(model, guide, batch).item()


@pytest.mark.parametrize(("batch_size", "particles"), [(1, 1), (4, 1), (4, 2), (6, 3), (13, 1)])
def test_batches_of_any_size_give_the_loss_of_the_whole_data(
    batch_size: int, particles: int
) -> None:
    """N = 13 fits no batch size: what `fit` uses must be unbiased at every step all the same."""
    model, guide = with_fixed_weights(())
    data = tiny_examples(13)
    feed, generator = CachedBatches(model, data), torch.Generator().manual_seed(0)
    elbo = bh.training.ELBO(particles)
    losses = []
    with torch.no_grad():
        while len(losses) < 300:
            epoch = feed.training(batch_size, particles, generator)
            losses += [elbo.differentiable_loss(model, guide, batch).item() for batch in epoch]
    values = torch.tensor(losses)
    error = values.std().item() / len(values) ** 0.5
    expected = whole_loss(model, guide, data)
    assert values.mean().item() == pytest.approx(expected, abs=5 * error + 1e-3)
    assert error < 0.05 * expected  # or the test could not fail


def test_the_temperature_weighs_a_monte_carlo_kl_like_a_closed_one() -> None:
    """Pyro's AutoNormal gives no closed form; from the same loc and scale the same in the mean."""
    model = normal_model(())
    ours = MeanFieldGuide(model, ("normal", {"init_scale": 0.3}))
    batch = on_features(model, 4)
    kl = {}
    with torch.no_grad(), pyro.get_param_store().scope():
        theirs: Any = bh.autoguide("AutoNormal", model, init_scale=0.3)
        for name in ("head.weight", "head.bias"):
            ours.loc[key(name)].normal_(0.0, 0.5)
            attrgetter(name)(theirs.auto.locs).copy_(ours.loc[key(name)])
        for temperature in (0.0, 1.0, 3.0):
            torch.manual_seed(0)
            elbo = bh.training.ELBO(20_000, temperature)
            kl[temperature] = elbo.differentiable_loss(model, theirs, batch).item()
    exact = normal_kl(ours).item()
    # log q - log p of a draw has an sd of a few nats: 0.03 for the mean of 20,000.
    assert kl[1.0] - kl[0.0] == pytest.approx(exact, abs=0.25)
    assert exact > 10
    assert kl[3.0] - kl[0.0] == pytest.approx(3 * (kl[1.0] - kl[0.0]), rel=1e-3)


@pytest.mark.parametrize("factor", [0.2, None])
def test_a_scaled_or_masked_prior_counts_as_it_says(factor: float | None) -> None:
    """Against E_q[log q] - factor E_q[log p], in closed form."""
    model = normal_model(())
    change: Any = pyro.poutine.mask(mask=False) if factor is None else None
    change = change or pyro.poutine.scale(scale=factor)
    own = model.prior
    guide = stirred(MeanFieldGuide(model, ("normal", {"init_scale": 0.3})))
    elbo = bh.training.ELBO(4000)
    with torch.no_grad():
        torch.manual_seed(0)
        batch = on_features(model, 2)
        elbo.differentiable_loss(model.with_prior(change(own)), guide, batch)
    minus_entropy = expected = 0.0
    for name in guide.scales():
        q = Normal(guide.loc[key(name)], guide.log_scale[key(name)].exp())
        minus_entropy -= q.entropy().sum().item()
        kl = kl_divergence(q, Normal(torch.zeros(()), PRIOR_SD)).sum().item()
        expected += kl + q.entropy().sum().item()  # - E_q[log p]
    assert elbo.parts is not None
    found = sum(elbo.parts.kl.values()).item()  # type: ignore[union-attr]
    assert found == pytest.approx(minus_entropy + (factor or 0.0) * expected, abs=0.5)
    with pytest.raises(GuideError, match=r"scales or masks at head\.weight, head\.bias"):
        bh.autoguide("laplace", model.with_prior(change(own)))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_what_a_prior_observes_is_no_part_of_the_likelihood(temperature: float) -> None:
    """A site that is held fixed, and a factor: they count whatever the temperature is."""
    bias = torch.tensor([3.0, -3.0])

    def observing(sites: Sequence[Any]) -> dict[str, Tensor]:
        values = pyro.poutine.condition(independent, {"head.bias": bias})(sites)
        pyro.factor("known", -values["head.weight"].square().sum((-2, -1)))
        return values

    model = tiny_model((), prior=observing)
    guide = stirred(MeanFieldGuide(model, ("normal", {"init_scale": 0.3})))
    batch, drawn = tiny_batch(6), dict[str, Tensor]()
    elbo = bh.training.ELBO(3, temperature)
    with torch.no_grad():
        loss = elbo.differentiable_loss(model, spied(guide, drawn), batch)
        weights = {"head.weight": drawn["head.weight"], "head.bias": bias}
        nll = -model.predictive(weights, batch).log_prob(batch.labels).sum() / 3
    evidence = drawn["head.weight"].square().sum() / 3 - Normal(0.0, 0.1).log_prob(bias).sum()
    assert elbo.parts is not None
    torch.testing.assert_close(elbo.parts.nll, nll)
    torch.testing.assert_close(elbo.parts.evidence, evidence)
    torch.testing.assert_close(loss, nll + temperature * elbo.parts.kl["head.weight"] + evidence)
    report = bh.fit(model, "normal", tiny_examples(), max_steps=2, progress=False).report
    assert [*report.kl] == ["head.weight"]
    first = report.history[0]
    assert first["nll"] < 5 < first["kl"]
    assert first["loss"] == pytest.approx(first["nll"] + first["kl"])


@pytest.mark.parametrize("name", ["AutoNormal", "mvn"])
def test_the_report_has_the_kl_of_a_guide_with_auxiliary_variables(name: str) -> None:
    """Site by site where each site has its own; else in one number."""
    model = normal_model(())
    fitted = bh.fit(model, name, tiny_examples(), max_steps=5, particles=1, progress=False)
    kl = fitted.report.kl
    assert [*kl] == (["head.weight", "head.bias"] if name == "AutoNormal" else ["weights"])
    joint = prior_of(fitted.model, fitted.guide)
    exact = {}
    for site in model.sites:
        if isinstance(joint, PosteriorPrior):
            q: Any = joint.distributions[site.name].base_dist  # type: ignore[attr-defined]
            exact[site.name] = kl_divergence(q, Normal(torch.zeros(()), PRIOR_SD)).sum().item()
    if isinstance(joint, JointPrior):
        p = LowRankNormal(
            torch.zeros_like(joint.normal.loc),
            Covariance.diagonal(torch.full_like(joint.normal.loc, PRIOR_SD)),
        )
        exact["weights"] = kl_divergence(joint.normal, p).item()
    for site_name, value in kl.items():
        assert value == pytest.approx(exact[site_name], abs=1.0)  # of 256 draws, not of one


def positive_prior(sites: Sequence[Any]) -> dict[str, Tensor]:
    pyro.sample("tau", dist.LogNormal(0.2, 0.7))
    return independent(sites, PRIOR_SD)


@pytest.mark.parametrize("name", ["normal", "AutoNormal"])
def test_a_latent_on_the_positive_line_counts_its_jacobian(name: str) -> None:
    """KL(LogNormal || LogNormal) is that of the Normals; a forgotten Jacobian is E[log tau] off."""
    model = tiny_model((), prior=positive_prior)
    batch = on_features(model, 2)
    elbo = bh.training.ELBO(20_000)
    with torch.no_grad(), pyro.get_param_store().scope():
        guide: Any = bh.autoguide(name, model, init_scale=0.4)
        guide(batch)
        (guide.loc["tau"] if name == "normal" else guide.auto.locs.tau).fill_(1.5)
        elbo.differentiable_loss(model, guide, batch)
    assert elbo.parts is not None
    found = sum(v.item() for site, v in elbo.parts.kl.items() if site.startswith("tau"))
    exact = kl_divergence(Normal(1.5, 0.4), Normal(0.2, 0.7))  # type: ignore[arg-type]
    assert found == pytest.approx(exact.item(), abs=0.06)


def test_a_point_pays_minus_its_log_prior_density() -> None:
    model = tiny_model((), prior=positive_prior)
    guide = MeanFieldGuide(model, "delta")
    with torch.no_grad():
        guide.loc["tau"].fill_(1.0)
    batch = next(tiny_examples(2).batches(2))
    elbo = bh.training.ELBO()
    elbo.differentiable_loss(model, guide, batch)
    assert elbo.parts is not None
    expected = -dist.LogNormal(0.2, 0.7).log_prob(torch.tensor(1.0).exp())
    torch.testing.assert_close(elbo.parts.kl["tau"], expected)
    expected = -dist.Normal(0.0, PRIOR_SD).log_prob(torch.zeros(2, 16)).sum()
    torch.testing.assert_close(elbo.parts.kl["head.weight"], expected)


def test_a_prior_that_differs_between_draws_has_a_kl_for_each() -> None:
    model = tiny_model((), prior=hierarchical)
    guide = stirred(MeanFieldGuide(model, ("normal", {"init_scale": 0.3})))
    drawn: dict[str, Tensor] = {}
    batch = next(tiny_examples(4).batches(4))
    elbo = bh.training.ELBO(3)
    with torch.no_grad():
        elbo.differentiable_loss(model, spied(guide, drawn), batch)
    assert elbo.parts is not None
    q = Normal(guide.loc[key("head.weight")], guide.log_scale[key("head.weight")].exp())
    each = [kl_divergence(q, Normal(torch.zeros(()), tau)).sum() for tau in drawn["tau"].flatten()]
    assert len(each) == 3
    assert max(each) - min(each) > 1.0
    torch.testing.assert_close(elbo.parts.kl["head.weight"], sum(each) / 3)
    tau = drawn["tau"].flatten()
    log_q = dist.LogNormal(guide.loc["tau"], guide.log_scale["tau"].exp()).log_prob(tau)
    expected = (log_q - dist.HalfNormal(1.0).log_prob(tau)).mean()
    torch.testing.assert_close(elbo.parts.kl["tau"], expected)
