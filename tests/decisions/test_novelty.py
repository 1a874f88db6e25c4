"""What is unlike what was learnt: closed forms, false alarms, rounds, kinds of data, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saves import load
from sklearn.covariance import LedoitWolf, ledoit_wolf_shrinkage
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from tiny import MODEL_TYPES, build
from torch import Tensor
from torch.nn.functional import normalize

import bhpeft_pyro as bh
from bhpeft_pyro.decisions import novelty as module
from bhpeft_pyro.decisions.novelty import Novelty
from bhpeft_pyro.errors import SaveError
from bhpeft_pyro.posterior.saving import FILE
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

QUICK: dict[str, Any] = {"max_steps": 2, "progress": False, "components": 1}
USUAL = {"text": [f"w{5 + i % 9} w{10 + i % 13} w{6 + i % 7}" for i in range(60)]}
ODD = {"text": [" ".join(f"w{38 + (i + k) % 15 + i // 15}" for k in range(9)) for i in range(30)]}


def table(texts: dict[str, list[str]]) -> dict[str, Any]:
    return texts | {"label": [i % 2 for i in range(len(texts["text"]))]}


def states(count: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of texts of one kind: neighbouring entries are correlated, and unit vectors have a mean."""
    draws = torch.randn(2, count, 12, generator=torch.Generator().manual_seed(seed))
    middle, last = (part + part.roll(1, 1) + shift * part.roll(5, 1).sign() for part in draws)
    return middle, last + 2


def test_distances_are_those_of_scikit_learn() -> None:
    middle, last = (part.double() for part in states(40, 0))
    new, other = (part.double() for part in states(9, 1))
    peer = LedoitWolf().fit(middle.numpy())
    ours = module._Mahalanobis.fitted(middle)(new)
    np.testing.assert_allclose(ours.numpy(), peer.mahalanobis(new.numpy()), rtol=1e-9)
    process = module._Process.fitted(last)
    kernel = RBF(float(process.length / 2) ** 0.5)  # exp(-d^2 / (2 scale^2))
    fitted = GaussianProcessRegressor(kernel, alpha=module._NOISE, optimizer=None).fit(
        normalize(last, dim=1).numpy(), np.zeros(40)
    )
    _, sd = fitted.predict(normalize(other, dim=1).numpy(), return_std=True)
    np.testing.assert_allclose(process(other).numpy(), sd**2, rtol=1e-6)


def test_left_out_distances_are_those_without_the_text() -> None:
    """Under the shrinkage, the size and the length of all."""
    middle, last = (part.double() for part in states(30, 0))
    distance, process = module._Mahalanobis.fitted(middle), module._Process.fitted(last)
    share = float(ledoit_wolf_shrinkage(middle.numpy()))
    size = torch.cov(middle.mT, correction=0).trace() / 12
    units = normalize(last, dim=1)
    for i in range(30):
        rest = torch.arange(30) != i
        covariance = (1 - share) * torch.cov(middle[rest].mT, correction=0)
        inverse = (covariance + share * size * torch.eye(12)).inverse()
        away = middle[i] - middle[rest].mean(0)
        torch.testing.assert_close(distance.left_out[i], away @ inverse @ away)
        kernel = (-torch.cdist(units, units).square() / process.length).exp()
        noisy = kernel[rest][:, rest] + module._NOISE * torch.eye(29)
        along = kernel[i, rest]
        variance = 1 - along @ torch.linalg.solve(noisy, along)
        torch.testing.assert_close(process.left_out[i], variance)


@pytest.mark.parametrize("count", [19, 60])
def test_false_alarms_are_as_rare_as_is_said(count: int) -> None:
    """Over 60 sets of learnt texts; the ranks of 40 new ones are uniform."""
    p = torch.stack(
        [Novelty(*states(count, s), count)._ranked(*states(40, 1000 + s)) for s in range(60)]
    )
    shares = {level: (p <= level).double().mean().item() for level in (0.05, 0.2, 0.5)}
    # The sd over sets of learnt texts is about sqrt(level (1 - level) / count).
    for level, share in shares.items():
        assert share == pytest.approx(level, abs=4 * (level * (1 - level) / count / 60) ** 0.5)
    far = Novelty(*states(60, 0), 60)._ranked(*states(40, 1, shift=4.0))
    assert (far <= 0.05).double().mean() > 0.9


def test_a_sample_of_both_rounds_is_kept_and_a_share_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = Novelty(*states(60, 0), 60), Novelty(*states(30, 1), 30)
    both = old.merged(new)
    assert (len(both.last), both.count) == (90, 90)
    half = old.merged(new, keep=0.5)
    assert (len(half.last), half.count) == (60, 60)
    assert torch.isin(half.last, old.last).all(1).sum() == 30
    anew = old.merged(new, keep=0.0)
    assert torch.equal(anew.last, new.last) and anew.count == 30
    monkeypatch.setattr(module, "MOST", 45)
    some = old._sample(45).merged(new)  # 45 stand for 60
    assert (len(some.last), some.count) == (45, 90)
    assert torch.isin(some.last, old.last).all(1).sum() == 30
    for one, other in zip(some.middle, some.last, strict=True):  # rows stay together
        place = (old.last == other).all(1) | (new.last == other).all(1)[torch.arange(60) % 30]
        assert place.any() and ((old.middle == one).all(1) | place).any()


def test_texts_of_all_rounds_are_kept_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 rounds of 40 texts a sample of 200; then a half is forgotten, and a round outweighs."""
    monkeypatch.setattr(module, "MOST", 200)
    whole, rounds = None, []
    for number in range(30):
        new = Novelty(*states(40, number), 40)
        rounds.append(new.last)
        whole = new if whole is None else whole.merged(new)
    assert whole is not None and (len(whole.last), whole.count) == (200, 1200)
    counts = [int(torch.isin(last[:, 0], whole.last[:, 0]).sum()) for last in rounds]
    assert sum(counts) == 200
    early, late = sum(counts[:15]), sum(counts[15:])
    assert early == pytest.approx(late, abs=3 * 200**0.5)  # three sds
    assert max(counts) <= 6.7 + 4 * 6.7**0.5
    half = whole.merged(Novelty(*states(200, 99), 200), keep=0.5)
    assert (len(half.last), half.count) == (200, 800)
    assert int(torch.isin(whole.last[:, 0], half.last[:, 0]).sum()) == 150  # which stand for 600


def test_copies_count_once() -> None:
    """Left out, a text that is still there would look well known, and others novel."""
    once = Novelty(*states(60, 0), 60)
    twice = once.merged(Novelty(once.middle + 1e-5, once.last * 1.001, 60))
    assert (len(twice.last), twice.count) == (60, 60)
    new = states(40, 1)
    torch.testing.assert_close(twice._ranked(*new), once._ranked(*new), atol=0.02, rtol=0)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_states_are_means_of_hidden_states(model_type: str) -> None:
    """Hugging Face's own, without PEFT weights, whatever the other texts are."""
    backbone = build(model_type)
    network = bh.RandomPEFT(backbone, bh.presets.lora(), bh.Head(2), tiny_tokenizer())
    texts = bh.Model(network).encode_texts(["w5 w9", "w6 w7 w8 w12 w20", "w30"])
    middle, last = module.states_of(network, texts)
    for i in range(3):
        one = network.accepted(texts.tokens.padded(torch.tensor([i])))
        with torch.no_grad():
            hidden = backbone(**one, output_hidden_states=True).hidden_states
        close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(middle[i], hidden[1][0].mean(0), **close)
        torch.testing.assert_close(last[i], hidden[2][0].mean(0), **close)


def test_weights_and_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = bh.fit(tiny_model(), "laplace", table(USUAL), **QUICK)
    p = posterior.predict(ODD).novelty
    assert p is not None and p.dtype == torch.float64
    moved = bh.fit(tiny_model(), "normal", table(USUAL), max_steps=30, lr=0.1, progress=False)
    assert torch.equal(moved.predict(ODD).novelty, p)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "PART", 7)
    parts = posterior.predict({"text": ODD["text"][::-1]}, max_rows=2)
    torch.testing.assert_close(parts.novelty, p.flip(0))  # type: ignore[union-attr]


def test_another_kind_of_texts_is_told_until_it_is_learnt() -> None:
    first = bh.fit(tiny_model(), "laplace", table(USUAL), **QUICK)
    share = first.predict(ODD).unlike().double().mean()
    assert share > 0.8
    later = {"text": [f"{text} w{40 + i % 3}" for i, text in enumerate(ODD["text"])]}
    second = first.update(table(ODD))
    assert second.predict(later).unlike().double().mean() < 0.2
    assert second.predict(USUAL).unlike().double().mean() < 0.2
    anew = first.update(table(ODD), keep=0.0)
    assert anew.predict(USUAL).unlike().double().mean() > 0.9
    assert first.assess(ODD).novel == pytest.approx(share)
    assert "unlike what was learnt" in str(first.assess(ODD))


def test_what_a_forecast_costs_and_does_without() -> None:
    posterior = bh.fit(tiny_model(), "laplace", table(USUAL), **QUICK)
    bare = posterior.replace(novelty=None)
    assert posterior.predict(ODD).passes == bare.predict(ODD).passes + 1  # type: ignore[operator]
    assert bare.predict(ODD).novelty is None and bare.assess(ODD).novel is None
    few = bh.fit(tiny_model(), "laplace", tiny_examples(18), **QUICK)
    assert few.novelty is not None and few.predict(ODD).novelty is None
    assert few.update(tiny_examples(1, seed=1)).predict(ODD).novelty is not None


CHOICES = {
    "question": [f"w{5 + i % 7} w{9 + i % 11}" for i in range(30)],
    "choices": [[f"w{9 + i % 5}", f"w{11 + i % 8} w12", "w30"][: 2 + i % 2] for i in range(30)],
    "answer": [i % 2 for i in range(30)],
}


def test_questions_are_the_means_over_their_choices() -> None:
    network = bh.RandomPEFT(tiny_backbone(), bh.presets.lora(), bh.Head(1), tiny_tokenizer())
    model = bh.Model(network, None, bh.likelihoods.MultipleChoice())
    posterior = bh.fit(model, "laplace", CHOICES, **QUICK)
    assert len(posterior.predict(CHOICES).novelty) == 30  # type: ignore[arg-type]
    examples = posterior.encode(CHOICES)
    middle, _ = module.states_of(network, examples)
    sequences = module.states_of(network, replace(examples, counts=None))[0]
    parts = sequences.split(examples.counts.tolist())  # type: ignore[union-attr]
    torch.testing.assert_close(middle, torch.stack([part.mean(0) for part in parts]))


def test_it_is_saved_and_goes_on(tmp_path: Path) -> None:
    first = bh.fit(tiny_model(), "laplace", table(USUAL), **QUICK | {"components": 2})
    again = load(first.save(tmp_path / "a"))
    p = first.predict(ODD).novelty
    assert torch.equal(again.predict(ODD).novelty, p)  # type: ignore[arg-type]
    rounds = [posterior.update(table(ODD)).predict(USUAL) for posterior in (first, again)]
    assert torch.equal(rounds[0].novelty, rounds[1].novelty)  # type: ignore[arg-type]
    bare = load(first.replace(novelty=None).save(tmp_path / "b"))  # as of an earlier version
    assert bare.novelty is None
    assert bare.update(table(ODD)).novelty is None  # what was learnt before is not known
    made = Novelty.of(bare.model, bare.encode(table(USUAL)))
    assert torch.equal(bare.replace(novelty=made).predict(ODD).novelty, p)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["middle", "last"])
def test_states_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    posterior = bh.fit(tiny_model(), "laplace", table(USUAL), **QUICK)
    assert posterior.novelty is not None
    states = {"middle": posterior.novelty.middle, "last": posterior.novelty.last}
    wrong = {"middle": states["middle"][1:], "last": states["last"][:, 1:]}[name]
    broken = Novelty(**{**states, name: wrong}, count=60)
    with pytest.raises(ValueError, match="states have shapes"):
        broken.check(posterior.model)
    posterior.replace(novelty=broken).save(tmp_path / "a")
    with pytest.raises(SaveError):
        load(tmp_path / "a")


def test_what_is_made_of_a_posterior_keeps_it() -> None:
    point = bh.fit(tiny_model(), "delta", table(USUAL), **QUICK | {"components": 2})
    wide = point.widen(table(USUAL))
    assert wide.novelty is point.novelty is not None
    assert point.replace(novelty=None).widen(table(USUAL)).novelty is not None
    assert wide.grow(["2"]).novelty is wide.novelty
    distilled = wide.distill(tiny_examples(60, seed=1), epochs=1, progress=False)
    assert distilled.novelty is wide.novelty
    forecast = distilled.predict(ODD)
    assert (forecast.method, forecast.passes) == ("student", 2)
    assert distilled.student.report.passes == 4  # type: ignore[union-attr]
    one = point.components[0]
    made = bh.Posterior.of(one.model, one.guide, table(USUAL))
    assert torch.equal(made.predict(ODD).novelty, forecast.novelty)  # type: ignore[arg-type]
    assert bh.Posterior.of(one.model, one.guide).novelty is None


def test_the_nearest_learnt_text_is_the_one_with_the_most_similar_states(tmp_path: Path) -> None:
    keep = {**QUICK, "keep_texts": True}
    first = bh.fit(tiny_model(), "laplace", table(USUAL), **keep)
    asked = [*USUAL["text"][:7], "w9 w30 w31", "w40"]
    near = first.predict(asked)
    assert list(near.nearest)[:7] == asked[:7]  # type: ignore[arg-type]
    _, learnt = module.states_of(first.model.network, first.encode(USUAL, labelled=False))
    _, last = module.states_of(first.model.network, first.encode(asked[7:], labelled=False))
    for row, text in zip(last, near.nearest[7:], strict=True):  # type: ignore[index]
        likeness = [torch.cosine_similarity(row, other, dim=0).item() for other in learnt]
        best = max(range(60), key=likeness.__getitem__)
        assert likeness[USUAL["text"].index(text)] == pytest.approx(likeness[best])
    assert [*near.table()["nearest"]] == [*near.nearest]  # type: ignore[arg-type]
    assert near.joined([near, near]).nearest == (*near.nearest, *near.nearest)  # type: ignore[misc]
    # The next round keeps them too, and the file has them; forgetting loses a share of them.
    second = load(first.save(tmp_path / "a")).update(table(ODD))
    assert second.predict([ODD["text"][3], asked[0]]).nearest == (ODD["text"][3], asked[0])
    assert second.novelty is not None
    kept = set(second.novelty.texts)
    assert {*USUAL["text"]} < kept and len(kept) == len(second.novelty.last)
    assert f"texts: {len(kept)} learnt ones are kept here, and in files" in repr(second)
    forgot = first.update(table(ODD), keep=0.5).novelty
    assert forgot is not None and len({*USUAL["text"]} & {*forgot.texts}) == 30


def test_texts_are_kept_only_where_it_is_asked_for(tmp_path: Path) -> None:
    first = bh.fit(tiny_model(), "laplace", table(USUAL), **QUICK)
    assert first.novelty is not None and first.novelty.texts == ()
    assert first.predict(ODD).nearest is None and "nearest" not in first.predict(ODD).table()
    saved_file = first.save(tmp_path) / FILE
    assert USUAL["text"][0].encode() not in saved_file.read_bytes()
    later = first.update(table(ODD), keep_texts=True)  # of earlier rounds there are none
    assert set(later.predict(USUAL).nearest) <= set(ODD["text"])  # type: ignore[arg-type]
    later.save(saved_file.parent, overwrite=True)
    assert ODD["text"][0].encode() in saved_file.read_bytes()
    lost = later.update(table({"text": ["w50 w51", "w52 w53"]}), keep_texts=False, keep=0.0)
    assert lost.novelty is not None and lost.novelty.texts == ()
    assert later.novelty is not None
    with pytest.raises(ValueError, match=r"\d+ texts for \d+ states"):
        replace(later.novelty, texts=later.novelty.texts[1:]).check(later.model)
