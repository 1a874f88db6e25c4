"""What to label next: against brute force, planted copies and clusters, and every kind of label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saves import backbone_in
from students import LIKELIHOODS, fitted, table, unlabelled
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro import fit
from bhpeft_pyro.decisions.queue import By, first_to_label, most_informative
from bhpeft_pyro.errors import ConfigError, DataError, GuideError
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.testing import tiny_examples, tiny_model

QUICK: dict[str, Any] = {"max_steps": 3, "progress": False}
BY: tuple[By, ...] = ("information", "typical", "random")


def conditioned(values: Tensor, noise: Tensor, chosen: list[int]) -> Tensor:
    """The covariance matrix of all outputs once some labels are known."""
    both = torch.cov(values.double().flatten(1).mT)
    at = torch.arange(both.shape[0]).view(len(noise), -1)[chosen].flatten()
    known = both[at][:, at] + noise.double().flatten()[at].diag()
    return both - both[:, at] @ torch.linalg.solve(known, both[at])


def removed(left: Tensor, noise: Tensor, one: int) -> float:
    """The mean over all labels of the share of their variance that one label removes."""
    at = torch.arange(left.shape[0]).view(len(noise), -1)[one]
    known = left[at][:, at] + noise.double().flatten()[at].diag()
    lower = left[:, at] @ torch.linalg.solve(known, left[at])
    return (lower.diagonal() / (left.diagonal() + noise.double().flatten())).mean().item()


@pytest.mark.parametrize("outputs", [1, 3])
def test_each_label_removes_as_much_variance_as_one_can(outputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    shared = torch.randn(40, 2, generator=generator)
    ways = torch.randn(2, 9 * outputs, generator=generator)
    own = 0.3 * torch.randn(40, 9 * outputs, generator=generator)
    values = (shared @ ways + own).view(40, 9, outputs)
    noise = 0.2 + torch.rand(9, outputs, generator=generator)
    order = most_informative(values, noise, 4)
    for number in range(4):
        chosen = order[:number].tolist()
        left = conditioned(values, noise, chosen)
        tried = {i: removed(left, noise, i) for i in {*range(9)} - {*chosen}}
        best = max(tried, key=lambda i: tried[i])
        assert order[number] == best


def test_the_covariance_is_that_of_the_outputs() -> None:
    """Of ratings under a linearised posterior: the draws agree with J S J', text by text."""
    posterior = fitted("rating")
    examples = posterior.encode({"text": table("rating", 20, seed=5)["text"]}, labelled=False)
    drawn = posterior.predict(examples, samples=4000, keep_samples=True)
    exact = posterior.predict(examples, method="exact")
    assert torch.allclose(drawn.means.var(0), exact.epistemic, rtol=0.2)


@pytest.mark.parametrize("kind", ["class", "rating"])
def test_a_batch_is_not_the_same_text_twelve_times(kind: str) -> None:
    posterior, texts = fitted(kind), table(kind, 20, seed=5)["text"]
    ranked = posterior.predict(texts).flag(1.0, by="epistemic").tolist()
    # Words that are not known are one token: these differ, and the network sees one text.
    alike = [f"unknown{i} {texts[ranked[0]]}" for i in range(12)]
    every = [*alike, *(texts[i] for i in ranked[1:])]
    certain = posterior.predict(every).epistemic
    assert certain[:12].unique().numel() == 1
    queue = posterior.queue(every, 6)
    assert sum(row < 12 for row in queue.rows.tolist()) == 1
    assert len({*queue.rows.tolist()}) == 6


@pytest.mark.parametrize("by", BY)
def test_learnt_texts_and_copies_are_left_out(by: By) -> None:
    examples = tiny_examples(60)
    posterior = fit(tiny_model(()), "normal", examples, **QUICK)
    texts = [*examples.texts[:8], "w20 w21", "W20  w21", "w33 w21", "w20 w21"]
    queue = posterior.queue(texts, np.int64(5), by=by, seed=np.int64(0))  # type: ignore[arg-type]
    assert sorted(queue.rows.tolist()) == [8, 10]
    assert (queue.learnt, queue.copies) == (8, 2)
    assert len(queue.reasons) == len(queue.texts) == 2
    later = posterior.update({"text": ["w20 w21", "w7"], "label": [0, 1]}, **QUICK)
    assert later.queue(texts, 5, by=by).rows.tolist() == [10]
    with pytest.raises(DataError, match="texts: all of the 1 have been learnt"):
        later.queue(["w7"], by=by)


def test_what_was_learnt_is_known_after_saving_and_of_every_component(tmp_path: Path) -> None:
    path = backbone_in(tmp_path / "tiny")
    backbone, tokenizer = load_backbone(str(path), "cpu")
    model = bh.Model(bh.RandomPEFT(backbone, (), bh.Head(2), tokenizer))
    texts = [f"w{i} w{5 + i % 2} w{k}" for i in range(10, 45) for k in (6, 7)]
    data = {"text": texts, "label": [i // 2 % 2 for i in range(70)]}
    posterior = fit(model, "laplace", data, components=2, **QUICK)
    posterior.save(tmp_path / "run")
    after = bh.Posterior.load(tmp_path / "run", str(path), device="cpu")
    for one in (posterior, after, *after.components, after.grow(["2"])):
        assert one.learnt_rows is not None and len(one.learnt_rows) == 70  # those held out too
    point = fit(model, "delta", data, components=1, **QUICK)
    assert point.widen(data).queue([*texts[:3], "w20"], 9).rows.tolist() == [3]


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("by", BY)
def test_every_kind_of_label(kind: str, by: By) -> None:
    posterior, pool = fitted(kind), unlabelled(kind, 30, seed=7)
    queue = posterior.queue(pool, 4, by=by, seed=3)
    assert len({*queue.rows.tolist()}) == len(queue) == 4
    first = next(iter(pool.values()))
    assert queue.texts == tuple(first[i] for i in queue.rows.tolist())
    again = posterior.queue(pool, 4, by=by, seed=3)
    assert torch.equal(queue.rows, again.rows) and queue.reasons == again.reasons
    assert f"4 texts to label, by {by}" in repr(queue)
    if by == "information":
        said = "known to ±" if kind.endswith("rating") else "%)"
        assert all(said in reason for reason in queue.reasons)
        if kind != "noisy rating":  # of which draws of all components are pooled
            assert all("model" in reason for reason in queue.reasons)


def test_long_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more texts than the usual candidates."""
    monkeypatch.setattr("bhpeft_pyro.decisions.queue.CANDIDATES", 20)
    queue = fitted("class").queue(unlabelled("class", 70, seed=7), 30)
    assert len({*queue.rows.tolist()}) == 30


def test_typical_texts_are_of_different_clusters() -> None:
    """Of two groups of texts, the larger one first, one of each; an outlier is not typical."""
    texts = [f"a{i} w5 w5 w5 w5" for i in range(9)] + [f"b{i} w40 w41 w42" for i in range(5)]
    queue = first_to_label(tiny_model(()), texts, 2)
    first, second = queue.rows.tolist()
    assert first < 9 <= second
    assert queue.reasons == ("typical of 9 texts", "typical of 5 texts")
    more = first_to_label(tiny_model(()), texts, 6)  # than there are different features
    assert len({*more.rows.tolist()}) == 6


def test_groups_that_have_been_learnt_are_left_out() -> None:
    learnt = [f"a{i} w5 w5 w5 w5 w{i}" for i in range(10, 40)]
    data = {"text": learnt, "label": [i % 2 for i in range(30)]}
    posterior = fit(tiny_model(()), "normal", data, **QUICK)
    texts = [f"c{i} w5 w5 w5 w5 w{i}" for i in range(10, 19)]
    texts += [f"b{i} w40 w41 w42 w{i}" for i in range(10, 15)]
    assert posterior.queue(texts, 1, by="typical").rows.item() >= 9
    unknown = posterior.replace(novelty=None, learnt_rows=None)
    assert unknown.queue(texts, 1, by="typical").rows.item() < 9


def test_reasons_say_what_is_unlike_what_was_learnt() -> None:
    posterior = fitted("class")
    queue = posterior.queue([*unlabelled("class", 20, seed=7)["text"], "w2 w2 w2 w2 w2 w2"], 21)
    forecast = posterior.predict(list(queue.texts))
    said = ["unlike what was learnt" in reason for reason in queue.reasons]
    assert said == forecast.unlike().tolist() and any(said)


def test_a_question_is_as_its_choices() -> None:
    model = tiny_model((), outputs=1, likelihood=bh.likelihoods.MultipleChoice())
    queue = first_to_label(model, unlabelled("choice", 20), 3)
    assert len({*queue.rows.tolist()}) == 3


def test_what_is_refused() -> None:
    posterior = fitted("class")
    with pytest.raises(ConfigError, match="n=0"):
        posterior.queue(["w5"], 0)
    with pytest.raises(ConfigError, match="by='entropy'"):
        posterior.queue(["w5"], by="entropy")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a posterior; expected 'typical' or 'random'"):
        first_to_label(tiny_model(()), ["w5"], by="information")
    point = fit(tiny_model(()), "delta", tiny_examples(), components=1, **QUICK)
    with pytest.raises(GuideError, match="a single point estimate does not know"):
        point.queue(["w30 w31"])
    assert len(point.queue(["w30 w31"], by="random")) == 1


def test_the_unit_of_ratings_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, texts = fitted("rating"), table("rating", 60, seed=5)["text"]
    expected = posterior.queue(texts, 8).rows.tolist()
    predict = type(posterior).predict

    def scaled(self: Any, *args: Any, **options: Any) -> Any:
        forecast = predict(self, *args, **options)
        if not options.get("keep_samples"):
            return forecast
        parts = {"means": forecast.means * 1e-3, "sds": forecast.sds * 1e-3}
        return replace(forecast, **parts)

    monkeypatch.setattr(type(posterior), "predict", scaled)
    assert posterior.queue(texts, 8).rows.tolist() == expected
