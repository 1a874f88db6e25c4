"""Texts of two rounds: of one kind or not, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from bhpeft_pyro.decisions.novelty import Novelty
from bhpeft_pyro.decisions.two_samples import separation


def around(count: int, *means: float, seed: int = 0) -> Novelty:
    """States near the circle, at Normal heights around the means in turn."""
    heights = 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(seed))
    heights += torch.tensor(means).repeat(count)[:count]
    states = torch.stack([torch.ones(count), heights], 1)
    return Novelty(states, states, count)


@pytest.mark.parametrize("distance", [0.0, 0.1, 0.2, 1.0])
def test_it_is_the_auroc_of_two_normals(distance: float) -> None:
    first, second = around(600, 0.0), around(400, distance, seed=1)
    expected = Normal(0.0, 1.0).cdf(torch.tensor(distance / 0.1 / 2**0.5)).item()
    assert separation(first, second) == pytest.approx(expected, abs=0.03)


def test_a_kind_among_others_is_told_from_these_alone() -> None:
    assert separation(around(800, -1.0, 1.0), around(200, 1.0, seed=1)) == pytest.approx(
        0.75, abs=0.03
    )


def test_the_size_of_a_side_does_not_matter() -> None:
    few, many = around(40, 0.0, seed=1), around(1000, 0.0)
    assert separation(many, few) == pytest.approx(0.5, abs=0.1)
    assert separation(many, around(40, 1.0)) == pytest.approx(1.0, abs=1e-3)


def test_copies_are_of_one_kind() -> None:
    assert separation(around(100, 0.0), around(100, 0.0)) == 0.5


def test_few_texts_tell_nothing() -> None:
    enough, few = around(19, 0.0), around(18, 1.0)
    assert separation(enough, few) is None and separation(few, enough) is None
    assert separation(enough, around(19, 1.0)) == pytest.approx(1.0)


def test_lengths_of_states_do_not_matter() -> None:
    def times(novelty: Novelty, factor: float) -> Novelty:
        states: Tensor = factor * novelty.last
        return Novelty(states, states, novelty.count)

    first, second = around(200, 0.0), around(200, 0.1, seed=1)
    assert separation(times(first, 50.0), second) == pytest.approx(separation(first, second))
