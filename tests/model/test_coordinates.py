"""Coordinates of the weights, and principal axes of the features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import Memory
from saves import load
from tiny import drawn
from torch import Tensor
from transformers import BertModel

import bhpeft_pyro as bh
from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.model import coordinates
from bhpeft_pyro.model.coordinates import PrincipalAxes
from bhpeft_pyro.model.fisher import diagonal, scores
from bhpeft_pyro.peft import LoRA
from bhpeft_pyro.testing import tiny_backbone, tiny_batch, tiny_examples, tiny_model, tiny_tokenizer
from bhpeft_pyro.training.initialization import _eigen, align

PRESETS = {
    "bh_peft": bh.presets.bh_peft,
    "mam": bh.presets.mam,
    "unipelt": bh.presets.unipelt,
    "lora": bh.presets.lora,
}


def aligned(kinds: Any = None, texts: int = 32) -> bh.Model:
    model = tiny_model(bh.presets.bh_peft() if kinds is None else kinds, aligned=True)
    batches = [batch for _, batch in tiny_examples(texts).by_length(8)]
    model.network.align(batches)
    torch.manual_seed(0)
    align(model, batches)
    return model


@pytest.mark.parametrize("preset", PRESETS)
def test_they_only_rename_the_weights(preset: str) -> None:
    """The transformer under W(Z) is the one that raw weights W give."""
    model = aligned(PRESETS[preset]())
    values = drawn(model.sites, 3)
    coordinates = model.network.coordinates
    assert bool(coordinates.fitted)
    weights = coordinates(values)
    raw = bh.RandomPEFT(tiny_backbone(), PRESETS[preset](), bh.Head(2))
    assert raw.axes is not None and model.network.axes is not None
    raw.axes.load_state_dict(model.network.axes.state_dict())
    assert not bool(raw.coordinates.fitted)
    anchors = {s.name: s.anchor for s in raw.attachment.sites if s.anchor is not None}
    away = {name: w - anchors[name] if name in anchors else w for name, w in weights.items()}
    batch = tiny_batch(4)
    torch.testing.assert_close(model.network(values, batch), raw(away, batch), atol=1e-4, rtol=1e-4)
    changed = {name for name in values if not torch.equal(values[name], weights[name])}
    assert changed == {*coordinates.outer, *anchors}


def test_zero_is_the_frozen_transformer() -> None:
    model = aligned(bh.presets.lora())
    head = drawn(model.sites, 3)
    zero = {n: v if n.startswith("head") else torch.zeros_like(v) for n, v in head.items()}
    batch = tiny_batch(4)
    features = model.network.features(batch)
    expected = torch.einsum("bd,sod->sbo", features, head["head.weight"])
    expected = expected + head["head.bias"][:, None]
    torch.testing.assert_close(model.network(zero, batch), expected, atol=1e-5, rtol=1e-4)


def test_a_prefix_that_is_off_reads_little() -> None:
    """Its positions draw attention off the text, whatever their values are: as large as the
    text's own, keys did much harm on films (a squared error of 2.30, not 2.07; one seed)."""
    model = aligned(bh.presets.prefix(4))
    network, batch = model.network, tiny_batch(16)
    start = {site.name: site.init()[None] for site in network.sites}
    weights = network.coordinates(start)
    assert not weights["prefix.value"].any() and weights["prefix.key"].any()
    none = {**start, "prefix.key": start["prefix.key"] - weights["prefix.key"]}
    frozen = network.features(batch)
    with network.bind(start):
        off = network.features(batch)
    with network.bind(none):
        blank = network.features(batch)
    assert (off - blank).norm() < 0.2 * (blank - frozen).norm()


def test_one_unit_is_one_nat() -> None:
    """Under Z ~ N(0, (unit / 50)^2) predictions move by 1/2500 nats a site and layer: measured as
    a KL divergence by brute force, with the heads that `align` assumes."""
    model = aligned(bh.presets.lora(rank=2), texts=1024)
    network = model.network
    batch = Batch(next(tiny_examples(32).batches(32)).inputs)
    torch.manual_seed(1)
    draws, small = 200, 0.02
    head = drawn([site for site in network.sites if site.name.startswith("head")], draws)
    zero = {s.name: torch.zeros(draws, *s.shape) for s in network.attachment.sites} | head
    with torch.no_grad():
        frozen = network(zero, batch).log_softmax(-1)
        name = "lora.value.B"  # tiny queries do so little that they are not scaled up as far
        site = next(site for site in network.sites if site.name == name)
        for layer in range(2):
            moved = dict(zero)
            moved[name] = torch.zeros(draws, *site.shape)
            noise = torch.randn(draws, *site.shape[1:])
            moved[name][:, layer] = small * site.unit[layer] * noise
            now = network(moved, batch).log_softmax(-1)
            kl = (frozen.exp() * (frozen - now)).sum(-1).mean().item()
            assert kl / small**2 == pytest.approx(1.0, rel=0.35), layer


@pytest.mark.parametrize("kinds", [bh.presets.lora(rank=2), bh.presets.prefix(2)])
def test_the_axes_make_the_fisher_information_diagonal(kinds: Any) -> None:
    """With F = left x right / trace(right) of a known shape: F in Z is diagonal, axes weigh as
    their eigenvalues do, and half its trace at unit sds is a nat."""
    model = tiny_model(kinds, aligned=True)
    coordinates = model.network.coordinates
    assert coordinates.outer
    sites = {site.name: site for site in model.network.sites}
    generator = torch.Generator().manual_seed(0)

    def moment(size: int, strength: float) -> Tensor:
        roots = torch.randn(2, 3 * size, size, generator=generator)
        return strength * roots.mT @ roots / (3 * size)

    lefts = {name: moment(16, 50.0) for name in coordinates.outer}
    rights = {name: moment(2, 7.0) for name in coordinates.outer}
    coordinates.fit_axes(lefts, rights)
    for name in coordinates.outer:
        left = coordinates.get_buffer(f"{name}.left".replace(".", "/"))
        right = coordinates.get_buffer(f"{name}.right".replace(".", "/"))
        inner = left.mT @ lefts[name] @ left
        outer = right.mT @ rights[name] @ right
        outer = outer / outer.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        for part in (inner, outer):
            diagonal_part = torch.diag_embed(part.diagonal(dim1=-2, dim2=-1))
            torch.testing.assert_close(part, diagonal_part, atol=1e-3 * float(part.max()), rtol=0)
        fisher = (
            inner.diagonal(dim1=-2, dim2=-1)[..., None]
            * outer.diagonal(dim1=-2, dim2=-1)[..., None, :]
        )
        nats = 0.5 * (fisher * sites[name].unit ** 2).sum((-1, -2))
        torch.testing.assert_close(nats, torch.ones(2), rtol=1e-3, atol=0.0)
        weight = left.square().sum(1)
        strength = torch.linalg.eigvalsh(lefts[name]).square()
        torch.testing.assert_close(
            weight / weight.sum(-1, keepdim=True),
            strength / strength.sum(-1, keepdim=True),
            atol=1e-4,
            rtol=1e-2,
        )


@pytest.mark.parametrize(("width", "texts"), [(256, 12), (16, 32)])
def test_anchors_whiten_the_leading_directions_of_the_gradients(
    width: int, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a wide input side a matrix (in, in) was made: for Llama 2 GB a site, and minutes."""
    config = tiny_backbone().config
    config.hidden_size = width
    kinds = (bh.peft.LoRA(("ffn_in",), rank=2),)
    network = bh.RandomPEFT(BertModel(config), kinds, bh.Head(2, principal=False), tiny_tokenizer())
    model = bh.Model(network)
    seen: list[Tensor] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        for gradients in scores(*args, **kwargs):
            seen.append(gradients["lora.ffn_in.A"])
            yield gradients

    monkeypatch.setattr("bhpeft_pyro.training.initialization.scores", watched)
    batches = [tiny_batch(texts // 4, seed=seed) for seed in range(4)]
    with Memory() as memory:
        align(model, batches)
    assert width < 100 or memory.largest < width**2
    g = torch.cat(seen[:4]).double()  # those of the input side come first
    anchor = network.coordinates.get_buffer("lora/ffn_in/A/anchor").double()
    moment = torch.einsum("nlab,nlac->lbc", g, g)
    white = anchor @ moment @ anchor.mT
    scale = white.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    torch.testing.assert_close(white / scale, torch.eye(2).expand(2, 2, 2).double(), **NEAR)
    rows = torch.linalg.qr(anchor.mT)[0]
    most = torch.linalg.eigvalsh(moment)[..., -2:].sum(-1)
    torch.testing.assert_close(torch.einsum("lbr,lbc,lcr->l", rows, moment, rows), most, **NEAR)
    site = next(site for site in network.attachment.sites if site.name == "lora.ffn_in.A")
    assert site.anchor is not None  # the random one, of which the size is kept
    size = site.anchor.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(anchor.flatten(1).norm(dim=1), size, **NEAR)


NEAR: dict[str, float] = {"atol": 1e-4, "rtol": 1e-4}


@pytest.mark.parametrize(
    ("kinds", "guide"),
    [
        (bh.presets.bh_peft(), "normal"),
        (bh.presets.unipelt(), "normal"),
        (bh.presets.lora(rank=3, alpha=5.0), "normal"),
        (bh.presets.lora(rank=2), "laplace"),  # which does not set coordinates
    ],
)
def test_a_posterior_keeps_them(kinds: Any, guide: str, tmp_path: Path) -> None:
    """Kinds, axes and coordinates: the first round sets them, later ones and a saved file do not
    change them."""
    model = tiny_model(kinds, aligned=True)
    quick: Any = {"max_steps": 2, "components": 1, "progress": False}
    first = bh.fit(model, guide, tiny_examples(16), **quick)
    before = {name: value.clone() for name, value in first.model.network.state_dict().items()}
    assert before["axes.fitted"] and bool(before["coordinates.fitted"]) == (guide == "normal")
    assert not torch.equal(before["axes.matrix"], torch.eye(16))
    second = first.update(tiny_examples(16, seed=1), max_steps=2)
    assert second.save(tmp_path / "saved") == tmp_path / "saved"
    random = torch.get_rng_state()
    loaded = load(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), random)
    assert loaded.model.network.kinds == model.network.kinds
    assert str(loaded.report) == str(second.report)
    for posterior in (second, loaded):
        after = posterior.model.network.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in after.items())
    texts = ["w5 w7", "w9"]
    for samples in (3, 0):
        expected = second.predict(texts, samples=samples).probabilities
        assert torch.equal(loaded.predict(texts, samples=samples).probabilities, expected)


@pytest.mark.parametrize("fitted", [False, True])
def test_another_start_is_another_projection_of_the_same_size(fitted: bool) -> None:
    kinds = (*bh.presets.lora(rank=8), *bh.presets.adapter(8), *bh.presets.prefix(8))
    model = aligned(kinds) if fitted else tiny_model(kinds, aligned=True)
    coordinates = model.network.coordinates
    raw = model.network.attachment.sites
    torch.manual_seed(1)
    found = {site.name: coordinates.another(site.name) for site in raw}
    again = {site.name: coordinates.another(site.name) for site in raw}
    inner = [site for site in raw if site.anchor is not None]
    assert {site.name for site in inner} == {
        name for name, away in found.items() if away is not None
    }
    assert {site.role for site in inner} == {"input"} and len(inner) >= 4
    zero = {site.name: torch.zeros(site.shape) for site in raw}
    for site in inner:
        starts = [coordinates(zero | {site.name: each[site.name]}) for each in (found, again)]
        one, other = (weights[site.name] for weights in starts)
        assert site.anchor is not None
        for away in (other, site.anchor):
            across = torch.nn.functional.cosine_similarity(one.flatten(), away.flatten(), 0)
            assert across.abs() < 0.25, site.name  # 4 sds
        sizes = [layers.flatten(1).norm(dim=1) for layers in (one, site.anchor)]
        torch.testing.assert_close(*sizes, rtol=0.3, atol=0.0)


def test_a_guide_starts_at_laplace_sds() -> None:
    """A head's sds, one step into the fit, are those of its Fisher information at the start."""
    model = tiny_model(())
    guide = MeanFieldGuide(model)
    data = tiny_examples(128)
    prior = guide.scales()
    information = diagonal(model, guide.means(), [next(data.batches(128))])
    bh.fit(model, guide, data, max_steps=1, lr=1e-6, progress=False)
    for name, scale in guide.scales().items():
        expected = (prior[name] ** -2 + 128 * information[name]).rsqrt()
        torch.testing.assert_close(scale, expected, rtol=0.1, atol=0.0)
        assert (scale < 0.9 * prior[name]).any()


def test_ratings_do_not_go_astray() -> None:
    """Started at the prior's sds, the first natural-gradient steps of a regression diverged."""
    generator = torch.Generator().manual_seed(0)
    ratings = 2 * torch.randn(64, generator=generator)
    data = {"text": [f"w{5 + i % 20} w{6 + i % 30}" for i in range(64)], "label": ratings.tolist()}
    model = tiny_model((), 1, likelihood=bh.likelihoods.Normal(spread=2.0), aligned=True)
    posterior = bh.fit(model, "normal", data, epochs=15, progress=False)
    spread = ratings.std().item()
    # N(0, spread^2) for every rating, and a nat for each of a few parameters
    baseline = 0.5 * (1 + torch.tensor(2 * torch.pi * spread**2).log().item())
    assert posterior.report.last("loss") < baseline + 0.5


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_other_texts_may_set_the_axes_before_a_fit(guide: str) -> None:
    """Of points the coordinates stay as they are: they train the PEFT weights themselves."""
    few, many = tiny_examples(8), tiny_examples(48, seed=3)
    quick: Any = {"max_steps": 1, "components": 1, "progress": False}

    def chosen(data: bh.data.Examples, texts: Any = None) -> dict[str, Tensor]:
        model = tiny_model(bh.presets.lora(rank=2), aligned=True)
        start = {k: v.clone() for k, v in model.network.coordinates.state_dict().items()}
        if texts is not None:
            model.network.align(model.encode_texts(texts).batches(32))
        bh.fit(model, guide, data, **quick)  # under random heads
        after = model.network.coordinates.state_dict()
        changed = any(not torch.equal(after[name], value) for name, value in start.items())
        assert changed == bool(after["fitted"]) == (guide == "normal")
        return dict(model.network.state_dict())

    assert many.texts is not None
    by_many, given, by_few = chosen(many), chosen(few, list(many.texts)), chosen(few)
    torch.testing.assert_close(given["axes.center"], by_many["axes.center"])
    assert not torch.equal(by_few["axes.matrix"], by_many["axes.matrix"])
    left = "coordinates.lora/query/B/left"
    assert torch.equal(by_few[left], by_many[left]) == (guide != "normal")


def test_coordinates_are_those_under_the_head_that_the_labels_ask_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a posterior every example gets a draw of the fitted head's; other labels, other axes."""
    seen: list[dict[str, Tensor]] = []

    def watched(model: bh.Model, weights: dict[str, Tensor], *rest: Any, **more: Any) -> Any:
        seen.append(weights)
        return scores(model, weights, *rest, **more)

    monkeypatch.setattr("bhpeft_pyro.training.initialization.scores", watched)
    examples = tiny_examples(64)
    assert examples.labels is not None

    def fitted(flipped: bool) -> Tensor:
        seen.clear()
        labels = 1 - examples.labels if flipped else examples.labels
        model = tiny_model(bh.presets.lora(rank=2), aligned=True)
        given = replace(examples, labels=labels)
        bh.fit(model, "normal", given, max_steps=4, progress=False)
        return torch.cat([weights["head.weight"][:, 0] for weights in seen])

    heads, others = fitted(False), fitted(True)
    assert len(heads) == 2 * 64  # for the anchors, and for the axes
    assert heads.flatten(1).std(0).min() > 0.01  # draws, no point
    contrast, other = ((each[:, 0] - each[:, 1]).mean(0) for each in (heads, others))
    across = torch.nn.functional.cosine_similarity(contrast, other, dim=0)
    assert across < -0.5


def test_anchors_of_few_texts_read_what_predictions_depend_on() -> None:
    """Of fewer texts than ranks most directions are rounding errors: divided by the roots of their
    strengths, these would be all that is read."""
    coordinates = tiny_model((LoRA(rank=4, targets=("query",)),), aligned=True).network.coordinates
    layers, rank, width = coordinates.get_buffer("lora/query/A/anchor").shape
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(layers, width, rank).double())[0]
    strength = torch.tensor([1e-17, 3e-17, 0.5, 1.0]).double().expand(layers, rank)
    coordinates.fit_anchors({"lora.query.A": (strength, vectors)})
    anchor = coordinates.get_buffer("lora/query/A/anchor").double()
    along = (anchor @ vectors).square().sum(1) / anchor.square().sum((1, 2)).unsqueeze(-1)
    expected = torch.tensor([1.0, 1.0, 2.0, 1.0]).double() / 5  # as whitened; the rest like the top
    torch.testing.assert_close(along, expected.expand(layers, rank), rtol=1e-4, atol=1e-4)


def test_the_leading_directions_of_few_rows_are_not_those_of_rounding_errors() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 1) @ torch.randn(1, 40) + 1e-3 * torch.randn(4, 40)
    rows[3] = rows[2]  # so one of the four directions is nothing
    strength, vectors = _eigen(rows, 4)
    truth = torch.linalg.svd(rows.double())[2][:3].flip(0)  # ascending, as eigenvalues are
    torch.testing.assert_close(
        (truth @ vectors[:, 1:]).abs(), torch.eye(3).double(), atol=1e-3, rtol=0
    )
    assert strength[0] < 1e-9 * strength[-1]


def test_a_fit_says_which_sites_are_too_wide_for_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinates.Coordinates, "widest", 8)  # below the tiny backbone's width
    with pytest.warns(UserWarning, match=r"lora.query.B.* wider than 8"):
        bh.fit(tiny_model(), "normal", tiny_examples(12), max_steps=2, progress=False)


# Principal axes


def features(rows: int = 200, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(rows, width, generator=generator) @ mixing + 5


def test_coordinates_are_centred_uncorrelated_and_of_mean_square_one() -> None:
    data = features()
    axes = PrincipalAxes(6)
    axes.fit(data)
    turned = axes(data).double()
    covariance = turned.mT @ turned / len(data)
    off = covariance - covariance.diag().diag()
    assert turned.mean(0).abs().max() < 1e-4
    assert off.abs().max() < 1e-3 * covariance.diag().max()
    assert turned.square().mean().item() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(axes.sds, axes(data).std(0, correction=0), rtol=1e-3, atol=1e-4)
    # The variance of a coordinate goes with the square of its axis' variance.
    spectrum = torch.linalg.eigvalsh(torch.cov(data.double().mT, correction=0))
    expected = spectrum * (spectrum + 0.01 * spectrum.mean())
    got = turned.var(0, correction=0)
    assert torch.allclose(got / got.sum(), expected / expected.sum(), atol=1e-5)


def test_without_fit_the_identity_and_few_texts_refused() -> None:
    axes = PrincipalAxes(6)
    assert torch.equal(axes(features()), features())
    with pytest.raises(bh.errors.DataError, match="two or more texts, got 1"):
        axes.fit(features(1))
    with pytest.raises(bh.errors.DataError, match="same features"):
        axes.fit(torch.ones(4, 6))


@pytest.mark.filterwarnings("ignore:.* repeat another's text")
def test_equal_texts_are_refused_whatever_rounding_leaves_of_their_features() -> None:
    """Axes of rounding errors predicted -22,396 for ratings of 1 and 5."""
    data = {"text": ["w5 w20 w7"] * 60, "label": [1.0, 5.0] * 30}
    network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(1), tiny_tokenizer())
    model = bh.Model(network, likelihood=bh.likelihoods.Normal())
    with pytest.raises(bh.errors.DataError, match="all 60 texts have the same features"):
        bh.fit(model, "laplace", data, max_steps=2, progress=False)
    # Another text is enough, whatever its share.
    data["text"][0] = "w5 w20 w8"
    posterior = bh.fit(model, "normal", data, max_steps=20, progress=False)
    assert posterior.predict(["w5 w20 w7"]).mean.sub(3).abs() < 2


def test_places_of_missing_choices_do_not_shift_the_axes() -> None:
    """Three choices beside two: the padding place of the second question must not count."""
    rows = [
        {"question": "w10 w11", "choices": ["w12", "w13", "w14"], "answer": 0},
        {"question": "w20 w21", "choices": ["w22", "w23"], "answer": 1},
    ]
    network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(1), tiny_tokenizer())
    examples = bh.data.encode(rows, tiny_tokenizer(), kind="choice")
    network.align(examples.batches(2))
    plain = bh.RandomPEFT(tiny_backbone(), (), bh.Head(1, principal=False), tiny_tokenizer())
    alone = (bh.data.encode([row], tiny_tokenizer(), kind="choice") for row in rows)
    pooled = torch.cat([plain.features(next(rows.batches(1)))[0] for rows in alone])
    assert network.axes is not None
    assert torch.allclose(network.axes.center, pooled.mean(0), atol=1e-5)
