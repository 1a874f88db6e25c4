"""One run's outcome: the draws of its forecasts, and what made them, in one file.

Tensors are in safetensors, the rest is JSON in the file's metadata; no table needs more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bhpeft_pyro.errors import SaveError
from bhpeft_pyro.forecast import ClassForecast, LabelsForecast, RatingForecast
from bhpeft_pyro.prediction.predict import AnyForecast

__all__ = ["Outcome"]

_KEY = "outcome"
_MOMENTS = ("probabilities", "total", "aleatoric", "epistemic", "variance", "between")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run leaves.

    Attributes:
        facts: task, method, rows, seed, the setting, and what the fit says of itself.
        forecasts: of "validation", "test" and the shifts, labelled where labels are known.
    """

    facts: Mapping[str, Any]
    forecasts: Mapping[str, AnyForecast]

    def to_bytes(self) -> bytes:
        """The file."""
        tensors: dict[str, Tensor] = {}
        for part, forecast in self.forecasts.items():
            named: dict[str, Tensor | None] = {"labels": forecast.labels}
            assert not isinstance(forecast, LabelsForecast)  # no task has several labels a text
            if isinstance(forecast, RatingForecast):
                named |= {"means": forecast.means, "sds": forecast.sds, "within": forecast.within}
            elif forecast.samples is None:
                named |= {name: getattr(forecast, name) for name in (*_MOMENTS, "choices")}
                named["count"] = torch.tensor(forecast.draws)
            else:
                named |= {"draws": forecast.samples, "choices": forecast.choices}
            named["novelty"] = forecast.novelty
            tensors |= {f"{part}/{name}": v for name, v in named.items() if v is not None}
        flat = {name: value.contiguous() for name, value in tensors.items()}
        return save(flat, metadata={_KEY: json.dumps(self.facts)})

    @classmethod
    def read(cls, path: Path) -> Outcome:
        """From a file.

        Raises:
            SaveError: the file is no outcome.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(path, "pt") as file:
                # Files from before the device was stored were made on CPUs.
                facts = {"device": "CPU"} | json.loads(file.metadata()[_KEY])
                for name in file.keys():  # noqa: SIM118
                    part, _, tensor = name.rpartition("/")
                    parts.setdefault(part, {})[tensor] = file.get_tensor(name)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SaveError(f"{path} is no result of an experiment: {error}") from error
        made = {part: _forecast(tensors) for part, tensors in parts.items()}
        return cls(facts, made)


def _forecast(tensors: Mapping[str, Tensor]) -> AnyForecast:
    made: AnyForecast
    if "means" in tensors:
        draws = tensors["means"], tensors["sds"]
        made = RatingForecast.from_draws(*draws, within=tensors.get("within"))
    elif "draws" in tensors:
        choices = tensors.get("choices")
        made = ClassForecast.from_draws(tensors["draws"], choices=choices, keep_samples=True)
    else:
        moments: dict[str, Any] = {name: tensors.get(name) for name in (*_MOMENTS, "choices")}
        made = ClassForecast(**moments, draws=int(tensors.get("count", 1)))
    return replace(made, labels=tensors.get("labels"), novelty=tensors.get("novelty"))
