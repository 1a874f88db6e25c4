"""The benchmark must time what it says it times."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from transformers import PreTrainedModel
from typer.testing import CliRunner

import bhpeft_pyro as bh
from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.guides import DeltaGuide, Guide, LaplaceGuide, LowRankGuide, NormalGuide
from bhpeft_pyro.inference.draws import draw
from bhpeft_pyro.peft import presets
from bhpeft_pyro.testing import tiny_backbone, tiny_batch, tiny_examples, tiny_model
from tools.experiments import step_cost, timing
from tools.experiments.step_cost import (
    CLASSES,
    folded,
    hf_peft_step,
    looped,
    svi_step,
)
from tools.experiments.timing import compare, peak_bytes

TINY = ["--tiny", "--rounds", "2", "--batch-size", "8", "--length", "6"]

app = typer.Typer()
app.command()(step_cost.main)


def _ratios(tree: object) -> Iterator[float]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _ratios(value)
    elif isinstance(tree, float):
        yield tree


def _copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def _model(kinds: object = None) -> bh.Model:
    return tiny_model(presets.bh_peft() if kinds is None else kinds, outputs=CLASSES)


def _batch() -> Batch:
    return tiny_batch(8, labels=CLASSES)


def test_command_prints_one_json_object_and_writes_it(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = tmp_path / "cost.json"
    outcome = CliRunner().invoke(app, [*TINY, "--json", str(file)])
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    assert json.loads(file.read_text()) == result
    assert set(result["training_step"]) == {
        "bayesian_4 / deterministic",
        "bayesian_1 / deterministic",
        "bayesian_4 / hf_peft_lora",
        "deterministic / hf_peft_lora",
        "lora_deterministic / hf_peft_lora",
    }
    ways = ("folded", "looped")
    assert set(result["prediction"]) == {f"{w}_{s} / plain" for w in ways for s in (1, 4, 16)}
    assert result["sizes"]["latents"] == sum(site.numel for site in _model().sites)
    groups = [result[name] for name in ("training_step", "prediction", "memory")]
    assert all(ratio > 0 for group in groups for ratio in _ratios(group))
    assert all(
        ratio["q25"] <= ratio["median"] <= ratio["q75"]
        for group in groups[:2]
        for ratio in group.values()
    )
    assert result["memory"]["bayesian_4 / deterministic"] > 1
    assert result["hf_peft_missing"] is None


def test_without_hugging_face_peft_its_ratios_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    outcome = CliRunner().invoke(app, TINY)
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    for name, ratio in result["training_step"].items():
        assert (ratio is None) == ("hf_peft" in name)
    assert "peft" in result["hf_peft_missing"]


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    outcome = CliRunner().invoke(app, ["--tiny", "--batch-size", "6", "--length", "6"])
    assert outcome.exit_code == 1
    assert "particles=4" in outcome.stderr


@pytest.mark.parametrize(
    "kind,particles",
    [(NormalGuide, 4), (NormalGuide, 1), (DeltaGuide, 1), (LaplaceGuide, 1), (LowRankGuide, 4)],
)
def test_the_timed_step_trains_every_parameter(kind: type[Guide], particles: int) -> None:
    model = _model()
    guide = kind(model)  # type: ignore[call-arg]
    backbone, before = _copy(model.network.backbone), _copy(guide)
    step = svi_step(model, guide, _batch(), particles)
    for _ in range(3):  # a point-mass LoRA B moves only once the head is not zero any more
        step()
    after = _copy(guide)
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    for name, value in model.network.backbone.named_parameters():
        assert torch.equal(value, backbone[name])


def test_the_timed_steps_are_those_that_fit_takes() -> None:
    examples, model = tiny_examples(8), _model()
    fitted = DeltaGuide(model)
    timed = copy.deepcopy(fitted)
    (batch,) = examples.batches(8)
    step = svi_step(model, timed, batch, 1)
    for _ in range(3):
        step()
    options = {"batch_size": 8, "max_steps": 3, "schedule": "constant", "lr": 1e-3}
    bh.fit(model, fitted, examples, progress=False, warmup=0.0, **options)
    for name, value in fitted.named_parameters():
        torch.testing.assert_close(timed.get_parameter(name), value, rtol=1e-3, atol=1e-6)


def test_the_step_of_hugging_face_peft_trains_as_many_weights_as_ours() -> None:
    pytest.importorskip("peft")
    backbone: PreTrainedModel = tiny_backbone()
    frozen = _copy(backbone)
    step = hf_peft_step(backbone, _batch())
    trained = [p for p in backbone.parameters() if p.requires_grad]
    ours = [site for site in _model(presets.lora()).sites if site.name.startswith("lora")]
    assert sum(p.numel() for p in trained) == sum(site.numel for site in ours)
    start = [p.detach().clone() for p in trained]
    losses = [step() for _ in range(10)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, old) for p, old in zip(trained, start, strict=True))
    names = {name.replace(".base_layer", ""): p for name, p in backbone.named_parameters()}
    assert all(torch.equal(names[name], value) for name, value in frozen.items())


def test_folded_and_looped_predictions_agree() -> None:
    model, batch = _model(), _batch()
    weights = draw(model, NormalGuide(model), 4)
    together = folded(model, weights, batch)
    assert together.shape == (4, 8, CLASSES)
    assert not torch.allclose(together[0], together[1])  # the draws do differ
    torch.testing.assert_close(together, looped(model, weights, batch), rtol=1e-4, atol=1e-5)


def test_ratios_are_paired_by_round_and_the_first_round_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 0.0
    calls: list[str] = []
    # The machine gets slower all the time; a and b suffer alike.
    costs = {"a": [900.0, 3.0, 30.0, 300.0], "b": [1.0, 2.0, 20.0, 200.0]}
    turns = {name: iter(values) for name, values in costs.items()}

    def variant(name: str) -> None:
        nonlocal clock
        calls.append(name)
        clock += next(turns[name])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    ratios = compare({"a": lambda: variant("a"), "b": lambda: variant("b")}, [("a", "b")], rounds=3)
    assert ratios == {"a / b": {"median": 1.5, "q25": 1.5, "q75": 1.5}}
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_peak_counts_what_is_alive_together() -> None:
    def run() -> None:
        for _ in range(3):
            kept = torch.zeros(1000)
            torch.zeros(250)
        del kept

    # From the second turn on a tensor is made before the last one of its name is let go.
    assert peak_bytes(run) == 4 * 2 * 1000
