"""What the demonstration fits and measures; nothing here prints."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import calibration
from ..fitting import fit
from ..forecast import ClassForecast
from ..head import Head
from ..metrics import evaluate, rejection_curve
from ..model import Model
from ..network import RandomPEFT
from ..peft import Kind
from ..posterior import Posterior
from .data import LABELS, Round

__all__ = [
    "Settings",
    "bayesian",
    "deterministic",
    "fine_tuned",
    "forecast",
    "most_uncertain",
    "rejections",
    "scores",
    "tempered",
]

REJECTED = (0.0, 0.1, 0.2)


@dataclass(frozen=True)
class Settings:
    """Sizes of the demonstration; everything else is the package's default.

    Attributes:
        train: training rows of round 1 and of round 2.
        validation, test: rows of each round.
        epochs: passes over the training rows.
        samples: weight draws in the ArviZ file.
        exported: test rows in the ArviZ file.
        seed: of data, draws and starting values.
    """

    train: tuple[int, int] = (400, 300)
    validation: int = 100
    test: int = 400
    epochs: int = 6
    samples: int = 8
    exported: int = 100
    seed: int = 0

    def smaller(self) -> Settings:
        """Enough to see that everything runs; the numbers mean nothing."""
        return replace(self, train=(16, 16), validation=8, test=16, epochs=2, samples=2, exported=4)


def _model(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kinds: tuple[Kind, ...],
) -> Model:
    return Model(RandomPEFT(backbone, kinds, Head(len(LABELS)), tokenizer))


def _fit(
    model: Model, guide: Any, data: Round, settings: Settings, progress: bool, **options: Any
) -> Posterior:
    options = {"epochs": settings.epochs, "seed": settings.seed, "progress": progress} | options
    return fit(model, guide, data.train, **options)


def bayesian(point: Posterior, data: Round) -> Posterior:
    """The same point with a width: a Laplace approximation, measured and not trained."""
    return point.widen(data.train, validation=data.validation)


def deterministic(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kinds: tuple[Kind, ...],
    data: Round,
    settings: Settings,
    progress: bool,
) -> Posterior:
    """PEFT weights and head as points, by maximum likelihood; validation rows choose the step."""
    model = _model(backbone, tokenizer, kinds)
    return _fit(model, "delta", data, settings, progress, validation=data.validation)


def fine_tuned(before: Posterior, data: Round, settings: Settings, progress: bool) -> Posterior:
    """Plain sequential fine-tuning: go on training the points, on the new rows only."""
    guide = copy.deepcopy(before.guide)
    return _fit(before.model, guide, data, settings, progress, temperature=0.0)


def forecast(posterior: Posterior, data: Any, settings: Settings) -> ClassForecast:
    result = posterior.predict(data, seed=settings.seed)
    assert isinstance(result, ClassForecast)
    return result


def tempered(
    posterior: Posterior, data: Round, test: ClassForecast, settings: Settings
) -> tuple[ClassForecast, float]:
    """Temperature scaling, the rival to beat: T from the validation rows, applied to the test."""
    return calibration.tempered(test, forecast(posterior, data.validation, settings))


def most_uncertain(test: ClassForecast, count: int = 5) -> list[dict[str, Any]]:
    """The examples on which the weight draws disagree most."""
    chosen: Tensor = test.flag(1.0, by="epistemic")[:count]
    truth = test.observed()
    return [
        {
            "text": test.texts[i] if test.texts is not None else "",
            "prediction": LABELS[int(test.label[i])],
            "confidence": float(test.confidence[i]),
            "epistemic": float(test.epistemic[i]),
            "truth": LABELS[int(truth[i])],
        }
        for i in chosen.tolist()
    ]


def rejections(test: ClassForecast, by: str) -> dict[str, float]:
    """Accuracy of the rest once 0, 10 and 20 % least certain are given to a human."""
    fractions, accuracy = rejection_curve(test, by=by, fractions=REJECTED)
    pairs = zip(fractions.tolist(), accuracy.tolist(), strict=True)
    return {f"{fraction:.0%}": value for fraction, value in pairs}


def scores(test: ClassForecast) -> dict[str, float]:
    """The four numbers of the demonstration's tables, of `metrics.evaluate`'s."""
    every = evaluate(test)
    return {name: every[name] for name in ("accuracy", "nll", "ece", "brier")}
