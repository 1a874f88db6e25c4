"""The benchmark must time what it says it times."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import tiny
import torch
from transformers import PreTrainedModel

import bhpeft_pyro as bh
from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.peft import presets
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model
from bhpeft_pyro.training import loop
from tools.experiments.machine import in_turn, over
from tools.experiments.steps import CLASSES, hf_peft_step, svi_step


def _copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def _model() -> bh.Model:
    return tiny_model(presets.bh_peft(), outputs=CLASSES)


def _batch() -> Batch:
    return tiny_batch(8, labels=CLASSES)


@pytest.mark.parametrize(
    "kind,particles",
    [("normal", 4), ("normal", 1), ("delta", 1), ("laplace", 1)],
)
def test_the_timed_step_trains_every_parameter(kind: str, particles: int) -> None:
    model = _model()
    guide = bh.autoguide(kind, model)
    backbone, before = _copy(model.network.backbone), _copy(guide)
    step = svi_step(model, guide, _batch(), particles)
    for _ in range(3):  # a point-mass LoRA B moves only once the head is not zero any more
        step()
    after = _copy(guide)
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    for name, value in model.network.backbone.named_parameters():
        assert torch.equal(value, backbone[name])


def test_the_timed_steps_are_those_that_fit_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_rate", lambda done, steps: 1.0)  # a constant learning rate
    examples, model = tiny_examples(8), _model()
    fitted = MeanFieldGuide(model, "delta")
    timed = copy.deepcopy(fitted)
    (batch,) = examples.batches(8)
    step = svi_step(model, timed, batch, 1)
    for _ in range(3):
        step()
    options = {"batch_size": 8, "max_steps": 3, "lr": 1e-3}
    bh.fit(model, fitted, examples, progress=False, **options)
    for name, value in fitted.named_parameters():
        torch.testing.assert_close(timed.get_parameter(name), value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "llama"])  # minilm, mpnet and smollm2
def test_the_step_of_hugging_face_peft_trains_as_many_weights_as_ours(model_type: str) -> None:
    pytest.importorskip("peft")
    backbone: PreTrainedModel = tiny.build(model_type)
    frozen = _copy(backbone)
    step = hf_peft_step(backbone, _batch())
    trained = [p for p in backbone.parameters() if p.requires_grad]
    network = bh.RandomPEFT(tiny.build(model_type), presets.lora(), bh.Head(CLASSES))
    ours = [site for site in network.sites if site.name.startswith("lora")]
    assert sum(p.numel() for p in trained) == sum(site.numel for site in ours)
    start = [p.detach().clone() for p in trained]
    losses = [step() for _ in range(10)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, old) for p, old in zip(trained, start, strict=True))
    names = {name.replace(".base_layer", ""): p for name, p in backbone.named_parameters()}
    assert all(torch.equal(names[name], value) for name, value in frozen.items())


def test_variants_take_turns_and_ratios_are_those_within_a_round() -> None:
    """The machine gets slower all the time; a and b suffer alike."""
    now, calls = 0.0, []
    costs = {"a": iter([3.0, 30.0, 300.0]), "b": iter([2.0, 20.0, 200.0])}

    def variant(name: str) -> None:
        nonlocal now
        calls.append(name)
        now += next(costs[name])

    variants = {name: partial(variant, name) for name in costs}
    seconds = in_turn(variants, 3, lambda: now)
    assert over(seconds["a"], seconds["b"]) == 1.5
    assert calls == ["a", "b", "b", "a", "a", "b"]
