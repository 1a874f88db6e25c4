"""Bayesian hybrid parameter-efficient fine-tuning (arXiv 2508.02711) as Pyro modules.

Five nouns: a *site* is one random PEFT tensor; a *prior* is a stochastic function from sites to
tensors; a *likelihood* turns outputs into a distribution of labels; a *guide* is a family of
approximate posteriors; a *posterior* is a fitted guide, which predicts, is saved, and becomes the
prior of the next round.
"""

from . import data, errors, forecast, guides, peft, priors, sequential
from .data import Columns, Examples, encode
from .data.batch import Batch
from .forecast import ClassForecast, RatingForecast, metrics
from .guides import Guide, autoguide
from .inference import ELBO, FitOptions, FitReport, NaturalGradient
from .inference.fit import fit
from .model import likelihoods, tasks
from .model.head import Head, OwnHead
from .model.model import Model
from .model.network import RandomPEFT
from .peft import presets
from .posterior.mixture import MixturePosterior
from .posterior.posterior import Posterior
from .sequential import History, Replay, stream

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "Batch",
    "ClassForecast",
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
    "OwnHead",
    "Posterior",
    "RandomPEFT",
    "RatingForecast",
    "Replay",
    "autoguide",
    "data",
    "encode",
    "errors",
    "fit",
    "forecast",
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
