"""Guide functions: their parameters, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import FunctionGuide, MeanFieldGuide
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model


def test_a_function_guide_keeps_its_own_parameters_and_their_constraints() -> None:
    start = torch.zeros(2)

    def guide(batch: bh.data.Batch | None) -> None:
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        loc = pyro.param("a.loc", start)
        pyro.sample("head.bias", dist.Normal(loc, scale).to_event(1))

    module, other = FunctionGuide(guide), FunctionGuide(guide)
    parameters = dict(module.named_parameters())
    assert len(parameters) == 2
    assert all(isinstance(value, nn.Parameter) for value in parameters.values())
    with torch.no_grad():
        for name, value in parameters.items():
            if name.endswith("scale"):
                assert value.item() == pytest.approx(torch.tensor(0.5).log().item())
            value.fill_(-3.0)
    assert not start.any() and not other.parameters_["a/loc"].any()
    trace = poutine.trace(module).get_trace(None)
    assert trace.nodes["scale"]["value"].item() == pytest.approx(torch.tensor(-3.0).exp().item())
    trace.log_prob_sum().backward()
    assert all(value.grad is not None for value in parameters.values())
    assert len(pyro.get_param_store()) == 0


def test_a_function_guide_cannot_declare_parameters_for_data_alone() -> None:
    model = tiny_model(())

    def guide(batch: bh.data.Batch | None) -> None:
        for site in model.sites:
            loc = pyro.param(f"{site.name}.loc", torch.zeros(site.shape))
            if batch is not None:
                loc = loc + pyro.param(f"{site.name}.shift", torch.zeros(site.shape))
            pyro.sample(site.name, dist.Normal(loc, 0.01).to_event(site.ndim))

    with pytest.raises(GuideError, match=r"guide: .*'head.weight.shift', 'head.bias.shift'.*None"):
        bh.fit(model, guide, tiny_examples(), max_steps=4, progress=False)
    assert len(pyro.get_param_store()) == 0


class Stored(nn.Module):
    """A module whose parameters are in Pyro's store."""

    def __init__(self, model: bh.Model) -> None:
        super().__init__()
        self.sites, self.own = model.sites, nn.Parameter(torch.zeros(()))

    def forward(self, batch: bh.data.Batch | None = None) -> None:
        for site in self.sites:
            loc = pyro.param(f"{site.name}.loc", site.init()) + self.own
            pyro.sample(site.name, dist.Normal(loc, 0.1).to_event(site.ndim))


def test_parameters_of_a_module_that_only_the_store_has_are_refused() -> None:
    """A posterior would answer with their initial values."""
    model = tiny_model(())
    for use in (partial(bh.fit, data=tiny_examples(8), max_steps=2), bh.Posterior.of):
        with pytest.raises(
            GuideError, match=r"Stored declares 'head\.weight\.loc', 'head\.bias\.loc'"
        ):
            use(model, Stored(model))


def test_svi_by_hand_goes_on_with_a_fitted_function() -> None:
    model = tiny_model(())

    def guide(batch: bh.data.Batch | None) -> None:
        for site in model.sites:
            loc = pyro.param(f"{site.name}.loc", site.init())
            pyro.sample(site.name, dist.Normal(loc, 0.1).to_event(site.ndim))

    fitted = bh.fit(model, guide, tiny_examples(8), max_steps=2, progress=False).guide
    before = [value.clone() for value in fitted.parameters()]
    SVI(model, fitted, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(tiny_batch(8))
    assert all(not torch.equal(*pair) for pair in zip(before, fitted.parameters(), strict=True))
    assert len(pyro.get_param_store()) == 0


def test_a_function_that_trains_nothing_is_refused() -> None:
    """It runs a module, whose parameters are its own, not those that `fit` trains."""
    model = tiny_model(())
    module = MeanFieldGuide(model)

    def registered(batch: bh.data.Batch | None) -> Any:
        pyro.module("guide", module)
        return module(batch)

    for use in (partial(bh.fit, data=tiny_examples(8), max_steps=2), bh.Posterior.of):
        with pytest.raises(GuideError, match="the function registers the module 'guide'"):
            use(model, registered)

    shift = torch.nn.Linear(1, 2)

    def called(batch: bh.data.Batch | None) -> None:
        scale = pyro.param("scale", torch.tensor(0.1), constraint=dist.constraints.positive)
        for site in model.sites:
            loc = shift(torch.ones(1)).mean().expand(site.shape)
            pyro.sample(site.name, dist.Normal(loc, scale).to_event(site.ndim))

    called(None)  # its parameter is in Pyro's store, as after SVI
    quick: dict[str, Any] = {"max_steps": 2, "progress": False}
    for use in (partial(bh.fit, data=tiny_examples(8), **quick), bh.Posterior.of):
        with pytest.raises(
            GuideError, match=r"of the shapes .*\(2, 1\).* no parameters of the guide"
        ):
            use(model, called)
    assert shift.weight.grad is None
    pyro.clear_param_store()

    def half(batch: bh.data.Batch | None) -> None:
        pyro.param("unused", torch.zeros(2))
        for site in model.sites:
            loc = pyro.param(f"{site.name}.loc", site.init())
            pyro.sample(site.name, dist.Normal(loc, 0.1).to_event(site.ndim))

    with pytest.raises(GuideError, match="does not depend on 'unused'"):
        bh.fit(model, half, tiny_examples(8), max_steps=2, progress=False)


class Dependent(nn.Module):
    """Its weights depend on its bias, by a sum over all of it and by a branch."""

    def __init__(self, model: bh.Model) -> None:
        super().__init__()
        self.loc, self.shift = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 16))

    def forward(self, batch: bh.data.Batch | None = None) -> None:
        bias = pyro.sample("head.bias", dist.Normal(self.loc, 1.0).to_event(1))
        mean = self.shift + (bias.sum() if bias.sum() > 0 else 10 * bias.sum())
        with pyro.plate("classes", 2), pyro.plate("features", 16, dim=-2):
            weight = pyro.sample("raw", dist.Normal(mean.mT, 0.1), infer={"is_auxiliary": True})
        pyro.sample("head.weight", dist.Delta(weight.mT, event_dim=2))


def dependent(batch: bh.data.Batch | None) -> None:
    loc = pyro.param("b", torch.zeros(2))
    bias = pyro.sample("head.bias", dist.Normal(loc, 1.0).to_event(1))
    mean = pyro.param("w", torch.zeros(2, 16)) + (bias.sum() if bias.sum() > 0 else 10 * bias.sum())
    pyro.sample("head.weight", dist.Normal(mean, 0.1))


@pytest.mark.parametrize("kind", [Dependent, lambda model: dependent], ids=["module", "function"])
def test_a_guide_sees_one_draw_where_many_are_made_at_once(kind: Any) -> None:
    """Sums over a whole value would otherwise run over the draws."""
    model, quick = tiny_model(()), {"max_steps": 2, "particles": 4, "progress": False}
    posterior = bh.fit(model, kind(model), tiny_examples(), **quick)
    drawn = posterior.sample(400)
    sums, means = drawn["head.bias"].sum(-1).flatten(), drawn["head.weight"].flatten(1).mean(1)
    # The weights' mean is that of the function, plus noise of sd 0.1 / sqrt(32).
    shift = means - torch.where(sums > 0, sums, 10 * sums)
    assert (shift - shift.mean()).abs().max() < 0.2  # the parameters have moved a little


def test_a_joint_latent_of_a_function_is_cut_into_sites() -> None:
    def flat(batch: bh.data.Batch | None) -> None:
        cholesky = dist.constraints.lower_cholesky
        loc = pyro.param("m", torch.zeros(34))
        scale = pyro.param("s", torch.eye(34), constraint=cholesky)
        whole = dist.MultivariateNormal(loc, scale_tril=scale)
        value = pyro.sample("whole", whole, infer={"is_auxiliary": True})
        weight = value[:32].reshape(2, 16)
        pyro.sample("head.weight", dist.Delta(weight, event_dim=2))
        pyro.sample("head.bias", dist.Delta(value[32:], event_dim=1))

    posterior = bh.fit(tiny_model(()), flat, tiny_examples(), max_steps=2, progress=False)
    assert posterior.sample(20)["head.weight"].shape == (20, 2, 16)


def test_names_that_differ_in_a_dot_or_a_slash_have_parameters_of_their_own() -> None:
    def guide(batch: bh.data.Batch | None) -> None:
        loc, scale = pyro.param("a.b", torch.zeros(2)), pyro.param("a/b", torch.ones(2))
        pyro.param("a%2Fb", torch.ones(3))
        pyro.sample("head.bias", dist.Normal(loc, scale).to_event(1))

    assert len(dict(FunctionGuide(guide).named_parameters())) == 3


def test_a_shape_that_is_not_the_sites_is_the_guides_fault() -> None:
    def guide(batch: bh.data.Batch | None) -> None:
        for name in ("head.weight", "head.bias"):
            pyro.sample(name, dist.Normal(pyro.param(f"{name}.loc", torch.tensor(0.0)), 0.1))

    with pytest.raises(GuideError, match=r"head\.weight"):
        bh.fit(tiny_model(()), guide, tiny_examples(8), max_steps=2, progress=False)


def test_what_a_function_returns_has_the_dims_of_the_draws() -> None:
    def guide(batch: bh.data.Batch | None) -> dict[str, torch.Tensor]:
        loc = pyro.param("b", torch.zeros(2))
        return {"head.bias": pyro.sample("head.bias", dist.Normal(loc, 1.0).to_event(1))}

    module = FunctionGuide(guide)
    assert module(None)["head.bias"].shape == (2,)
    with pyro.plate("many", 3, dim=-2), poutine.trace() as tracer:
        values = module(None)
    assert values["head.bias"].shape == (3, 1, 2)
    assert torch.equal(values["head.bias"], tracer.trace.nodes["head.bias"]["value"])
