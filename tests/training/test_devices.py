"""On another device everything is as on the CPU: on a real one where there is one, and on a
pretended one everywhere."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import arviz  # noqa: F401  (not timed within)
import elsewhere
import pytest
import torch
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.testing import _fix_coordinates, tiny_backbone, tiny_examples, tiny_tokenizer
from bhpeft_pyro.training.initialization import align

DEVICES = [
    elsewhere.PRETENDED,
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no such device")
    ),
]
QUICK = {"max_steps": 2, "progress": False}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def rows(likelihood: str, count: int, seed: int = 0) -> bh.data.Examples:
    examples = tiny_examples(count, seed)
    if likelihood == "Categorical":
        return examples
    labels = [len(text) / 5 for text in examples.texts]
    table = {"text": list(examples.texts), "label": labels}
    return bh.data.encode(table, tiny_tokenizer(), kind="rating")


def model_on(device: str, likelihood: str = "Categorical", **options: Any) -> bh.Model:
    of = getattr(bh.likelihoods, likelihood)()
    head = bh.Head(1 if likelihood == "Normal" else 2, principal=False)
    backbone = tiny_backbone().to(device)
    kinds = (bh.peft.LoRA(rank=2, layers=(1,)), bh.peft.Prefix(2))
    network = bh.RandomPEFT(backbone, kinds, head, tiny_tokenizer())
    return bh.Model(network, likelihood=of)


def numbers(forecast: Any) -> Tensor:
    if hasattr(forecast, "probabilities"):
        return forecast.probabilities
    return torch.stack([forecast.mean, forecast.sd])


@cache
def results(device: str, guide: str, likelihood: str) -> dict[str, Tensor]:
    """Everything that a posterior does, in numbers."""
    test = rows(likelihood, 5, seed=9)
    found = {}
    with elsewhere.at(device), TemporaryDirectory() as folder:
        torch.manual_seed(0)
        more: dict[str, Any] = {"components": 2} if guide == "laplace" else {}
        model = model_on(device, likelihood)
        data = rows(likelihood, 50)
        if guide == "normal":  # equal eigenvalues would have other eigenvectors by a rounding error
            _fix_coordinates(model.network)
        family: Any = bh.autoguide("delta", model, width=0.5) if guide == "delta" else guide
        posterior = bh.fit(model, family, data, **more, **QUICK)
        assert posterior.model.network.device.type == torch.device(device).type
        found["loss"] = torch.tensor([step["loss"] for step in posterior.report.history])
        found["predict"] = numbers(posterior.predict(test))
        if guide == "normal":  # a point estimate has no density
            found["psis"] = torch.tensor(bh.diagnostics.psis(posterior, data, samples=100).k_hat)
        updated = posterior.update(rows(likelihood, 50, seed=1), **QUICK)
        updated.save(f"{folder}/saved")
        backbone = tiny_backbone().to(device)
        again = bh.Posterior.load(f"{folder}/saved", backbone=backbone, tokenizer=tiny_tokenizer())
        found["update, save, load"] = numbers(again.predict(test))
        # Of the later round: the width that held-out rows choose amplifies rounding errors.
        found["draws"] = numbers(again.predict(test, samples=4, keep_samples=True))
        exported = again.to_arviz(test, samples=4)
        found["to_arviz"] = torch.tensor(exported.posterior["head.bias"].values)
    return found


@pytest.mark.parametrize(
    ("guide", "likelihood"),
    [
        ("laplace", "Categorical"),
        ("delta", "Normal"),
        pytest.param("laplace", "Normal", marks=pytest.mark.slow),
        pytest.param("laplace", "HeteroscedasticNormal", marks=pytest.mark.slow),
        pytest.param("normal", "Categorical", marks=pytest.mark.slow),
    ],
)
def test_everything_is_as_on_the_cpu(device: str, guide: str, likelihood: str) -> None:
    expected = results("cpu", guide, likelihood)
    for name, value in results(device, guide, likelihood).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3, msg=name)


def test_the_axes_of_the_weights_are_on_the_device(device: str) -> None:
    with elsewhere.at(device):
        model = model_on(device)
        align(model, list(rows("Categorical", 16).batches(8)))
        buffers = dict(model.network.coordinates.named_buffers())
        assert buffers.pop("fitted")
        kind = torch.device(device).type
        assert {buffer.device.type for buffer in buffers.values() if buffer.numel()} == {kind}


def test_the_pretended_device_takes_no_tensors_of_the_cpu() -> None:
    with elsewhere.at(elsewhere.PRETENDED):
        there = torch.ones(2, device=elsewhere.PRETENDED)
        with pytest.raises(RuntimeError, match="tensors on lazy:0 and on the CPU"):
            there + torch.ones(2)
        assert (there * torch.tensor(2.0)).sum().item() == 4


def test_layers_may_be_spread_over_devices() -> None:
    accelerate = pytest.importorskip("accelerate")
    found = []
    for last in ("cpu", elsewhere.PRETENDED):
        with elsewhere.at(elsewhere.PRETENDED):
            places = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": last}
            backbone = tiny_backbone()
            backbone.pooler = None
            backbone = accelerate.dispatch_model(backbone, places, main_device="cpu")
            network = bh.RandomPEFT(backbone, None, bh.Head(2), tiny_tokenizer())
            posterior = bh.fit(
                bh.Model(network), "laplace", tiny_examples(50), components=1, **QUICK
            )
            found.append(numbers(posterior.predict(tiny_examples(5))))
    torch.testing.assert_close(found[0], found[1])


def test_offloaded_weights_are_refused() -> None:
    backbone = tiny_backbone()
    backbone.encoder.layer[1].to("meta")  # where accelerate leaves them until they are needed
    with pytest.raises(ConfigError, match=r"were offloaded to the CPU or to disk.*quantised"):
        bh.RandomPEFT(backbone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_backbone_predicts_as_a_whole_one(dtype: torch.dtype) -> None:
    """Under the default guide."""
    found = []
    for kind in (torch.float32, dtype):
        backbone = tiny_backbone().to(kind)
        model = bh.Model(bh.RandomPEFT(backbone, None, bh.Head(2), tiny_tokenizer()))
        posterior = bh.fit(model, "laplace", tiny_examples(50), components=1, **QUICK)
        found.append(numbers(posterior.predict(tiny_examples(5))))
        assert {value.dtype for value in posterior.sample(2).values()} == {torch.float32}
    torch.testing.assert_close(found[1], found[0], atol=5e-3, rtol=0)
