"""Simulation-based calibration (Talts et al. 2018), for variational posteriors too (Yao et al.
2018): does inference find truths drawn from the prior as often as it claims?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any

import torch
from pydantic import Field
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..base.isolation import seeded
from ..base.names import matching
from ..base.values import Count, Inside, Seed, Whole, checked_call, derived, valid
from ..data import Examples
from ..data.batch import Batch
from ..errors import ConfigError, DataError
from ..guides import Guide, GuideLike, PriorGuide, as_guide
from ..model.cached_batches import CachedBatches
from ..model.model import Model
from ..model.network import RandomPEFT
from ..posterior.fit import fit
from ..posterior.posterior import Posterior
from ..prediction.draws import Draws, draw_parts, passes
from ..prediction.predict import simulate
from ..priors.any_prior import with_fixed_scales
from ..training.initialization import align
from .psis import log_likelihoods
from .ranks import Calibration

Infer = Callable[[Model, Examples], Posterior | Callable[..., Any]]

_FEWEST = 20  # data sets
_AT = 3  # texts whose predictions are ranked
_ALIGN = 128  # texts, as for a fit


@checked_call
def sbc(
    model: Model,
    infer: GuideLike | Infer,
    texts: object,
    *,
    sites: str | Sequence[str] = (),
    replications: int = 200,
    draws: Count = 99,
    false_alarm: Inside = 0.01,
    seed: Seed = 0,
    **options: Any,
) -> Calibration:
    """Draw weights from the prior and labels from the likelihood, infer, and rank the truth.

    The quantities ranked are scalars: the log-likelihood of the labels (a posterior that ignores
    them passes in everything else; Modrák et al. 2023), the predictions at the first three texts,
    and weights if `sites` names some. Draws of a Laplace approximation predict with the linearised
    network, the truth with the network itself. Without PEFT weights the transformer runs once on
    the texts, not once per data set. Data sets whose labels are all of one class are drawn again,
    which leaves ranks uniform.

    Args:
        model: the model; its coordinates are fitted to the texts, unless they are fitted already.
        infer: what `autoguide` takes, fitted anew to every data set with `options`; or a
            function of the model and the labelled examples that returns a `Posterior` or a Pyro
            guide.
        texts: the texts that get labels.
        sites: patterns of sites whose weights are ranked, each weight separately.
        replications: R data sets, at least 20.
        draws: L posterior draws for each.
        false_alarm: the probability that an exact posterior fails.
        seed: of everything drawn.
        options: of `fit`, such as `max_steps`.

    Raises:
        ConfigError: invalid numbers, a pattern that matches no site, options for an `infer` that
            takes none.
        DataError: the texts cannot be used, or are so few that labels nearly always agree.
        PriorError: the prior has observations or factors, which draws would leave out.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> texts = [f"w{i} w{i + 1}" for i in range(5, 25)]
    >>> prior = lambda model, examples: PriorGuide(model)     # learns nothing
    >>> sbc(tiny_model(()), prior, texts, replications=60).failed
    ['log likelihood']
    """
    replications = valid(Annotated[Whole, Field(ge=_FEWEST)], "replications", replications)
    inferred = _inference(infer, options)
    chosen = matching([site.name for site in model.sites], sites, "sites")
    examples = model.encode_texts(texts)
    first = examples.subset(range(min(_AT, len(examples))))
    prior = with_fixed_scales(model.prior)  # scales are not to be chosen for each data set
    likelihood = model.likelihood.standardised(None)  # nor is the unit of ratings
    model = Model(model.network.unused(), prior, likelihood)
    start = examples.subset(range(min(_ALIGN, len(examples))))
    with seeded(seed):
        model.network.align(batch for _, batch in start.by_length(32))
        align(model, [batch for _, batch in start.by_length(16)])
    model = Model(_remembering(model.network), prior, likelihood)
    whole, places = CachedBatches(model, examples), CachedBatches(model, first)
    generator = torch.Generator().manual_seed(seed)
    ranks = []
    for number, (truth, labels) in enumerate(
        _simulate(model, whole, replications, derived(seed, replications))
    ):
        data = replace(examples, labels=labels)
        guides = inferred(model, data, derived(seed + number))
        batches = copy.copy(whole)
        batches.examples = data
        names, true = _quantities(model, [Draws(truth)], batches, places, chosen)
        drawn = [*draw_parts(model, guides, draws, seed + number)]
        _, values = _quantities(model, drawn, batches, places, chosen)
        below, ties = (values < true).sum(0), (values == true).sum(0)
        # A truth that equals some draws is ranked at random among them.
        ranks.append(below + (torch.rand(ties.shape, generator=generator) * (ties + 1)).long())
    if len(ranks) < replications:
        raise DataError(
            f"texts: under the prior the labels of all {len(examples)} texts agree too often "
            f"({len(ranks)} usable data sets of {2 * replications}); give more texts"
        )
    # In a mixture every component gives equally many draws, which may be more in all.
    return Calibration(names, torch.stack(ranks), len(values), false_alarm)


def _inference(
    infer: GuideLike | Infer, options: Mapping[str, Any]
) -> Callable[[Model, Examples, int], Sequence[Guide]]:
    """From a model, labelled examples and a seed to the guides of all components."""
    if isinstance(infer, str | type | Mapping):
        how = {"progress": False, **options}
        return lambda model, data, seed: fit(model, infer, data, **how | {"seed": seed}).guides
    if isinstance(infer, torch.nn.Module) or not callable(infer):
        raise ConfigError(
            f"infer: expected a guide's name or class, or a function of model and examples, "
            f"got {type(infer).__name__}: each data set needs a guide of its own"
        )
    if options:
        raise ConfigError(f"options {', '.join(options)} are for a guide given by name")

    def inferred(model: Model, data: Examples, seed: int) -> Sequence[Guide]:
        outcome = infer(model, data)
        return outcome.guides if isinstance(outcome, Posterior) else [as_guide(outcome)]

    return inferred


def _remembering(network: RandomPEFT) -> RandomPEFT:
    """A copy of the network that computes the frozen features of a batch once."""
    kept: dict[bytes, Tensor] = {}

    def features(batch: Batch) -> Tensor:
        key = b"|".join(value.cpu().numpy().tobytes() for value in batch.inputs.values())
        if key not in kept:
            kept[key] = network.features(batch)
        return kept[key]

    twin = copy.copy(network)
    twin.features = features  # type: ignore[method-assign]
    return twin


def _simulate(
    model: Model, batches: CachedBatches, replications: int, seed: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """(1, 1, *shape) weights from the prior, with (N,) labels of at least two classes; at most
    twice as many are drawn as are wanted."""

    def tries() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        drawn = draw_parts(model, PriorGuide(model), 2 * replications, seed)
        for number, part in enumerate(drawn):
            with seeded(seed + number):
                by_draw, *_ = simulate(model, [part], batches)
            for i, labels in enumerate(by_draw):
                if model.likelihood.kind != "class" or len(labels.unique()) > 1:
                    yield {name: value[i : i + 1] for name, value in part.weights.items()}, labels

    return islice(tries(), replications)


def _quantities(
    model: Model,
    draws: Sequence[Draws],
    batches: CachedBatches,
    places: CachedBatches,
    sites: Sequence[str],
) -> tuple[tuple[str, ...], Tensor]:
    """Names of the Q quantities, and their values (S, Q) under S draws."""
    first = int(model.likelihood.picks_one)

    def take(predicted: TorchDistribution, _: Tensor | None) -> tuple[Tensor]:
        return (predicted.probs if first else predicted.mean,)

    predicted = torch.cat([part.double() for (part,) in passes(model, draws, places, take)])
    if model.likelihood.kind == "rating":
        predicted, whats = predicted.unsqueeze(-1), ["mean"]
    else:  # the first class's probability follows from the others
        predicted = predicted[..., first:]
        whats = [f"p({first + k})" for k in range(predicted.shape[-1])]
    names = ["log likelihood"]
    names += [f"{what} at {text!r:.40}" for text in places.examples.texts for what in whats]
    columns = [log_likelihoods(model, draws, batches).unsqueeze(-1), predicted.flatten(1)]
    for site in model.sites:
        if site.name in sites:
            index = torch.cartesian_prod(*map(torch.arange, site.shape)).reshape(-1, site.ndim)
            names += [f"{site.name}{place}" for place in index.tolist()]
            values = torch.cat([part.weights[site.name] for part in draws])
            columns.append(values.double().flatten(1).cpu())
    return tuple(names), torch.cat(columns, -1)
