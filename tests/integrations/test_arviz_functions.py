"""ArviZ's own functions on exported results: leave-one-out, comparisons, summaries."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from exact import Exact, guide_of, own_network, random_texts, ratings, regression
from torch.distributions import Normal

import bhpeft_pyro as bh
from bhpeft_pyro.guides import FunctionGuide
from bhpeft_pyro.peft import Adapter, LoRA
from bhpeft_pyro.testing import tiny_examples, tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

OLD = "InferenceData" in vars(arviz)
EXACT: dict[str, Any] = {} if OLD else {"round_to": "none"}  # of `compare`
NOISE, COUNT, DRAWS = 2.0, 60, 1000


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """ArviZ warns of its own future, and of what few draws of tiny models cannot do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def left_out(exact: Exact, last: int = COUNT) -> np.ndarray:
    """log p(y_i | all others) of the last ratings, each N - 1 others' posterior in closed form."""
    found = []
    for i in range(len(exact.y) - last, len(exact.y)):
        rest = torch.arange(len(exact.y)) != i
        others = Exact(exact.x[rest], exact.y[rest], exact.prior_sd, exact.noise)
        row = exact.x[i]
        sd = (row @ others.covariance @ row + exact.noise**2).sqrt()
        found.append(Normal(row @ others.mean, sd).log_prob(exact.y[i]).item())
    return np.array(found)


def exported(exact: Exact, model: bh.Model, data: bh.data.Examples) -> Any:
    """The exact posterior, as if fitted, with what it says of some of its data."""
    report = bh.training.FitReport(len(exact.y), data.fingerprint, bh.FitOptions())
    posterior = bh.Posterior(model, FunctionGuide(guide_of(exact)), (report,))
    return posterior.to_arviz(data, samples=DRAWS)


@pytest.fixture(scope="module")
def conjugate() -> dict[str, tuple[Exact, Any]]:
    """Three posteriors that have learnt the same ratings; one has learnt 200 others before."""
    network = own_network()
    model = regression(network, noise=NOISE)
    data = ratings(network, random_texts(COUNT), seed=3, noise=NOISE)
    old = ratings(network, random_texts(200, seed=1), seed=4, noise=NOISE)
    before, fresh, narrow = (Exact.of(model, *more) for more in ((old,), (data,), (data, 0.1)))
    updated = Exact(torch.cat([before.x, fresh.x]), torch.cat([before.y, fresh.y]), noise=NOISE)
    exact = {"fresh": fresh, "narrow": narrow, "updated": updated}
    return {name: (one, exported(one, model, data)) for name, one in exact.items()}


@pytest.fixture(scope="module")
def fitted() -> dict[str, tuple[bh.Posterior, Any]]:
    kinds = {"LoRA": (LoRA(rank=2),), "hybrid": (LoRA(rank=2), Adapter(2))}
    found = {}
    for name, own in kinds.items():
        posterior = bh.fit(tiny_model(own), "normal", tiny_examples(), max_steps=10, progress=False)
        found[name] = posterior, posterior.to_arviz(tiny_examples(), samples=100)
    return found


def elpd(loo: Any) -> float:
    return float(loo.elpd_loo if OLD else loo.elpd)


@pytest.mark.parametrize("name", ["fresh", "narrow", "updated"])
def test_loo_is_leave_one_out(conjugate: dict[str, tuple[Exact, Any]], name: str) -> None:
    exact, idata = conjugate[name]
    loo = arviz.loo(idata, pointwise=True)
    expected = left_out(exact)
    pointwise = (loo.loo_i if OLD else loo.elpd_i).values
    drawn = idata.log_likelihood["label"].values[0].astype(float)
    # Importance sampling, to first order: four standard errors of the mean of a log-likelihood.
    np.testing.assert_array_less(np.abs(pointwise - expected), 4 * drawn.std(0) / DRAWS**0.5 + 1e-3)
    error = 4 * drawn.sum(1).std() / DRAWS**0.5
    assert elpd(loo) == pytest.approx(expected.sum(), abs=error)
    # The fit of the posterior that has learnt each rating too would be told from it.
    assert np.log(np.exp(drawn).mean(0)).sum() - expected.sum() > 2 * error


def test_compare_kinds(fitted: dict[str, tuple[bh.Posterior, Any]]) -> None:
    """LoRA against a hybrid; with what is left out put back, it is the forecast's own NLL."""
    table = arviz.compare({name: idata for name, (_, idata) in fitted.items()}, **EXACT)
    assert sorted(table.index) == ["LoRA", "hybrid"]
    column, parameters = ("elpd_loo", "p_loo") if OLD else ("elpd", "p")
    for name, (posterior, idata) in fitted.items():
        row = table.loc[name, [column, parameters]].astype(float)
        assert row[column] == pytest.approx(elpd(arviz.loo(idata)), abs=1e-6)
        scores = posterior.evaluate(tiny_examples(), 100)  # the same seed, so the same draws
        assert row[column] + row[parameters] == pytest.approx(-12 * scores["nll"], abs=1e-3)
        assert row[parameters] > 0.1


def test_summary_of_all_that_is_exported(fitted: dict[str, tuple[bh.Posterior, Any]]) -> None:
    """ArviZ 1.x fails on dims with a name of its own, and swaps rows where dims are in disorder."""
    posterior, _ = fitted["hybrid"]
    idata = posterior.to_arviz(samples=20, sites="*")
    table = arviz.summary(idata, kind="stats", round_to=6)
    assert len(table) == sum(drawn[0, 0].size for drawn in idata.posterior.values())
    for name, drawn in idata.posterior.items():
        means = drawn.mean(("chain", "draw"))
        for index in np.ndindex(means.shape):
            found = float(table.loc[f"{name}[{', '.join(map(str, index))}]", "mean"])
            assert found == pytest.approx(float(means[index]), abs=1e-5), name
