"""What a person can read of the weights, against the dense matrices and the network itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import build, drawn
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro import priors
from bhpeft_pyro.base.checks import derived
from bhpeft_pyro.diagnostics.changes import Variable, head_norms
from bhpeft_pyro.guides import MixtureGuide, NormalGuide
from bhpeft_pyro.integrations.arviz import _dataset
from bhpeft_pyro.peft import Adapter, LoRA, Prefix
from bhpeft_pyro.testing import tiny_examples, tiny_model

DRAWS = 3


@pytest.fixture(scope="module")
def posterior() -> bh.Posterior:
    """In fitted coordinates: what is exported must go through them."""
    model = tiny_model((LoRA(rank=3, alpha=5.0), Adapter(2)), aligned=True)
    return bh.fit(model, "normal", tiny_examples(), max_steps=2, progress=False)


def dense(network: bh.RandomPEFT, weights: dict[str, Tensor], target: str) -> Tensor:
    """(S, layer, out, in) delta W."""
    (lora,) = (kind for kind in network.kinds if isinstance(kind, LoRA))
    product = weights[f"lora.{target}.B"] @ weights[f"lora.{target}.A"]
    return lora.alpha / lora.rank * product


@pytest.mark.parametrize(("architecture", "keys"), [("gpt2", 4), ("llama", 2)])
def test_heads_have_the_rows_that_make_their_outputs(architecture: str, keys: int) -> None:
    """GPT-2 fuses query, key and value; two query heads of this Llama share one of keys."""
    network = bh.RandomPEFT(build(architecture), (LoRA(("query", "key"), rank=2),))
    weights = drawn(network.sites, DRAWS, seed=2)
    found = head_norms(network, weights)
    counts = {"query": 4, "key": keys}
    for target, count in counts.items():
        delta = dense(network, weights, target)
        for layer, norms in found[f"lora.{target}"].items():
            rows = delta[:, layer].chunk(count, 1)
            assert norms.shape == (DRAWS, count)
            torch.testing.assert_close(
                norms, torch.stack([r.flatten(1).norm(dim=1) for r in rows], 1)
            )


def test_the_head_s_effect_is_a_move_of_the_logit(posterior: bh.Posterior) -> None:
    """Features one sd further along the leading axis: the logit moves by the effect on axis 0."""
    network = posterior.model.network
    assert network.axes is not None
    idata = posterior.to_arviz(samples=DRAWS, sites="head.*")
    effect = idata.posterior["head.effect"]
    assert effect.dims == ("chain", "draw", "output", "axis")
    features = network.features(next(tiny_examples().batches(12)))
    step = torch.zeros(16)
    step[features.var(0).argmax()] = network.axes.sds.max()
    weights = {name: value for name, value in posterior.sample(DRAWS).items() if "head" in name}
    before, after = (
        network.head(x.expand(DRAWS, -1, -1), weights) for x in (features, features + step)
    )
    moved = (after - before).mean(1)
    np.testing.assert_allclose(effect.values[0, :, :, 0], moved, rtol=1e-3, atol=1e-5)


def test_gates_are_open_as_often_as_their_probability() -> None:
    kinds = (LoRA(rank=2), Adapter(2, layers=(1,)))
    model = tiny_model(kinds, prior=priors.Gates(change=0.5))
    posterior = bh.fit(model, "normal", tiny_examples(), max_steps=20, progress=False)
    idata = posterior.to_arviz(samples=100)
    draws = posterior.sample(100)
    for kind, layers in (("lora", [0, 1]), ("adapter", [1])):
        gate = idata.posterior[f"gate.{kind}"]
        (layer,) = gate.dims[2:]
        assert gate[layer].values.tolist() == layers
        share = (gate > 0.5).mean(("chain", "draw"))
        expected = (draws[f"gates.{kind}"] > 0).float().mean(0)
        np.testing.assert_allclose(share, expected, atol=1e-6)
    assert 0.35 < float((idata.prior["gate.lora"] > 0.5).mean()) < 0.65


READY = {
    "hierarchical": (priors.Hierarchical(), {"log_scale": (), "log_layers": ("layer",)}),
    "ard": (priors.ARD(), {"log_ranks": ("layer", "rank")}),
    "horseshoe": (priors.Horseshoe(), {"log_tau": (), "log_local": ("layer", "out", "rank")}),
}


@pytest.mark.parametrize("name", READY)
def test_hyper_parameters_have_their_site_s_dims(name: str) -> None:
    """Layer 1 alone has LoRA, of rank 3: neither number could be told from a shape alone."""
    prior, dims = READY[name]
    model = tiny_model((LoRA(("query",), rank=3, layers=(1,)), Prefix(2)), prior=prior)
    posterior = bh.Posterior(
        model, NormalGuide(model), (bh.training.FitReport(1, "", bh.FitOptions()),)
    )
    for group in ("posterior", "prior"):
        drawn = posterior.to_arviz(samples=2)[group]
        for what, expected in dims.items():
            found = drawn[f"lora.query.B.{what}"]
            assert tuple(dim.split(".")[0] for dim in found.dims[2:]) == expected
            for dim in found.dims:
                if dim.startswith("layer"):
                    assert found[dim].values.tolist() == [1]
                    assert dim == "layer.lora.query.B." + what


def test_dims_that_differ_get_a_name_each() -> None:
    one = Variable(torch.zeros(1, 2, 3), ("layer", "rank"), (0, 1))
    other = Variable(torch.zeros(1, 2), ("layer",), (0, 5))
    labels = Variable(torch.zeros(1, 2), ("output",))
    one_chain = {"a": one, "b": other, "c": labels, "d": Variable(torch.zeros(1, 4))}
    found = _dataset([one_chain, one_chain], ["no", "yes"])
    dims = {name: array.dims[2:] for name, array in found.data_vars.items()}
    assert dims == {
        "a": ("layer.a", "rank"),
        "b": ("layer.b",),
        "c": ("output",),
        "d": ("d_dim_0",),
    }
    assert found["layer.b"].values.tolist() == [0, 5]
    assert found["output"].values.tolist() == ["no", "yes"]
    assert found.sizes["chain"] == 2


def test_components_are_chains() -> None:
    model = tiny_model(())
    guides = [NormalGuide(model, init_scale=0.1) for _ in range(2)]
    with torch.no_grad():
        guides[1].loc["head/bias"].add_(3.0)
    data = tiny_examples(6)
    posteriors = [
        bh.Posterior(model, guide, (bh.training.FitReport(6, data.fingerprint, bh.FitOptions()),))
        for guide in (MixtureGuide(guides), *guides)
    ]
    both = posteriors[0].to_arviz(data, samples=50, sites="head.*")
    for number, posterior in enumerate(posteriors[1:]):
        alone = posterior.to_arviz(data, samples=50, sites="head.*", seed=derived(0, number))
        for group, name in (("posterior", "head.bias"), ("log_likelihood", "label")):
            np.testing.assert_array_equal(
                both[group][name].values[number], alone[group][name].values[0]
            )
    assert both.posterior.sizes["chain"] == 2 and both.prior.sizes["chain"] == 1
    between = both.posterior["head.bias"].mean("draw").diff("chain")
    np.testing.assert_allclose(between, 3.0, atol=0.1)
