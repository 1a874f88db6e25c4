"""Predictions with the linearised network: under `inference_mode`, and within bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bhpeft_pyro as bh
from bhpeft_pyro.guides import LaplaceGuide
from bhpeft_pyro.model import linearized as linear
from bhpeft_pyro.model.likelihoods import Normal
from bhpeft_pyro.testing import tiny_examples, tiny_model

TEXTS = ["w9", "w5 w30 w12 w44 w17", "w6 w7", "w8 w40 w41 w42", "w21 w22 w23"]


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it took at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.live = {key: pair for key, pair in self.live.items() if not pair[0].expired()}
        before = {x.untyped_storage()._cdata for x in tree_leaves(args) if torch.is_tensor(x)}
        for each in tree_leaves(found):
            if torch.is_tensor(each) and each.untyped_storage()._cdata not in before:
                storage = each.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return found


def posterior_of(**options: Any) -> bh.Posterior:
    model = tiny_model(bh.presets.lora(rank=8), **options)
    guide = bh.autoguide("laplace", model, components=1)
    assert isinstance(guide, LaplaceGuide)
    guide.spread(guide.prior.covariance)
    return bh.Posterior(model, guide, ())


@pytest.mark.parametrize("guide", ["laplace", "normal", "delta"])
def test_inference_mode_changes_nothing(guide: str) -> None:
    """As many write around predictions; the linearised network takes gradients in it."""
    posterior = bh.fit(tiny_model(), guide, tiny_examples(), max_steps=2, progress=False)
    outside = posterior.predict(TEXTS, 5)
    with torch.inference_mode():
        inside = posterior.predict(TEXTS, 5)
        copied = posterior.predict(tiny_examples(), 5)
    assert torch.equal(inside.probabilities, outside.probabilities)
    assert torch.equal(copied.probabilities, posterior.predict(tiny_examples(), 5).probabilities)


def test_draws_are_held_once() -> None:
    """Draws, their way from the mean, and both flattened side by side would be three copies."""
    posterior, samples = posterior_of(), 2000
    copy = samples * 4 * sum(site.numel for site in posterior.model.sites)
    with Peak() as peak:
        posterior.predict(TEXTS, samples, keep_samples=True)
    assert copy < peak.bytes < 1.2 * copy


def test_many_draws_are_predicted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal forecasts, whose memory does not grow; noise scales are parted as the weights are."""
    posterior, samples = posterior_of(outputs=1, likelihood=Normal(3.0, 2.0)), 2000
    whole = posterior.predict(TEXTS, samples, keep_samples=True)
    part = 128 * 4 * sum(site.numel for site in posterior.model.network.sites)
    monkeypatch.setattr(linear, "MAX_BYTES", part)
    with Peak() as peak:
        parted = posterior.predict(TEXTS, samples, keep_samples=True)
    torch.testing.assert_close(parted.means, whole.means, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parted.sds, whole.sds)
    assert peak.bytes < 3 * part < samples / 128 * part
