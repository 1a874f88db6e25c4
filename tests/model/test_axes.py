"""Principal axes: what they do to features, and that a posterior keeps them."""

from __future__ import annotations

import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.model.coordinates import PrincipalAxes
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer


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


def test_a_coordinates_variance_goes_with_the_square_of_its_axis_variance() -> None:
    data = features()
    axes = PrincipalAxes(6)
    axes.fit(data)
    spectrum = torch.linalg.eigvalsh(torch.cov(data.double().mT, correction=0))
    expected = spectrum * (spectrum + 0.01 * spectrum.mean())
    got = axes(data).double().var(0, correction=0)
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
    pooled = torch.cat(
        [
            plain.features(
                bh.data.encode([row], tiny_tokenizer(), kind="choice").batches(1).__next__()
            )[0]
            for row in rows
        ]
    )
    assert network.axes is not None
    assert torch.allclose(network.axes.center, pooled.mean(0), atol=1e-5)
