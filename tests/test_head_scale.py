"""The scale of the head's prior, found by empirical Bayes, against the exact evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from exact import KnownNoise, design, one_word_texts, orthogonal_network, ratings
from torch import Tensor
from torch.distributions import MultivariateNormal

import bhpeft_pyro as bh
from bhpeft_pyro.experiments import head_scale
from bhpeft_pyro.experiments.budgets import BUDGETS
from bhpeft_pyro.priors import FunctionSpaceNormal
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

FIT: dict[str, Any] = {
    "epochs": 150,
    "batch_size": 32,
    "natural_lr": 0.1,
    "warmup": 0.0,
    "progress": False,
}


def model_of(head: float | None = None, noise: float = 0.5) -> bh.Model:
    return bh.Model(orthogonal_network(), FunctionSpaceNormal(head=head), KnownNoise(noise))


def best_scale(model: bh.Model, data: bh.Examples, noise: float) -> float:
    """Where the exact evidence is highest, on a grid of steps of 2 %."""
    assert data.labels is not None
    x, labels = design(model.network, data), data.labels.double()
    units = torch.cat([site.unit.expand(site.shape).flatten() for site in model.network.sites])
    features = x * units.double()
    eye = torch.eye(len(x), dtype=torch.float64)

    def evidence(scale: Tensor) -> Tensor:
        covariance = noise**2 * eye + scale**2 * features @ features.T
        return MultivariateNormal(torch.zeros_like(labels), covariance).log_prob(labels)

    grid = torch.arange(-150, 150) * 0.02
    return float(grid[torch.stack([evidence(s) for s in grid.exp()]).argmax()].exp())


def found(posterior: bh.Posterior) -> float | None:
    assert isinstance(posterior.model.prior, FunctionSpaceNormal)
    return posterior.model.prior.head


# A mean-field guide's sds are slow to settle where labels are very many of them away.
@pytest.mark.parametrize(
    ("guide", "size", "near"), [("normal", 1.0, 0.25), ("lowrank", 1.0, 0.1), ("lowrank", 3.0, 0.1)]
)
def test_it_is_where_the_evidence_is_highest(guide: str, size: float, near: float) -> None:
    model = model_of()
    data = ratings(model.network, one_word_texts() * 2, seed=1)
    assert data.labels is not None
    data.labels.mul_(size)
    best = best_scale(model, data, 0.5)
    assert best > 0.5  # else the floor would do it
    assert found(bh.fit(model, guide, data, **FIT)) == pytest.approx(best, rel=near)


def test_on_ratings_it_is_at_least_0_3() -> None:
    model = model_of(noise=3.0)
    data = ratings(model.network, one_word_texts(), seed=1, noise=3.0)
    assert data.labels is not None
    data.labels.mul_(0.1)
    assert best_scale(model, data, 3.0) < 0.2
    assert found(bh.fit(model, "normal", data, **FIT)) == 0.3


def test_on_classes_it_is_at_least_2() -> None:
    labels_at_random = tiny_examples(48)
    assert labels_at_random.labels is not None
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    labels_at_random.labels.copy_(labels_at_random.labels[order])
    assert found(bh.fit(tiny_model(), "normal", labels_at_random, **FIT | {"epochs": 20})) == 2.0


def test_a_scale_that_is_given_stays_and_models_are_left_alone() -> None:
    data = ratings(model_of().network, one_word_texts(), seed=1)
    assert found(bh.fit(model_of(head=0.7), "normal", data, **FIT)) == 0.7
    model = model_of()
    posterior = bh.fit(model, "normal", data, **FIT)
    assert isinstance(model.prior, FunctionSpaceNormal) and model.prior.head is None
    assert found(posterior) is not None


def test_the_report_is_of_the_prior_that_was_found() -> None:
    posterior = bh.fit(tiny_model(), "normal", tiny_examples(48), max_steps=30, progress=False)
    prior, guide = posterior.model.prior, posterior.guide
    assert isinstance(prior, FunctionSpaceNormal)
    for site in posterior.model.sites:
        ratio = guide.scales()[site.name] / prior.sd(site)  # type: ignore[union-attr,operator]
        expected = ratio.log().mean().exp().item()
        assert posterior.report.scales[site.name] == pytest.approx(expected, rel=1e-4)


def test_the_table_shows_what_fit_finds_and_what_was_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_backbone().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(head_scale, "minilm", lambda: tmp_path)
    monkeypatch.setattr(head_scale, "SCALES", (None, 3.0))
    monkeypatch.setitem(BUDGETS, "small", BUDGETS["tiny"])
    head_scale.head_scale(tmp_path, ["classes"], seeds=2, epochs=2, test=8)
    lines = capsys.readouterr().out.splitlines()
    fixed = next(line for line in lines if "fixed" in line)
    found = next(line for line in lines if "found by fit" in line)
    assert "3.000 ± 0.000" in fixed
    assert float(found.split("|")[2].split()[0]) >= 1.0
    with pytest.raises(typer.BadParameter, match="unknown: tale; known: classes"):
        head_scale.head_scale(tmp_path, ["tale"])
