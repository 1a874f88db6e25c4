"""`Posterior`: a fitted guide, and all that is needed to use, update and keep it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check
from ..data import Columns, Examples
from ..errors import ConfigError
from ..forecast.metrics import evaluate
from ..guides import GuideLike
from ..guides.guide import prior_of, title
from ..inference.draws import draw
from ..inference.loop import OptimizerFactory
from ..inference.predict import AnyForecast, predict
from ..inference.report import FitReport
from ..model.model import Model
from ..options import FitOptions
from ..priors import Prior, PriorLike
from . import io

if TYPE_CHECKING:
    from ..diagnostics import Diagnosis
    from ..sequential import Drift, Replay

__all__ = [
    "Coreset",
    "Posterior",
]


@dataclass(frozen=True, eq=False)
class Coreset:
    """Examples kept for later rounds, and the posterior of all the others.

    Attributes:
        examples: learnt last of all; any later round may learn them again, after `guide`.
        guide: has learnt everything but them.
        report: of the fit that learnt them.
    """

    examples: Examples
    guide: nn.Module
    report: FitReport


class Posterior:
    """A fitted guide with its model, its reports and the way its data are read.

    Attributes:
        model: with the prior it was fitted under.
        guide: the fitted guide.
        lineage: one report per round, the first round first.
        columns: how data are read.
        first_prior: the prior of the first round; None if it was a function of its user's
            that was not given when the posterior was loaded.
        coreset: what replay keeps, if there is any.
    """

    def __init__(
        self,
        model: Model,
        guide: nn.Module,
        lineage: tuple[FitReport, ...],
        columns: Columns = Columns(),
        first_prior: Prior | None = None,
        coreset: Coreset | None = None,
    ) -> None:
        self.model = model
        self.guide = guide
        self.lineage = lineage
        self.columns = columns
        self.first_prior = first_prior
        self.coreset = coreset

    def replace(self, **changes: Any) -> Self:
        """The same posterior with some attributes changed."""
        new = copy.copy(self)
        vars(new).update(changes)
        return new

    @property
    def components(self) -> tuple[Posterior, ...]:
        """The independent fits of a mixture; the posterior itself, unless it is one."""
        return (self,)

    @property
    def report(self) -> FitReport:
        """The report of the last round.

        Raises:
            ConfigError: there is none, as the guide was not fitted by `fit`.
        """
        if not self.lineage:
            raise ConfigError("this posterior has no rounds: its guide was not fitted by bh.fit")
        return self.lineage[-1]

    def __repr__(self) -> str:
        if not self.lineage:
            return f"Posterior(no round, {title(self.guide)})"
        return f"Posterior(round {len(self.lineage)}, {title(self.guide)})\n{self.report}"

    def encode(self, data: object, *, labelled: bool = True) -> Examples:
        """Read and tokenise data as those it was fitted to; see `data.encode`."""
        return self.model.encode(data, self.columns, labelled=labelled)

    def sample(self, samples: int = 100, seed: int = 0) -> dict[str, Tensor]:
        """Joint draws of the weights: site name to `(samples, *site shape)`."""
        draws = draw(self.model, self.guide, samples, seed)
        return {name: value[:, 0] for name, value in draws.items()}

    def predict(
        self,
        data: object,
        samples: int | None = None,
        *,
        max_rows: int = 64,
        seed: int = 0,
        keep_samples: bool = False,
        bf16: bool = False,
    ) -> AnyForecast:
        """Predict texts, with epistemic and aleatoric uncertainty apart.

        Args:
            data: a list of texts, or anything `fit` reads; labels are kept if there are any.
            samples: draws of the weights (by default 32), or, of a Laplace approximation, of the
                outputs (1,000, at no cost; ratings with one noise scale need none); 0 for a single
                pass at the posterior mean.
            max_rows: the transformer runs on at most so many sequences at once.
            seed: the same seed gives the same forecast.
            keep_samples: draw weights, and keep each draw's prediction in the forecast's
                `samples`.
            bf16: autocast to bfloat16.
        """
        examples = self.encode(data, labelled=False)
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

    def evaluate(
        self, data: object, samples: int | None = None, **options: Any
    ) -> dict[str, float]:
        """Accuracy, NLL, ECE and so on (`metrics.evaluate`) on labelled data."""
        return evaluate(self.predict(self.encode(data), samples, **options))

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
        from ..arviz import to_arviz

        return to_arviz(self, data, samples=samples, sites=sites, max_bytes=max_bytes, seed=seed)

    def diagnose(self, data: object, samples: int = 200, seed: int = 0) -> Diagnosis:
        """How far the guide may be trusted; see `diagnostics.diagnose`."""
        from ..diagnostics import diagnose

        return diagnose(self, data, samples, seed)

    def as_prior(self) -> Prior:
        """The posterior as a prior for new data; it does not change if the guide trains on.

        Raises:
            GuideError: the guide is a point, or not one of this package's.
        """
        return prior_of(self.model, self.guide)

    def widen(self, data: object, *, validation: object | None = None, **changes: Any) -> Posterior:
        """Give a fitted point its width: a Laplace approximation around it, nothing trained anew.

        Each component of several becomes one of a mixture. The predictive means are the point's.

        Args:
            data: what the point was fitted to.
            validation: as for `fit`: rows that it has not learnt, by which the width is chosen; by
                default those that the fit held out of `data`.
            changes: options of the fit, such as `tau`.

        Raises:
            DataError: the data cannot be used.
            GuideError: the guide is no point, or its prior is not Normal at every site.
        """
        from .widen import widen

        return widen(self, data, validation=validation, changes=changes)

    def update(
        self,
        data: object,
        *,
        validation: object | None = None,
        options: FitOptions | None = None,
        optimizer: OptimizerFactory | None = None,
        guide: GuideLike | None = None,
        keep: float | Mapping[str, float] = 1.0,
        floor: float = 0.0,
        replay: Replay | None = None,
        grow: bool = False,
        again: bool = False,
        **changes: Any,
    ) -> Posterior:
        """Learn new data: fit it with this posterior as the prior, started at this posterior.

        This posterior is left as it is; the new one knows its rounds. Options not given
        are those of the last round; without `validation` there is no patience.

        Args:
            data, validation, options, optimizer: as for `fit`.
            guide: another family for this round and those after it, by the name or mapping that
                `fit` takes. Its prior is this posterior if the family can hold it, or else the
                nearest in the family, with the same means, sds and the correlations that are left
                (`sequential.projected`); `FitReport.projection` says how far it is away.
            keep: forget on purpose (`sequential.Forgetting`): the prior is q^keep p0^(1 - keep),
                normalised, between this posterior q and the first prior p0. One number, or one
                per pattern of site names ("lora.*"); sites that no pattern matches are kept.
            floor: no sd of the prior is less than this share of the first prior's.
            replay: hold a coreset of this and the earlier rounds out (`sequential.Replay`).
            grow: give labels that are new in `data` an output of their own (`grow`).
            again: learn `data` even if an earlier round has; its evidence then counts twice.

        Raises:
            DataError: the data cannot be used, or were learnt in an earlier round.
            GuideError: the guide is a point; it, or the new one, is not one of this package's.
            PriorError: forgetting has no closed form between these priors.
        """
        from ..sequential.forgetting import Forgetting
        from ..sequential.update import update

        check(options, FitOptions | None, "options", "bh.FitOptions(...) or None")
        if options is None and validation is None:  # nor are the last round's held-out rows known
            changes = {"patience": None, **changes}
        return update(
            self,
            data,
            validation=validation,
            options=(options or self.report.options).change(**changes),
            optimizer=optimizer,
            family=guide,
            forgetting=Forgetting(keep, floor),
            replay=replay,
            grow=grow,
            again=again,
        )

    def assess(self, data: object, samples: int = 64, **options: Any) -> Drift:
        """How surprising new data are before they are learnt; see `sequential.assess`."""
        from ..sequential.drift import assess

        return assess(self, data, samples, **options)

    def grow(self, labels: Sequence[str] | int) -> Posterior:
        """Add labels to the head; see `sequential.grow`."""
        from ..sequential.growth import grow

        return grow(self, labels)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write to a folder: `posterior.json` and a safetensors file; nothing is pickled.

        Raises:
            SaveError: the folder holds a posterior already, or the guide, prior or likelihood
                cannot be described.
        """
        return io.save(self, Path(path), overwrite)

    @classmethod
    def load(
        cls,
        path: str | Path,
        backbone: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prior: PriorLike | None = None,
    ) -> Posterior:
        """Read a saved posterior onto the backbone it was fitted on.

        Args:
            path: the folder.
            backbone: the same checkpoint; checked by a fingerprint.
            tokenizer: as for `RandomPEFT`.
            prior: the prior function, if it was one of your own; in later rounds it is the first
                round's, and only forgetting and new labels need it.

        Raises:
            SaveError: missing, cut-off or altered files; another backbone; a prior needed.
        """
        return io.load(Path(path), backbone, tokenizer, prior)
