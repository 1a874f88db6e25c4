"""Bayesian hybrid parameter-efficient fine-tuning (arXiv 2508.02711) as Pyro modules.

Five nouns: a *site* is one random PEFT tensor; a *prior* is a stochastic function from sites to
tensors; a *likelihood* turns outputs into a distribution of labels; a *guide* is a family of
approximate posteriors; a *posterior* is a fitted guide, which predicts, is saved, and becomes the
prior of the next round.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import comparison, data, errors, forecast, guides, peft, priors, sequential
    from .data import Columns, Examples, encode
    from .data.batch import Batch
    from .forecast import ClassForecast, RatingForecast, metrics
    from .guides import Guide, autoguide
    from .guides.optimizers import NaturalGradient
    from .huggingface import from_peft
    from .inference.elbo import ELBO
    from .inference.report import FitReport
    from .model import likelihoods, tasks
    from .model.head import ClassifierHead, Head
    from .model.model import Model
    from .model.network import RandomPEFT
    from .options import FitOptions
    from .peft import presets
    from .posterior.fit import fit
    from .posterior.posterior import MixturePosterior, Posterior
    from .sequential import History, Replay
    from .sequential.stream import stream

__version__ = "0.1.0"

# PyTorch, Pyro and Transformers take seconds to import, and `bhpeft --help` needs none of them: so
# each name is imported when it is first used.
_HOMES = {
    "ELBO": "inference.elbo",
    "Batch": "data.batch",
    "ClassForecast": "forecast",
    "ClassifierHead": "model.head",
    "Columns": "data",
    "Examples": "data",
    "FitOptions": "options",
    "FitReport": "inference.report",
    "Guide": "guides",
    "Head": "model.head",
    "History": "sequential",
    "MixturePosterior": "posterior.posterior",
    "Model": "model.model",
    "NaturalGradient": "guides.optimizers",
    "Posterior": "posterior.posterior",
    "RandomPEFT": "model.network",
    "RatingForecast": "forecast",
    "Replay": "sequential",
    "autoguide": "guides",
    "encode": "data",
    "fit": "posterior.fit",
    "from_peft": "huggingface",
    "stream": "sequential",
}
_MODULES = {
    "comparison": "comparison",
    "data": "data",
    "errors": "errors",
    "forecast": "forecast",
    "guides": "guides",
    "likelihoods": "model.likelihoods",
    "metrics": "forecast.metrics",
    "peft": "peft",
    "presets": "peft.presets",
    "priors": "priors",
    "sequential": "sequential",
    "tasks": "model.tasks",
}

__all__ = [
    "ELBO",
    "Batch",
    "ClassForecast",
    "ClassifierHead",
    "Columns",
    "Examples",
    "FitOptions",
    "FitReport",
    "Guide",
    "Head",
    "History",
    "MixturePosterior",
    "Model",
    "NaturalGradient",
    "Posterior",
    "RandomPEFT",
    "RatingForecast",
    "Replay",
    "autoguide",
    "comparison",
    "data",
    "encode",
    "errors",
    "fit",
    "forecast",
    "from_peft",
    "guides",
    "likelihoods",
    "metrics",
    "peft",
    "presets",
    "priors",
    "sequential",
    "stream",
    "tasks",
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
