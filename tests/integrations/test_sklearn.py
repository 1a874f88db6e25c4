"""The estimators under scikit-learn's own checks, and in its tools."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from saves import backbone_in
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import validate_data

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.integrations.sklearn import BayesianTextClassifier, BayesianTextRegressor
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer

QUICK: dict[str, Any] = {"preset": "head_only", "guide": "normal", "epochs": 1}
TRAINED: dict[str, Any] = {"preset": "lora", "components": 1, "lr": 0.02}
EXAMPLES = tiny_examples(40)
TEXTS, NUMBERS = list(EXAMPLES.texts), EXAMPLES.labels.numpy()
CLASSES = np.array(["good", "bad"])[NUMBERS]  # not in the order of the alphabet


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(backbone_in(tmp_path_factory.mktemp("tiny")))


class OfNumbers:
    """A thin front: `check_estimator` has no checks of estimators that take only text.

    Numbers become words. Rounded in that way they are hard to learn, so scores do not count.
    """

    def fit(self, X: Any, y: Any) -> Any:
        X, y = validate_data(self, X, y)
        return super().fit(words(X), y)

    def partial_fit(self, X: Any, y: Any, **classes: Any) -> Any:
        X, y = validate_data(self, X, y, reset=not hasattr(self, "posterior_"))
        return super().partial_fit(words(X), y, **classes)

    def _forecast(self, X: Any) -> Any:
        if hasattr(self, "posterior_"):
            X = words(validate_data(self, X, reset=False))
        return super()._forecast(X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array = True, False
        for own in (tags.classifier_tags, tags.regressor_tags):
            if own is not None:
                own.poor_score = True
        return tags


class NumberClassifier(OfNumbers, BayesianTextClassifier):
    pass


class NumberRegressor(OfNumbers, BayesianTextRegressor):
    pass


def words(X: Any) -> list[str]:
    # Far from 0 they still differ, since texts that are all alike are refused.
    rounded = np.clip(np.round(4 * X.astype(float)), -1e9, 1e9).astype(int) % 48 + 2
    return [" ".join(f"w{k}" for k in row) for row in rounded]


TWICE = "it learns the same texts again by partial_fit, and they would count twice: refused"


def fails(estimator: Any) -> dict[str, str]:
    """What is meant to fail."""
    return {"check_fit_score_takes_y": TWICE}


@pytest.mark.filterwarnings("ignore:.*with different labels")  # theirs are random
@pytest.mark.slow
@parametrize_with_checks(
    [NumberClassifier(**QUICK), NumberRegressor(**QUICK)], expected_failed_checks=fails
)
def test_scikit_learns_own_checks(estimator: Any, check: Any, folder: str) -> None:
    check(estimator.set_params(backbone=folder))


def test_a_classifier_is_the_fit_of_the_package_under_the_names_of_the_classes(folder: str) -> None:
    classifier = BayesianTextClassifier(folder, **TRAINED).fit(TEXTS, CLASSES)
    assert classifier.classes_.tolist() == ["bad", "good"]
    model = bh.tasks.categories(
        tiny_backbone(), 2, kinds=bh.presets.lora(), tokenizer=tiny_tokenizer()
    )
    data = {"text": TEXTS, "label": list(CLASSES)}
    posterior = bh.fit(model, "laplace", data, components=1, lr=0.02, progress=False)
    probabilities = classifier.predict_proba(TEXTS)
    assert np.array_equal(classifier.predict_log_proba(TEXTS), np.log(probabilities))
    expected = posterior.predict(TEXTS).probabilities
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert np.abs(probabilities.sum(1) - 1).max() < 1e-12
    assert (classifier.predict(TEXTS) == CLASSES).mean() > 0.8
    assert classifier.posterior_.columns.label_names == ("bad", "good")


def test_a_regressors_std_is_that_of_the_forecast(folder: str) -> None:
    regressor = BayesianTextRegressor(folder, **TRAINED).fit(TEXTS, 100 + 10 * NUMBERS)
    mean, std = regressor.predict(TEXTS, return_std=True)
    forecast = regressor.posterior_.predict(TEXTS)
    np.testing.assert_array_equal(mean, forecast.mean)
    np.testing.assert_array_equal(std, forecast.sd)
    assert regressor.score(TEXTS, 100 + 10 * NUMBERS) > 0.5
    assert len(regressor.partial_fit(["w7"], [104]).posterior_.lineage) == 2


def test_partial_fit_is_an_update(folder: str) -> None:
    classifier = BayesianTextClassifier(folder, **QUICK)
    with pytest.raises(ConfigError, match="classes=None"):
        classifier.partial_fit(TEXTS[:30], CLASSES[:30])
    with pytest.raises(DataError, match="y: the only class is good; expected at least two"):
        classifier.fit(TEXTS[:2], ["good", "good"])
    classifier.partial_fit(TEXTS[:30], CLASSES[:30], classes=["good", "so-so", "bad"])
    assert classifier.predict_proba(TEXTS).shape == (len(TEXTS), 3)
    first = classifier.posterior_
    classifier.set_params(epochs=2).partial_fit(TEXTS[30:31], ["so-so"])
    assert [r.options.epochs for r in classifier.posterior_.lineage] == [1, 2]
    assert classifier.posterior_.report.parent == first.report.id
    with pytest.raises(DataError, match="has learnt 1 of these"):
        classifier.partial_fit(TEXTS[30:31], ["so-so"])
    with pytest.raises(DataError, match="y: 'new' is not among the classes"):
        classifier.partial_fit(TEXTS[31:], ["new"] * 9)
    with pytest.raises(ConfigError, match="as in the first call"):
        classifier.partial_fit(TEXTS[31:], CLASSES[31:], classes=["good", "bad"])
    assert len(classifier.fit(TEXTS, CLASSES).posterior_.lineage) == 1  # starts anew


def test_a_first_batch_may_be_of_one_class_if_all_are_named(folder: str) -> None:
    """As for the estimators of scikit-learn: a stream may begin with one class."""
    good = CLASSES == "good"
    for guide in ("laplace", "normal", "delta"):
        classifier = BayesianTextClassifier(
            folder, preset="head_only", components=1, guide=guide, epochs=9
        )
        first = np.array(TEXTS)[good]
        classifier.partial_fit(first, CLASSES[good], classes=["good", "bad"])
        assert classifier.predict_proba(TEXTS).shape == (len(TEXTS), 2)
        assert (classifier.predict(first) == "good").all()


def test_a_copy_predicts_the_same_and_holds_the_files_of_a_saved_posterior(folder: str) -> None:
    classifier = BayesianTextClassifier(folder, **QUICK).fit(TEXTS, CLASSES)
    expected = classifier.predict_proba(TEXTS)
    files = classifier.__getstate__()["posterior_"]
    assert [*files] == ["posterior.safetensors"]
    for again in (pickle.loads(pickle.dumps(classifier)), copy.deepcopy(classifier)):
        np.testing.assert_array_equal(again.predict_proba(TEXTS), expected)
        again.partial_fit(["w7"], ["good"])
    with pytest.raises(NotFittedError):
        pickle.loads(pickle.dumps(clone(classifier))).predict(TEXTS)


def test_texts_come_in_one_column_of_any_kind(folder: str) -> None:
    classifier = BayesianTextClassifier(folder, **QUICK).fit(pd.Series(TEXTS), pd.Series(CLASSES))
    expected = classifier.predict_proba(TEXTS)
    for X in (tuple(TEXTS), np.array(TEXTS), np.array(TEXTS)[:, None], pd.DataFrame({"t": TEXTS})):
        np.testing.assert_array_equal(classifier.predict_proba(X), expected)
    for X, problem in (
        ("w5", "scalar"),
        ([["w5", "w6"]], r"shape \(1, 2\); expected \(N,\)"),
        (["w5", None], "row 1: the text is missing"),
        ([5], "row 0: 5 is a int"),
        ([], "0 sample"),
    ):
        with pytest.raises((TypeError, ValueError), match=problem):
            classifier.predict(X)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"preset": "lore"}, "preset='lore'"),
        ({"random_state": -1}, "random_state=-1"),
        ({"epochs": 0}, "epochs=0"),
        ({"guide": "lapalce"}, "unknown guide 'lapalce'"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], problem: str, folder: str) -> None:
    classifier = BayesianTextClassifier(folder, **QUICK).set_params(**changes)
    with pytest.raises(ValueError, match=problem):
        classifier.fit(TEXTS, CLASSES)
    assert not hasattr(classifier, "posterior_")


def test_classes_are_of_one_type(folder: str) -> None:
    classes = np.array([*CLASSES[:-1], None], dtype=object)
    with pytest.raises(DataError, match="y: classes of several types, NoneType, "):
        BayesianTextClassifier(folder, **QUICK).fit(TEXTS, classes)


def test_labels_come_in_one_column_too(folder: str) -> None:
    column = [[label] for label in CLASSES.tolist()]
    with pytest.warns(DataConversionWarning):
        classifier = BayesianTextClassifier(folder, **QUICK).fit(TEXTS, column)
    assert classifier.classes_.tolist() == ["bad", "good"]


def test_a_random_state_draws_the_seed(folder: str) -> None:
    def seed(state: Any) -> Any:
        fitted = BayesianTextClassifier(folder, **QUICK, random_state=state).fit(TEXTS, CLASSES)
        return fitted.posterior_.report.options.seed

    state = np.random.RandomState(3)
    assert seed(state) == seed(np.random.RandomState(3)) != seed(state)
    assert seed(None) != seed(None)
    assert seed(np.int64(3)) == 3


def test_verbose_shows_the_progress(folder: str) -> None:
    for verbose in (False, 1):
        fitted = BayesianTextClassifier(folder, **QUICK, verbose=verbose).fit(TEXTS, CLASSES)
        assert fitted.posterior_.report.options.progress is bool(verbose)


def test_pipelines_and_searches(folder: str) -> None:
    steps = make_pipeline(
        FunctionTransformer(lambda table: table["review"]), BayesianTextClassifier(folder, **QUICK)
    )
    search = GridSearchCV(
        steps, {"bayesiantextclassifier__epochs": [1, 8]}, cv=2, scoring="neg_log_loss"
    )
    search.fit(pd.DataFrame({"review": TEXTS}), CLASSES)
    assert search.best_params_ == {"bayesiantextclassifier__epochs": 8}
    assert search.predict_proba(pd.DataFrame({"review": TEXTS})).shape == (len(TEXTS), 2)


def test_classes_are_the_same_as_floats(folder: str) -> None:
    classifier = BayesianTextClassifier(folder, **QUICK)
    classifier.partial_fit(TEXTS[:20], NUMBERS[:20].astype(float), classes=[0, 1])
    classifier.partial_fit(TEXTS[20:30], NUMBERS[20:30].astype(float))
    assert classifier.classes_.tolist() == [0, 1]
    assert classifier.posterior_.columns.label_names == ("0", "1")
    with pytest.raises(DataError, match=r"y: 2.0 is not among the classes \[0, 1\]$"):
        classifier.partial_fit(TEXTS[30:], [2.0] * 10)


def test_a_promise_says_which_texts_are_answered(folder: str) -> None:
    classifier = BayesianTextClassifier(folder, **TRAINED, random_state=1).fit(TEXTS, CLASSES)
    with pytest.raises(ConfigError, match="answers: nothing is promised yet"):
        classifier.answers(TEXTS)
    more = tiny_examples(120, seed=7)
    labels = np.array(["good", "bad"])[more.labels.numpy()]
    classifier.promise(list(more.texts), labels, max_share_to_people=0.5)
    chance = classifier.predict_proba(TEXTS).max(1)
    threshold = classifier.posterior_.promised.threshold
    like = ~classifier.posterior_.predict(list(TEXTS)).unlike().numpy()
    assert classifier.answers(TEXTS).tolist() == ((chance > threshold) & like).tolist()
    assert pickle.loads(pickle.dumps(classifier)).answers(TEXTS).shape == (40,)
    classifier.partial_fit(list(more.texts)[:20], labels[:20])
    assert classifier.posterior_.promised is None
    regressor = BayesianTextRegressor(folder, **TRAINED).fit(TEXTS, NUMBERS * 2.0)
    regressor.promise(list(more.texts), more.labels * 2.0, tolerance=0.5, error=0.3)
    assert regressor.answers(TEXTS).dtype == bool
