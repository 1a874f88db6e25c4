"""Simulation-based calibration (Talts et al. 2018), for variational posteriors too (Yao et al.
2018): whether inference finds truths drawn from the prior as often as it says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..data import Examples
from ..data.batch import Batch
from ..errors import ConfigError, DataError
from ..guides import GuideLike, prior_guide
from ..inference.draws import blocks, seeded
from ..inference.initialization import align
from ..inference.passes import Block, Feed, drawn
from ..model.model import Model
from ..model.network import RandomPEFT
from ..posterior.fit import fit
from ..posterior.posterior import Posterior
from ..priors import FunctionSpaceNormal, Prior
from .ranks import Calibration
from .ratios import labels, run

__all__ = ["sbc"]

Guide = Callable[..., Any]
Infer = Callable[[Model, Examples], Posterior | Guide]

_FEWEST = 20  # data sets
_AT = 3  # of the texts stand for all, unless others are given
_ALIGN = 128  # texts, as for a fit


def sbc(
    model: Model,
    infer: GuideLike | Infer,
    texts: object,
    *,
    at: object | None = None,
    sites: str | Sequence[str] = (),
    replications: int = 200,
    draws: int = 99,
    false_alarm: float = 0.01,
    seed: int = 0,
    **options: Any,
) -> Calibration:
    """Draw weights from the prior and labels from the likelihood, infer, and rank the truth.

    The quantities ranked are scalars: the log-likelihood of the labels (a posterior that ignores
    them passes in everything else; Modrák et al. 2023), the predictions at some texts, and, if
    asked for, weights. Draws of a linear guide predict with the linearised network, as it does, and
    the truth with the network itself. Without PEFT weights the transformer runs once on the texts,
    not once a data set. Data sets with labels of one class only are drawn again, which leaves ranks
    uniform.

    Args:
        model: the model; its coordinates are fitted to the texts, if they are not yet.
        infer: what `autoguide` takes, fitted anew to every data set as `options` say; or a
            function of the model and the labelled examples that returns a `Posterior` or a Pyro
            guide.
        texts: the texts that get labels.
        at: texts whose class probabilities, or mean rating, are ranked; by default the first three.
        sites: patterns of sites whose weights are ranked, each by itself.
        replications: R data sets, at least 20.
        draws: L posterior draws for each.
        false_alarm: the probability that an exact posterior fails.
        seed: of everything drawn.
        options: of `fit`, such as `max_steps`.

    Raises:
        ConfigError: numbers that cannot work, a pattern that matches no site, options for an
            `infer` that takes none.
        DataError: the texts cannot be used, or are so few that labels nearly always agree.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> texts = [f"w{i} w{i + 1}" for i in range(5, 25)]
    >>> prior = lambda model, examples: prior_guide(model)     # learns nothing
    >>> found = sbc(tiny_model(()), prior, texts, replications=60)
    >>> found.failed
    ['log likelihood']
    """
    _check(model, infer, sites, replications, draws, options)
    examples = model.encode_texts(texts)
    first = range(min(_AT, len(examples)))
    some = examples.subset(first) if at is None else model.encode_texts(at)
    with seeded(seed):
        _align(model, examples)
    model = Model(_remembering(model.network), _settled(model.prior), model.likelihood)
    whole, places = Feed(model, examples), Feed(model, some)
    ranks = []
    generator = torch.Generator().manual_seed(seed)
    simulated = _simulate(model, whole, replications, seed)
    for number, (truth, known) in enumerate(simulated):
        data = replace(examples, labels=known)
        guide = _inferred(model, infer, data, {**options, "seed": seed + number})
        inferred = [*drawn(model, guide, draws, seed + number)]
        names, there = _quantities(model, [Block(truth)], whole, known, places, sites)
        _, found = _quantities(model, inferred, whole, known, places, sites)
        below, ties = (found < there).sum(0), (found == there).sum(0)
        # A truth level with some draws is put at random among them.
        ranks.append(below + (torch.rand(ties.shape, generator=generator) * (ties + 1)).long())
    if len(ranks) < replications:
        raise DataError(
            f"texts: under the prior the labels of all {len(examples)} texts agree too often "
            f"({len(ranks)} usable data sets of {2 * replications}); give more texts"
        )
    # Of a mixture as many draws are ranked from each component, which may be more.
    return Calibration(names, torch.stack(ranks), len(found), false_alarm)


def _check(
    model: Model,
    infer: object,
    sites: str | Sequence[str],
    replications: int,
    draws: int,
    options: Mapping[str, Any],
) -> None:
    if replications < _FEWEST:
        raise ConfigError(f"replications={replications} must be at least {_FEWEST}")
    if draws < 1:
        raise ConfigError(f"draws={draws} must be at least 1")
    if not isinstance(infer, str | type | Mapping):
        if isinstance(infer, torch.nn.Module) or not callable(infer):
            raise ConfigError(
                f"infer: expected a guide's name or class, or a function of model and examples, "
                f"got {type(infer).__name__}: each data set needs a guide of its own"
            )
        if options:
            raise ConfigError(f"options {', '.join(options)} are for a guide given by name")
    for pattern in [sites] if isinstance(sites, str) else sites:
        if not any(fnmatchcase(site.name, pattern) for site in model.sites):
            known = ", ".join(site.name for site in model.sites)
            raise ConfigError(f"sites: {pattern!r} matches no site; sites: {known}")


def _align(model: Model, examples: Examples) -> None:
    first = examples.subset(range(min(_ALIGN, len(examples))))
    model.network.align(batch for _, batch in first.by_length(32))
    align(model, [batch for _, batch in first.by_length(16)])


def _settled(prior: Prior) -> Prior:
    """Scales set anew from each data set make a prior that the truths are not drawn from."""
    return prior.closed() if isinstance(prior, FunctionSpaceNormal) else prior


def _remembering(network: RandomPEFT) -> RandomPEFT:
    """The same network, which computes the frozen features of a batch once."""
    known: dict[bytes, Tensor] = {}

    def features(batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        assert weights is None
        key = b"|".join(value.cpu().numpy().tobytes() for value in batch.inputs.values())
        if key not in known:
            known[key] = network.features(batch)
        return known[key]

    twin = copy.copy(network)
    twin.features = features  # type: ignore[method-assign]
    return twin


def _simulate(
    model: Model, feed: Feed, replications: int, seed: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """(1, 1, *shape) weights from the prior, with (N,) labels of at least two classes."""
    return islice(_tries(model, feed, 2 * replications, seed), replications)


def _tries(
    model: Model, feed: Feed, count: int, seed: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for number, block in enumerate(blocks(model, prior_guide(model), count, seed)):
        with seeded(seed + number):
            simulated = labels(model, [Block(block)], feed)
        for i, known in enumerate(simulated):
            if model.likelihood.kind != "class" or len(known.unique()) > 1:
                yield {name: value[i : i + 1] for name, value in block.items()}, known


def _inferred(
    model: Model, infer: GuideLike | Infer, data: Examples, options: dict[str, Any]
) -> Guide:
    if isinstance(infer, str | type | Mapping):
        return fit(model, infer, data, **{"progress": False, **options}).guide
    outcome = infer(model, data)
    return outcome.guide if isinstance(outcome, Posterior) else outcome


def _quantities(
    model: Model,
    draws: Sequence[Block],
    whole: Feed,
    known: Tensor,
    places: Feed,
    sites: str | Sequence[str],
) -> tuple[tuple[str, ...], Tensor]:
    """Names of the Q quantities, and their values (S, Q) under S draws."""
    labelled = copy.copy(whole)
    labelled.examples = replace(whole.examples, labels=known)
    likelihood = run(model, draws, labelled).log_likelihood
    assert likelihood is not None
    names, columns = ["log likelihood"], [likelihood.unsqueeze(-1)]
    predictions = run(model, draws, places).predictions
    for i, text in enumerate(places.examples.texts):
        # The first class's probability is what the others leave over.
        for k in range(min(1, predictions.shape[-1] - 1), predictions.shape[-1]):
            what = "mean" if model.likelihood.kind == "rating" else f"p({k})"
            names.append(f"{what} at {text!r:.40}")
            columns.append(predictions[:, i, k : k + 1])
    patterns = [sites] if isinstance(sites, str) else sites
    for site in model.sites:
        if any(fnmatchcase(site.name, pattern) for pattern in patterns):
            index = torch.cartesian_prod(*map(torch.arange, site.shape)).reshape(-1, site.ndim)
            names += [f"{site.name}{place}" for place in index.tolist()]
            values = torch.cat([block.weights[site.name] for block in draws])
            columns.append(values.double().flatten(1).cpu())
    return tuple(names), torch.cat(columns, -1)
