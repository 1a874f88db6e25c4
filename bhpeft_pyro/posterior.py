"""`fit` and `Posterior`: a fitted guide, and all that is needed to use, update and keep it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeGuard

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import saving
from .data import Columns, Examples, encode
from .data.labels import check_names
from .errors import ConfigError, DataError, FitError, GuideError
from .guides import Guide, NormalGuide, autoguide
from .inference.alignment import align
from .inference.draws import draw, seeded
from .inference.optimise import OptimizerFactory, as_module, optimise
from .inference.options import FitOptions
from .inference.predict import AnyForecast, predict
from .inference.report import FitReport
from .inference.start import start
from .metrics import evaluate
from .model import Model
from .priors import PosteriorPrior, PriorLike

__all__ = ["Posterior", "TextOptions", "fit"]

# So many of the first round's texts set the head's axes and the PEFT sites' coordinates.
_HEAD_TEXTS, _PEFT_TEXTS = 2000, 128


@dataclass(frozen=True)
class TextOptions:
    """How text was read, so that new text is read the same way."""

    columns: Columns = Columns()
    max_length: int | None = None
    label_names: tuple[str, ...] | None = None

    def encode(self, model: Model, data: object, labelled: bool) -> Examples:
        """Tokenise `data` for a model."""
        return encode(
            data,
            model.network.tokenizer,
            kind=model.likelihood.kind,
            columns=self.columns,
            label_names=self.label_names,
            num_labels=model.likelihood.labels(model.network.outputs),
            max_length=self.max_length,
            labelled=labelled,
        )


def fit(
    model: Model,
    guide: str | type[AutoGuide] | Guide | AutoGuide | nn.Module | Callable[..., Any],
    data: object,
    *,
    validation: object | None = None,
    columns: Columns = Columns(),
    max_length: int | None = None,
    label_names: Sequence[str] | None = None,
    options: FitOptions | None = None,
    optimizer: OptimizerFactory | None = None,
    **changes: Any,
) -> Posterior:
    """Fit a guide to data by stochastic variational inference.

    Args:
        model: the model.
        guide: what `autoguide` takes, a guide (fitted in place), or a function with
            `pyro.param`s.
        data: anything `data.encode` reads: a `datasets.Dataset`, a hub name, a CSV or JSON lines
            file, a mapping of lists.
        validation: as `data`; its NLL is reported, and stops the fit if `patience` is set.
        columns: the names of the data's columns.
        max_length: longer texts are cut to so many tokens.
        label_names: the classes in the order of their indices.
        options: how to fit; single options may be given by name instead (`epochs=5`).
        optimizer: from parameters to a torch optimiser; by default `NaturalGradient`
            for Normal guides and Adam for what else there is.

    Raises:
        DataError: the data cannot be used. Checked before anything is trained, as are options.
        FitError: the loss stayed non-finite; its `posterior` is the last good state.

    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> posterior.report.steps
    3
    """
    options = (options or FitOptions()).change(**changes)
    _check_patience(options, validation)
    check_names(label_names, None)
    names = None if label_names is None else tuple(label_names)
    text = TextOptions(columns, max_length, names)
    examples = text.encode(model, data, labelled=True)
    text = replace(text, label_names=examples.label_names)
    held_out = None if validation is None else text.encode(model, validation, labelled=True)
    _check_classes(examples, columns.label)
    with seeded(options.seed):
        module = as_module(autoguide(guide, model) if isinstance(guide, str | type) else guide)
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(options.seed))
    model.network.align(batch for _, batch in examples.subset(chosen[:_HEAD_TEXTS]).by_length(32))
    with seeded(options.seed):
        align(model, [batch for _, batch in examples.subset(chosen[:_PEFT_TEXTS]).by_length(16)])
        if _may_start(module, options):
            start(model, module, examples, options)
    return _fit(model, module, examples, held_out, options, optimizer, text, ())


def _check_patience(options: FitOptions, validation: object | None) -> None:
    if options.patience and validation is None:
        raise ConfigError(
            f"patience={options.patience} needs validation data; patience=None fits to the end"
        )


def _may_start(guide: nn.Module, options: FitOptions) -> TypeGuard[NormalGuide]:
    """Whether `start` applies: unless a width was asked for, or there is to be no posterior."""
    return isinstance(guide, NormalGuide) and guide.init_scale is None and options.temperature > 0


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


def _fit(
    model: Model,
    guide: nn.Module,
    examples: Examples,
    validation: Examples | None,
    options: FitOptions,
    optimizer: OptimizerFactory | None,
    text: TextOptions,
    lineage: tuple[FitReport, ...],
) -> Posterior:
    report = FitReport(len(examples), examples.fingerprint, options)
    posterior = Posterior(model, guide, (*lineage, report), text)
    try:
        optimise(model, guide, examples, validation, report, optimizer)
    except FitError as error:
        error.posterior = posterior
        raise
    return posterior


class Posterior:
    """A fitted guide with its model, its reports and its way of reading text.

    Attributes:
        model: with the prior it was fitted under.
        guide: the fitted guide.
        lineage: one report per round, the first round first.
        text: how text is read.
    """

    def __init__(
        self,
        model: Model,
        guide: nn.Module,
        lineage: tuple[FitReport, ...],
        text: TextOptions = TextOptions(),
    ) -> None:
        self.model = model
        self.guide = guide
        self.lineage = lineage
        self.text = text

    @property
    def report(self) -> FitReport:
        """The report of the last round."""
        return self.lineage[-1]

    def __repr__(self) -> str:
        return f"Posterior(round {len(self.lineage)}, {type(self.guide).__name__})\n{self.report}"

    def sample(self, samples: int = 100, seed: int = 0) -> dict[str, Tensor]:
        """Joint draws of the weights: site name to (samples, *site shape)."""
        draws = draw(self.model, self.guide, samples, seed)
        return {name: value[:, 0] for name, value in draws.items()}

    def predict(
        self,
        data: object,
        samples: int = 32,
        *,
        max_rows: int = 64,
        seed: int = 0,
        keep_samples: bool = False,
        bf16: bool = False,
    ) -> AnyForecast:
        """Predict texts, with epistemic and aleatoric uncertainty apart.

        Args:
            data: a list of texts, or anything `fit` reads; labels are kept if there are any.
            samples: draws of the weights; 0 for a single pass at the posterior mean.
            max_rows: the transformer runs on at most so many sequences at once.
            seed: the same seed gives the same forecast.
            keep_samples: keep each draw's prediction in the forecast's `samples`.
            bf16: autocast to bfloat16.
        """
        examples = self.text.encode(self.model, data, labelled=False)
        return predict(
            self.model,
            self.guide,
            examples,
            samples,
            max_rows=max_rows,
            seed=seed,
            keep_samples=keep_samples,
            bf16=bf16,
        )

    def evaluate(self, data: object, samples: int = 32, **options: Any) -> dict[str, float]:
        """Accuracy, NLL, ECE and so on (`metrics.evaluate`) on labelled data."""
        examples = self.text.encode(self.model, data, labelled=True)
        return evaluate(self.predict(examples, samples, **options))

    def to_arviz(
        self,
        data: object | None = None,
        *,
        samples: int = 100,
        sites: str | Sequence[str] | None = None,
        max_bytes: int = 2**30,
        seed: int = 0,
    ) -> Any:
        """Draws, fit trace and, with data, predictions for ArviZ; see `arviz.to_arviz`."""
        from .arviz import to_arviz  # ArviZ is slow to import, and seldom needed

        return to_arviz(self, data, samples=samples, sites=sites, max_bytes=max_bytes, seed=seed)

    def as_prior(self) -> PosteriorPrior:
        """The posterior as a prior for new data; it does not change if the guide trains on.

        Raises:
            GuideError: the guide is a point, or not one of this package's.
        """
        if not isinstance(self.guide, Guide):
            raise GuideError(
                f"{type(self.guide).__name__} does not say how its posterior becomes a prior; "
                "derive your guide from bhpeft_pyro.guides.Guide and give it distributions()"
            )
        distributions = self.guide.distributions()
        if all(site.name in distributions for site in self.model.sites):
            return PosteriorPrior(distributions)
        prior = self.model.prior
        return PosteriorPrior(
            distributions, prior.structure if isinstance(prior, PosteriorPrior) else prior
        )

    def update(
        self,
        data: object,
        *,
        validation: object | None = None,
        options: FitOptions | None = None,
        optimizer: OptimizerFactory | None = None,
        **changes: Any,
    ) -> Posterior:
        """Learn new data: fit it with this posterior as the prior, started at this posterior.

        This posterior is left as it is; the new one knows its rounds. Options not given
        are those of the last round.
        """
        options = (options or self.report.options).change(**changes)
        _check_patience(options, validation)
        prior = self.as_prior()
        examples = self.text.encode(self.model, data, labelled=True)
        held_out = None
        if validation is not None:
            held_out = self.text.encode(self.model, validation, labelled=True)
        model = Model(self.model.network, prior, self.model.likelihood)
        guide = copy.deepcopy(self.guide)
        return _fit(model, guide, examples, held_out, options, optimizer, self.text, self.lineage)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write to a folder: `posterior.json` and a safetensors file; nothing is pickled.

        Raises:
            SaveError: the folder holds a posterior already, or the guide or prior
                cannot be described.
        """
        return saving.save(self, Path(path), overwrite)

    @classmethod
    def load(
        cls,
        path: str | Path,
        backbone: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prior: PriorLike | None = None,
    ) -> Self:
        """Read a saved posterior onto the backbone it was fitted on.

        Args:
            path: the folder.
            backbone: the same checkpoint; checked by a fingerprint.
            tokenizer: as for `RandomPEFT`.
            prior: the prior function, if it was one of your own.

        Raises:
            SaveError: missing, cut-off or altered files; another backbone; a prior needed.
        """
        return saving.load(cls, Path(path), backbone, tokenizer, prior)
