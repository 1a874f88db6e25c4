"""The linearised network against reverse-mode derivatives and the Gauss-Newton posterior."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import KnownNoise, random_texts
from tiny import MODEL_TYPES, build
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import bhpeft_pyro as bh
from bhpeft_pyro.batch import Batch
from bhpeft_pyro.errors import ConfigError, GuideError
from bhpeft_pyro.guides import LinearGuide
from bhpeft_pyro.inference.draws import draw
from bhpeft_pyro.likelihoods import Categorical, Likelihood, MultipleChoice, Normal
from bhpeft_pyro.linear import LinearModel
from bhpeft_pyro.testing import tiny_backbone, tiny_batch, tiny_examples, tiny_model, tiny_tokenizer

Weights = dict[str, Tensor]


def random_weights(model: bh.Model, seed: int, *lead: int, size: float = 0.2) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: size * torch.randn(*lead, *site.shape, generator=generator)
        for site in model.sites
    }


def moved(at: Weights, towards: Weights, step: float) -> Weights:
    return {name: at[name] + step * towards[name] for name in at}


def model_of(backbone: Any, kinds: Any) -> bh.Model:
    return bh.Model(bh.RandomPEFT(backbone, kinds, bh.Head(3), tiny_tokenizer()))


KINDS = [bh.presets.bh_peft(), bh.presets.mam(), bh.presets.unipelt()]


@pytest.mark.parametrize("kinds", KINDS)
def test_the_change_is_the_directional_derivative(kinds: Any) -> None:
    check_derivative(tiny_model(kinds, 3))


@pytest.mark.parametrize("name", [name for name in MODEL_TYPES if name != "deberta-v2"])
def test_on_every_architecture(name: str) -> None:
    check_derivative(model_of(build(name), bh.presets.bh_peft()))


def check_derivative(model: bh.Model) -> None:
    """Forward-mode derivatives against reverse-mode ones, output by output."""
    at, towards = random_weights(model, 1), random_weights(model, 2)
    batch = tiny_batch(5)
    leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
    outputs = model.outputs(leaves, batch)
    slopes = [
        torch.autograd.grad(output, list(leaves.values()), retain_graph=True)
        for output in outputs.flatten()
    ]
    pairs = [zip(slope, towards.values(), strict=True) for slope in slopes]
    expected = torch.stack([torch.stack([(g * v).sum() for g, v in pair]).sum() for pair in pairs])
    linear = LinearModel(model, lambda: at).outputs(moved(at, towards, 1.0), batch).detach()
    change = linear - outputs.detach()
    torch.testing.assert_close(change.flatten(), expected, atol=1e-4, rtol=1e-3)
    whole = model.outputs(moved(at, towards, 1.0), batch) - outputs
    assert (whole - change).abs().max() > 0.01  # the network itself is not linear


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_frozen_layers_are_multiplied_by_once_for_the_value_and_once_for_the_change(
    name: str,
) -> None:
    """torch's own forward derivatives take a third product, with zeros."""
    model, batch = model_of(build(name), bh.presets.bh_peft()), tiny_batch(5)
    at = random_weights(model, 1)
    linear = LinearModel(model, lambda: at)
    flops = []
    for call in (
        lambda: model.outputs(at, batch),
        lambda: linear._change(at, random_weights(model, 2), batch),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        counts = counter.get_flop_counts()["Global"]
        flops.append(sum(counts.get(of, 0) for of in (torch.ops.aten.addmm, torch.ops.aten.mm)))
    assert flops[0] < flops[1] < 2 * flops[0]  # in the first layer little moves yet


def test_the_gradient_is_that_at_the_point() -> None:
    model, batch = tiny_model(bh.presets.bh_peft(), 3), tiny_batch(6).split(2)
    at = random_weights(model, 1)
    weights = {k: v.requires_grad_() for k, v in random_weights(model, 2, 2, 1).items()}
    outputs = LinearModel(model, lambda: at).outputs(weights, batch)
    slope = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((outputs * slope).sum(), list(weights.values()))
    copies = {k: v.expand(2, 1, *v.shape).clone().requires_grad_() for k, v in at.items()}
    expected = torch.autograd.grad((model.outputs(copies, batch) * slope).sum(), copies.values())  # type: ignore[arg-type]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def linear_posterior(likelihood: Likelihood) -> bh.Posterior:
    model = tiny_model(bh.presets.bh_peft(), likelihood.outputs or 3, likelihood=likelihood)
    guide = LinearGuide(model, rank=4)
    with torch.no_grad():
        guide.loc.add_(
            0.2 * torch.randn(len(guide.loc), generator=torch.Generator().manual_seed(1))
        )
    return bh.Posterior(model, guide, ())


TEXTS = ["w9", "w5 w30 w12 w44 w17", "w6 w7", "w8 w40 w41 w42", "w21 w22 w23"]
QUESTIONS = [("w9 w10", ["w5", "w6 w7", "w8 w9 w11"]), ("w12", ["w5 w6", "w30"])]


@pytest.mark.parametrize(
    ("likelihood", "data"),
    [(Categorical(), TEXTS), (Normal(3.0, 2.0), TEXTS), (MultipleChoice(), QUESTIONS)],
)
def test_all_draws_at_once_are_the_draws_one_by_one(likelihood: Likelihood, data: Any) -> None:
    """Reverse-mode gradients, all draws at once, against forward-mode ones, draw by draw."""
    posterior = linear_posterior(likelihood)
    model, guide = posterior.model, posterior.guide
    assert isinstance(guide, LinearGuide)
    forecast = posterior.predict(data, 5, seed=7, keep_samples=True)
    examples = posterior.text.encode(model, data, labelled=False)
    (batch,) = examples.batches(len(examples))
    weights = draw(model, guide, 5, seed=7)
    distribution = LinearModel(model, guide.means).predictive(weights, batch)
    rating = likelihood.kind == "rating"
    expected = (distribution.mean if rating else distribution.probs).detach()
    found = forecast.means if rating else forecast.samples  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.std(0).max() > 0.01
    sampled = posterior.predict(data, 5, seed=7, keep_samples=True, linear=False)
    theirs = sampled.means if rating else sampled.samples  # type: ignore[union-attr]
    assert (theirs - found).abs().max() > 1e-3


def test_its_cost_does_not_depend_on_the_number_of_draws() -> None:
    posterior = linear_posterior(Categorical())
    passes: list[int] = []
    posterior.model.network.backbone.register_forward_hook(lambda *_: passes.append(1))
    for samples in (1, 200):
        posterior.predict(TEXTS, samples)
    assert len(passes) == 2


def jacobian(model: bh.Model, at: Weights, batch: Batch) -> Tensor:
    """(B, D) gradients of a single output, example by example."""
    leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
    outputs = model.outputs(leaves, batch)[:, 0]
    rows = [torch.autograd.grad(o, list(leaves.values()), retain_graph=True) for o in outputs]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_it_is_the_gauss_newton_posterior_at_its_own_mean() -> None:
    """Mean and predictive variance in closed form, with LoRA weights under a wide prior."""
    noise = 0.3
    prior = bh.priors.FunctionSpaceNormal(change=0.5, spread=0.5, head=1.0)
    model = tiny_model(bh.presets.lora(rank=2), 1, prior, KnownNoise(noise), aligned=True)
    texts = random_texts(48)
    generator = torch.Generator().manual_seed(2)
    labels = [
        0.4 * len(t.split()) - 1.5 + noise * float(torch.randn((), generator=generator))
        for t in texts
    ]
    data = {"text": texts, "label": labels}
    posterior = bh.fit(
        model,
        bh.autoguide("linear", model, rank=64),
        data,
        max_steps=800,
        batch_size=48,
        natural_lr=0.1,
        warmup=0.0,
        progress=False,
    )
    guide = posterior.guide
    assert isinstance(guide, LinearGuide)
    unseen = random_texts(40, seed=9)
    parts = [posterior.text.encode(model, d, labelled=False) for d in (texts, unseen)]
    batches = [next(part.batches(len(part))) for part in parts]
    at = guide.means()
    seen, new = (jacobian(model, at, batch).double() for batch in batches)
    residual = torch.tensor(labels).double() - model.outputs(at, batches[0])[:, 0].detach()
    scale = guide.prior.covariance.scale.double()
    # At the optimum the prior's pull is the data's. What is left is Newton's step to the mode; its
    # length is measured in posterior sds.
    pull = (guide.loc.detach() - guide.prior.loc).double() / scale.square()
    push = seen.T @ residual / noise**2
    rest = scale * (push - pull)
    root = seen * scale / noise
    told = root @ rest
    step = rest.square().sum() - told @ torch.linalg.solve(
        torch.eye(48).double() + root @ root.T, told
    )
    assert step.sqrt() < 0.5  # over all weights together
    assert (scale * pull).norm() > 2.0  # the prior's mean is far off
    # Prior covariance less what N outputs tell: the sds of functions, by Woodbury's identity.
    kernel = [scale * rows for rows in (seen, new)]
    gram = kernel[0] @ kernel[0].T + noise**2 * torch.eye(48).double()
    cross = kernel[1] @ kernel[0].T
    variance = (kernel[1].square().sum(1) - (cross @ torch.linalg.inv(gram) * cross).sum(1)).sqrt()
    found = posterior.predict(unseen, 4000).epistemic.sqrt().double()
    assert (found / variance).log().mean().abs() < 0.05
    assert (found / variance).log().abs().max() < 0.25
    assert (kernel[1].norm(dim=1) / variance).median() > 1.5  # data did tell


def test_it_is_updated_and_saved_from_round_to_round(tmp_path: Path) -> None:
    posterior = bh.fit(
        tiny_model(bh.presets.bh_peft()),
        "linear",
        tiny_examples(64),
        max_steps=60,
        natural_lr=0.1,
        progress=False,
    )
    updated = posterior.update(tiny_examples(64, seed=4), max_steps=40)
    unseen = tiny_examples(100, seed=5)
    assert updated.evaluate(unseen)["nll"] < posterior.evaluate(unseen)["nll"]
    assert isinstance(updated.guide, LinearGuide)
    folder = updated.save(tmp_path / "round")
    again = bh.Posterior.load(folder, tiny_backbone(), tokenizer=tiny_tokenizer())
    assert torch.equal(*(p.predict(unseen, 20).probabilities for p in (again, updated)))


def test_second_derivatives_are_refused() -> None:
    """They would be the network's own, of which the linearised one has none."""
    model, batch = tiny_model(), tiny_batch(4)
    weights = {k: v.requires_grad_() for k, v in random_weights(model, 2).items()}
    zeros = {site.name: torch.zeros(site.shape) for site in model.sites}
    outputs = LinearModel(model, lambda: zeros).outputs(weights, batch)
    with pytest.raises(ConfigError, match="create_graph=True"):
        torch.autograd.grad(outputs.square().sum(), list(weights.values()), create_graph=True)


class Rounded(torch.autograd.Function):
    """As layers of quantised libraries are: a gradient, and no forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope @ ctx.saved_tensors[0], None


def test_a_layer_without_forward_derivatives_is_named_with_a_way_out() -> None:
    model = tiny_model(bh.presets.lora(rank=2))
    dense = model.network.backbone.encoder.layer[1].output.dense
    dense.forward = lambda x: Rounded.apply(x, dense.weight)
    quick: dict[str, Any] = {"max_steps": 4, "progress": False}
    with pytest.raises(GuideError, match=r"forward derivatives, .*jvp.*'lowrank' or 'normal'"):
        bh.fit(model, "linear", tiny_examples(8), **quick)
    bh.fit(model, "lowrank", tiny_examples(8), **quick)


def test_a_first_fit_shows_no_warning_of_torchs_own_doings() -> None:
    """In a process of its own: torch warns once."""
    code = """
import warnings
import bhpeft_pyro as bh
from bhpeft_pyro.testing import tiny_examples, tiny_model
warnings.simplefilter("error")
warnings.filterwarnings("default", category=UserWarning)
bh.fit(tiny_model(), "linear", tiny_examples(8), max_steps=2, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "jit" not in done.stderr, done.stderr
