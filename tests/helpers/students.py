"""Posteriors of the tiny transformer that have learnt, and their students."""

from __future__ import annotations

from functools import cache
from typing import Any

from exact import random_texts
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.decisions.promises import Promise
from bhpeft_pyro.model.likelihoods import (
    Categorical,
    HeteroscedasticNormal,
    Likelihood,
    MultiLabel,
    MultipleChoice,
    Normal,
    OrderedLogistic,
)
from bhpeft_pyro.testing import tiny_model

LIKELIHOODS: dict[str, tuple[Likelihood, int]] = {
    "class": (Categorical(), 3),
    "stars": (OrderedLogistic(3), 1),
    "labels": (MultiLabel(), 3),
    "rating": (Normal(), 1),
    "noisy rating": (HeteroscedasticNormal(), 2),
    "choice": (MultipleChoice(), 1),
}
QUICK: dict[str, Any] = {"max_steps": 30, "batch_size": 16, "lr": 0.03, "progress": False}


def table(kind: str, count: int = 60, seed: int = 1) -> dict[str, list[Any]]:
    """Texts whose label is a function of their first word."""
    texts = random_texts(count, seed)
    first = [int(text.split()[0][1:]) for text in texts]
    if kind == "choice":  # two to four
        ways = [[f"w{word}", "w6 w7", "w8", "w9"][: 2 + word % 3] for word in first]
        return {"question": texts, "choices": ways, "answer": [word % 2 for word in first]}
    labels: list[Any] = [word % 3 for word in first]
    if kind == "labels":
        labels = [[word % 2, 1 - word % 2, int(word % 3 == 0)] for word in first]
    elif kind.endswith("rating"):
        labels = [word / 10 for word in first]
    return {"text": texts, "label": labels}


def unlabelled(kind: str, count: int = 220, seed: int = 3) -> dict[str, list[Any]]:
    """Other texts alone."""
    columns = table(kind, count, seed)
    return {name: columns[name] for name in columns if name not in ("label", "answer")}


def fresh(kind: str, count: int, seed: int) -> dict[str, list[Any]]:
    """Rows without a text that any of the posteriors or students here has learnt."""
    rows = table(kind, count, seed)
    texts, *_ = rows
    seen = {*table(kind)[texts], *unlabelled(kind)[texts]}
    left = [i for i, text in enumerate(rows[texts]) if text not in seen]
    return {name: [cells[i] for i in left] for name, cells in rows.items()}


def promise_on(kind: str, **how: Any) -> Promise:
    """One that was set on calibration rows, which are tensors by name, by no posterior at all."""
    calibration = {name: value for name, value in how.items() if isinstance(value, Tensor)}
    facts: dict[str, Any] = {"error": 0.1, "confidence": 0.9, "answered": 1, "wrong": 0}
    facts |= {"answer_unlike": True, "unlike": 0}
    facts |= {"method": "", "round": "a", "rows": len(next(iter(calibration.values())))}
    facts |= {name: value for name, value in how.items() if name not in calibration}
    return Promise(kind=kind, calibration=calibration, **facts)


@cache
def fitted(kind: str = "class", guide: str = "laplace") -> bh.Posterior:
    """A mixture of two components, of LoRA."""
    likelihood, outputs = LIKELIHOODS[kind]
    model = tiny_model(outputs=outputs, likelihood=likelihood, aligned=True)
    return bh.fit(model, guide, table(kind), components=2, **QUICK)


@cache
def with_student(kind: str = "class", guide: str = "laplace") -> bh.Posterior:
    """The same with a student."""
    posterior = fitted(kind, guide)
    return posterior.distill(unlabelled(kind), epochs=2, lr=0.01, progress=False)
