"""Posteriors of guides and draws that `fit` did not make."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import dense, hierarchical
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, autoguide
from saves import load
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import BHPEFTWarning, ConfigError, DataError, GuideError
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.guides import DrawsGuide, MeanFieldGuide, PyroGuide
from bhpeft_pyro.guides.guide import prior_of
from bhpeft_pyro.guides.latent import latents
from bhpeft_pyro.integrations import arviz as export
from bhpeft_pyro.priors import JointPrior
from bhpeft_pyro.testing import (
    tiny_backbone,
    tiny_batch,
    tiny_examples,
    tiny_model,
    tiny_tokenizer,
)

QUICK: dict[str, Any] = {"max_steps": 3, "progress": False}


def draws_of(model: bh.Model, samples: int = 40, chains: int = 0) -> dict[str, Tensor]:
    lead = (chains, samples) if chains else (samples,)
    return {site.name: site.unit + torch.randn(*lead, *site.shape) for site in model.sites}


def trained(model: bh.Model, guide: Any, steps: int = 30) -> Any:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(steps):
        svi.step(tiny_batch(16))
    return guide


@pytest.fixture(autouse=True)
def _store() -> Any:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def test_draws_of_nuts_predict_as_their_mean_over_draws(tmp_path: Path) -> None:
    model, data = tiny_model(()), tiny_examples(12)
    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=6, warmup_steps=30, disable_progbar=True)
    mcmc.run(next(data.batches(12)))
    draws = mcmc.get_samples()
    assert draws["head.bias"].std(0).min() > 0.1  # it has moved
    posterior = bh.Posterior.from_draws(model, draws, data)
    with torch.no_grad():
        exact = model.predictive(draws, next(data.batches(12))).probs.mean(0)
    found = posterior.predict(data, samples=4000).probabilities
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0)
    posterior.save(tmp_path / "p")
    again = load(tmp_path / "p")
    assert torch.equal(again.predict(data).probabilities, posterior.predict(data).probabilities)
    assert posterior.report.data == data.fingerprint


@pytest.mark.parametrize("chains", [1, 2])
def test_draws_on_a_simplex_have_one_number_more_than_dimensions(
    tmp_path: Path, chains: int
) -> None:
    def prior(sites: Any) -> Any:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(len(sites))))
        return {
            s.name: pyro.sample(s.name, dist.Normal(0.0, share).expand(s.shape).to_event())
            for s, share in zip(sites, shares, strict=True)
        }

    model, data = tiny_model((), prior=prior), tiny_examples(12)
    runs = [pyro.poutine.trace(prior).get_trace(model.sites) for _ in range(3 * chains)]
    draws = {
        n: torch.stack([run.nodes[n]["value"] for run in runs]) for n in runs[0].stochastic_nodes
    }
    if chains > 1:
        draws = {name: value.unflatten(0, (chains, 3)) for name, value in draws.items()}
    posterior = bh.Posterior.from_draws(model, draws, data)
    exported = posterior.to_arviz(samples=3).posterior["shares"]
    assert exported.shape == (chains, 3, 2)
    posterior.save(tmp_path / "p")
    again = load(tmp_path / "p", prior=prior)
    assert torch.equal(again.predict(data).probabilities, posterior.predict(data).probabilities)
    new = tiny_examples(8, seed=1)
    under = model.with_prior(posterior.components[0].as_prior())
    assert bh.fit(under, "normal", new, **QUICK).report.steps == 3


def test_every_draw_is_taken_whole() -> None:
    model = tiny_model(())
    draws = draws_of(model, 5)
    drawn = bh.Posterior.from_draws(model, draws).sample(64)
    every = {float(value[0]): number for number, value in enumerate(draws["head.bias"])}
    which = [every[float(value[0])] for value in drawn["head.bias"]]
    assert all(sorted(which[start : start + 5]) == [0, 1, 2, 3, 4] for start in range(0, 60, 5))
    assert which[:5] == [0, 1, 2, 3, 4] and which[60:] == sorted(which[60:])
    assert torch.equal(drawn["head.weight"], draws["head.weight"][which])


def test_chains_are_chains_and_a_mixture() -> None:
    model = tiny_model(())
    draws = draws_of(model, 20, chains=2)
    draws["head.bias"][1] += 100
    posterior = bh.Posterior.from_draws(model, draws)
    exported = posterior.to_arviz(samples=10).posterior["head.bias"]
    assert exported.sizes["chain"] == 2
    assert (exported.mean(["draw", "output"]).values > 50).tolist() == [False, True]
    assert "2 components, fitted elsewhere" in str(posterior)
    rows = [{"text": "w5 w9", "label": 0}, {"text": "w6 w9", "label": 1}]
    learnt = bh.Posterior.from_draws(model, draws, iter(rows))  # read but once
    assert [part.report.examples for part in learnt.components] == [2, 2]
    with pytest.raises(GuideError, match="draws: expected as many chains of each latent"):
        bh.Posterior.from_draws(model, draws | {"head.bias": draws["head.bias"][:1]})
    with pytest.raises(GuideError, match="draws: expected 2 or more of head"):
        bh.Posterior.from_draws(model, {})


def test_an_mcmc_gives_its_chains_and_what_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 1)  # so all in this process
    model, batch = tiny_model(()), tiny_batch(12)
    kernel = NUTS(model, max_tree_depth=2, step_size=1e3, adapt_step_size=False)  # far too long
    how: dict[str, Any] = {"num_samples": 4, "warmup_steps": 1, "disable_progbar": True}
    alone = MCMC(NUTS(model, max_tree_depth=1), **how)
    with pytest.warns(UserWarning, match="drawn sequentially"):
        mcmc = MCMC(kernel, num_chains=2, **how)
    with pytest.raises(GuideError, match="this MCMC has no draws; expected one that has run"):
        bh.Posterior.from_draws(model, mcmc)
    for each in (mcmc, alone):
        each.run(batch)
        energy = torch.arange(4.0 * each.num_chains).reshape(each.num_chains, 4)
        said = {"energy": energy[0] if each is alone else energy}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "draws: all 4 are equal")  # of the one that diverged
            posterior = bh.Posterior.from_draws(model, each, tiny_examples(12), statistics=said)
        assert len(posterior.components) == each.num_chains
        idata = posterior.to_arviz()
        assert torch.equal(torch.from_numpy(idata.sample_stats["energy"].values), energy.double())
        for name, value in each.get_samples(group_by_chain=True).items():
            assert torch.equal(torch.from_numpy(idata.posterior[name].values), value)
        found = {
            f"chain {chain}": np.flatnonzero(row).tolist()
            for chain, row in enumerate(idata.sample_stats["diverging"].values)
        }
        expected = each.diagnostics()["divergences"]
        assert found == expected and (each is alone or all(expected.values()))


def test_statistics_of_draws_are_those_of_the_draws_that_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, energy = tiny_model(()), torch.arange(40.0).reshape(2, 20)
    draws = draws_of(model, 20, chains=2)
    draws["head.bias"][..., 0] = energy
    posterior = bh.Posterior.from_draws(model, draws, statistics={"energy": energy})
    posterior.save(tmp_path)
    for each in (posterior, bh.Posterior.load(tmp_path, model.network.backbone)):
        for samples in (None, 20, 7):
            idata = each.to_arviz(samples=samples)
            taken = idata.posterior["head.bias"].values[..., 0]
            np.testing.assert_array_equal(idata.sample_stats["energy"].values, taken)
            assert taken.shape == (2, samples or 20) and (np.diff(taken) > 0).all()
        with monkeypatch.context() as other:  # of ArviZ 1
            other.delitem(vars(export.arviz), "InferenceData", raising=False)
            tree = each.to_arviz()
            assert tree["sample_stats/energy"].dims == ("chain", "draw")
        with pytest.raises(ConfigError, match="samples=21: the sampler made 20 draws in each"):
            each.to_arviz(samples=21)
    for wrong in (energy[0], energy[:, 1:]):
        message = rf"'lp' has shape \({', '.join(map(str, wrong.shape))},?\), expected \(2, 20\)"
        with pytest.raises(GuideError, match=message):
            bh.Posterior.from_draws(model, draws, statistics={"lp": wrong})


def test_draws_become_a_prior_of_their_moments() -> None:
    model = tiny_model((), prior=hierarchical)
    draws = {**draws_of(model), "tau": torch.rand(40) + 0.5}
    posterior = bh.Posterior.from_draws(model, draws, tiny_examples(9))
    found = posterior.as_prior().distributions  # type: ignore[attr-defined]
    torch.testing.assert_close(found["head.bias"].mean, draws["head.bias"].mean(0))
    torch.testing.assert_close(found["head.bias"].stddev, draws["head.bias"].std(0))
    assert found["tau"].base_dist.loc == pytest.approx(draws["tau"].log().mean().item())
    under = model.with_prior(posterior.as_prior())
    assert "tau" in bh.fit(under, "normal", tiny_examples(9, seed=5), **QUICK).guide.means()
    with pytest.raises(GuideError, match=r"draws of a sampler cannot go on.*as_prior\(\)"):
        posterior.update(tiny_examples(9, seed=5), **QUICK)
    with pytest.raises(GuideError, match="no density"):
        posterior.diagnose(tiny_examples(9), samples=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("head.bias"), r"none of head.bias"),
        (lambda d: d.update(other=torch.zeros(40)), "unknown other"),
        (lambda d: d.update({"head.bias": torch.zeros(40, 3)}), r"\(40, 3\), expected \(40, 2\)"),
        (lambda d: d["head.bias"].fill_(torch.nan), "not finite"),
    ],
)
def test_wrong_draws_are_refused(change: Callable[[Any], object], message: str) -> None:
    model = tiny_model(())
    draws = draws_of(model)
    change(draws)
    with pytest.raises(GuideError, match=message):
        bh.Posterior.from_draws(model, draws)


def test_a_draw_that_single_precision_cannot_hold_is_refused() -> None:
    model = tiny_model((), prior=hierarchical)
    tau = torch.linspace(0.5, 1.0, 40).double()
    tau[7] = 1e-50
    with pytest.raises(GuideError, match=r"'tau' has values .* impossible in torch\.float32"):
        bh.Posterior.from_draws(model, {**draws_of(model), "tau": tau})


@pytest.mark.parametrize("more", [1, -1])
def test_a_joint_vector_of_another_length_is_refused(more: int) -> None:
    """With a weight too many, the last would be left out in silence."""
    model = tiny_model(())
    first = bh.fit(model, "laplace", tiny_examples(60), components=1, **QUICK)
    joint = model.with_prior(first.as_prior())
    (latent,) = latents(joint)
    length = latent.loc.numel()
    draws = {latent.name: torch.randn(20, length + more)}
    with pytest.raises(
        GuideError, match=rf"shape \(20, {length + more}\), expected \(20, {length}"
    ):
        bh.Posterior.from_draws(joint, draws)


@pytest.mark.parametrize(
    "family",
    [
        autoguide.AutoNormal,
        autoguide.AutoMultivariateNormal,
        lambda model: autoguide.AutoLowRankMultivariateNormal(model, rank=2),
    ],
)
def test_a_guide_that_pyro_trained_is_saved_and_updated(family: Any, tmp_path: Path) -> None:
    model, data = tiny_model(()), tiny_examples(12)
    guide = trained(model, family(model))
    posterior = bh.Posterior.of(model, guide, data)
    assert isinstance(posterior.guide, PyroGuide)
    for name, value in guide.median().items():
        assert torch.equal(posterior.guide.means()[name], value)
    posterior.save(tmp_path / "p")
    again = load(tmp_path / "p")
    assert metrics.evaluate(again.predict(data)) == metrics.evaluate(posterior.predict(data))
    assert len(posterior.update(tiny_examples(9, seed=5), **QUICK).lineage) == 2


def test_a_function_s_parameters_come_from_pyro_s_store() -> None:
    model = tiny_model(())

    def guide(batch: object) -> None:
        for site in model.sites:
            loc = pyro.param(f"{site.name}.loc", torch.zeros(site.shape))
            pyro.sample(site.name, dist.Delta(loc, event_dim=site.ndim))

    with pytest.raises(GuideError, match=r"store has no 'head.weight.loc'"):
        bh.Posterior.of(model, guide)
    trained(model, guide)
    posterior = bh.Posterior.of(model, guide)
    pyro.param("head.bias.loc").data.fill_(9.0)  # later training of the function's own
    assert 0 < posterior.sample(1)["head.bias"].abs().max() < 9


def test_a_subclass_of_a_model_is_refused() -> None:
    class Own(bh.Model):
        def forward(self, batch: Any = None) -> Any:
            pyro.factor("own", torch.zeros(()))
            return super().forward(batch)

    model = Own(tiny_model(()).network)
    with pytest.raises(ConfigError, match=r"expected a bh.Model itself, got Own"):
        bh.fit(model, "normal", tiny_examples(), **QUICK)
    with pytest.raises(ConfigError, match=r"expected a bh.Model itself, got Own"):
        bh.Posterior.of(model, bh.autoguide("normal", model))


def test_a_posterior_is_pickled() -> None:
    """As spawned processes need it, for example the chains of NUTS."""
    posterior = bh.fit(tiny_model(), "normal", tiny_examples(12), **QUICK)
    again = pickle.loads(pickle.dumps(posterior))
    assert metrics.evaluate(again.predict(tiny_examples(9))) == metrics.evaluate(
        posterior.predict(tiny_examples(9))
    )


def test_draws_under_the_prior_of_a_joint_posterior() -> None:
    model = tiny_model(())
    joint = bh.fit(model, "laplace", tiny_examples(12), components=1, **QUICK)
    model = model.with_prior(joint.as_prior())
    draws = draws_of(model, 6)
    whole = torch.cat([value.flatten(1) for value in draws.values()], 1)
    apart, together = (DrawsGuide.of(model, each).means() for each in (draws, {"weights": whole}))
    assert torch.equal(apart["head.weight"], together["head.weight"])
    posterior = bh.Posterior.from_draws(model, {"weights": whole})
    under = model.with_prior(posterior.as_prior())
    assert bh.fit(under, "normal", tiny_examples(9, seed=4), **QUICK).report.steps == 3


def test_pyro_s_laplace_approximation_is_saved_and_updated(tmp_path: Path) -> None:
    """Its covariance has no unconstrained parameters, as that of a trained guide has."""
    model = tiny_model(())
    mode = trained(model, autoguide.AutoLaplaceApproximation(model))
    own = mode.laplace_approximation(tiny_batch(16)).get_posterior()
    posterior = bh.Posterior.of(model, mode.laplace_approximation(tiny_batch(16)))
    posterior.save(tmp_path)
    for each in (posterior, bh.Posterior.load(tmp_path, model.network.backbone)):
        joint = prior_of(each.model, each.guide)
        assert isinstance(joint, JointPrior)
        covariance = own.covariance_matrix.detach()
        torch.testing.assert_close(joint.normal.variance, covariance.diagonal())
        rows = dense(joint.normal.covariance).float()
        torch.testing.assert_close(rows, covariance, rtol=1e-3, atol=1e-4)
    assert posterior.update(tiny_examples(9, seed=4), **QUICK).report.steps == 3


@pytest.mark.parametrize(
    "options",
    [{"stable": True}, {"log_scale_max_clip": -3.0}, {"hidden_dim": [40], "num_transforms": 2}],
)
def test_a_flow_keeps_the_options_that_change_no_shape(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(())
    guide = trained(model, autoguide.AutoIAFNormal(model, **options))
    posterior = bh.Posterior.of(model, guide, tiny_examples(12))
    torch.manual_seed(0)
    noise = guide.get_base_dist().sample((5,))
    expected = guide.get_transform()(noise)
    posterior.save(tmp_path / "p")
    for each in (posterior, load(tmp_path / "p")):
        assert isinstance(each.guide, PyroGuide)
        flow: Any = each.guide.auto
        torch.testing.assert_close(flow.get_transform()(noise), expected)


def test_a_guide_of_another_model_is_refused_before_it_predicts() -> None:
    model, other = tiny_model(()), tiny_model(bh.presets.lora(rank=2))

    def function(batch: Any) -> None:
        pyro.sample("head.bias", dist.Normal(pyro.param("b", torch.zeros(2)), 1.0).to_event(1))

    for guide, message in (
        (
            trained(other, autoguide.AutoNormal(other), steps=1),
            "made for another model: the model lacks lora.query.A",
        ),
        (
            trained(other, autoguide.AutoDiagonalNormal(other), steps=1),
            "made for another model: the model lacks lora",
        ),
        (function, "does not sample what the model does: it lacks head.weight"),
    ):
        function(None)  # its parameter is in the store
        with pytest.raises(GuideError, match=message):
            bh.Posterior.of(model, guide)
    for wrong in ("AutoNormal", autoguide.AutoNormal):
        with pytest.raises(ConfigError, match="expected a guide that is trained on this model"):
            bh.Posterior.of(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model: expected a bh\.Model"):
        bh.training.whole_batch(tiny_examples(4), model)  # type: ignore[arg-type]


def test_what_was_learnt_is_known_if_the_data_are_given() -> None:
    model, examples = tiny_model(()), tiny_examples(60)
    posterior = bh.Posterior.of(model, MeanFieldGuide(model), examples)
    assert posterior.queue([*examples.texts[:5], "w20 w21"], 3).learnt == 5
    with pytest.raises(DataError, match="60 of 60 rows have the text of a row that was learnt"):
        posterior.promise(examples, error=0.4)
    later = posterior.update(tiny_examples(9, seed=1), max_steps=1, progress=False)
    assert later.queue([*examples.texts[:5], "w20 w21"], 3).learnt == 5
    # Without the data it is not known, and a round does not hide that.
    unknown = bh.Posterior.of(model, MeanFieldGuide(model)).update(
        tiny_examples(9, seed=1), max_steps=1, progress=False
    )
    assert unknown.learnt_rows is None
    with pytest.warns(UserWarning, match="which rows this posterior has learnt is not known"):
        unknown.promise(tiny_examples(100, seed=5), error=0.5, answer_unlike=True)


def test_draws_that_are_all_equal_are_doubted() -> None:
    model = tiny_model(())
    with pytest.warns(BHPEFTWarning, match="draws: all 9 are equal"):
        bh.Posterior.from_draws(model, {s.name: torch.ones(9, *s.shape) for s in model.sites})


def by_hand(model: bh.Model, guide: Any, steps: int = 3) -> None:
    step = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step  # type: ignore[no-untyped-call]
    for _ in range(steps):
        step(tiny_batch())
    pyro.clear_param_store()


@pytest.mark.parametrize("kind", ["AutoNormal", "AutoStructured", "normal", "module"])
def test_a_posterior_has_a_copy_of_its_guide(kind: str) -> None:
    model = tiny_model(())

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.locs = torch.nn.ParameterList([site.init() for site in model.sites])

        def forward(self, batch: Any = None) -> None:
            for site, loc in zip(model.sites, self.locs, strict=True):
                pyro.sample(site.name, dist.Normal(loc, 0.1).to_event(site.ndim))

    if kind == "module":
        guide: Any = Own()
    else:
        guide = MeanFieldGuide(model) if kind == "normal" else getattr(autoguide, kind)(model)
    if kind != "module":
        by_hand(model, guide)
    posterior = bh.Posterior.of(model, guide)
    before = posterior.sample(4)
    for parameter in guide.parameters():
        parameter.data += 1.0
    after = posterior.sample(4)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_autostructured_guide_is_saved_whatever_its_conditionals(tmp_path: Path) -> None:
    model = tiny_model(())
    guide = bh.autoguide("AutoStructured", model, conditionals="normal")
    posterior = bh.fit(model, guide, tiny_examples(), **QUICK)
    again = load(posterior.save(tmp_path / "run"))
    assert torch.equal(again.sample(3)["head.bias"], posterior.sample(3)["head.bias"])


def test_a_fit_between_sampling_and_its_posterior_changes_nothing() -> None:
    """It has a network of its own, whose head has other axes."""
    data = tiny_examples(24)
    network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(2), tiny_tokenizer())
    model = bh.Model(network)
    bh.training.whole_batch(model, data)  # for a sampler, whose draws are these
    draws = draws_of(model)
    other = bh.fit(model, "normal", data, **QUICK)
    assert other.model.network is not model.network and other.model.network.aligned()
    assert not model.network.aligned()
    features = model.network.features(tiny_batch())
    assert torch.equal(
        bh.Posterior.from_draws(model, draws).model.network.features(tiny_batch()), features
    )
    network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(2), tiny_tokenizer())
    model = bh.Model(network)
    by_hand(model, MeanFieldGuide(model), steps=1)  # Pyro's own inference has used it
    assert bh.fit(model, "normal", data, **QUICK).model.network is not network
