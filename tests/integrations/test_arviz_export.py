"""The ArviZ export holds the posterior's own numbers, under the right names."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from counts import COUNTS, Counts

from bhpeft_pyro import FitOptions, Posterior, fit
from bhpeft_pyro.diagnostics.changes import changes, shifts, sizes
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.integrations import arviz as export
from bhpeft_pyro.integrations.arviz import to_arviz, trace
from bhpeft_pyro.model import likelihoods
from bhpeft_pyro.model.linearized import linear_predictives
from bhpeft_pyro.peft import Adapter, LoRA
from bhpeft_pyro.testing import tiny_examples, tiny_model
from bhpeft_pyro.training import FitReport

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

TEXTS = ["w5 w20", "w6 w21 w22", "w5 w23"]
RATINGS = {"text": TEXTS * 3, "label": [1.0, 3.0, 2.0] * 3}


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    data, others = tiny_examples(), tiny_examples(seed=1)
    return fit(tiny_model(), "normal", data, validation=others, max_steps=6, progress=False)


@pytest.fixture(scope="module")
def idata(posterior: Posterior) -> Any:
    return posterior.to_arviz(tiny_examples(7, seed=3), samples=40, sites=["head.*", "lora.*"])


def test_means_and_sds_are_the_guides(posterior: Posterior) -> None:
    many = posterior.to_arviz(samples=400, sites="head.*")
    for name in ("head.weight", "head.bias"):
        expected = posterior.guide.distributions()[name]  # type: ignore[operator]
        drawn = many.posterior[name].values[0]
        error = expected.stddev.numpy() / np.sqrt(400)
        np.testing.assert_array_less(np.abs(drawn.mean(0) - expected.mean.numpy()), 5 * error)
        np.testing.assert_allclose(drawn.std(0), expected.stddev.numpy(), rtol=0.15)


def test_prior_is_the_models(posterior: Posterior) -> None:
    many = posterior.to_arviz(samples=300, sites="head.bias")
    with pyro.poutine.trace() as tracer:
        posterior.model.prior(posterior.model.sites)
    expected = tracer.trace.nodes["head.bias"]["fn"].stddev.numpy()
    np.testing.assert_allclose(many.prior["head.bias"].values[0].std(0), expected, rtol=0.2)


def test_each_draw_predicts_with_its_own_weights(posterior: Posterior, idata: Any) -> None:
    """Put draw s back into the model by hand: its log-likelihood is that of the export."""
    data = tiny_examples(7, seed=3)
    batch = next(data.batches(7))
    for s in (0, 17, 39):
        weights = {
            site.name: torch.tensor(idata.posterior[site.name].values[0, s])
            for site in posterior.model.sites
        }
        with torch.no_grad():
            expected = posterior.model.predictive(weights, batch).log_prob(batch.labels)
        got = idata.log_likelihood["label"].values[0, s]
        np.testing.assert_allclose(got, expected.numpy().reshape(-1), atol=1e-4)


def test_the_prior_predicts_with_its_own_draws(posterior: Posterior) -> None:
    """Put the prior's draws back into the model: labels come up as often as they say."""
    data = tiny_examples(5, seed=4)
    idata = posterior.to_arviz(data, samples=200, sites=["head.*", "lora.*"])
    weights = {
        site.name: torch.tensor(idata.prior[site.name].values[0])[:, None]
        for site in posterior.model.sites
    }
    with torch.no_grad():
        p = posterior.model.predictive(weights, next(data.batches(5))).probs[..., 1]
    labels = torch.tensor(idata.prior_predictive["label"].values[0]).float()
    assert labels.shape == p.shape == (200, 5)
    noise = (p * (1 - p)).sum(0).sqrt() / 200
    assert ((labels - p).mean(0).abs() < 4 * noise).all()
    # Draw by draw, not only on average: probable labels are the ones drawn.
    assert torch.corrcoef(torch.stack([labels.flatten(), p.flatten()]))[0, 1] > 0.3


def linearised(model: Any, guide: Any, weights: dict[str, torch.Tensor], batch: Any) -> Any:
    """The labels' distribution under draws of the weights, in the network linearised around the
    guide's means."""
    ((_, predictive),) = linear_predictives(model, guide.means(), [weights])
    return predictive(batch)


def test_a_linear_posterior_has_the_predictions_of_the_linearised_network() -> None:
    data, options = tiny_examples(6), {"components": 1, "max_steps": 5, "progress": False}
    posterior = fit(tiny_model(), "laplace", data, **options)
    idata = posterior.to_arviz(data, samples=200, sites=["head.*", "lora.*"])
    model, guide = posterior.model, posterior.guide
    batch = next(data.batches(6))
    for group in ("posterior", "prior"):
        drawn = idata[group]
        weights = {s.name: torch.tensor(drawn[s.name].values[0])[:, None] for s in model.sites}
        with torch.no_grad():
            p = linearised(model, guide, weights, batch).probs
        labels = torch.tensor(idata[f"{group}_predictive"]["label"].values[0]).float()
        noise = (p[..., 0] * p[..., 1]).sum(0).sqrt() / 200
        assert ((labels - p[..., 1]).mean(0).abs() < 4 * noise).all()
    weights = {
        s.name: torch.tensor(idata.posterior[s.name].values[0])[:, None] for s in model.sites
    }
    with torch.no_grad():
        fitted = linearised(model, guide, weights, batch).log_prob(batch.labels)
        plain = model.predictive(weights, batch).log_prob(batch.labels)
    np.testing.assert_allclose(idata.log_likelihood["label"].values[0], fitted, atol=1e-3)
    assert (fitted - plain).abs().max() > 0.1  # elsewhere it would not be the same
    needed = 200 * (2 * 4 * sum(s.numel for s in model.sites) + 6 * (2 * 8 + 4))
    with pytest.raises(ConfigError, match=f"{needed:,} bytes"):
        posterior.to_arviz(data, samples=200, sites=["head.*", "lora.*"], max_bytes=needed - 1)


def test_the_prior_of_a_laplace_approximation_has_its_tau() -> None:
    options = {"components": 1, "max_steps": 5, "tau": 0.01, "progress": False}
    posterior = fit(tiny_model(()), "laplace", tiny_examples(6), **options)
    drawn = posterior.to_arviz(samples=400).prior["head.weight"].values[0]
    plain = posterior.guide.unpack(posterior.guide.prior.stddev)["head.weight"]
    np.testing.assert_allclose((drawn.std(0) / plain.numpy()).mean(), 10, rtol=0.05)


def test_the_prior_of_a_mixture_s_round_is_that_of_all_components() -> None:
    options = {"max_steps": 1, "lr": 1e-9, "progress": False}
    first = fit(tiny_model(()), "normal", tiny_examples(6), components=2, **options)
    for number, each in enumerate(first.components):
        each.guide.move({"head.bias": torch.full((2,), 9.0 * number)})
    second = first.update(tiny_examples(6, seed=1), **options)
    drawn = second.to_arviz(samples=10).prior["head.bias"].values[0, :, 0]
    assert sorted(drawn > 4.5) == [False] * 5 + [True] * 5


def test_steps_left_out_are_gaps() -> None:
    history = [{"step": 1, "loss": 2.0, "nll": 1.5}, {"step": 4, "loss": 1.0, "nll": 0.5}]
    stats = trace(FitReport(9, "", FitOptions(), steps=5, skipped=3, history=history))
    assert stats["skipped"].values.tolist() == [False, True, True, False, True]
    np.testing.assert_array_equal(stats["loss"].values, [2, np.nan, np.nan, 1, np.nan])
    assert "validation_nll" not in stats and stats["step"].values.tolist() == [1, 2, 3, 4, 5]


def test_components_have_the_same_steps_and_none_left_out() -> None:
    data, options = tiny_examples(), {"max_steps": 4, "progress": False}
    stats = fit(tiny_model(()), "normal", data, components=2, **options).to_arviz().sample_stats
    assert stats["step"].values.tolist() == [1, 2, 3, 4]
    assert not stats["skipped"].values.any() and np.isfinite(stats["loss"].values).all()


def test_the_noise_of_ratings_goes_with_its_draw() -> None:
    model = tiny_model((), outputs=1, likelihood=likelihoods.Normal(center=2.0))
    posterior = fit(model, "normal", RATINGS, max_steps=5, progress=False)
    idata = posterior.to_arviz(RATINGS, samples=300, sites="noise.*")
    forecast = posterior.predict(RATINGS, 300)
    density = np.exp(idata.log_likelihood["label"].values[0].astype(np.float64)).mean(0)
    expected = forecast.log_prob(torch.tensor(RATINGS["label"])).exp()
    np.testing.assert_allclose(density, expected.numpy(), rtol=1e-3)
    assert idata.posterior["noise.log_scale"].dims == ("chain", "draw")
    assert idata.observed_data["label"].values.tolist() == RATINGS["label"]


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_predictions_are_of_the_likelihood_itself(guide: str) -> None:
    """Counts, not Normals with their means and sds: draw by draw the likelihood's own."""
    model = tiny_model(outputs=1, likelihood=Counts())
    posterior = fit(model, guide, COUNTS, components=1, max_steps=5, progress=False)
    idata = posterior.to_arviz(COUNTS, samples=150, sites=["head.*", "lora.*"])
    counts = idata.posterior_predictive["label"].values[0]
    assert (counts == counts.round()).all() and counts.min() == 0
    batch = next(posterior.encode(COUNTS).batches(12))
    weights = {
        s.name: torch.tensor(idata.posterior[s.name].values[0])[:, None] for s in model.sites
    }
    with torch.no_grad():
        poisson = (
            linearised(model, posterior.guide, weights, batch)
            if guide == "laplace"
            else model.predictive(weights, batch)
        )
    expected = poisson.log_prob(batch.labels)
    np.testing.assert_allclose(idata.log_likelihood["label"].values[0], expected, atol=1e-3)
    error = (poisson.mean.mean(0) / 150).sqrt().numpy()
    np.testing.assert_array_less(np.abs(counts.mean(0) - poisson.mean.mean(0).numpy()), 5 * error)
    again = posterior.to_arviz(COUNTS, samples=150, sites="head.bias")
    np.testing.assert_array_equal(again.posterior_predictive["label"].values[0], counts)


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


def test_changes_by_layer_and_the_kl_of_sites() -> None:
    kinds = (LoRA(("query",), rank=2), Adapter(size=3, layers=(1,)))
    posterior = fit(tiny_model(kinds), "normal", tiny_examples(), max_steps=3, progress=False)
    idata = posterior.to_arviz(samples=20, sites=["change.*", "head.bias"])
    expected = changes(posterior, 20)  # the same seed, so the same draws
    drawn = idata.posterior
    assert set(drawn.data_vars) == {"change.lora.query", "change.adapter", "head.bias"}
    assert drawn["layer.change.adapter"].values.tolist() == [1]
    for branch, layers in expected.items():
        for number, (layer, value) in enumerate(layers.items()):
            found = drawn[f"change.{branch}"]
            assert found[found.dims[-1]].values[number] == layer
            np.testing.assert_allclose(found.values[0, :, number], value.numpy(), rtol=1e-5)
    network = posterior.model.network
    prior = posterior.to_arviz(samples=5, sites="*").prior
    weights = {s.name: torch.tensor(prior[s.name].values[0]) for s in network.sites}
    by_hand = sizes(network, network.coordinates(weights))["adapter"][1]
    np.testing.assert_allclose(prior["change.adapter"].values[0, :, 0], by_hand, rtol=1e-5)
    stats = idata.sample_stats
    for name, by_site in (("kl", posterior.report.kl), ("scale", posterior.report.scales)):
        assert stats[f"site_{name}"].to_series().to_dict() == pytest.approx(by_site)
    assert len(arviz.summary(idata, var_names=["change.lora.query"], kind="stats")) == 2


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

    posterior = fit(
        tiny_model((), prior=prior), "normal", tiny_examples(), max_steps=2, particles=1,
        progress=False,
    )  # fmt: skip
    idata = posterior.to_arviz(samples=5)
    assert idata.posterior["tau"].shape == idata.prior["tau"].shape == (1, 5, 3)
    assert (idata.posterior["tau"].values > 0).all()


def test_trace_of_the_fit(posterior: Posterior, idata: Any) -> None:
    history = posterior.report.history
    stats = idata.sample_stats
    assert stats["step"].values.tolist() == [1, 2, 3, 4, 5, 6]
    assert not stats["skipped"].values.any()
    for name in ("loss", "nll", "kl", "temperature", "lr", "gradient"):
        assert stats[name].values.tolist() == [entry[name] for entry in history]
    evaluated = ~np.isnan(stats["validation_nll"].values)
    assert evaluated.tolist() == ["validation_nll" in entry for entry in history]


@pytest.mark.parametrize(("guide", "kl"), [("delta", "minus log prior"), ("laplace", "KL to the")])
def test_a_point_estimate_has_a_penalty_and_no_kl(guide: str, kl: str) -> None:
    how: dict[str, Any] = {"components": 1, "max_steps": 2, "progress": False}
    stats = fit(tiny_model(()), guide, tiny_examples(), **how).to_arviz(samples=2).sample_stats
    assert stats["kl"].attrs["long_name"].startswith("penalty of the prior")
    assert stats["site_kl"].attrs["long_name"].startswith(kl)


def test_large_sites_are_left_out_by_name(
    posterior: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SMALL", 40)
    idata = posterior.to_arviz(samples=2)
    readable = ("change", "head_norm")
    small = {f"{what}.lora.{target}" for what in readable for target in ("query", "value")}
    assert set(idata.posterior.data_vars) == small | {"head.weight", "head.bias"}
    left_out = idata.posterior.attrs["left_out"].split(", ")
    assert sorted(left_out) == [f"lora.{target}.{m}" for target in ("query", "value") for m in "AB"]
    assert idata.posterior.attrs["temperature"] == 1.0
    assert idata.posterior.attrs["guide"] == "NormalGuide"


def test_memory_is_bounded_before_any_draw(
    posterior: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    numel = {site.name: site.numel for site in posterior.model.sites}
    # Posterior and prior; labels of both, and a log-likelihood.
    needed = 3 * 8 * (numel["head.weight"] + numel["head.bias"]) + 3 * (2 * 8 + 4) * 5
    data = tiny_examples(5)
    idata = posterior.to_arviz(data, samples=3, sites="head.*", max_bytes=needed)
    drawn = [_dataset(idata[group]) for group in _groups(idata)]
    arrays = [
        array for group in drawn for array in group.data_vars.values() if "draw" in array.dims
    ]
    assert needed == sum(array.nbytes for array in arrays)
    monkeypatch.setattr(export, "_chosen_draws", None)  # would be called for the draws
    with pytest.raises(ConfigError, match=rf"samples=3: {needed:,} bytes.*head.weight, head.bias"):
        posterior.to_arviz(data, samples=3, sites="head.*", max_bytes=needed - 1)


def test_wrong_arguments_are_named(posterior: Posterior) -> None:
    with pytest.raises(ConfigError, match=r"'adapter\.\*' matches no site; sites: lora"):
        posterior.to_arviz(samples=2, sites=["head.*", "adapter.*"])
    with pytest.raises(ConfigError, match="samples=0"):
        posterior.to_arviz(samples=0)
    for function in (to_arviz, changes, shifts):
        with pytest.raises(ConfigError, match=r"posterior: expected a bh.Posterior.* got 3"):
            function(3)  # type: ignore[arg-type]


def test_same_seed_same_draws(posterior: Posterior) -> None:
    def biases(seed: int) -> list[Any]:
        idata = to_arviz(posterior, TEXTS, samples=3, sites="head.bias", seed=seed)
        assert "log_likelihood" not in _groups(idata) and "observed_data" not in _groups(idata)
        assert idata.constant_data["text"].values.tolist() == TEXTS
        return [idata.posterior["head.bias"].values, idata.posterior_predictive["label"].values]

    state = torch.get_rng_state()
    one, same, other = biases(0), biases(0), biases(5)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(one[0], same[0])
    np.testing.assert_array_equal(one[1], same[1])
    assert not np.array_equal(one[0], other[0])


def test_netcdf_round_trip(idata: Any, tmp_path: Path) -> None:
    idata.to_netcdf(str(tmp_path / "idata.nc"))
    back = arviz.from_netcdf(str(tmp_path / "idata.nc"))
    assert _groups(back) == _groups(idata)
    for group in _groups(idata):
        xr.testing.assert_equal(back[group], idata[group])
    assert back.posterior.attrs["left_out"] == idata.posterior.attrs["left_out"]


def test_arviz_1_gets_a_data_tree(
    posterior: Posterior, idata: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(vars(arviz), "InferenceData", raising=False)
    tree = posterior.to_arviz(tiny_examples(7, seed=3), samples=40, sites=["head.*", "lora.*"])
    assert isinstance(tree, xr.DataTree)
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as back:
        for group in _groups(idata):
            xr.testing.assert_equal(back[group].to_dataset(), _dataset(idata[group]))


def _dataset(group: Any) -> xr.Dataset:
    """A group's contents, of either ArviZ."""
    return group.to_dataset() if isinstance(group, xr.DataTree) else group


def _groups(idata: Any) -> set[str]:
    """Names of the groups, of either ArviZ."""
    if isinstance(idata, xr.DataTree):
        return set(idata.children)
    return set(idata.groups())


def test_a_model_is_exported_before_any_fit() -> None:
    model, data = tiny_model(()), tiny_examples(12)
    exported = to_arviz(model, data, samples=400, seed=3)
    assert exported.observed_data["label"].shape == (12,)
    assert not any(hasattr(exported, name) for name in ("posterior", "log_likelihood"))
    weights = {
        name: torch.from_numpy(exported.prior[name].values[0]) for name in exported.prior.data_vars
    }
    drawn = {site.name: weights[site.name] for site in model.sites}
    with torch.no_grad():
        expected = model.predictive(drawn, next(data.batches(12))).probs[..., 1].mean(0)
    found = exported.prior_predictive["label"].values[0].mean(0)
    assert abs(found - expected.numpy()).max() < 0.12  # 400 labels: five standard errors


def test_no_variable_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="sites: no variable is chosen"):
        to_arviz(tiny_model(()), samples=2, sites=[])
