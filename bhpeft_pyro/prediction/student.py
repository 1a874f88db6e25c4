"""A student: one network that predicts in one pass what a posterior predicts in many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..base.values import checked_dataclass
from ..data import Examples
from ..data.batch import Batch
from ..forecast import RatingForecast
from ..forecast.multilabel import both
from ..model.cached_batches import BATCH, MAX_ROWS, CachedBatches
from ..model.likelihoods import Outputs
from ..model.model import Model
from .dirichlet import class_forecast, labels_forecast, precision_for
from .draws import by_batch
from .log_kernel import OF_CHOICES, LogKernel, of_pass
from .predict import AnyForecast, in_parts, known_of, probabilities_of

__all__ = ["Student", "StudentReport"]


@checked_dataclass(kw_only=True)
class StudentReport:
    """How a student was made, and how far it is from its posterior on texts that it has not learnt.

    Attributes:
        round: id of the round whose posterior it stands for.
        texts: how many it learnt from.
        held_out: how many it was compared on.
        epochs: passes over the texts.
        best_epoch: the one whose weights were kept; 0 is the component that it started from.
        passes: of the network, forward and backward, that the posterior took for a text; the
            student takes one.
        divergence: KL from the posterior's predictive distribution to the student's in nats, the
            mean over held-out texts; of ratings, between Normals of the same variance.
        start_divergence: that of the component that it started from.
        difference: the share of held-out texts for which it decides otherwise (of labels, of pairs
            of a text and a label); of ratings, the root mean square difference of the means.
        rating: whether these are ratings.
        rank_correlation: Spearman's, between the two epistemic uncertainties; None if one of them
            is the same for all texts.
        nll, posterior_nll: of held-out texts, if they have labels.
        seconds: wall time.

    >>> report = StudentReport(
    ...     round="a", texts=80, held_out=20, epochs=3, best_epoch=2, passes=5, divergence=0.012,
    ...     start_divergence=0.1, difference=0.05, rating=False, rank_correlation=0.9,
    ... )
    >>> print(report)
    student: 1 pass a text, the posterior takes 5
    learnt from 80 texts, epoch 2 of 3 kept
    on 20 other texts: KL from the posterior 0.0120 nats (of the component it began as, 0.1000),
    decides otherwise for 5.0% of them
    rank correlation with the posterior's uncertainty 0.90
    """

    round: str
    texts: int
    held_out: int
    epochs: int
    best_epoch: int
    passes: float
    divergence: float
    start_divergence: float
    difference: float
    rating: bool
    rank_correlation: float | None
    nll: float | None = None
    posterior_nll: float | None = None
    seconds: float = 0.0

    @property
    def in_short(self) -> str:
        """How far it is from the posterior, in one line."""
        kl = f"KL {self.divergence:.4f} nats"
        return f"1 pass a text for {self.passes:g}, {kl} on {self.held_out} held-out texts"

    def __str__(self) -> str:
        differs = f"decides otherwise for {self.difference:.1%} of them"
        if self.rating:
            differs = f"its means differ by {self.difference:.3f} (root mean square)"
        lines = [
            f"student: 1 pass a text, the posterior takes {self.passes:g}",
            f"learnt from {self.texts} texts, epoch {self.best_epoch} of {self.epochs} kept",
            f"on {self.held_out} other texts: KL from the posterior {self.divergence:.4f} nats (of "
            f"the component it began as, {self.start_divergence:.4f}), {differs}",
        ]
        if self.rank_correlation is not None:
            lines.append(
                f"rank correlation with the posterior's uncertainty {self.rank_correlation:.2f}"
            )
        if self.nll is not None:
            lines.append(f"NLL {self.nll:.3f}, of the posterior {self.posterior_nll:.3f}")
        return "\n".join(lines)


@checked_dataclass(eq=False)
class Student:
    """Weights for one network, and how uncertain it is of a text.

    Its probabilities, or mean ratings, are those of the network under these weights. A `LogKernel`
    gives the rest in the same pass: for classes and labels the precision of a Dirichlet
    distribution around the probabilities, for ratings the aleatoric and the epistemic variance.

    Attributes:
        weights: for each site a tensor of its shape.
        uncertainty: of the pass of a text; one number for classes and labels, two for ratings.
        report: how it was made, and how far it is from the posterior.
        learnt_rows: (R,) hashes of its texts, held-out ones too.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> options = {"components": 2, "max_steps": 3, "progress": False}
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(), **options)
    >>> posterior = posterior.distill(tiny_examples(60, seed=1), epochs=1, progress=False)
    >>> posterior.student.report.texts, posterior.student.weights["head.weight"].shape
    (48, torch.Size([2, 16]))
    """

    weights: Mapping[str, Tensor]
    uncertainty: LogKernel
    report: StudentReport
    learnt_rows: Tensor

    def predict(
        self, model: Model, examples: Examples, max_rows: int = MAX_ROWS, bf16: bool = False
    ) -> AnyForecast:
        """Its forecast of N examples; arguments are as for `Posterior.predict`."""
        return predict_in_one_pass(model, self.weights, self.uncertainty, examples, max_rows, bf16)

    def __repr__(self) -> str:
        return f"Student({self.report.in_short})"

    def check(self, model: Model) -> None:
        """Refuse weights that are not of the model's sites, by a ValueError."""
        shapes = {name: tuple(value.shape) for name, value in self.weights.items()}
        if shapes != {site.name: site.shape for site in model.sites}:
            raise ValueError(f"its weights have shapes {shapes}")
        rows = self.learnt_rows
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(f"learnt_rows are {rows.dtype} of shape {tuple(rows.shape)}")


def learnt_uncertainty(
    model: Model, weights: Mapping[str, Tensor], texts: Examples, forecast: Any
) -> LogKernel:
    """How uncertain the network is under some weights, learnt from a posterior's forecast of some
    texts."""
    _, of_texts = _passed(model, weights, texts)
    if texts.kind == "rating":
        numbers = torch.stack([forecast.aleatoric, forecast.epistemic], 1)
    else:
        p = forecast.probabilities
        p = both(p) if texts.kind == "labels" else p
        numbers = precision_for(p, forecast.epistemic).unsqueeze(1)
    outputs = OF_CHOICES if texts.kind == "choice" else model.network.outputs
    return LogKernel.fitted(of_texts, numbers, of_texts.shape[1] - outputs)


def predict_in_one_pass(
    model: Model,
    weights: Mapping[str, Tensor],
    uncertainty: LogKernel,
    examples: Examples,
    max_rows: int = MAX_ROWS,
    bf16: bool = False,
) -> AnyForecast:
    """The forecast of N examples by the network under some weights."""

    def of_part(part: Examples, done: Callable[[], object]) -> AnyForecast:
        predicted, of_texts = _passed(model, weights, part, max_rows, bf16)
        numbers = uncertainty(of_texts)
        done()
        known = known_of(part)
        if part.kind == "rating":
            aleatoric, epistemic = numbers.mT.unsqueeze(1)
            known |= {"within": epistemic, "scale": model.likelihood.label_range}
            return RatingForecast.from_draws(predicted[None], aleatoric.sqrt(), **known)
        forecast_of = labels_forecast if part.kind == "labels" else class_forecast
        return forecast_of(predicted, numbers[:, 0], **known)

    return replace(in_parts(model, examples, of_part), method="student", passes=1)


def _passed(
    model: Model,
    weights: Mapping[str, Tensor],
    examples: Examples,
    max_rows: int = MAX_ROWS,
    bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """From one pass: (N, C) or (N, K) probabilities or (N,) means; and the pass, (N, F), as
    `log_kernel.of_pass` has it."""
    weights = {name: value.to(model.network.device) for name, value in weights.items()}

    def run(batch: Batch) -> Sequence[Tensor]:
        outputs, features = model.network.read(weights, batch)
        labels = model.likelihood.checked(Outputs(outputs, weights, batch.choices, batch.extra))
        if examples.kind == "rating":
            values = labels.mean.float()
        else:
            (values,) = probabilities_of(labels, None)
        return values[None], of_pass(features, outputs, batch.choices)[None]

    batches = CachedBatches(model, examples)
    texts = max(1, min(BATCH, max_rows // examples.width))
    values, of_texts = by_batch(model, batches, run, size=texts, bf16=bf16)
    return values[0], of_texts[0]
