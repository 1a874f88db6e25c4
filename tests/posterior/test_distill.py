"""Students of posteriors: how near they come, rounds, files, exports, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from exact import KnownNoise
from saves import load
from students import QUICK, fitted, table, unlabelled, with_student

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.model.likelihoods import Likelihood
from bhpeft_pyro.testing import tiny_classifier, tiny_examples, tiny_model, tiny_tokenizer

TEXTS = unlabelled("class", 20, seed=5)["text"]
PLAIN: dict[str, Any] = {"progress": False}


# How near it comes


def test_a_head_alone_becomes_the_mixture() -> None:
    """Outputs are linear in its weights, so one network can have the mean of both."""
    model = bh.Model(tiny_model((), 1).network, dist.Normal(0.0, 0.7), KnownNoise(0.5))
    posterior = bh.fit(model, "laplace", table("rating"), components=2, **QUICK)
    first, second = (part.weights()["head.weight"] for part in posterior.components)
    assert (first - second).abs().max() > 0.01
    done = posterior.distill(unlabelled("rating"), epochs=150, lr=0.05, batch_size=64, **PLAIN)
    assert done.student is not None and done.student.report.divergence < 2e-6
    assert done.student.report.start_divergence > 1e-4
    means = [done.predict(TEXTS, method=method).mean for method in ("student", "exact")]
    torch.testing.assert_close(*means, atol=5e-3, rtol=0)


def test_one_point_estimate_is_its_own_student() -> None:
    """It has no epistemic uncertainty to learn either, and no rank correlation."""
    likelihood = fitted("rating").model.likelihood
    model = tiny_model((), 1, likelihood=likelihood)
    posterior = bh.fit(model, "delta", table("rating"), components=1, **QUICK)
    done = posterior.distill(unlabelled("rating"), epochs=1, lr=1e-6, **PLAIN)
    assert done.student is not None
    report = done.student.report
    assert abs(report.divergence) < 1e-6 and report.difference < 1e-3
    assert report.rank_correlation is None
    one, other = done.predict(TEXTS), posterior.predict(TEXTS)
    torch.testing.assert_close(one.total, other.total, atol=1e-3, rtol=1e-3)
    assert one.epistemic.max() < 1e-4


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_it_comes_nearer_than_a_component_is(guide: str) -> None:
    report = with_student("class", guide).student.report  # type: ignore[union-attr]
    assert report.best_epoch > 0 and report.divergence < report.start_divergence
    assert report.texts == 176 and report.held_out == 44
    assert report.rank_correlation is not None and report.rank_correlation > 0.3
    assert report.nll is None


def test_labels_are_scored_and_not_learnt() -> None:
    posterior = fitted("class")
    known, wrong = table("class", 80, seed=3), table("class", 80, seed=3)
    known["label"] = posterior.predict(known["text"]).label.tolist()
    wrong["label"] = [(label + 1) % 3 for label in known["label"]]
    made = [posterior.distill(data, epochs=1, **PLAIN).student for data in (known, wrong)]
    assert made[0] is not None and made[1] is not None
    for name, value in made[0].weights.items():
        assert torch.equal(value, made[1].weights[name])
    reports = [student.report for student in made]
    assert reports[0].nll is not None and reports[1].nll is not None
    assert reports[0].nll < reports[1].nll
    assert reports[0].posterior_nll is not None


class Exposed(Likelihood):
    """Counts by a column of their own."""

    kind = "rating"
    outputs = 1
    columns = ("exposure",)

    def distribution(self, outputs: Any) -> Any:
        return dist.Poisson(outputs.extra["exposure"] * outputs.values[..., 0].clamp(max=5).exp())


def test_columns_of_a_likelihood() -> None:
    data = table("rating") | {"exposure": [1.0 + i % 3 for i in range(60)]}
    data["label"] = [float(i % 4) for i in range(60)]
    texts = unlabelled("rating") | {"exposure": [2.0] * 220}
    model = tiny_model(outputs=1, likelihood=Exposed(), aligned=True)
    posterior = bh.fit(model, "laplace", data, components=1, **QUICK)
    done = posterior.distill(texts, epochs=1, **PLAIN)
    assert done.predict(texts).method == "student"
    half = texts | {"exposure": [1.0] * 220}
    torch.testing.assert_close(2 * done.predict(half).mean, done.predict(texts).mean)


# Rounds


def test_a_student_of_another_round_is_refused() -> None:
    one, other = with_student(), with_student("class", "normal")
    strange = one.replace(student=other.student)
    for method in ("student", None):
        with pytest.raises(
            ConfigError, match=f"of round {other.report.id}, this is round {one.report.id}"
        ):
            strange.predict(TEXTS, method=method)
    with pytest.raises(ConfigError, match="student: it is of round"):
        strange.weights("student")
    assert strange.predict(TEXTS, method="exact").method == "exact"
    with pytest.raises(ConfigError, match=r"has no student; posterior.distill\(texts\) makes one"):
        fitted().predict(TEXTS, method="student")


def test_labels_that_cannot_be_read_are_left_out() -> None:
    texts = unlabelled("class")
    with pytest.warns(bh.data.LabelWarning, match="labels are not read: column 'label', row 0"):
        done = fitted("class").distill(texts | {"label": ["x"] * 220}, epochs=1, **PLAIN)
    assert done.student is not None and done.student.report.nll is None


def test_new_labels_have_none_either() -> None:
    for posterior in (with_student(), with_student().components[0]):
        grown = posterior.grow(["3"])
        assert grown.student is None
        assert grown.predict(TEXTS).method == "exact"
        assert grown.predict(TEXTS).probabilities.shape == (20, 4)
    single = with_student("class", "normal").components[0]
    done = single.distill(TEXTS_TO_LEARN, epochs=1, **PLAIN)
    assert done.student is not None and done.grow(["3"]).student is None


TEXTS_TO_LEARN = unlabelled("class", 60)


def test_the_posterior_itself_does_not_change() -> None:
    posterior = fitted("class")
    before = [copy.deepcopy(part.guide.state_dict()) for part in posterior.components]
    exact = posterior.predict(TEXTS)
    done = posterior.distill(unlabelled("class", 260), epochs=1, **PLAIN)
    assert posterior.student is None and exact.method == "exact"
    for part, state in zip(posterior.components, before, strict=True):
        for name, value in part.guide.state_dict().items():
            assert torch.equal(value, state[name]), name
    assert torch.equal(posterior.predict(TEXTS).probabilities, exact.probabilities)
    assert done.predict(TEXTS, method="exact").passes == exact.passes


def test_an_interrupt_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted("class")
    before = posterior.predict(TEXTS)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("bhpeft_pyro.posterior.distill.copied", interrupted)
        with pytest.raises(KeyboardInterrupt):
            posterior.distill(unlabelled("class", 260), epochs=1, progress=True)
    after = posterior.predict(TEXTS)
    assert (after.method, posterior.student) == (before.method, None)
    assert torch.equal(after.probabilities, before.probabilities)
    assert posterior.distill(TEXTS_TO_LEARN, epochs=1, **PLAIN).student is not None


def test_what_cannot_be_distilled() -> None:
    posterior = fitted()
    with pytest.raises(DataError, match="texts: got 49 different texts; expected at least 50"):
        posterior.distill(unlabelled("class", 49), **PLAIN)
    with pytest.raises(DataError, match="got 1 different text;"):
        posterior.distill(["w5"], **PLAIN)
    for wrong in ({"epochs": 0}, {"batch_size": -1}, {"lr": 0.0}, {"seed": 1.5}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
            posterior.distill(TEXTS_TO_LEARN, **{**PLAIN, **wrong})


# Files


def test_a_saved_student_predicts_the_same(tmp_path: Path) -> None:
    for kind in ("class", "choice"):
        posterior = with_student(kind)
        loaded = load(posterior.save(tmp_path / kind))
        assert loaded.student.report == posterior.student.report  # type: ignore[union-attr]
        texts = unlabelled(kind, 9, seed=5)
        for method in ("student", "exact"):
            one, other = (each.predict(texts, method=method) for each in (posterior, loaded))
            assert torch.equal(one.total, other.total) and torch.equal(
                one.epistemic, other.epistemic
            )
        assert loaded.predict(texts).method == "student"


# Exports


@pytest.fixture(scope="module")
def classifier() -> bh.Posterior:
    network = bh.RandomPEFT(
        tiny_classifier(), bh.presets.lora(rank=2), bh.ClassifierHead(2), tiny_tokenizer()
    )
    posterior = bh.fit(bh.Model(network), "laplace", tiny_examples(60), components=2, **QUICK)
    return posterior.distill(TEXTS_TO_LEARN, epochs=2, lr=0.01, **PLAIN)


def test_a_student_becomes_a_plain_classifier(classifier: bh.Posterior, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    forecast = classifier.predict(TEXTS)
    assert forecast.method == "student"
    (batch,) = classifier.encode(TEXTS, labelled=False).batches(20)
    with torch.no_grad():
        logits = classifier.merge("student").eval()(**batch.inputs).logits
    torch.testing.assert_close(logits.softmax(1), forecast.probabilities, atol=1e-5, rtol=1e-5)
    apart = classifier.predict(TEXTS, method="exact").probabilities
    assert not torch.allclose(apart, forecast.probabilities, atol=1e-5)
    classifier.to_peft(tmp_path, "student")
    adapted = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch.inputs).logits, logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="has no student"):
        classifier.replace(student=None).merge("student")
    with classifier.bind("student") as backbone, torch.no_grad():
        assert torch.isfinite(backbone(**batch.inputs).logits).all()
