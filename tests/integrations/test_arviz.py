"""The ArviZ export holds the posterior's own numbers, under the right names, for ArviZ's functions.

What a person can read in the weights is compared with the network itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from counts import COUNTS, Counts
from exact import Exact, guide_of, own_network, random_texts, ratings, regression
from torch.distributions import Normal

import bhpeft_pyro as bh
from bhpeft_pyro import FitOptions, Posterior, fit, priors
from bhpeft_pyro.base.values import derived
from bhpeft_pyro.decisions.novelty import Novelty
from bhpeft_pyro.diagnostics.changes import Variable, changes, sizes
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.guides import FunctionGuide, MeanFieldGuide
from bhpeft_pyro.integrations import arviz as export
from bhpeft_pyro.integrations.arviz import to_arviz, trace
from bhpeft_pyro.model import likelihoods
from bhpeft_pyro.model.linearized import linear_predictives
from bhpeft_pyro.peft import Adapter, LoRA, Prefix
from bhpeft_pyro.testing import tiny_examples, tiny_model
from bhpeft_pyro.training import FitReport

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

OLD = "InferenceData" in vars(arviz)
EXACT: dict[str, Any] = {} if OLD else {"round_to": "none"}  # of `compare`
TEXTS = ["w5 w20", "w6 w21 w22", "w5 w23"]
RATINGS = {"text": TEXTS * 3, "label": [1.0, 3.0, 2.0] * 3}
PEFT = ["head.*", "lora.*"]
DATA = tiny_examples(7, seed=3)
NOISE, COUNT, DRAWS = 2.0, 60, 1000


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """ArviZ warns of its own future, and of what few draws of tiny models cannot do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    data, others = tiny_examples(), tiny_examples(seed=1)
    return fit(tiny_model(), "normal", data, validation=others, max_steps=6, progress=False)


@pytest.fixture(scope="module")
def idata(posterior: Posterior) -> Any:
    return posterior.to_arviz(DATA, samples=40, sites=PEFT)


def draws_in(group: Any, model: bh.Model) -> dict[str, torch.Tensor]:
    """By site (S, 1, *shape), of the first chain."""
    return {s.name: torch.tensor(group[s.name].values[0])[:, None] for s in model.sites}


def dataset(group: Any) -> xr.Dataset:
    """A group's contents, of either ArviZ."""
    return group.to_dataset() if isinstance(group, xr.DataTree) else group


def groups_of(idata: Any) -> set[str]:
    """Names of the groups, of either ArviZ."""
    return set(idata.children) if isinstance(idata, xr.DataTree) else set(idata.groups())


# Draws, and what they predict.


def test_means_and_sds_are_the_guides_and_the_priors(posterior: Posterior) -> None:
    many = posterior.to_arviz(samples=400, sites="head.*")
    with pyro.poutine.trace() as tracer:
        posterior.model.prior(posterior.model.sites)
    for name in ("head.weight", "head.bias"):
        expected = posterior.guide.distributions()[name]  # type: ignore[operator]
        drawn = many.posterior[name].values[0]
        error = expected.stddev.numpy() / np.sqrt(400)
        np.testing.assert_array_less(np.abs(drawn.mean(0) - expected.mean.numpy()), 5 * error)
        np.testing.assert_allclose(drawn.std(0), expected.stddev.numpy(), rtol=0.15)
        prior_sd = tracer.trace.nodes[name]["fn"].stddev.numpy()
        np.testing.assert_allclose(many.prior[name].values[0].std(0), prior_sd, rtol=0.2)


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_predictions_are_those_of_the_draws(guide: str) -> None:
    """Put draw s back into the model: labels come up as often, and have the log-likelihoods, that
    it says. Under a linear guide it is the network linearised around its means."""
    data = tiny_examples(6)
    posterior = fit(tiny_model(), guide, data, components=1, max_steps=5, progress=False)
    idata, model = posterior.to_arviz(data, samples=200, sites=PEFT), posterior.model
    batch = next(data.batches(6))
    for name in ("prior", "posterior"):
        weights = draws_in(idata[name], model)
        with torch.no_grad():
            predicted = model.predictive(weights, batch)
            plain = predicted.log_prob(batch.labels)
            if guide == "laplace":
                ((_, linear),) = linear_predictives(model, posterior.guide.means(), [weights])
                predicted = linear(batch)
        p = predicted.probs[..., 1]
        labels = torch.tensor(idata[f"{name}_predictive"]["label"].values[0]).float()
        assert labels.shape == p.shape == (200, 6)
        noise = (p * (1 - p)).sum(0).sqrt() / 200
        assert ((labels - p).mean(0).abs() < 4 * noise).all()
        if name == "prior":  # draw by draw, not only on average: probable labels are drawn
            assert torch.corrcoef(torch.stack([labels.flatten(), p.flatten()]))[0, 1] > 0.3
    fitted = predicted.log_prob(batch.labels)
    np.testing.assert_allclose(idata.log_likelihood["label"].values[0], fitted, atol=1e-3)
    assert ((fitted - plain).abs().max() > 0.1) == (guide == "laplace")


def test_predictions_are_of_the_likelihood_itself() -> None:
    """Counts, not Normals with their means and sds: draw by draw the likelihood's own."""
    model = tiny_model(outputs=1, likelihood=Counts())
    posterior = fit(model, "normal", COUNTS, components=1, max_steps=5, progress=False)
    idata = posterior.to_arviz(COUNTS, samples=150, sites=PEFT)
    counts = idata.posterior_predictive["label"].values[0]
    assert (counts == counts.round()).all() and counts.min() == 0
    batch = next(posterior.encode(COUNTS).batches(12))
    with torch.no_grad():
        poisson = model.predictive(draws_in(idata.posterior, model), batch)
    expected = poisson.log_prob(batch.labels)
    np.testing.assert_allclose(idata.log_likelihood["label"].values[0], expected, atol=1e-3)
    error = (poisson.mean.mean(0) / 150).sqrt().numpy()
    np.testing.assert_array_less(np.abs(counts.mean(0) - poisson.mean.mean(0).numpy()), 5 * error)


def test_the_noise_of_ratings_goes_with_its_draw() -> None:
    model = tiny_model((), outputs=1, likelihood=likelihoods.Normal(center=2.0))
    posterior = fit(model, "normal", RATINGS, max_steps=5, progress=False)
    idata = posterior.to_arviz(RATINGS, samples=300, sites="noise.*")
    forecast = posterior.predict(RATINGS, 300)
    density = np.exp(idata.log_likelihood["label"].values[0].astype(np.float64)).mean(0)
    expected = (-forecast.nlls(torch.tensor(RATINGS["label"]))).exp()
    np.testing.assert_allclose(density, expected.numpy(), rtol=1e-3)
    assert idata.posterior["noise.log_scale"].dims == ("chain", "draw")
    assert idata.observed_data["label"].values.tolist() == RATINGS["label"]


def test_the_prior_of_a_laplace_approximation_has_its_tau() -> None:
    options = {"components": 1, "max_steps": 5, "tau": 0.01, "progress": False}
    posterior = fit(tiny_model(()), "laplace", tiny_examples(6), **options)
    drawn = posterior.to_arviz(samples=400).prior["head.weight"].values[0]
    plain = posterior.guide.unpack(posterior.guide.prior.stddev)["head.weight"]
    np.testing.assert_allclose((drawn.std(0) / plain.numpy()).mean(), 10, rtol=0.05)


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_the_log_prior_is_the_density_under_the_round_before(guide: str) -> None:
    """Draw by draw, for the component of each chain."""
    options: dict[str, Any] = {"max_steps": 5, "progress": False}
    first = fit(tiny_model(()), guide, tiny_examples(6), components=2, **options)
    second = first.update(tiny_examples(6, seed=1), **options)
    idata = second.to_arviz(samples=7)
    for chain, part in enumerate(second.components):
        drawn = {
            name: torch.tensor(idata.posterior[name].values[chain]).flatten(1)
            for name in ("head.weight", "head.bias")
        }
        prior = part.guide.under_prior(part.model).prior
        if guide == "laplace":
            assert list(prior.shapes) == list(drawn)
            expected = prior.normal.log_prob(torch.cat([*drawn.values()], 1))
        else:
            normals = {name: first.components[chain].guide.distributions()[name] for name in drawn}
            expected = torch.zeros(7)
            for name, values in drawn.items():
                mean, sd = normals[name].mean.flatten(), normals[name].stddev.flatten()
                expected = expected + Normal(mean, sd).log_prob(values).sum(1)
        found = idata.log_prior["weights"].values[chain]
        np.testing.assert_allclose(found, expected.detach(), rtol=1e-4)


def test_the_prior_of_each_chain_is_that_of_its_component() -> None:
    options = {"max_steps": 1, "lr": 1e-9, "progress": False}
    first = fit(tiny_model(()), "normal", tiny_examples(6), components=2, **options)
    for number, part in enumerate(first.components):
        part.guide.move({"head.bias": torch.full((2,), 9.0 * number)})
    second = first.update(tiny_examples(6, seed=1), **options)
    drawn = second.to_arviz(samples=5).prior["head.bias"].values[:, :, 0]
    assert (drawn > 4.5).tolist() == [[False] * 5, [True] * 5]


def test_components_are_chains() -> None:
    model = tiny_model(())
    guides = [MeanFieldGuide(model, ("normal", {"init_scale": 0.1})) for _ in range(2)]
    with torch.no_grad():
        guides[1].loc["head/bias"].add_(3.0)
    report = FitReport(7, DATA.fingerprint, FitOptions())
    whole, *parts = (Posterior(model, g, (report,)) for g in (guides, *guides))
    both = whole.to_arviz(DATA, samples=50, sites="head.*")
    for number, part in enumerate(parts):
        alone = part.to_arviz(DATA, samples=50, sites="head.*", seed=derived(0, number))
        for group, name in (("posterior", "head.bias"), ("log_likelihood", "label")):
            np.testing.assert_array_equal(
                both[group][name].values[number], alone[group][name].values[0]
            )
    assert both.posterior.sizes["chain"] == both.prior.sizes["chain"] == 2
    between = both.posterior["head.bias"].mean("draw").diff("chain")
    np.testing.assert_allclose(between, 3.0, atol=0.1)


def test_same_seed_same_draws(posterior: Posterior) -> None:
    def biases(seed: int) -> list[Any]:
        idata = to_arviz(posterior, TEXTS, samples=3, sites="head.bias", seed=seed)
        assert not {"log_likelihood", "observed_data"} & groups_of(idata)
        assert idata.constant_data["text"].values.tolist() == TEXTS
        return [idata.posterior["head.bias"].values, idata.posterior_predictive["label"].values]

    state = torch.get_rng_state()
    one, same, other = biases(0), biases(0), biases(5)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(one[0], same[0])
    np.testing.assert_array_equal(one[1], same[1])
    assert not np.array_equal(one[0], other[0])


def test_novelty_is_among_the_data(posterior: Posterior) -> None:
    """Of twelve learnt texts there is none."""
    assert "novelty" not in posterior.to_arviz(TEXTS, samples=2).constant_data
    more = posterior.replace(novelty=Novelty.of(posterior.model, tiny_examples(30)))
    p = more.to_arviz(TEXTS, samples=2).constant_data["novelty"]
    np.testing.assert_array_equal(p.values, more.predict(TEXTS).novelty)
    assert p.dims == ("example",)


def test_a_model_is_exported_before_any_fit() -> None:
    model, data = tiny_model(()), tiny_examples(12)
    exported = to_arviz(model, data, samples=400, seed=3)
    assert exported.observed_data["label"].shape == (12,)
    assert not any(hasattr(exported, name) for name in ("posterior", "log_likelihood"))
    with torch.no_grad():
        weights = draws_in(exported.prior, model)
        expected = model.predictive(weights, next(data.batches(12))).probs[..., 1].mean(0)
    drawn = exported.prior_predictive["label"].values[0].mean(0)
    assert abs(drawn - expected.numpy()).max() < 0.12  # 400 labels: five standard errors


# The trace of the fit.


def test_trace_of_the_fit(posterior: Posterior, idata: Any) -> None:
    history, stats = posterior.report.history, idata.sample_stats
    assert stats["step"].values.tolist() == [1, 2, 3, 4, 5, 6]
    assert not stats["skipped"].values.any()
    for name in ("loss", "nll", "kl", "temperature", "lr", "gradient"):
        assert stats[name].values.tolist() == [entry[name] for entry in history]
    evaluated = ~np.isnan(stats["validation_nll"].values)
    assert evaluated.tolist() == ["validation_nll" in entry for entry in history]
    for name, by_site in (("kl", posterior.report.kl), ("scale", posterior.report.scales)):
        assert stats[f"site_{name}"].to_series().to_dict() == pytest.approx(by_site)


def test_steps_left_out_are_gaps() -> None:
    history = [{"step": 1, "loss": 2.0, "nll": 1.5}, {"step": 4, "loss": 1.0, "nll": 0.5}]
    stats = trace(FitReport(9, "", FitOptions(), steps=5, skipped=3, history=history))
    assert stats["skipped"].values.tolist() == [False, True, True, False, True]
    np.testing.assert_array_equal(stats["loss"].values, [2, np.nan, np.nan, 1, np.nan])
    assert "validation_nll" not in stats and stats["step"].values.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("guide", "loss", "kl"),
    [
        ("normal", "KL to the prior", "KL to the"),
        ("delta", "penalty of the prior", "minus log prior"),
        ("laplace", "penalty of the prior", "KL to the"),
    ],
)
def test_components_have_the_same_steps_and_points_a_penalty(
    guide: str, loss: str, kl: str
) -> None:
    how: dict[str, Any] = {"components": 2, "max_steps": 4, "progress": False}
    stats = fit(tiny_model(()), guide, tiny_examples(), **how).to_arviz(samples=2).sample_stats
    assert stats["step"].values.tolist() == [1, 2, 3, 4]
    assert not stats["skipped"].values.any() and np.isfinite(stats["loss"].values).all()
    assert stats["kl"].attrs["long_name"].startswith(loss)
    assert stats["site_kl"].attrs["long_name"].startswith(kl)
    assert "site_point" not in stats


def test_points_among_random_sites_are_told_apart() -> None:
    guide = {"head.*": "normal", "*": "delta"}
    posterior = fit(tiny_model(), guide, tiny_examples(), max_steps=2, progress=False)
    stats = posterior.to_arviz(samples=2).sample_stats
    points = stats["site_point"].to_series()
    assert points.dtype == bool
    assert points.to_dict() == {name: "head" not in name for name in posterior.report.kl}
    words = stats["site_kl"].attrs["long_name"]
    assert "KL to the prior" in words and "minus log prior density" in words


# Names, and what a person can read.


def test_dims_and_coordinates_have_names() -> None:
    data = {"text": TEXTS, "label": ["bad", "good", "bad"]}
    kinds = (LoRA(("query", "ffn_in"), rank=2), Adapter(size=3, layers=(1,)))
    posterior = fit(tiny_model(kinds), "normal", data, max_steps=1, progress=False)
    values = posterior.to_arviz(samples=2, sites="*").posterior
    assert values["head.weight"].dims == ("chain", "draw", "output", "feature")
    assert values["output"].values.tolist() == ["bad", "good"]
    assert values["lora.query.A"].dims[-2:] == ("rank", "in")
    # All layers here, layer 1 alone there; 16 outputs here, 32 there: no name for both.
    assert values["layer.adapter.up"].values.tolist() == [1]
    assert values["layer.lora.query.A"].values.tolist() == [0, 1]
    assert values.sizes["out.lora.ffn_in.B"] == 32 and values.sizes["out.lora.query.B"] == 16


def test_dims_that_differ_get_a_name_each() -> None:
    one_chain = {
        "a": Variable(torch.zeros(1, 2, 3), ("layer", "rank"), (0, 1)),
        "b": Variable(torch.zeros(1, 2), ("layer",), (0, 5)),
        "c": Variable(torch.zeros(1, 2), ("output",)),
        "d": Variable(torch.zeros(1, 4)),
    }
    group = export._dataset([one_chain, one_chain], ["no", "yes"])
    dims = {name: array.dims[2:] for name, array in group.data_vars.items()}
    expected = {"a": ("layer.a", "rank"), "b": ("layer.b",), "c": ("output",), "d": ("d_dim_0",)}
    assert dims == expected
    assert group["layer.b"].values.tolist() == [0, 5]
    assert group["output"].values.tolist() == ["no", "yes"]
    assert group.sizes["chain"] == 2


def test_changes_by_layer() -> None:
    kinds = (LoRA(("query",), rank=2), Adapter(size=3, layers=(1,)))
    posterior = fit(tiny_model(kinds), "normal", tiny_examples(), max_steps=3, progress=False)
    idata = posterior.to_arviz(samples=20, sites=["change.*", "head.bias"])
    drawn = idata.posterior
    assert set(drawn.data_vars) == {"change.lora.query", "change.adapter", "head.bias"}
    assert drawn["layer.change.adapter"].values.tolist() == [1]
    for branch, layers in changes(posterior, 20).items():  # the same seed, so the same draws
        for number, (layer, value) in enumerate(layers.items()):
            array = drawn[f"change.{branch}"]
            assert array[array.dims[-1]].values[number] == layer
            np.testing.assert_allclose(array.values[0, :, number], value.numpy(), rtol=1e-5)
    network = posterior.model.network
    prior = posterior.to_arviz(samples=5, sites="*").prior
    weights = {s.name: torch.tensor(prior[s.name].values[0]) for s in network.sites}
    by_hand = sizes(network, network.coordinates(weights))["adapter"][1]
    np.testing.assert_allclose(prior["change.adapter"].values[0, :, 0], by_hand, rtol=1e-5)
    assert len(arviz.summary(idata, var_names=["change.lora.query"], kind="stats")) == 2


def test_the_head_s_effect_is_a_move_of_the_logit() -> None:
    """Features one sd further along the leading axis: the logit moves by the effect on axis 0. In
    fitted coordinates, which the export must go through."""
    model = tiny_model((LoRA(rank=3),), aligned=True)
    posterior = fit(model, "normal", tiny_examples(), max_steps=2, progress=False)
    network = posterior.model.network
    assert network.axes is not None
    effect = posterior.to_arviz(samples=3, sites="head.*").posterior["head.effect"]
    assert effect.dims == ("chain", "draw", "output", "axis")
    features = network.features(next(tiny_examples().batches(12)))
    step = torch.zeros(16)
    step[features.var(0).argmax()] = network.axes.sds.max()
    weights = {name: value for name, value in posterior.sample(3).items() if "head" in name}
    before, after = (
        network.head(x.expand(3, -1, -1), weights) for x in (features, features + step)
    )
    moved = (after - before).mean(1)
    np.testing.assert_allclose(effect.values[0, :, :, 0], moved, rtol=1e-3, atol=1e-5)


def test_hyper_parameters_have_their_site_s_dims() -> None:
    """Layer 1 alone has LoRA, of rank 3: neither number could be told from a shape alone."""
    dims = {"log_scale": (), "log_layers": ("layer",), "standard": ("layer", "out", "rank")}
    prior = priors.Hierarchical()
    model = tiny_model((LoRA(("query",), rank=3, layers=(1,)), Prefix(2)), prior=prior)
    posterior = Posterior(model, MeanFieldGuide(model), (FitReport(1, "", FitOptions()),))
    for group in ("posterior", "prior"):
        drawn = posterior.to_arviz(samples=2)[group]
        for what, expected in dims.items():
            array = drawn[f"lora.query.B.{what}"]
            assert tuple(dim.split(".")[0] for dim in array.dims[2:]) == expected
            for dim in array.dims:
                if dim.startswith("layer"):
                    assert array[dim].values.tolist() == [1]
                    assert dim == "layer.lora.query.B." + what


def test_what_a_prior_samples_besides_comes_along() -> None:
    def prior(sites: Any) -> dict[str, torch.Tensor]:
        tau = pyro.sample("tau", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
        return {
            site.name: pyro.sample(
                site.name,
                dist.Normal(0.0, tau[..., 0].mean()).expand(site.shape).to_event(site.ndim),
            )
            for site in sites
        }

    model = tiny_model((), prior=prior)
    how: dict[str, Any] = {"max_steps": 2, "particles": 1, "progress": False}
    idata = fit(model, "normal", tiny_examples(), **how).to_arviz(samples=5)
    assert idata.posterior["tau"].shape == idata.prior["tau"].shape == (1, 5, 3)
    assert (idata.posterior["tau"].values > 0).all()


# What is chosen, and what it takes.


def test_large_sites_are_left_out_by_name(
    posterior: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SMALL", 40)
    idata = posterior.to_arviz(samples=2)
    small = {"change.lora.query", "change.lora.value", "head.weight", "head.bias"}
    assert set(idata.posterior.data_vars) == small
    left_out = idata.posterior.attrs["left_out"].split(", ")
    assert sorted(left_out) == [f"lora.{target}.{m}" for target in ("query", "value") for m in "AB"]
    assert idata.posterior.attrs["temperature"] == 1.0
    assert idata.posterior.attrs["guide"] == "MeanFieldGuide(normal)"


def test_wrong_arguments_are_named(posterior: Posterior) -> None:
    with pytest.raises(ConfigError, match=r"'adapter\.\*' matches no site; sites: lora"):
        posterior.to_arviz(samples=2, sites=["head.*", "adapter.*"])
    with pytest.raises(ConfigError, match="sites: no variable is chosen"):
        to_arviz(tiny_model(()), samples=2, sites=[])
    with pytest.raises(ConfigError, match="samples=0"):
        posterior.to_arviz(samples=0)


# Files, and ArviZ's own functions.


def test_netcdf_round_trip(idata: Any, tmp_path: Path) -> None:
    idata.to_netcdf(str(tmp_path / "idata.nc"))
    back = arviz.from_netcdf(str(tmp_path / "idata.nc"))
    assert groups_of(back) == groups_of(idata)
    for group in groups_of(idata):
        xr.testing.assert_equal(back[group], idata[group])
    assert back.posterior.attrs["left_out"] == idata.posterior.attrs["left_out"]


def test_arviz_1_gets_a_data_tree(
    posterior: Posterior, idata: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(vars(arviz), "InferenceData", raising=False)
    tree = posterior.to_arviz(DATA, samples=40, sites=PEFT)
    assert isinstance(tree, xr.DataTree)
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as back:
        for group in groups_of(idata):
            xr.testing.assert_equal(back[group].to_dataset(), dataset(idata[group]))


def left_out(exact: Exact) -> np.ndarray:
    """log p(y_i | all others) of each rating, each N - 1 others' posterior in closed form."""
    densities = []
    for i, row in enumerate(exact.x):
        rest = torch.arange(len(exact.y)) != i
        others = Exact(exact.x[rest], exact.y[rest], exact.prior_sd, exact.noise)
        sd = (row @ others.covariance @ row + exact.noise**2).sqrt()
        densities.append(Normal(row @ others.mean, sd).log_prob(exact.y[i]).item())
    return np.array(densities)[-COUNT:]


@pytest.fixture(scope="module")
def conjugate() -> tuple[bh.Model, bh.data.Examples, dict[str, Exact]]:
    """Three posteriors that have learnt the same ratings; one has learnt 200 others before."""
    network = own_network()
    model = regression(network, noise=NOISE)
    data = ratings(network, random_texts(COUNT), seed=3, noise=NOISE)
    old = ratings(network, random_texts(200, seed=1), seed=4, noise=NOISE)
    before, fresh, narrow = (Exact.of(model, *more) for more in ((old,), (data,), (data, 0.1)))
    updated = Exact(torch.cat([before.x, fresh.x]), torch.cat([before.y, fresh.y]), noise=NOISE)
    return model, data, {"fresh": fresh, "narrow": narrow, "updated": updated}


def elpd(loo: Any) -> float:
    return float(loo.elpd_loo if OLD else loo.elpd)


@pytest.mark.parametrize("name", ["fresh", "narrow", "updated"])
def test_loo_is_leave_one_out(conjugate: Any, name: str) -> None:
    model, data, exact = conjugate[0], conjugate[1], conjugate[2][name]
    report = FitReport(len(exact.y), data.fingerprint, FitOptions())  # as if fitted
    posterior = Posterior(model, FunctionGuide(guide_of(exact)), (report,))
    idata = posterior.to_arviz(data, samples=DRAWS)
    loo, expected = arviz.loo(idata, pointwise=True), left_out(exact)
    pointwise = (loo.loo_i if OLD else loo.elpd_i).values
    drawn = idata.log_likelihood["label"].values[0].astype(float)
    # Importance sampling, to first order: four standard errors of the mean of a log-likelihood.
    np.testing.assert_array_less(np.abs(pointwise - expected), 4 * drawn.std(0) / DRAWS**0.5 + 1e-3)
    error = 4 * drawn.sum(1).std() / DRAWS**0.5
    assert elpd(loo) == pytest.approx(expected.sum(), abs=error)
    # The fit of the posterior that has learnt each rating too would be told from it.
    assert np.log(np.exp(drawn).mean(0)).sum() - expected.sum() > 2 * error


def test_comparison_and_summary_of_kinds() -> None:
    """LoRA against a hybrid; with what is left out put back, it is the forecast's own NLL. ArviZ
    1.x fails on dims with a name of its own, and swaps rows where dims are in disorder."""
    posteriors = {
        name: fit(tiny_model(kinds), "normal", tiny_examples(), max_steps=10, progress=False)
        for name, kinds in (("LoRA", (LoRA(rank=2),)), ("hybrid", (LoRA(rank=2), Adapter(2))))
    }
    exported = {
        name: posterior.to_arviz(tiny_examples(), samples=100)
        for name, posterior in posteriors.items()
    }
    table = arviz.compare(exported, **EXACT)
    column, parameters = ("elpd_loo", "p_loo") if OLD else ("elpd", "p")
    for name, posterior in posteriors.items():
        row = table.loc[name, [column, parameters]].astype(float)
        assert row[column] == pytest.approx(elpd(arviz.loo(exported[name])), abs=1e-6)
        nlls = posterior.predict(tiny_examples(), 100).nlls()  # the same seed, so the same draws
        assert row[column] + row[parameters] == pytest.approx(-float(nlls.sum()), abs=1e-3)
        assert row[parameters] > 0.1
    idata = posteriors["hybrid"].to_arviz(samples=20, sites="*")
    table = arviz.summary(idata, kind="stats", round_to=6)
    assert len(table) == sum(drawn[0, 0].size for drawn in idata.posterior.values())
    for name, drawn in idata.posterior.items():
        means = drawn.mean(("chain", "draw"))
        for index in np.ndindex(means.shape):
            mean = float(table.loc[f"{name}[{', '.join(map(str, index))}]", "mean"])
            assert mean == pytest.approx(float(means[index]), abs=1e-5), name
