"""`fit`: what is trained, what is left alone, what is reported, and what happens when it fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from components import equal, state
from torch import Tensor
from torch.nn import functional
from torch.optim import SGD, Adam
from transformers import get_cosine_schedule_with_warmup

import bhpeft_pyro as bh
from bhpeft_pyro.errors import DataError, FitError
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.model.likelihoods import Categorical
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer
from bhpeft_pyro.training import loop
from bhpeft_pyro.training.initialization import own_start

PRESETS: dict[str, Callable[[], Any]] = {
    "bh_peft": bh.presets.bh_peft,
    "mam": bh.presets.mam,
    "unipelt": bh.presets.unipelt,
    "prefix": lambda: bh.presets.prefix(3),
    "head_only": bh.presets.head_only,
}


def fit(model: bh.Model | None = None, guide: Any = "normal", **options: Any) -> bh.Posterior:
    """A fit of a few steps to 16 examples."""
    options = {"data": tiny_examples(16), "max_steps": 6, "progress": False, **options}
    return bh.fit(tiny_model() if model is None else model, guide, **options)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate that neither rises nor falls."""
    monkeypatch.setattr(loop, "_rate", lambda done, steps: 1.0)


# What is trained


def test_the_start_at_a_head_leaves_peft_weights_where_they_are() -> None:
    """Features of the frozen transformer say nothing of them; the prior's mean is a saddle."""
    model = tiny_model(bh.presets.lora(), prior=dist.Normal(0.0, 0.3), aligned=False)
    guide = MeanFieldGuide(model)
    before = 0.5 * torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    guide.move({"lora.query.A": before})
    fit(model, guide, max_steps=1)
    moved = guide.means()["lora.query.A"] - before
    assert before.square().mean().sqrt() > 0.1  # a step moves it by a tenth towards the prior
    assert moved.abs().max() < 0.2 * before.abs().max()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_site_of_every_preset_is_trained(preset: str) -> None:
    model = tiny_model(PRESETS[preset]())
    guide = MeanFieldGuide(model)
    before = {name: value.clone() for name, value in guide.means().items()}
    fit(model, guide, max_steps=2)
    after = guide.means()
    assert set(after) == {site.name for site in model.sites}
    stuck = [name for name in after if (after[name] == before[name]).all()]
    assert not stuck


def test_the_backbone_is_left_alone() -> None:
    model = tiny_model(bh.presets.bh_peft())
    backbone = model.network.backbone
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    posterior = fit(model)
    assert equal(before, backbone.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert not list(pyro.get_param_store().keys())
    assert not list(model.parameters())
    names = {site.name.replace(".", "/") for site in model.sites}
    assert {name.split(".", 1)[1] for name, _ in posterior.guide.named_parameters()} == names


class ByHand(torch.nn.Module):
    """LoRA on queries and values and a linear head, with no part of this package."""

    def __init__(self, start: dict[str, Tensor], factor: float) -> None:
        super().__init__()
        self.weights = {k: v.clone().requires_grad_() for k, v in start.items()}
        self.backbone = tiny_backbone().eval().requires_grad_(False)
        for number, layer in enumerate(self.backbone.encoder.layer):
            for target in ("query", "value"):
                linear = getattr(layer.attention.self, target)
                linear.register_forward_hook(self.hook(target, number, factor))

    def hook(self, target: str, layer: int, factor: float) -> Callable[..., Tensor]:
        def add(_module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            down = self.weights[f"lora.{target}.A"][layer]
            up = self.weights[f"lora.{target}.B"][layer]
            return output + factor * inputs[0] @ down.T @ up.T

        return add

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = [h[m.bool()].mean(0) for h, m in zip(hidden, mask, strict=True)]
        features = functional.layer_norm(torch.stack(rows), (16,))
        return features @ self.weights["head.weight"].T + self.weights["head.bias"]


@pytest.mark.usefixtures("steady")
def test_a_point_at_temperature_0_is_fine_tuning_with_adam() -> None:
    head = bh.Head(2, pooling="mean", principal=False)
    kinds = bh.presets.lora(rank=2, alpha=6.0)
    network = bh.RandomPEFT(tiny_backbone(), kinds, head, tiny_tokenizer())
    model = bh.Model(network)
    guide = MeanFieldGuide(model, "delta")
    data = tiny_examples(16)
    start = guide.means() | own_start(model, seed=0)
    anchors = model.network.coordinates({name: value[None] for name, value in start.items()})
    by_hand = ByHand({name: value[0] for name, value in anchors.items()}, factor=6.0 / 2)
    options = {"batch_size": 16, "particles": 1, "temperature": 0.0, "lr": 0.01, "max_steps": 25}
    posterior = fit(model, guide, data=data, **options)

    batch = next(data.batches(16))
    optimizer = Adam(by_hand.weights.values(), lr=0.01)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        logits = by_hand(batch.inputs["input_ids"], batch.inputs["attention_mask"])
        loss = functional.cross_entropy(logits, batch.labels, reduction="sum")
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / 16)
    assert [entry["nll"] for entry in posterior.report.history] == pytest.approx(losses, rel=1e-3)
    assert losses[-1] < losses[0] - 0.1
    values = model.network.coordinates({k: v[None] for k, v in guide.means().items()})
    for name, (value,) in values.items():
        torch.testing.assert_close(value, by_hand.weights[name].detach(), atol=2e-4, rtol=1e-3)


# Repeatable, and the same in other ways of computing


def test_two_models_do_not_touch_each_other() -> None:
    alone = fit(seed=1)
    expected = alone.predict(["w5 w9", "w6 w9"], samples=4).probabilities
    other = fit(seed=2, data=tiny_examples(20, seed=7))  # parameters of the same names
    assert torch.equal(alone.predict(["w5 w9", "w6 w9"], samples=4).probabilities, expected)
    # Called outside of this package's own functions, too.
    for posterior in (alone, other):
        weights = posterior.guide()
        loc = posterior.guide.means()["head.weight"]
        scale = posterior.guide.scales()["head.weight"]
        assert ((weights["head.weight"] - loc).abs() < 8 * scale).all()
    trace = pyro.poutine.trace(other.guide).get_trace()
    loc = trace.nodes["head.weight"]["fn"].base_dist.loc
    assert torch.equal(loc, other.guide.means()["head.weight"])
    assert not torch.equal(loc, alone.guide.means()["head.weight"])


def test_bf16_runs_in_bf16_and_is_near() -> None:
    full, half = fit().report, fit(bf16=True).report
    exact = [entry["nll"] for entry in full.history]
    rounded = [entry["nll"] for entry in half.history]
    assert rounded == pytest.approx(exact, rel=0.05)
    assert rounded != pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("guide", "kinds"), [("laplace", bh.presets.bh_peft()), ("mvn", bh.presets.head_only())]
)
def test_the_callers_autocast_changes_nothing(guide: str, kinds: Any) -> None:
    """`bf16` alone decides; a fit of "laplace" ended in "expected m1 and m2 to have the same"."""

    def predicted() -> list[Tensor]:
        network = bh.RandomPEFT(tiny_backbone(), kinds, bh.Head(2), tiny_tokenizer())
        posterior = fit(bh.Model(network), guide, components=1, max_steps=2)
        later = posterior.update(tiny_examples(8, seed=1), max_steps=2, progress=False)
        return [each.predict(["w5 w9"]).probabilities for each in (posterior, later)]

    expected = predicted()
    with torch.autocast("cpu", torch.bfloat16):
        found = predicted()
    assert all(map(torch.equal, found, expected))


# The options do what they say


@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_the_loss_is_nll_plus_temperature_times_kl(temperature: float) -> None:
    """In every step, and in the words of the report."""
    posterior = fit(temperature=temperature, max_steps=8)
    report = posterior.report
    assert [entry["temperature"] for entry in report.history] == [temperature] * 8
    for entry in report.history:
        expected = entry["nll"] + entry["temperature"] * entry["kl"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
        assert entry["kl"] > 0
    assert report.temperature == temperature
    assert f"at temperature {temperature:g}" in repr(posterior)
    words = r"(negative ELBO|loss) (\S+) = NLL (\S+) \+ (?:(\S+) x )?KL (\S+) nats"
    found = re.search(words, str(report))
    assert found is not None
    name, loss, nll, times, kl = found.groups()
    assert name == ("negative ELBO" if temperature == 1 else "loss")
    assert float(loss) == pytest.approx(float(nll) + float(times or 1) * float(kl), abs=2e-3)


@pytest.mark.parametrize("guide", ["normal", "delta"])
def test_the_learning_rate_rises_and_falls_as_in_transformers(guide: str) -> None:
    """That of the weights: a point's noise scale has ten times as much. The step with a rate of 0,
    with which theirs begins, is left out."""
    model = tiny_model((), 1, likelihood=bh.likelihoods.Normal(0.0, 1.0))
    data = {"text": tiny_examples(16).texts, "label": [float(i % 3) for i in range(16)]}
    history = fit(model, guide, data=data, max_steps=45, lr=0.3).report.history
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    expected = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=46)
    for entry in history:
        optimizer.step()
        expected.step()
        assert entry["lr"] == expected.get_last_lr()[0]  # to the last bit


def test_the_history_has_the_norm_of_the_gradient_per_example() -> None:
    model = tiny_model()
    guide = MeanFieldGuide(model, "delta")
    before = torch.cat([p.detach().clone().flatten() for p in guide.parameters()])
    options = {"max_steps": 1, "optimizer": lambda found: SGD(found, lr=1e-5)}
    gradient = fit(model, guide, **options).report.history[0]["gradient"]
    after = torch.cat([p.detach().flatten() for p in guide.parameters()])
    assert (after - before).norm().item() / (1e-5 * 16) == pytest.approx(gradient, rel=1e-2)


def test_validation_is_the_nll_of_the_forecast() -> None:
    held_out = tiny_examples(10, seed=4)
    data = tiny_examples(48)  # three steps an epoch
    posterior = fit(data=data, validation=held_out, max_steps=6)
    history = posterior.report.history
    assert ["validation_nll" in entry for entry in history] == [False, False, True] * 2
    expected = metrics.evaluate(posterior.predict(held_out, samples=8))["nll"]
    assert history[-1]["validation_nll"] == pytest.approx(expected, rel=1e-6)
    assert posterior.report.best_step is None  # without patience the last state is kept


# What the report says about convergence


def test_kl_and_scales_are_those_of_the_state_that_is_kept() -> None:
    model = tiny_model()
    posterior = fit(model, max_steps=5, lr=0.3)
    prior = pyro.poutine.trace(posterior.model.prior).get_trace(model.sites)
    for name, q in posterior.guide.distributions().items():
        p = prior.nodes[name]["fn"]
        exact = torch.distributions.kl_divergence(q, p).item()
        assert posterior.report.kl[name] == pytest.approx(exact, rel=1e-3, abs=1e-3)
        ratio = (q.base_dist.scale / p.base_dist.scale).log().mean().exp().item()
        assert posterior.report.scales[name] == pytest.approx(ratio, rel=1e-4)


# When it fails


def test_features_that_are_no_numbers_are_said_to_be_so() -> None:
    for aligned in (True, False):
        model = tiny_model((), aligned=aligned)
        with torch.no_grad():
            model.network.backbone.get_input_embeddings().weight[5] = float("nan")
        with pytest.raises(DataError, match="numbers that are not finite"):
            bh.fit(model, "normal", tiny_examples(), progress=False)


class Sick(Categorical):
    """A likelihood that is ill from one call to another (the first call is the trial run)."""

    def __init__(self, first: int, last: int = 10**9, gradient: bool = False) -> None:
        self.__dict__.update(calls=0, first=first, last=last, gradient=gradient)

    def distribution(self, outputs: Any) -> Any:
        self.__dict__["calls"] += 1
        if self.first <= self.calls <= self.last:
            # sqrt has an infinite slope at 0: a finite loss whose gradient is NaN
            values = outputs.values
            values = values + ((values * 0).sqrt() if self.gradient else torch.nan)
            outputs = replace(outputs, values=values)
        return super().distribution(outputs)


def fit_sick(likelihood: Sick, **options: Any) -> bh.Posterior:
    """A given width, so that the likelihood is called by the loop only, not to find a start."""
    model = tiny_model(likelihood=likelihood)
    return fit(model, MeanFieldGuide(model, ("normal", {"init_scale": 0.1})), **options)


def test_a_fit_without_a_single_good_step_is_none() -> None:
    with pytest.raises(FitError, match="not finite at any of 3 steps, first at the likelihood"):
        fit_sick(Sick(2), max_steps=3)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_counted(gradient: bool) -> None:
    posterior = fit_sick(Sick(3, 4, gradient), max_steps=6)
    report = posterior.report
    assert (report.skipped, report.steps) == (2, 6)
    assert [entry["step"] for entry in report.history] == [1, 4, 5, 6]
    assert all(value.isfinite().all() for value in state(posterior).values())
    assert "2 skipped" in str(report) and "unstable: 2 of 6 steps" in str(report)


def test_a_skipped_step_is_not_validated() -> None:
    posterior = fit_sick(Sick(2, 2), max_steps=3, validation=tiny_examples(8))
    assert [("validation_nll" in entry, entry["step"]) for entry in posterior.report.history] == [
        (True, 2),
        (True, 3),
    ]


@pytest.mark.usefixtures("steady")
def test_giving_up_names_the_site_and_keeps_the_last_good_state() -> None:
    likelihood = Sick(14)
    with pytest.raises(FitError, match=r"for 5 steps in a row .*17 of 40.*site 'label'") as error:
        fit_sick(likelihood, max_steps=40)
    posterior = error.value.posterior
    assert isinstance(posterior, bh.Posterior)
    # The state is copied every ten steps.
    expected = state(fit_sick(Sick(10**9), max_steps=10))
    assert equal(state(posterior), expected)
    assert (posterior.report.steps, posterior.report.skipped) == (17, 5)
    assert len(posterior.report.history) == 12
    likelihood.__dict__["last"] = 0
    assert posterior.predict(["w5 w7"], samples=3).probabilities.isfinite().all()


class Bomb(SGD):
    """An optimiser that makes one weight infinite at its n-th step."""

    at = 10

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.at -= 1
        if self.at == 0:
            self.param_groups[0]["params"][3].data.view(-1)[2] = torch.inf


@pytest.mark.parametrize("steps", [10, 30])
def test_weights_that_are_not_finite_are_never_the_last_good_state(steps: int) -> None:
    model = tiny_model()
    guide = MeanFieldGuide(model, "delta")
    names = [name for name, _ in guide.named_parameters()]
    with pytest.raises(FitError) as error:
        fit(model, guide, max_steps=steps, optimizer=lambda params: Bomb(params, lr=1e-5))
    assert f"the guide's {names[3].replace('/', '.')}" in str(error.value)
    assert names[3].replace("/", ".").removeprefix("loc.") in [site.name for site in model.sites]
    assert all(value.isfinite().all() for value in error.value.posterior.guide.parameters())


@pytest.mark.parametrize("steps", [10, 30])
def test_a_look_at_weights_that_are_not_finite_loses_nothing(steps: int) -> None:
    model = tiny_model()
    options: dict[str, Any] = {"validation": tiny_examples(8, seed=1)}
    options |= {"max_steps": steps, "optimizer": lambda params: Bomb(params, lr=1e-5)}
    with pytest.raises(FitError) as error:
        fit(model, MeanFieldGuide(model, ("normal", {"init_scale": 0.1})), **options)
    posterior = error.value.posterior
    assert all(value.isfinite().all() for value in posterior.guide.parameters())
    assert ["validation_nll" in entry for entry in posterior.report.history] == [True] * 9 + [False]


def test_the_site_with_a_bad_gradient_is_named() -> None:
    model = tiny_model(())
    guide = MeanFieldGuide(model, "delta")

    def poison(gradient: Tensor) -> Tensor:
        return gradient * torch.nan

    guide.loc["head/weight"].register_hook(poison)
    with pytest.raises(FitError, match=r"gradient of the guide's loc\.head\.weight"):
        fit(model, guide)


def test_what_is_refused_leaves_the_network_as_it_was() -> None:
    model = tiny_model(aligned=True)
    with pytest.raises(DataError, match="row 0"):
        bh.fit(model, "normal", {"text": [" ", "w5"], "label": [0, 1]}, progress=False)
    assert not model.network.aligned()
    bh.fit(model, "normal", tiny_examples(4), max_steps=1, progress=False)
    assert model.network.aligned()


def test_ratings_of_another_scale_are_noted() -> None:
    model = tiny_model((), 1, likelihood=bh.likelihoods.Normal(3.0, 1.0))
    texts = {"text": ["w5 w9", "w6", "w7 w8"]}
    first = bh.fit(
        model, "normal", {**texts, "label": [1.0, 5.0, 3.0]}, max_steps=1, progress=False
    )
    with pytest.warns(UserWarning, match=r"a rating of 90 is 87 spreads from .*Normal\(center=3"):
        first.update({**texts, "label": [60.0, 90.0, 70.0]}, max_steps=1, again=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_that_a_caller_has_turned_off_are_there(context, tmp_path) -> None:
    """Serving code often runs under one of these."""
    options = {"components": 1, "max_steps": 2, "progress": False}
    outside = bh.fit(tiny_model(), "laplace", tiny_examples(), **options)
    backbone, model, data = tiny_backbone(), tiny_model(), tiny_examples(12, seed=3)
    with context():
        inside = bh.fit(model, "laplace", tiny_examples(), **options)
        inside.save(tmp_path)
        loaded = bh.Posterior.load(tmp_path, backbone, tokenizer=tiny_tokenizer())
        later = loaded.update(data, max_steps=2, progress=False)
    again = outside.update(data, max_steps=2, progress=False)
    for one, other in ((inside, outside), (later, again)):
        torch.testing.assert_close(one.guide.loc, other.guide.loc)


def test_a_backbone_of_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        backbone = tiny_backbone()
    with pytest.raises(bh.errors.ConfigError, match=r"made under torch\.inference_mode"):
        bh.RandomPEFT(backbone)


def test_a_later_round_of_a_point_estimate_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 20 steps, and five epochs of many rows; a distribution takes as many as before."""
    quick: Any = {"progress": False, "batch_size": 4}
    first = bh.fit(tiny_model(()), "laplace", tiny_examples(40), components=1, **quick)
    assert first.report.steps == 150  # 15 epochs of 10 steps
    short, longer = first.update(tiny_examples(8, seed=1)), first.update(tiny_examples(100, seed=1))
    assert (short.report.steps, longer.report.steps) == (20, 125)
    monkeypatch.setattr(loop.Descent, "goes_on", lambda descent: True)
    given = first.update(tiny_examples(8, seed=1), epochs=1).report
    assert given.steps == 2 and given.falling
    assert not first.update(tiny_examples(8, seed=1)).report.falling  # which is meant
    drawn = bh.fit(tiny_model(()), "normal", tiny_examples(40), **quick)
    assert drawn.update(tiny_examples(8, seed=1)).report.steps == 30
