"""`fit`, and what every round has in common with the first."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.optim import PyroOptim
from torch import nn
from torch.optim import Optimizer

from .data import Columns, Examples
from .data.labels import check_names
from .errors import ConfigError, DataError, FitError
from .guides import Guide, GuideLike, LaplaceGuide, autoguide, check_made_for
from .guides.guide import prior_of
from .inference import laplace
from .inference.alignment import align
from .inference.draws import seeded
from .inference.optimise import OptimizerFactory, as_module, optimise
from .inference.options import FitOptions
from .inference.report import FitReport
from .inference.scale import PriorScale
from .inference.start import may_start, scatter, start
from .inference.threads import fitting
from .likelihoods import HeteroscedasticNormal, Likelihood, Normal
from .mixture import MixturePosterior, keeping, seeds
from .model import Model
from .posterior import Coreset, Posterior
from .priors import FunctionSpaceNormal, Prior
from .priors.check import check_prior
from .reading import TextOptions

if TYPE_CHECKING:
    from .sequential import Replay

__all__ = ["check_how", "fit", "fit_round"]

# So many of the first round's texts set the head's axes and the PEFT sites' coordinates.
_HEAD_TEXTS, _PEFT_TEXTS = 2000, 128
_BY_NAME = str | type | Mapping
_FAR = 8.0  # spreads of a likelihood of ratings; stars from 1 to 5 are 5 of the default one's


@fitting()
def fit(
    model: Model,
    guide: GuideLike | Guide | AutoGuide | nn.Module | Callable[..., Any],
    data: object,
    *,
    validation: object | None = None,
    unlabelled: object | None = None,
    columns: Columns = Columns(),
    max_length: int | None = None,
    label_names: Sequence[str] | None = None,
    options: FitOptions | None = None,
    optimizer: OptimizerFactory | None = None,
    replay: Replay | None = None,
    restarts: int = 1,
    **changes: Any,
) -> Posterior:
    """Fit a guide to data by stochastic variational inference.

    Args:
        model: the model. What an earlier fit has measured on its network stays, the head's axes and
            the PEFT sites' coordinates: so each fold of a cross-validation needs a new one.
        guide: what `autoguide` takes, a guide (fitted in place), or a function with
            `pyro.param` statements.
        data: anything `data.encode` reads: a `datasets.Dataset`, a hub name, a CSV or JSON lines
            file, a mapping of lists.
        validation: as `data`; its NLL is reported, and stops the fit if `patience` is set.
        unlabelled: as `data`, of which the texts alone are read: the head's axes and the PEFT
            sites' coordinates are those of these texts, for this round and all later ones. By
            default those of `data`; where these are few, the coordinates are poor.
        columns: the names of the data's columns.
        max_length: longer texts are cut to so many tokens; by default to as many as tokenizer and
            backbone can have.
        label_names: the classes in the order of their indices.
        options: how to fit; single options may be given by name instead (`epochs=5`).
        optimizer: from parameters to a torch optimiser; by default `NaturalGradient`
            for Normal guides and Adam for what else there is.
        replay: hold a coreset out, as `Posterior.update` does.
        restarts: R independent fits, one after the other, each from another seed and another
            start: a `MixturePosterior`. Guides of this package start at draws from the prior,
            but for the first, which is what a single fit would be; others as their seed has it.

    Raises:
        ConfigError: an option or `restarts` that cannot work, or a guide that has but one start.
        DataError: the data cannot be used. Checked before anything is trained, as are options.
        GuideError: the guide cannot be made, or was made for another model.
        LikelihoodError: the likelihood's distribution has not one label an example.
        FitError: the loss stayed non-finite; its `posterior` is the last good state, or a mixture
            of the restarts before the one that failed.

    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> posterior.report.steps
    3
    """
    if not isinstance(model, Model):
        raise ConfigError(
            f"model: expected a bh.Model, got {type(model).__name__}; a structure of your own goes "
            "into its prior or its likelihood (Pyro's own inference takes any function)"
        )
    options = (options or FitOptions()).change(**changes)
    check_how(options, validation, optimizer)
    if unlabelled is not None and model.network.measured:
        raise ConfigError(
            "unlabelled: an earlier fit has set the coordinates of this network, which stay; "
            "expected a new RandomPEFT"
        )
    check_names(label_names, None)
    _check_restarts(restarts, guide)
    names = None if label_names is None else tuple(label_names)
    text = TextOptions(columns, max_length, names)
    examples = text.encode(model, data, labelled=True, new_names=True)
    text = replace(text, label_names=examples.label_names)
    held_out = None if validation is None else text.encode(model, validation, labelled=True)
    _check_classes(examples, columns.label)
    check_prior(model.prior, model.sites)
    every = seeds(options, restarts)
    modules = []
    for own in every:
        with seeded(own.seed):
            module = autoguide(guide, model) if isinstance(guide, _BY_NAME) else guide
            modules.append(as_module(module))
            check_made_for(model, modules[-1])
    if options.particles > 1 and guide != "delta":  # a point has but one draw
        check_prior(model.prior, model.sites, vectorised=True)
    splits = [
        (None, examples) if replay is None else replay.split(examples, own.seed) for own in every
    ]
    texts = examples if unlabelled is None else text.encode_texts(model, unlabelled)
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(options.seed))
    model.network.align(batch for _, batch in texts.subset(chosen[:_HEAD_TEXTS]).by_length(32))
    batches = [batch for _, batch in texts.subset(chosen[:_PEFT_TEXTS]).by_length(16)]
    given = model.prior
    fitted: list[Posterior] = []
    for module, own, (kept, rest) in zip(modules, every, splits, strict=True):
        report = FitReport(len(examples), examples.fingerprint, own)
        with seeded(own.seed):
            if isinstance(module, Guide):
                module.follow(model)  # in which the first start has left nothing open
            if may_start(module, own):
                model = start(model, module, rest, own, batches)
            else:
                align(model, batches)  # once: coordinates are one for all
            if fitted and isinstance(module, Guide):
                scatter(model, module, own)
        posterior = Posterior(model, module, (report,), text, model.prior)
        with keeping(fitted, options):
            fitted.append(fit_round(posterior, rest, held_out, optimizer, kept))
        model = fitted[-1].model
        report.found = _found(given, model.prior)
    return fitted[0] if restarts == 1 else MixturePosterior.joined(fitted, options)


def _found(given: Prior, prior: Prior) -> dict[str, float]:
    """The scales that the given prior left open, where they no longer are."""
    if not (isinstance(given, FunctionSpaceNormal) and isinstance(prior, FunctionSpaceNormal)):
        return {}
    return {
        name: value
        for name, value in vars(prior).items()
        if value is not None and getattr(given, name) is None
    }


def _check_restarts(restarts: int, guide: object) -> None:
    if not isinstance(restarts, int) or restarts < 1:
        raise ConfigError(f"restarts={restarts!r} must be an integer of at least 1")
    if restarts > 1 and isinstance(guide, nn.Module):
        raise ConfigError(
            f"restarts={restarts}: the {type(guide).__name__} given has but one start; expected "
            "what it can be made of anew: a name, a class, a mapping or a function"
        )


def check_how(options: FitOptions, validation: object | None, optimizer: object) -> None:
    """Early stopping has something to look at, and an optimiser can be made.

    Raises:
        ConfigError: not so.
    """
    if optimizer is not None and (
        not callable(optimizer) or isinstance(optimizer, (Optimizer, PyroOptim))
    ):
        raise ConfigError(
            f"optimizer: got a {type(optimizer).__name__}, expected a function from parameters to "
            "an optimiser of torch, such as lambda found: torch.optim.Adam(found, lr=0.01)"
        )
    if options.patience and validation is None:
        raise ConfigError(
            f"patience={options.patience} needs validation data; patience=None fits to the end"
        )


def _check_classes(examples: Examples, column: str) -> None:
    """One class alone teaches nothing; later rounds may well bring examples of just one."""
    if examples.kind == "class" and examples.labels is not None:
        classes = examples.labels.unique()
        if len(classes) == 1:
            names = examples.label_names
            label = names[int(classes)] if names else int(classes)
            raise DataError(
                f"data: all {len(examples)} labels in column {column!r} are {label!r}; "
                "expected at least two classes"
            )


def fit_round(
    posterior: Posterior,
    examples: Examples,
    validation: Examples | None = None,
    optimizer: OptimizerFactory | None = None,
    kept: Examples | None = None,
) -> Posterior:
    """Fit a round's guide in place under its model's prior, as its last report says.

    Args:
        posterior: the round as it starts.
        examples: what it learns.
        kept: the coreset, learnt after the rest, by a copy of the guide.

    Returns:
        The same posterior; with a coreset, another that has learnt it too.

    Raises:
        FitError: with the last good state.
    """
    guide, report = posterior.guide, posterior.report
    _note_scale(posterior.model.likelihood, examples)
    try:
        with _scale_found(posterior) as scale:
            model = scale.model if scale else posterior.model
            _learn(model, guide, examples, validation, report, optimizer, scale)
        return posterior if kept is None else _fit_coreset(posterior, kept, optimizer)
    except FitError as error:
        error.posterior = posterior
        raise


def _note_scale(likelihood: Likelihood, examples: Examples) -> None:
    """Warn of ratings in other units than the likelihood's: learnt they are, but at what cost."""
    if isinstance(likelihood, Normal | HeteroscedasticNormal) and examples.labels is not None:
        away = (examples.labels - likelihood.center).abs() / likelihood.spread
        if (most := away.max().item()) > _FAR:
            rating = examples.labels[away.argmax()].item()
            warnings.warn(
                f"data: a rating of {rating:g} is {most:.0f} spreads from the centre of "
                f"{likelihood}; expected ratings of that scale",
                stacklevel=2,
            )


@contextmanager
def _scale_found(posterior: Posterior) -> Iterator[PriorScale | None]:
    """Whatever end a fit takes, the posterior has the prior whose scale was found by then."""
    scale = PriorScale.of(posterior.model, posterior.guide)
    try:
        yield scale
    finally:
        if scale:
            posterior.model = scale.settle()
            posterior.first_prior = posterior.model.prior


def _learn(
    model: Model,
    guide: nn.Module,
    examples: Examples,
    validation: Examples | None,
    report: FitReport,
    optimizer: OptimizerFactory | None,
    scale: PriorScale | None = None,
) -> None:
    if isinstance(guide, Guide):
        guide.follow(model)
    if isinstance(guide, LaplaceGuide):
        laplace.begin(guide, report)
    optimise(model, guide, examples, validation, report, optimizer, scale)
    if isinstance(guide, LaplaceGuide):
        laplace.finish(model, guide, examples, report)


def _fit_coreset(
    posterior: Posterior, kept: Examples, optimizer: OptimizerFactory | None
) -> Posterior:
    """The posterior that has learnt a coreset too; the one without it stays, for later rounds."""
    options = replace(posterior.report.options, patience=None)
    report = FitReport(len(kept), kept.fingerprint, options)
    core = posterior.guide
    guide = copy.deepcopy(core)
    model = Model(
        posterior.model.network, prior_of(posterior.model, core), posterior.model.likelihood
    )
    _learn(model, guide, kept, None, report, optimizer)
    if isinstance(guide, Guide):
        guide.follow(posterior.model)  # under the round's own prior it has learnt all of it
    return posterior.replace(guide=guide, coreset=Coreset(kept, core, report))
