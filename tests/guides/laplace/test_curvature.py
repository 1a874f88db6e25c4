"""Curvature and precision, against closed forms and the Jacobians themselves."""

from __future__ import annotations

import warnings
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from counts import COUNTS, Counts
from exact import dense, own_network, random_ratings, random_texts, regression
from laplace_fits import QUICK, exactly, guide_of
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.guides import LaplaceGuide
from bhpeft_pyro.guides.laplace import curvature
from bhpeft_pyro.guides.laplace.curvature import Information, jacobians
from bhpeft_pyro.model import linearized
from bhpeft_pyro.model.likelihoods import Normal
from bhpeft_pyro.model.linearized import jacobian
from bhpeft_pyro.testing import tiny_examples, tiny_model


def test_logistic_regression_has_its_gauss_newton_posterior() -> None:
    """P + sum (diag p - p p') (x) x x', with the prior's own P."""
    prior = bh.priors.FunctionSpaceNormal(head=1.5)
    model = tiny_model((), outputs=3, prior=prior)
    examples = tiny_examples(12)
    posterior = exactly(model, examples, max_steps=20)
    guide = guide_of(posterior)
    x = model.network.features(next(examples.batches(12))).double()
    weights = guide.means()
    logits = x @ weights["head.weight"].T.double() + weights["head.bias"].double()
    p = logits.softmax(-1)
    curvature = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    ones = torch.cat([x, torch.ones(12, 1)], 1).double()
    full = torch.einsum("nab,nc,nd->acbd", curvature, ones, ones)  # (3, 17, 3, 17)
    order = [*range(17)]
    flat_of = torch.tensor([a * 17 + c for a in range(3) for c in order[:-1]] + [16, 33, 50])
    gauss = full.reshape(51, 51)[flat_of][:, flat_of]
    own = 1 / guide.prior.covariance.scale.double().square()
    expected = torch.linalg.inv(gauss + own.diag())
    torch.testing.assert_close(dense(guide.covariance), expected, rtol=1e-3, atol=1e-4)


def test_low_rank_keeps_what_data_say_and_the_diagonal_of_the_rest() -> None:
    """Against the exact precision: the same diagonal, and nearly the same predictive variance."""
    model = regression(own_network(), noise=0.5)
    examples = random_ratings(model, 64, 3)
    full, few = (exactly(model, examples, rank) for rank in (None, 4))
    precisions = [torch.linalg.inv(dense(guide_of(each).covariance)) for each in (full, few)]
    torch.testing.assert_close(
        precisions[1].diagonal(), precisions[0].diagonal(), rtol=1e-2, atol=1e-1
    )
    unseen = random_texts(40, seed=9)
    one, other = (each.predict(unseen, 4000).epistemic.sqrt() for each in (full, few))
    assert (other / one).log().abs().mean() < 0.5


def counted(outputs: Tensor) -> Any:
    return dist.Poisson(outputs[..., 0].exp())


def test_information_is_an_expectation_over_labels_where_it_has_no_closed_form() -> None:
    """P + sum rate x x', for counts; in the order of the weights."""
    model = tiny_model((), 1, likelihood=counted, prior=bh.priors.FunctionSpaceNormal(head=0.5))
    rows = {"text": random_texts(20), "label": [float(i % 4) for i in range(20)]}
    examples = model.encode(rows)
    guide = guide_of(exactly(model, examples, max_steps=20))
    x = model.network.features(next(examples.batches(20))).double()
    weights = guide.means()
    rates = (x @ weights["head.weight"].T.double() + weights["head.bias"].double()).exp()
    ones = torch.cat([x, torch.ones(20, 1)], 1).double()
    precision = (rates * ones).T @ ones + (guide.prior.covariance.scale.double() ** -2).diag()
    expected = torch.linalg.inv(precision)
    ratio = dense(guide.covariance).diagonal() / expected.diagonal()
    assert ratio.log().abs().max() < 0.1  # one label for each text gives 0.4


def test_all_gradients_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one output, more examples are run at once than of three."""
    model = tiny_model((), 1, likelihood=Normal(3.0, 2.0))
    examples = model.encode({"text": random_texts(64), "label": [float(i % 5) for i in range(64)]})
    for module in (linearized, curvature):
        monkeypatch.setattr(module, "AT_ONCE", 5760)
    guide = LaplaceGuide(model, rank=1)
    with warnings.catch_warnings(action="error"):  # torch would enlarge the table
        rows, scale = jacobians(model, guide.means(), examples), guide.prior.covariance.scale
        Information.of(rows, scale, guide.rank, model.network.outputs, weight=1.0)


@pytest.mark.parametrize("kept", [0, 256])
def test_a_width_is_the_same_whether_jacobians_are_kept_or_computed_again(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 0

    def counted(model: bh.Model, at: Any, batch: Batch, first: bool) -> Any:
        nonlocal rows
        rows += len(batch)
        return jacobian(model, at, batch, first)

    model, examples = tiny_model(()), tiny_examples(80)
    posterior = bh.fit(model, "delta", examples, max_steps=2, progress=False)
    expected = posterior.widen(examples)
    monkeypatch.setattr(curvature, "jacobian", counted)
    monkeypatch.setattr(curvature, "rows_kept", lambda latents: kept)
    found = posterior.widen(examples)
    assert torch.equal(guide_of(found).rest, guide_of(expected).rest)
    assert found.report.expected_nll == expected.report.expected_nll
    # 64 rows are learnt and 16 held out; 32 of the first are used for the prior's scales, the
    # curvature and the expected NLL.
    assert rows == (80 if kept else 80 + 2 * 32)


def test_outcomes_that_are_drawn_are_the_same_ones_again() -> None:
    """Those of a likelihood of one's own; the global random state is left alone."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = tiny_model((), outputs=1, likelihood=Counts())
        found.append(bh.fit(model, "laplace", COUNTS, components=1, **QUICK))
        assert torch.equal(torch.get_rng_state(), before)
    one, other = (guide_of(posterior).scales() for posterior in found)
    assert all(torch.equal(one[name], other[name]) for name in one)
