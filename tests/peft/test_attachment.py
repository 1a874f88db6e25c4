"""Backbones whose linear layers are not float32: bfloat16, int8, and those that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ArchitectureError, SaveError
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.model.backbone import check_weights
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer


class Int8Linear(nn.Module):
    """Weights as int8 with a scale a row: what quantisation libraries do, in a few lines."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def dequantised(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dequantised(), self.bias)


class Opaque(Tensor):
    """A quantised weight that computes nothing but its layer, as torchao's."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.sum:
            raise NotImplementedError("unimplemented operator")
        return super().__torch_function__(func, types, args, kwargs or {})


def replace(backbone, make):
    """Every linear layer by another."""
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, make(child))
    return backbone


def rounded(linear):
    """A float32 layer with the weights that are left after int8."""
    linear.weight.data = Int8Linear(linear).dequantised()
    return linear


class InferenceOnly(Int8Linear):
    """No way back for a gradient, and a state that is no tensor, as PyTorch's dynamic int8."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())

    def get_extra_state(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.scale

    def set_extra_state(self, state: tuple[Tensor, Tensor]) -> None:
        self.weight, self.scale = state


def fit(backbone, kinds=None):
    network = bh.RandomPEFT(backbone, kinds, bh.Head(2), tiny_tokenizer())
    return bh.fit(bh.Model(network), "normal", tiny_examples(), epochs=8, progress=False)


def probabilities(posterior):
    return posterior.predict(tiny_examples(seed=1), samples=4).probabilities


def test_int8_is_as_its_weights_in_float32() -> None:
    """Hybrid, coordinates, start and fit: all of them run on the quantised layers as they are."""
    int8 = fit(replace(tiny_backbone(), Int8Linear))
    float32 = fit(replace(tiny_backbone(), rounded))
    torch.testing.assert_close(probabilities(int8), probabilities(float32), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbone(dtype: torch.dtype) -> None:
    """It is learnt from as any other, and predicts as the same backbone does in single precision.

    (Two fits are not compared: what the last bits are depends on the processor.)
    """
    backbone = tiny_backbone().to(dtype)
    posterior = fit(backbone)
    assert all(value.dtype == torch.float32 for value in posterior.sample(2).values())
    assert (
        metrics.evaluate(posterior.predict(tiny_examples(), samples=4))["nll"] < 0.5
    )  # 0.69 knows nothing
    halved = probabilities(posterior)
    backbone.float()
    torch.testing.assert_close(halved, probabilities(posterior), atol=0.02, rtol=0)


def test_layers_without_a_gradient_are_refused() -> None:
    """All of them, or a single one."""
    message = r"layer 0, query .*InferenceOnly\) lets no gradient"
    with pytest.raises(ArchitectureError, match=message):
        fit(replace(tiny_backbone(), InferenceOnly))
    backbone = tiny_backbone()
    output = backbone.encoder.layer[1].output
    output.dense = InferenceOnly(output.dense)
    with pytest.raises(ArchitectureError, match="layer 1, ffn_out"):
        fit(backbone)


def test_head_alone_needs_no_gradient(tmp_path: Path) -> None:
    posterior = fit(replace(tiny_backbone(), InferenceOnly), bh.presets.head_only())
    posterior.save(tmp_path / "saved")
    backbone, tokenizer = replace(tiny_backbone(), InferenceOnly), tiny_tokenizer()
    again = bh.Posterior.load(tmp_path / "saved", backbone, tokenizer=tokenizer)
    torch.testing.assert_close(probabilities(again), probabilities(posterior))
    with pytest.raises(SaveError, match=r"^backbone: "):
        bh.Posterior.load(tmp_path / "saved", tiny_backbone(), tokenizer=tokenizer)


def test_weights_that_cannot_be_summed_are_not_looked_at():
    backbone = tiny_backbone()
    layer = backbone.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Opaque), requires_grad=False)
    with pytest.raises(NotImplementedError):
        layer.weight.sum()
    check_weights(backbone)
