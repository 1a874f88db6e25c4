"""Several labels a text, counts and extra columns through fits, forecasts, rounds and files."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from exact import Designed
from saves import load
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.forecast import metrics
from bhpeft_pyro.model.cached_batches import CachedBatches
from bhpeft_pyro.model.fisher import all_outcomes
from bhpeft_pyro.model.likelihoods import Function, MultiLabel, StudentT
from bhpeft_pyro.testing import tiny_model

NAMES = ("art", "money", "sport")
QUICK: dict[str, Any] = {"max_steps": 6, "progress": False}


def model(likelihood: Any, outputs: int = 1) -> bh.Model:
    """A head on the first word alone, which is one of sixteen."""
    table = torch.zeros(50, 16)
    table[5:21] = 4 * torch.eye(16)
    return bh.Model(Designed(table, outputs), likelihood=likelihood)


def table(count: int = 60) -> dict[str, list[Any]]:
    """The first word determines the three labels."""
    codes = torch.randint(0, 8, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    labels = [[name for k, name in enumerate(NAMES) if code >> k & 1] for code in codes]
    texts = [f"w{5 + code} w{20 + i % 30}" + " w49" * (i // 30) for i, code in enumerate(codes)]
    return {"text": texts, "label": labels}


def counts(count: int = 60) -> dict[str, list[Any]]:
    generator = torch.Generator().manual_seed(0)
    hours = [1.0 + i % 5 for i in range(count)]
    rates = torch.tensor([each * (1 + 3 * (i % 2)) for i, each in enumerate(hours)])
    texts = [f"w{5 + i % 2} w{10 + i % 35}" for i in range(count)]
    found = torch.poisson(rates, generator=generator).int().tolist()
    return {"text": texts, "label": found, "hours": hours}


def seen(outputs: Tensor, extra: Any) -> Any:
    """2.5 an hour where the output is 0."""
    return dist.Poisson(2.5 * extra["hours"] * outputs[..., 0].exp())


def loaded(posterior: bh.Posterior, folder: Path, **code: Any) -> bh.Posterior:
    """The saved posterior, with the features of `model`."""
    again = load(folder, **code)
    return again.replace(
        model=bh.Model(posterior.model.network, again.model.prior, again.model.likelihood)
    )


@pytest.fixture(scope="module")
def laplace() -> bh.Posterior:
    tagger = model(MultiLabel(), 3)
    return bh.fit(tagger, "laplace", table(), components=2, max_steps=60, progress=False)


def test_the_information_of_several_labels_is_exact() -> None:
    """Against the sum over all 2^K outcomes of p times the outer product of the score."""
    logits = torch.randn(2, 3).double().requires_grad_()
    predictive = dist.Bernoulli(logits=logits).to_event(1)

    def slopes(total: Tensor) -> Tensor:
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    found = sum(
        torch.einsum("be,bf->bef", score, score)
        for score in (slopes(each.sum()) for each in all_outcomes(predictive))
    )
    exact = torch.zeros(2, 3, 3).double()
    for outcome in itertools.product([0.0, 1.0], repeat=3):
        log_prob = predictive.log_prob(torch.tensor(outcome).double())
        score = slopes(log_prob.sum())
        exact += log_prob.exp()[:, None, None] * torch.einsum("be,bf->bef", score, score)
    torch.testing.assert_close(found, exact.detach())


def test_laplace_learns_several_labels(laplace: bh.Posterior) -> None:
    scores = metrics.evaluate(laplace.predict(table()))
    assert scores["f1_micro"] > 0.9 and scores["accuracy"] > 0.7
    forecast = laplace.predict(["w6 w20", "w11"])
    assert forecast.predicted == [["art"], ["money", "sport"]]
    assert forecast.between is not None and (forecast.epistemic > 0).all()
    assert (forecast.epistemic < forecast.total).all()
    assert laplace.columns.label_names == NAMES


def test_one_label_is_refused() -> None:
    rows = {"text": ["w5", "w6"], "label": [[0], [1]]}
    with pytest.raises(bh.errors.ConfigError, match="two or more different names"):
        bh.fit(model(MultiLabel()), "delta", rows, **QUICK)


def test_predictions_of_laplace_are_those_of_weight_draws(laplace: bh.Posterior) -> None:
    texts = ["w6", "w15"]
    drawn = laplace.predict(texts, 4000, keep_samples=True)
    closed = laplace.predict(texts, 4000)
    assert drawn.samples is not None and drawn.samples.shape == (4000, 2, 3)
    torch.testing.assert_close(closed.probabilities, drawn.probabilities, atol=0.02, rtol=0)
    torch.testing.assert_close(
        closed.by_label("epistemic"), drawn.by_label("epistemic"), atol=0.01, rtol=0.1
    )


def test_rounds_files_arviz_and_drift_of_several_labels(
    laplace: bh.Posterior, tmp_path: Path
) -> None:
    folder = laplace.save(tmp_path / "run")
    again = loaded(laplace, folder)
    more = table(80)
    more = {name: values[60:] for name, values in more.items()}
    expected = laplace.predict(more)
    assert torch.equal(again.predict(more).probabilities, expected.probabilities)
    assert again.predict(more).predicted == expected.predicted
    newer = again.update(more, **QUICK)
    assert len(newer.lineage) == 2
    with pytest.raises(bh.errors.DataError, match="'film' is not one of"):
        again.update({"text": ["w5"], "label": [["film"]]}, **QUICK)
    idata = newer.to_arviz(more, samples=3)
    label = idata.posterior_predictive["label"]
    assert label.dims == ("chain", "draw", "example", "output")
    assert label["output"].values.tolist() == [*NAMES] and label.shape == (2, 3, 20, 3)
    assert idata.log_likelihood["label"].shape == (2, 3, 20)
    assert idata.observed_data["label"].values.tolist() == expected.labels.tolist()  # type: ignore[union-attr]
    drift = newer.assess(more, 20)
    assert drift.nll is not None and 0.05 < drift.nll.p <= 1
    assert drift.nll.observed == pytest.approx(
        metrics.evaluate(newer.predict(more, 20, seed=0))["nll"], rel=0.2
    )


def test_a_variational_guide_learns_several_labels_with_peft_weights() -> None:
    tagger = tiny_model(None, 3, likelihood=MultiLabel())
    posterior = bh.fit(tagger, "normal", table(24), particles=2, batch_size=8, **QUICK)
    forecast = posterior.predict(table(24), 5)
    assert forecast.probabilities.shape == (24, 3) and forecast.labels is not None
    assert math.isfinite(posterior.diagnose(table(24), samples=100).psis.log_evidence)


@pytest.mark.parametrize("guide", ["laplace", "normal", "AutoNormal"])
def test_counts_with_an_exposure(guide: str, tmp_path: Path) -> None:
    data = counts()
    counter = model(Function(seen, columns=("hours",)))
    posterior = bh.fit(counter, guide, data, components=1, max_steps=60, lr=0.05, progress=False)
    assert posterior.columns.extra == ("hours",)
    slow, fast, long = posterior.predict(
        {"text": ["w5 w20", "w6 w20", "w5 w20"], "hours": [1.0, 1.0, 10.0]}
    ).mean.tolist()
    assert long == pytest.approx(10 * slow, rel=1e-4)
    assert 1.5 * slow < fast  # 1 and 4 an hour
    forecast = posterior.predict(data)
    assert forecast.outcomes is not None and forecast.outcomes.shape[1] == 60
    assert forecast.outcomes[..., 0].numel() * forecast.outcomes.shape[2] >= 60_000
    assert torch.equal(forecast.outcomes, posterior.predict(data).outcomes)  # type: ignore[arg-type]
    assert metrics.evaluate(posterior.predict(data))["coverage_90"] > 0.75
    with pytest.raises(bh.errors.DataError, match="column 'hours' is missing"):
        posterior.predict(["w5"])
    if guide != "AutoNormal":
        newer = posterior.update({k: v[:20] for k, v in data.items()}, again=True, **QUICK)
        assert newer.columns.extra == ("hours",)
        again = loaded(newer, newer.save(tmp_path / "run"), likelihood=seen)
        assert torch.equal(again.predict(data).mean, newer.predict(data).mean)


def test_drift_is_judged_by_the_likelihood() -> None:
    counter, data = model(Function(seen, columns=("hours",))), counts()
    posterior = bh.fit(counter, "normal", data, max_steps=40, progress=False)
    found = posterior.assess(data, 20).nll
    assert found is not None and found.p > 0.05
    assert posterior.assess({**data, "label": [30] * 60}, 20).surprising
    # The same mixture of Poissons by hand, for the labels as they are and for simulated ones.
    examples = posterior.encode(data)
    _, batch = next(iter(CachedBatches(posterior.model, examples).prediction(len(examples))))
    with torch.no_grad():
        rates, others = [
            posterior.model.predictive(posterior.sample(20, seed=seed), batch).mean
            for seed in (0, 1)
        ]
    assert examples.labels is not None

    def nll(labels: torch.Tensor) -> torch.Tensor:
        logs = torch.distributions.Poisson(rates).log_prob(labels).double()
        return (math.log(20) - logs.logsumexp(0)).mean(-1)

    assert found.observed == pytest.approx(nll(examples.labels).item(), rel=1e-5)
    torch.manual_seed(0)
    expected = torch.stack([nll(torch.poisson(others)[i]) for _ in range(50) for i in range(20)])
    error = 4 * found.sd * (1 / 20 + 1 / 1000) ** 0.5
    assert found.expected == pytest.approx(expected.mean().item(), abs=error)


def test_outcomes_of_different_batches_are_independent() -> None:
    """Equal noise in each batch of 32 would correlate texts, and labels simulated from them."""
    data = {"text": ["w5 w6"] * 32, "label": [0.0, 1.0] * 16}
    posterior = bh.fit(model(StudentT()), "delta", data, max_steps=2, progress=False)
    outcomes = posterior.predict(data["text"] * 2, 1).outcomes
    assert outcomes is not None
    first, second = outcomes[0, :32].flatten(), outcomes[0, 32:].flatten()
    assert torch.corrcoef(torch.stack([first.clamp(-3, 3), second.clamp(-3, 3)]))[0, 1].abs() < 0.05


def test_a_stream_is_tested_on_texts_of_one_label(tmp_path: Path) -> None:
    rows = {"text": ["w5 w20", "w6 w21"] * 6, "label": [["a"], ["a", "b"]] * 6}
    test = {"text": ["w5 w9", "w7 w8"], "label": [["a"], []]}
    model = tiny_model((), 2, likelihood=MultiLabel())
    options: dict[str, Any] = {"max_steps": 1, "progress": False, "guide": "normal"}
    last = bh.stream(model, {"x": rows}, tmp_path, tests={"t": test}, **options)
    assert "test/t" in last.report.metrics


def test_calibration_ranks_every_label() -> None:
    """No probability follows from the others."""
    from bhpeft_pyro.diagnostics import sbc
    from bhpeft_pyro.guides import PriorGuide

    model = tiny_model((), 3, likelihood=MultiLabel())
    found = sbc(model, lambda m, _: PriorGuide(m), ["w5 w20", "w6 w21"], replications=20, draws=9)
    assert sum("p(0)" in name for name in found.names) == len({"w5 w20", "w6 w21"})
