"""Bayesian hybrid parameter-efficient fine-tuning (arXiv 2508.02711) as Pyro modules.

Five nouns: a *site* is one random tensor; a *prior* is a stochastic function from sites to
tensors; a *likelihood* turns outputs into a distribution of labels; a *guide* is a family of
approximate posteriors; a *posterior* is a fitted guide, which predicts, is saved, and becomes the
prior of the next round.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (  # noqa: F401 - the others are there without a star import
        data,
        diagnostics,
        errors,
        forecast,
        guides,
        peft,
        plots,
        posterior,
        priors,
        streams,
        training,
    )
    from .base.fit_options import FitOptions
    from .data import Columns
    from .diagnostics import changes, comparison  # noqa: F401
    from .guides import autoguide
    from .integrations import arviz  # noqa: F401
    from .integrations.peft_in import from_peft
    from .model import likelihoods, tasks
    from .model.head import ClassifierHead, Head
    from .model.model import Model
    from .model.network import RandomPEFT
    from .peft import presets
    from .posterior.fit import fit
    from .posterior.posterior import Posterior
    from .streams.stream import stream

__version__ = "0.1.0"

# PyTorch, Pyro and Transformers take seconds to import, and `bhpeft --help` needs none of them: so
# each name is imported when it is first used.
_HOMES = {
    "ClassifierHead": "model.head",
    "Columns": "data",
    "FitOptions": "base.fit_options",
    "Head": "model.head",
    "Model": "model.model",
    "Posterior": "posterior.posterior",
    "RandomPEFT": "model.network",
    "autoguide": "guides",
    "fit": "posterior.fit",
    "from_peft": "integrations.peft_in",
    "stream": "streams",
}
_ROOMS = (
    *("data", "diagnostics", "errors", "forecast", "guides", "peft", "plots", "posterior"),
    *("priors", "streams", "training"),
)
_MODULES = {
    **{room: room for room in _ROOMS},
    "arviz": "integrations.arviz",
    "changes": "diagnostics.changes",
    "comparison": "diagnostics.comparison",
    "likelihoods": "model.likelihoods",
    "presets": "peft.presets",
    "tasks": "model.tasks",
}

__all__ = [  # noqa: RUF022 - the reference lists them in this order
    "fit",
    "Posterior",
    "FitOptions",
    "Columns",
    "tasks",
    "stream",
    "from_peft",
    "Model",
    "RandomPEFT",
    "Head",
    "ClassifierHead",
    "autoguide",
    "priors",
    "likelihoods",
    "guides",
    "peft",
    "presets",
    "data",
    "forecast",
    "streams",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = import_module(f"{__name__}.{_MODULES[name]}")
    elif name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
