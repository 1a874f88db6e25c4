"""Priors with random scales: their densities, scales and errors, and a fit's whole life."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from recipes import RECIPES, recipe
from saves import load
from scipy.stats import ks_2samp
from torch import Tensor
from torch.distributions import Normal

import bhpeft_pyro as bh
from bhpeft_pyro import priors
from bhpeft_pyro.errors import ConfigError, PriorError, SaveError
from bhpeft_pyro.guides import latents
from bhpeft_pyro.model.fisher import from_prior
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.priors import FunctionSpaceNormal, PosteriorPrior, complete
from bhpeft_pyro.testing import tiny_examples, tiny_model

NAME, SHAPE = "lora.query.B", (2, 3, 2)
B = Site(
    NAME,
    SHAPE,
    ("layer", "out", "rank"),
    torch.ones(1, 1, 1),
    lambda: torch.zeros(SHAPE),
    (0, 1),
    role="output",
)

# Densities, by hand


def log_prob(prior: Any, values: dict[str, Tensor]) -> float:
    """Of these values of all latents of a prior on the site B."""
    trace = poutine.trace(poutine.condition(prior, values)).get_trace([B])
    assert not trace.stochastic_nodes, "a latent is left out"
    return trace.log_prob_sum().item()


def normal(value: Tensor, loc: float | Tensor, scale: float | Tensor) -> Tensor:
    return Normal(loc, scale).log_prob(value).sum()


def test_densities() -> None:
    z, one, two = torch.randn(2, 3, 2), torch.randn(()), torch.randn(2)
    cases: list[tuple[Any, dict[str, Tensor], Tensor]] = [
        (
            priors.Hierarchical(change=0.3, overall=0.4, between=0.7),
            {f"{NAME}.log_scale": one, f"{NAME}.log_layers": two, f"{NAME}.standard": z},
            normal(one, -0.16 - 0.49, 0.4) + normal(two, one, 0.7) + normal(z, 0.0, 1.0),
        ),
    ]
    for prior, values, expected in cases:
        assert log_prob(prior, values) == pytest.approx(expected.item(), rel=1e-4), prior


# Scales, by brute force: a weight in units of the sd that the prior names


def cauchy(n: int) -> Tensor:
    return (torch.randn(n) / torch.randn(n)).abs()


def slab(n: int, t: Tensor) -> Tensor:
    return torch.randn(n) * t / (1 + t**2).sqrt()


BRUTE: dict[str, Callable[[int], Tensor]] = {
    "hierarchical": lambda n: (
        torch.randn(n) * (0.5 * torch.randn(n) + 0.5 * torch.randn(n) - 0.5).exp()
    ),
    "ard": lambda n: torch.randn(n) * torch.randn(n).abs(),
    "horseshoe": lambda n: slab(n, 0.1 * cauchy(n) * cauchy(n)),
    "gates": lambda n: torch.randn(n) * (2 * torch.logit(torch.rand(n))).sigmoid(),
}


@pytest.mark.parametrize("name", ("hierarchical", *RECIPES))
def test_the_prior_predictive_scale_of_weights(name: str) -> None:
    """Kolmogorov-Smirnov, two samples of 20,000, or of 2,000 for an own prior, which runs once for
    each draw; false alarm rate 1e-4 for each of the priors."""
    count = 20_000 if name == "hierarchical" else 2_000
    sites = [s for s in tiny_model().sites if s.name.startswith("lora.query")]
    ready = priors.Hierarchical() if name == "hierarchical" else FunctionSpaceNormal()
    prior = ready if name == "hierarchical" else recipe(name, ready)
    with pyro.plate("draws", count, dim=-2):
        values = priors.checked(prior, sites)
    for s in sites:
        chosen = values[s.name][:, 0, 1, 0, 1]  # one weight: others share its scales
        sd = (ready.scale(s) * s.unit).expand(s.shape)[1, 0, 1]
        loc = 0.0 if s.anchor is None else s.anchor[1, 0, 1]
        weight = (chosen - loc) / sd
        selective = s.name.endswith("B") or name not in ("ard", "gates")
        expected = BRUTE[name](count) if selective else torch.randn(count)
        assert ks_2samp(weight.numpy(), expected.numpy()).pvalue > 1e-4, s.name
        if name in ("hierarchical", "ard"):  # heavier tails leave sds too noisy
            assert weight.square().mean().sqrt().item() == pytest.approx(1.0, rel=0.1)


# Bad input


@pytest.mark.parametrize(
    ("prior", "options", "name"),
    [
        (FunctionSpaceNormal, {"change": 0.0}, "change"),
        (priors.Hierarchical, {"between": -1.0}, "between"),
        (FunctionSpaceNormal, {"head": math.nan}, "head"),
    ],
)
def test_improper_numbers_are_refused(prior: Any, options: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}="):
        prior(**options)


# Sites made out of other latents


QUERIES = (bh.peft.LoRA(("query",), rank=2),)


def reload(posterior: bh.Posterior, folder: Path, given: Any) -> bh.Posterior:
    return load(posterior.save(folder), prior=given)


def whole_life(folder: Path, prior: Any, given: Any = None, kinds: Any = QUERIES) -> None:
    """Fit, predict, update, save, load, export: all is the same before and after loading."""
    data = tiny_examples(12)
    model = tiny_model(kinds, prior=prior)
    first = bh.fit(model, "normal", data, max_steps=3, batch_size=12, progress=False)
    second = first.update(tiny_examples(8, seed=1))
    assert second.report.history[0]["kl"] == pytest.approx(0.0, abs=1e-3)  # it starts at its prior
    for number, posterior in enumerate((first, second)):
        loaded = reload(posterior, folder / str(number), given)
        for samples in (0, 3):
            one, two = (p.predict(data, samples).probabilities for p in (posterior, loaded))  # type: ignore[union-attr]
            assert torch.equal(one, two)
    third, again = (p.update(data, again=True) for p in (second, loaded))
    assert third.report.history == again.report.history
    idata = second.to_arviz(samples=4)
    for s in model.sites:
        for group in (idata.posterior, idata.prior):
            assert group[s.name].dims[2:] == s.dims
            assert group[s.name].std("draw").max() > 0


def test_the_whole_life_of_a_fit(tmp_path: Path) -> None:
    kinds = (bh.peft.LoRA(rank=2), bh.peft.Adapter(2), bh.peft.Prefix(2))
    whole_life(tmp_path, priors.Hierarchical(), kinds=kinds)


@pytest.mark.parametrize("name", RECIPES)
def test_the_whole_life_of_a_fit_under_a_recipe(name: str, tmp_path: Path) -> None:
    prior = recipe(name, FunctionSpaceNormal())
    whole_life(tmp_path, prior, given=prior)


def by_layer(sites: Sequence[Any]) -> dict[str, Tensor]:
    values = {}
    for s in sites:
        scale = pyro.sample(f"{s.name}.u", dist.Normal(0.0, 0.3))
        sd = 0.1 * s.unit * scale.reshape(*scale.shape, *[1] * s.ndim).exp()
        fn = dist.Normal(0.0, sd.expand(*sd.shape[: sd.dim() - s.ndim], *s.shape))
        values[s.name] = pyro.sample(s.name, fn.to_event(s.ndim))
    return values


def reparametrised(sites: Sequence[Any]) -> dict[str, Tensor]:
    with poutine.reparam(config={"lora.query.B": LocScaleReparam(0.0)}):
        return by_layer(sites)


def test_a_prior_of_one_s_own_reparametrised_by_pyro(tmp_path: Path) -> None:
    found = {latent.name for latent in latents(tiny_model(prior=reparametrised))}
    assert "lora.query.B_decentered" in found and "lora.query.B" not in found
    whole_life(tmp_path, reparametrised, given=reparametrised)
    with pytest.raises(SaveError, match="reparametrised"):
        load(tmp_path / "1")


def test_the_posterior_of_a_made_site_is_what_its_latents_make() -> None:
    model = tiny_model(prior=priors.Hierarchical())
    posterior = bh.fit(model, "normal", tiny_examples(8), max_steps=2, progress=False)
    draws = posterior.sample(5)
    for s in model.sites:
        if "layer" in s.dims:
            factor = draws[f"{s.name}.log_layers"].exp().reshape(5, -1, 1, 1)
            loc = 0.0 if s.anchor is None else s.anchor
            expected = loc + 0.1 * s.unit * factor * draws[f"{s.name}.standard"]
            torch.testing.assert_close(draws[s.name], expected)


def test_a_latent_without_a_value_is_an_error() -> None:
    with pytest.raises(PriorError, match=r"samples 'lora\.query\.B\.log_scale'"):
        complete(priors.Hierarchical(), [B], {f"{NAME}.standard": torch.zeros(B.shape)})
    earlier = PosteriorPrior({"tau": dist.LogNormal(0.0, 1.0)}, priors.default())
    with pytest.raises(PriorError, match=f"samples '{NAME}'"):
        earlier([B])


def test_guides_start_at_medians() -> None:
    prior = recipe("horseshoe", FunctionSpaceNormal())
    found = {latent.name: latent for latent in latents(tiny_model(prior=prior))}
    torch.testing.assert_close(
        found["tau.lora.query.B"].loc, torch.tensor(0.1).log(), rtol=1e-4, atol=1e-5
    )
    assert not found["local.lora.query.B"].loc.abs().max() > 1e-4


def test_what_weights_tell_about_their_scale() -> None:
    """D weights have Fisher information 2 D about their log scale; and none about each other."""
    model = tiny_model(prior=by_layer)
    starts = {latent.name: latent.loc for latent in latents(model)}
    runs = [from_prior(model, starts) for _ in range(10)]
    for s in model.sites:
        mean = torch.stack([run[f"{s.name}.u"] for run in runs]).mean().item()
        # (2 D)^-1 times a squared score is nearly chi^2 of one degree: sd sqrt(2 / 320) = 0.08
        assert mean / (2 * s.numel) == pytest.approx(1.0, abs=0.45), s.name
        assert not runs[0][s.name].any()
