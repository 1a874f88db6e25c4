"""What is compared: four ways to fit and predict with the same frozen transformer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, logging

from .. import presets
from ..calibration import tempered
from ..forecast import ClassForecast, RatingForecast
from ..head import Head
from ..inference.predict import AnyForecast
from ..metrics import evaluate
from ..model import Model
from ..network import RandomPEFT
from ..peft import Kind
from ..posterior import Posterior, fit
from .data import Split, Task

__all__ = ["ARMS", "run_arms"]

ARMS = ("head only", "deterministic", "deterministic + scaling", "Bayesian")


def run_arms(
    task: Task, data: Split, backbone: Path, seed: int, epochs: int, samples: int
) -> dict[str, dict[str, float]]:
    """Metrics on the test rows of every arm.

    All arms may take `epochs` passes over the same batches. The deterministic ones are ordinary
    fine-tuning (a point, temperature 0), stopped early on validation rows; "scaling" divides the
    logits by a temperature (Guo et al. 2017), or multiplies the predicted sds by a factor, fitted
    on those rows.
    The Bayesian one is the package's default, at temperature 1; it sees no validation rows.
    """
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    stopped: dict[str, Any] = {"temperature": 0.0, "validation": data.validation, "patience": 2}

    def train(kinds: tuple[Kind, ...], guide: str) -> Posterior:
        torch.manual_seed(seed)
        head = Head(task.outputs)
        network = RandomPEFT(AutoModel.from_pretrained(backbone), kinds, head, tokenizer)
        return fit(
            Model(network, None, task.likelihood()),
            guide,
            data.train,
            columns=task.columns,
            max_length=task.max_length,
            epochs=epochs,
            seed=seed,
            progress=False,
            **(stopped if guide == "delta" else {}),
        )

    metrics: dict[str, dict[str, float]] = {}
    posterior = train((), "delta")
    metrics["head only"] = evaluate(posterior.predict(data.test, 0))
    posterior = train(presets.bh_peft(), "delta")
    forecast = posterior.predict(data.test, 0)
    metrics["deterministic"] = evaluate(forecast)
    scaled = _scaled(forecast, posterior.predict(data.validation, 0))
    metrics["deterministic + scaling"] = evaluate(scaled)
    posterior = train(presets.bh_peft(), "normal")
    metrics["Bayesian"] = evaluate(posterior.predict(data.test, samples)) | {
        "negative_elbo": posterior.report.last("loss")
    }
    return metrics


def _scaled(forecast: AnyForecast, validation: AnyForecast) -> AnyForecast:
    if isinstance(forecast, ClassForecast) and isinstance(validation, ClassForecast):
        return tempered(forecast, validation)[0]
    assert isinstance(forecast, RatingForecast) and isinstance(validation, RatingForecast)
    error = (validation.observed() - validation.mean) / validation.sd
    return replace(forecast, sds=forecast.sds * error.square().mean().sqrt())
