"""Priors: the forms they come in, their errors, and what the default one means."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import independent
from pyro import poutine
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import PriorError
from bhpeft_pyro.guides import latents
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.priors import (
    FunctionSpaceNormal,
    Hierarchical,
    PosteriorPrior,
    as_prior,
)
from bhpeft_pyro.priors.prior import PatternPrior
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model

MODEL = tiny_model()
SITES = MODEL.sites


def log_prob(prior: Any, values: dict[str, Tensor]) -> Tensor:
    model = poutine.condition(as_prior(prior), values)
    trace = poutine.trace(model).get_trace(SITES)
    assert {name for name in trace.nodes if name[0] != "_"} == set(values)
    return trace.log_prob_sum()


FORMS = {
    "function": independent,
    "distribution": dist.Normal(0.0, 0.1),
    "mapping": {"lora.*": dist.Normal(0.0, 0.1), "head.*": dist.Normal(0.0, 0.1)},
    "of a site": {"*": lambda site: dist.Normal(0.0, 0.1 * torch.ones(site.shape[-1:]))},
    "joint over the last dim": {
        "*": lambda site: dist.Normal(0.0, 0.1).expand(site.shape[-1:]).to_event(1)
    },
    "earlier posterior": PosteriorPrior(
        {s.name: dist.Normal(0.0, 0.1).expand(s.shape).to_event(s.ndim) for s in SITES}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_has_the_same_density(form: str) -> None:
    values = {site.name: 0.1 * torch.randn(site.shape) for site in SITES}
    flat = torch.cat([value.flatten() for value in values.values()])
    expected = torch.distributions.Normal(0.0, 0.1).log_prob(flat).sum()
    torch.testing.assert_close(log_prob(FORMS[form], values), expected, rtol=1e-5, atol=1e-2)


def test_the_first_pattern_that_matches_holds() -> None:
    narrow, wide = dist.Normal(0.0, 1e-6), dist.Normal(0.0, 1e3)
    values = as_prior({"lora.query.*": narrow, "*.A": wide, "*": narrow})(SITES)
    large = {name for name, value in values.items() if value.abs().max() > 1}
    assert large == {"lora.value.A"}


def test_a_mapping_takes_ready_priors_for_their_sites_together() -> None:
    scaled = bh.priors.Hierarchical()
    wide = FunctionSpaceNormal(change=0.3)
    mixed = {"lora.*": scaled, "adapter.*": wide, "*": dist.Normal(0.0, 2.0)}
    sites = tiny_model(bh.presets.bh_peft()).sites
    rest = dist.Normal(0.0, 2.0)
    parts = {"lora": scaled, "adapter": wide, "prefix": rest, "head": rest}
    torch.manual_seed(3)
    whole = poutine.trace(as_prior(mixed)).get_trace(sites)
    data = {name: whole.nodes[name]["value"] for name in whole.stochastic_nodes}
    alone = torch.zeros(())
    for start, prior in parts.items():
        own = [site for site in sites if site.name.startswith(start)]
        trace = poutine.trace(poutine.condition(as_prior(prior), data)).get_trace(own)
        alone = alone + trace.log_prob_sum()
    torch.testing.assert_close(whole.log_prob_sum(), alone)


def drop(name: str) -> Callable[[Sequence[Site]], dict[str, Tensor]]:
    def prior(sites: Sequence[Site]) -> dict[str, Tensor]:
        return independent([site for site in sites if site.name != name])

    return prior


def transposed(sites: Sequence[Site]) -> dict[str, Tensor]:
    return {
        name: value.mT if value.dim() > 1 else value for name, value in independent(sites).items()
    }


def not_sampled(sites: Sequence[Site]) -> dict[str, Tensor]:
    return {**independent(sites[1:]), sites[0].name: torch.zeros(sites[0].shape)}


def discrete(sites: Sequence[Site]) -> dict[str, Tensor]:
    pyro.sample("gate", dist.Bernoulli(0.5))
    return independent(sites)


def masked(sites: Sequence[Site]) -> dict[str, Tensor]:
    with poutine.mask(mask=torch.tensor([True, False])):
        return independent(sites)


UNIT = dist.Normal(0.0, 1.0)


@pytest.mark.parametrize(
    ("prior", "name"),
    [
        ({}, "'lora.query.A'"),
        (Hierarchical, "Hierarchical"),
        ({"lora.*": UNIT}, "'head.weight'"),
        ({"*": UNIT, "lora.*": UNIT}, "'lora.*'"),
        ({"*": dist.Normal(torch.zeros(9), 1.0).to_event(1)}, "'lora.query.A'"),
        ({"head.bias": UNIT.expand([3, 2]).to_event(), "*": UNIT}, "'head.bias'"),
        (drop("head.bias"), "'head.bias'"),
        (transposed, "'lora.query.A'"),
        (not_sampled, "lora.query.A"),
        (discrete, "'gate'"),
        (PosteriorPrior({s.name: dist.Normal(torch.zeros(3), 1.0) for s in SITES}), "lora.query.A"),
    ],
)
def test_refusals(prior: Any, name: str) -> None:
    with pytest.raises(PriorError, match=re.escape(name)):
        latents(bh.Model(MODEL.network, prior))


def test_a_mask_for_each_weight_is_refused() -> None:
    """Pyro would count the density of the whole site once for each."""
    with pytest.raises(ValueError, match="without dims"):
        latents(bh.Model(MODEL.network, masked))


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_a_prior_that_returns_another_value_than_it_samples_is_refused(guide: str) -> None:
    """Fits would use the one and predictions the other."""

    def scaled(sites: Sequence[Site]) -> dict[str, Tensor]:
        return {name: 0.1 * value for name, value in independent(sites).items()}

    def pruned(sites: Sequence[Site]) -> dict[str, Tensor]:
        values = independent(sites)
        return values | {"head.weight": values["head.weight"] * torch.eye(2, 16)}

    for prior, site in ((scaled, "lora.query.A"), (pruned, "head.weight")):
        with pytest.raises(PriorError, match=f"samples '{site}' and returns another value"):
            bh.fit(MODEL.with_prior(prior), guide, tiny_examples(), max_steps=1, progress=False)


def test_keys_are_an_input_side_of_a_prefix_but_not_of_lora() -> None:
    kinds = (bh.peft.LoRA(("key",), rank=2), bh.peft.Prefix(3))
    sites = tiny_model(kinds).network.attachment.sites
    prior = FunctionSpaceNormal(change=0.3, spread=0.7)
    assert {site.name: prior.scale(site) for site in sites} == {
        "lora.key.A": 0.7,
        "lora.key.B": 0.3,
        "prefix.key": 0.7,
        "prefix.value": 0.3,
    }


def test_each_logit_has_the_sd_it_is_said_to_have() -> None:
    model = tiny_model((), outputs=3, prior=FunctionSpaceNormal(head=2.0))
    features = torch.nn.functional.layer_norm(torch.randn(1, 16), (16,))
    with pyro.plate("draws", 4000, dim=-2):
        weights = model.prior(model.sites)
    logits = model.network(weights, bh.data.Batch({}, features=features))
    weight_part = logits - weights["head.bias"]
    assert weight_part.std().item() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("change", [0.02, 0.2])
@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_a_block_changes_by_the_fraction_that_the_prior_names(kind: str, change: float) -> None:
    """Relative RMS of what the branch adds in the first layer, where the inputs are the same."""
    backbone = tiny_backbone()
    kinds = (bh.peft.LoRA(("query",), rank=4),) if kind == "lora" else (bh.peft.Adapter(size=8),)
    network = bh.RandomPEFT(backbone, kinds, bh.Head(2, principal=False))
    layer = backbone.encoder.layer[0]
    module: Any = layer.attention.self.query if kind == "lora" else layer.output
    seen: list[Tensor] = []
    # The adapter is added to the feed-forward output ahead of the norm; measure before it.
    target = module if kind == "lora" else module.dense
    prior = FunctionSpaceNormal(change=change)
    ids = torch.randint(5, 50, (8, 32))
    batch = bh.data.Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    off = {site.name: torch.zeros(1, 1, *site.shape) for site in network.sites}
    with pyro.plate("draws", 40, dim=-2), torch.no_grad():
        weights = prior(network.sites)
    handle = target.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    try:
        with torch.no_grad():
            network(off, batch)
            network(weights, batch)
    finally:
        handle.remove()
    frozen, changed = seen
    difference = changed.unflatten(0, (40, -1)) - frozen
    relative = (difference.square().mean() / frozen.square().mean()).sqrt().item()
    assert relative == pytest.approx(change, rel=0.3)


def test_the_default_prior_on_b_is_matrix_normal() -> None:
    """The covariance of vec B in fitted coordinates is a Kronecker product."""
    model = tiny_model(aligned=True)
    coordinates = model.network.coordinates
    s = next(s for s in model.sites if s.name == "lora.query.B")
    layers, out, rank = s.shape
    moments = [
        {n: (m := torch.randn(layers, size, size)) @ m.mT for n in coordinates.outer}
        for size in (out, rank)
    ]
    coordinates.fit_axes(*moments)
    basis = torch.eye(out * rank).reshape(-1, 1, out, rank).expand(-1, layers, -1, -1)
    values = {t.name: torch.zeros(out * rank, *t.shape) for t in model.sites} | {s.name: basis}
    images = coordinates(values)[s.name].flatten(2)  # (entry of Z, layer, entry of B)
    left, right = (
        coordinates.get_buffer(f"{s.name}.{side}".replace(".", "/")) for side in ("left", "right")
    )
    for layer in range(layers):
        covariance = images[:, layer].mT @ images[:, layer]
        u, v = left[layer] @ left[layer].mT, right[layer] @ right[layer].mT
        torch.testing.assert_close(covariance, torch.kron(u, v), rtol=1e-3, atol=1e-5)


def test_a_mapping_of_default_priors_is_the_default_prior() -> None:
    """Also under 'laplace', which sets its scales."""
    fits = [
        bh.fit(
            tiny_model(prior=prior),
            "laplace",
            tiny_examples(16),
            components=1,
            max_steps=3,
            progress=False,
        )
        for prior in (
            None,
            {"*": bh.priors.default()},
            {"head.*": bh.priors.default(), "*": bh.priors.default()},
        )
    ]
    states = [fitted.guide.state_dict() for fitted in fits]
    for state in states[1:]:
        torch.testing.assert_close(state["first_scale"], states[0]["first_scale"])
    assert not PatternPrior(
        {"head.*": FunctionSpaceNormal(head=1.0), "*": bh.priors.default()}
    ).open
