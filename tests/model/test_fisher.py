"""Gradients by example, and the Fisher information that they make."""

from __future__ import annotations

import torch

from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.model.fisher import diagonal, scores
from bhpeft_pyro.testing import tiny_batch, tiny_model


def test_scores_are_gradients_of_the_log_likelihood() -> None:
    """Example by example, against a loop; a two-class model has y in {0, 1} only."""
    model = tiny_model()
    batch = tiny_batch(6)
    torch.manual_seed(0)
    weights = {s.name: s.unit * torch.randn(6, 1, *s.shape) for s in model.sites}
    (got,) = scores(model, weights, batch)
    for i in range(6):
        own = {name: value[i, 0].clone().requires_grad_() for name, value in weights.items()}
        inputs = {name: value[i : i + 1] for name, value in batch.inputs.items()}
        log_probs = model.predictive(own, Batch(inputs)).logits.log_softmax(-1)[0]
        candidates = [
            torch.autograd.grad(log_probs[label], list(own.values()), retain_graph=True)
            for label in range(2)
        ]
        assert any(
            all(
                torch.allclose(got[name][i], gradient, atol=1e-4, rtol=1e-3)
                for name, gradient in zip(own, candidate, strict=True)
            )
            for candidate in candidates
        )


def test_the_fisher_information_of_a_softmax_head() -> None:
    """At zero: E[x^2] / 4 for two classes; labels are not looked at."""
    model = tiny_model(())
    batches = [tiny_batch(64, seed=seed) for seed in range(40)]
    means = {site.name: torch.zeros(site.shape) for site in model.sites}
    torch.manual_seed(0)
    information = diagonal(model, means, batches)
    torch.testing.assert_close(information["head.bias"], torch.full((2,), 0.25))
    square = torch.cat([model.network.features(batch) for batch in batches]).square().mean(0)
    torch.testing.assert_close(
        information["head.weight"], (square / 4).expand(2, -1), rtol=1e-3, atol=1e-5
    )
