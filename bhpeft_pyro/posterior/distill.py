"""From many components to one network: a student of a posterior, and how far it is from it."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from typing import Any, TypeVar

from scipy.stats import spearmanr

from ..base.checks import COUNT, POSITIVE, SEED, boolean, warn
from ..base.fit_options import FitOptions
from ..base.names import Method
from ..base.progress import bars, tracked, work
from ..data import Columns, Examples, LabelWarning
from ..data.sources import in_file
from ..errors import DataError, FitError
from ..model.model import Model
from ..prediction.predict import closed_ways
from ..prediction.student import Student, StudentReport, learnt_uncertainty, predict_in_one_pass
from ..training.distillation import distil, targets_of
from .predictor import Predictor

P = TypeVar("P", bound=Predictor)


def distill(
    posterior: P, texts: object, epochs: int, batch_size: int, lr: float, seed: int, progress: bool
) -> P:
    """See `Posterior.distill`."""
    epochs, batch_size = COUNT("epochs", epochs), COUNT("batch_size", batch_size)
    lr, seed, progress = POSITIVE("lr", lr), SEED("seed", seed), boolean("progress", progress)
    started, model = time.monotonic(), posterior.model
    nlls = [part.report.component_nll or math.inf for part in posterior.components]
    start = posterior.weights(nlls.index(min(nlls)))  # of the best component, or of the first
    with bars(progress), work("student", 2, at_once=True) as whole:
        examples = read_texts(posterior, texts)
        learnt, held_out = _parted(examples, seed, "texts")
        whole.name("predictions of the posterior")
        posterior = _with_learnt_outputs(posterior.replace(student=None, promised=None), learnt)
        # Exactly where that takes one backward pass a text, as for ratings, where what is learnt
        # of covariances loses most.
        free = model.network.outputs - model.likelihood.softmax
        one = free == 1 and model.likelihood.kind != "choice"
        exact = one and "exact" in closed_ways(model, posterior.guide)
        method: Method | None = "exact" if exact else None
        alone = posterior.replace(novelty=None)
        forecasts = [alone.predict(part, method=method) for part in (learnt, held_out)]
        targets = [targets_of(forecast, examples.kind) for forecast in forecasts]
        whole.next()
        made = distil(
            model,
            start,
            (learnt, targets[0]),
            (held_out, targets[1]),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
        )
        uncertainty = learnt_uncertainty(model, made.weights, learnt, forecasts[0])
        forecast = predict_in_one_pass(model, made.weights, uncertainty, held_out)
        report = StudentReport(
            round=posterior.report.id,
            texts=len(learnt),
            held_out=len(held_out),
            passes=forecasts[1].passes or 0.0,
            rating=examples.kind == "rating",
            best_epoch=made.best_epoch,
            epochs=epochs,
            divergence=made.divergences[made.best_epoch],
            start_divergence=made.divergences[0],
            seconds=time.monotonic() - started,
            **_distances(forecasts[1], forecast, examples.kind),
        )
        whole.next()
    student = Student(made.weights, uncertainty, report, examples.row_hashes)
    return posterior.replace(student=student)


def read_texts(posterior: Predictor, texts: object, file: object = None) -> Examples:
    """Texts for a student, with labels that tell how good it is; without them, and with a warning,
    if they cannot be read. Errors name the rows of `file`, from which the texts may be."""
    try:
        with in_file(file):
            return posterior.encode(texts, labelled=False)
    except DataError as error:
        with in_file(file):
            examples = posterior.model.encode_texts(texts, posterior.columns)
        warn(LabelWarning(f"labels are not read: {error}"))
        return examples


def texts_for(model: Model, texts: object, columns: Columns, seed: int) -> Examples:
    """The texts that a student is to learn after a fit, checked before it. Labels are not looked
    at: they may be classes that are still to come.

    Raises:
        DataError: there are fewer than 50 different texts, or they cannot be used.
    """
    examples = model.encode_texts(texts, replace(columns, label_names=None))
    _parted(examples, seed, "distill")
    return examples


def with_student(posterior: P, texts: Examples, options: FitOptions) -> P:
    """A posterior that has just been fitted, with a student.

    Raises:
        FitError: there is no student. `posterior`, of the error, is the one that was fitted.
    """
    try:
        return posterior.distill(texts, seed=options.seed, progress=options.progress)
    except Exception as error:  # too little memory, say
        failed = FitError(f"distill: {error}")
        failed.posterior = posterior
        raise failed from error


def _parted(texts: Examples, seed: int, argument: str) -> tuple[Examples, Examples]:
    """Texts to learn, and others on which the student is compared."""
    learnt, held_out = texts.hold_out(seed)
    if held_out is None:
        raise DataError(
            f"{argument}: got {len(texts.row_hashes) - texts.copies} different texts; expected at "
            "least 50, of which a fifth are held out"
        )
    return learnt, held_out


def _with_learnt_outputs(posterior: P, texts: Examples) -> P:
    """The posterior whose components have learnt the covariances of their outputs, if they can and
    have not yet."""
    parts, guides = posterior.components, []
    for part in tracked(parts, "learning the width", len(parts)):
        guide = part.guide
        if guide.linear and guide.output_covariance is None:
            guide = copy.deepcopy(guide)
            guide.strategy.learn_outputs(posterior.model, texts)
        guides.append(guide)
    return posterior.with_guides(guides)


def _distances(wanted: Any, given: Any, kind: str) -> dict[str, Any]:
    """How far a student's forecast is from the posterior's, by fields of the report."""
    decided = wanted.mean if kind == "rating" else wanted.label
    difference = given.loss(decided).mean().item()
    both = wanted.epistemic, given.epistemic
    known = all(len(values.unique()) > 1 for values in both)  # not of a single point estimate
    distances = {
        "difference": difference**0.5 if kind == "rating" else difference,
        "rank_correlation": float(spearmanr(*both).statistic) if known else None,
    }
    if wanted.labels is not None:
        distances["nll"] = given.nlls().mean().item()
        distances["posterior_nll"] = wanted.nlls().mean().item()
    return distances
