"""A Bayesian linear regression, its data and its exact posterior."""

import pytest
from exact import Exact, own_network, random_texts, ratings, regression

import bhpeft_pyro as bh


@pytest.fixture(scope="module")
def model() -> bh.Model:
    return regression(own_network(), noise=2.0)


@pytest.fixture(scope="module")
def data(model: bh.Model) -> bh.data.Examples:
    return ratings(model.network, random_texts(40), seed=3, noise=2.0)


@pytest.fixture(scope="module")
def exact(model: bh.Model, data: bh.data.Examples) -> Exact:
    return Exact.of(model, data)
