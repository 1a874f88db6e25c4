"""Predictions against reference draws: exact ones for a regression, NUTS for a transformer."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from exact import (
    WIDTH,
    Exact,
    KnownNoise,
    design,
    guide_of,
    random_texts,
)
from pyro.infer import MCMC, NUTS
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.diagnostics import PSIS, Comparison, against, psis
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.guides import FunctionGuide, PriorGuide
from bhpeft_pyro.model.cached_batches import CachedBatches
from bhpeft_pyro.prediction.draws import Draws, draw
from bhpeft_pyro.prediction.predict import simulate
from bhpeft_pyro.testing import tiny_examples, tiny_model

ELSEWHERE = random_texts(30, seed=8)


def reference(exact: Exact, count: int = 4000) -> dict[str, Tensor]:
    """Draws of the exact posterior, in the form in which MCMC gives them."""
    joint = torch.distributions.MultivariateNormal(exact.mean, exact.covariance)
    w = joint.sample((count,)).float()
    return {"head.weight": w[:, None, :WIDTH], "head.bias": w[:, WIDTH:]}


@pytest.mark.parametrize(("shift", "spread"), [(0.0, 1.0), (1.0, 1.0), (0.0, 0.5), (0.0, 2.0)])
def test_against_the_closed_form(
    shift: float, spread: float, model: bh.Model, data: bh.data.Examples, exact: Exact
) -> None:
    report = bh.training.FitReport(len(data), data.fingerprint, bh.FitOptions())
    guide = FunctionGuide(guide_of(exact, shift, spread))
    found = against(bh.Posterior(model, guide, (report,)), reference(exact), ELSEWHERE, 4000)
    blank = bh.data.encode(ELSEWHERE, model.network.tokenizer, kind="rating", labelled=False)
    x = design(model.network, blank)
    sd = (x @ exact.covariance * x).sum(-1).sqrt()
    assert found.noise == pytest.approx(((spread**2 + 1) / 4000) ** 0.5, rel=0.05)
    limit = 4.5 * found.noise  # standard errors; of a log sd 0.7 of that, or less
    torch.testing.assert_close(found.errors, shift * (x @ exact.sd) / sd, rtol=0, atol=limit)
    expected = torch.full_like(sd, spread)
    torch.testing.assert_close(found.ratios, expected, rtol=4.5 * found.noise, atol=0)
    near = found.error < 0.3 and 0.8 < found.ratio < 1.25
    assert near == ((shift, spread) == (0.0, 1.0))


def test_classes_and_missing_choices() -> None:
    """Both sets of draws are run alike: the same draws differ by nothing, however many classes."""
    posterior = bh.fit(
        tiny_model(outputs=3), "normal", tiny_examples(12), max_steps=2, progress=False
    )
    found = against(posterior, posterior.sample(30, seed=5), ELSEWHERE[:4], samples=30, seed=5)
    arrays: Any = {name: each.numpy() for name, each in posterior.sample(30, seed=5).items()}
    of_arrays = against(posterior, arrays, ELSEWHERE[:4], samples=30, seed=5)
    assert torch.equal(of_arrays.errors, found.errors)
    assert found.errors.shape == (4 * 3,)
    assert found.error < 1e-5 and found.ratio == pytest.approx(1.0, abs=1e-5)
    choosing = bh.tasks.multiple_choice(
        posterior.model.network.backbone, tokenizer=posterior.model.network.tokenizer
    )
    questions = {
        "question": ["w5 w6", "w7 w8"] * 4,
        "choices": [["w9", "w10"], ["w11", "w12", "w13"]] * 4,
        "answer": [0, 2] * 4,
    }
    posterior = bh.fit(choosing, "normal", questions, max_steps=2, progress=False)
    found = against(posterior, posterior.sample(30, seed=6), questions, samples=30)
    assert found.errors.shape == (4 * 2 + 4 * 3,)  # not the choices that don't exist
    assert found.errors.isfinite().all() and found.ratios.isfinite().all()


@pytest.mark.slow
def test_a_transformer_against_nuts() -> None:
    """LoRA on one layer, and a head: 49 latents, of which the data tell on the head most.

    Mean-field sds of weights are too small. Those of predictions are too large all the same: it
    forgets that weights compensate each other. A full covariance mends both, and k-hat knows.
    """
    lora = bh.peft.LoRA(rank=1, targets=("value",), layers=(1,))
    prior = {
        "lora.*.A": lambda site: dist.Normal(0.0, (0.3 * site.unit).expand(site.shape)),
        "lora.*.B": lambda site: dist.Normal(0.0, site.unit.expand(site.shape)),
        "head.*": dist.Normal(0.0, 0.5),
    }
    model = tiny_model((lora,), 1, prior, KnownNoise(1.5))
    network = model.network
    texts = random_texts(12)
    blank = bh.data.encode(texts, network.tokenizer, kind="rating", labelled=False)
    truth = draw(model, PriorGuide(model), 1, seed=3)
    ratings = simulate(model, [Draws(truth)], CachedBatches(model, blank))[0][0].tolist()
    data = bh.data.encode({"text": texts, "label": ratings}, network.tokenizer, kind="rating")
    kernel = NUTS(model, jit_compile=False, max_tree_depth=4)
    mcmc = MCMC(kernel, num_samples=150, warmup_steps=60, disable_progbar=True)
    mcmc.run(next(data.batches(len(data))))
    nuts = mcmc.get_samples()

    def fitted(guide: str, **options: Any) -> tuple[Comparison, PSIS, float]:
        chosen = bh.autoguide(guide, model, init_scale=0.1) if guide != "normal" else guide
        posterior = bh.fit(model, chosen, data, batch_size=12, progress=False, **options)
        drawn = posterior.sample(2000)["head.weight"].std(0) / nuts["head.weight"].std(0)
        weights = drawn.log().mean().exp().item()
        return against(posterior, nuts, ELSEWHERE, 400), psis(posterior, data, 500), weights

    # 150 draws of NUTS: a mean is known to 0.1 sds, a sd to 6 %, the mean of 16 sds to 2 %.
    full, full_psis, weights = fitted("AutoMultivariateNormal", max_steps=1000, lr=0.01)
    assert full.error < 0.3 and 1 / 1.3 < full.ratio < 1.3, str(full)
    assert 0.85 < weights < 1.1
    narrow, narrow_psis, weights = fitted("normal", max_steps=400, lr=0.1)
    assert narrow.error < 0.3 and narrow.ratio > 1.35, str(narrow)
    assert weights < 0.82
    assert narrow_psis.verdict == "bad"
    assert full_psis.k_hat < 0.75 < narrow_psis.k_hat


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bias": None}, r"site 'head.bias' has nothing, expected \(R, \*\(1,\)\)"),
        ({"head.bias": torch.zeros(5, 2)}, r"site 'head.bias' has shape \(5, 2\)"),
        ({"head.bias": torch.zeros(7, 1)}, r"equally many for every site.* got \[5, 7\]"),
    ],
)
def test_bad_input(
    change: dict[str, Any], message: str, model: bh.Model, data: bh.data.Examples, exact: Exact
) -> None:
    report = bh.training.FitReport(len(data), data.fingerprint, bh.FitOptions())
    posterior = bh.Posterior(model, FunctionGuide(guide_of(exact)), (report,))
    draws = {**reference(exact, 5), **change}
    draws = {name: value for name, value in draws.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        against(posterior, draws, ELSEWHERE)
    with pytest.raises(ConfigError, match="samples=1 must be an integer of at least 2"):
        against(posterior, reference(exact, 5), ELSEWHERE, samples=1)
    with pytest.raises(ConfigError, match="draws: expected a tensor of draws for each site"):
        against(posterior, 3, ELSEWHERE)  # type: ignore[arg-type]
