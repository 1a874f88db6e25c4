"""What is compared: ways to fit and predict with the same frozen transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, logging

from .. import presets
from ..calibration import tempered
from ..fitting import fit
from ..forecast import ClassForecast, RatingForecast
from ..head import Head
from ..inference.predict import AnyForecast
from ..metrics import evaluate
from ..model import Model
from ..network import RandomPEFT
from ..peft import Kind
from .data import Split, Task

__all__ = ["ARMS", "Arm", "run_arm"]


@dataclass(frozen=True)
class Arm:
    """One method.

    Attributes:
        kinds: makes the PEFT kinds.
        guide: name of the guide; "delta" is ordinary fine-tuning (a point, temperature 0), stopped
            early on validation rows; any other guide is fitted to the end at temperature 1 and
            sees no validation rows.
    """

    kinds: Callable[[], Sequence[Kind]]
    guide: str


ARMS = {
    "head only": Arm(tuple, "delta"),
    "head only, Bayesian": Arm(tuple, "normal"),
    "deterministic": Arm(presets.bh_peft, "delta"),
    "Bayesian": Arm(presets.bh_peft, "normal"),
    "Bayesian, joint": Arm(presets.bh_peft, "lowrank"),
}


def run_arm(
    arm: Arm, task: Task, data: Split, backbone: Path, seed: int, epochs: int, samples: int
) -> dict[str, dict[str, float]]:
    """Metrics on the test rows, "as is" and "scaled".

    All arms may take `epochs` passes over the same batches. "scaled" divides the logits by a
    temperature (Guo et al. 2017), or multiplies the predicted sds by a factor, fitted on the
    validation rows.
    """
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    point = arm.guide == "delta"
    stopped: dict[str, Any] = {"temperature": 0.0, "validation": data.validation, "patience": 2}
    torch.manual_seed(seed)
    network = RandomPEFT(
        AutoModel.from_pretrained(backbone),
        tuple(arm.kinds()),
        Head(task.outputs),
        tokenizer,
        aligned=not point,  # ordinary fine-tuning trains the weights themselves
    )
    posterior = fit(
        Model(network, None, task.likelihood()),
        arm.guide,
        data.train,
        columns=task.columns,
        max_length=task.max_length,
        epochs=epochs,
        seed=seed,
        progress=False,
        **(stopped if point else {}),
    )
    draws = 0 if point else samples
    forecast = posterior.predict(data.test, draws)
    scaled = _scaled(forecast, posterior.predict(data.validation, draws))
    metrics = {"as is": evaluate(forecast), "scaled": evaluate(scaled)}
    if not point:
        metrics["as is"]["negative_elbo"] = posterior.report.last("loss")
    return metrics


def _scaled(forecast: AnyForecast, validation: AnyForecast) -> AnyForecast:
    if isinstance(forecast, ClassForecast) and isinstance(validation, ClassForecast):
        return tempered(forecast, validation)[0]
    assert isinstance(forecast, RatingForecast) and isinstance(validation, RatingForecast)
    error = (validation.observed() - validation.mean) / validation.sd
    return replace(forecast, sds=forecast.sds * error.square().mean().sqrt())
