"""`Predictor`: a fitted guide with its model, what it predicts, and what is promised of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from torch import Tensor
from transformers import PreTrainedModel

from ..base.isolation import locked, with_gradients
from ..base.names import Method
from ..base.values import Amount, valid
from ..data import Columns, Examples
from ..data.copies import new_among
from ..decisions.novelty import Novelty
from ..decisions.promises import Promise, terms, with_promise
from ..errors import ConfigError
from ..forecast.metrics import evaluate
from ..guides import Guide
from ..guides.guide import check_not_linear, guides_of
from ..model.model import Model
from ..prediction.draws import draw, point
from ..prediction.predict import AnyForecast, predict
from ..prediction.student import Student
from ..priors import Prior
from ..training.report import FitReport

if TYPE_CHECKING:
    from .posterior import Posterior

Part = int | Literal["student"]
"""A component of a posterior, by its number, or its student."""


@dataclass(eq=False, repr=False)
class Predictor:
    """What a `Posterior` is, and predicts; its attributes are described there."""

    model: Model
    guides: Sequence[Guide]
    lineage: tuple[FitReport, ...]
    columns: Columns = Columns()
    priors: Sequence[Prior] = ()
    first_priors: Sequence[Prior | None] = ()
    student: Student | None = None
    learnt_rows: Tensor | None = None
    promised: Promise | None = None
    novelty: Novelty | None = None

    def __post_init__(self) -> None:
        self.guides = tuple(guides_of(self.guides))
        count = len(self.guides)
        alike = count == 1 or not self.priors
        self.priors = (self.model.prior,) * count if alike else tuple(self.priors)
        self.first_priors = tuple(self.first_priors) or (None,) * count
        self.columns = self.model.named(self.columns)

    @property
    def guide(self) -> Guide:
        """The guide, if there is one component.

        Raises:
            ConfigError: there are several; `guides` has them.
        """
        if len(self.guides) > 1:
            raise ConfigError(f"guide: this posterior has {len(self.guides)}; expected `guides`")
        return self.guides[0]

    @property
    def linear(self) -> bool:
        """Whether the network is linearised around the central values of each component."""
        return all(guide.linear for guide in self.guides)

    @property
    def point(self) -> bool:
        """Whether training is of point estimates, which may have got a width afterwards."""
        return all(guide.point for guide in self.guides)

    @property
    def components(self) -> tuple[Posterior, ...]:
        """Each component as a posterior of its own; one component is the posterior itself, unless
        it is all that is left of several."""
        if len(self.guides) == 1 and not (self.lineage and self.report.components):
            return (cast("Posterior", self),)  # nothing else is a Predictor
        return tuple(cast("Posterior", self._component(k)) for k in range(len(self.guides)))

    def _component(self, number: int) -> Self:
        return self.replace(
            model=self.model.with_prior(self.priors[number]),
            guides=(self.guides[number],),
            lineage=lineage_of(number, self.lineage),
            first_priors=(self.first_priors[number],),
            **dict.fromkeys(("student", "promised", "novelty")),
        )

    def replace(self, **changes: Any) -> Self:
        """The same posterior with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def with_report(self, **changes: Any) -> Self:
        """The same posterior with some fields of its last report changed, such as `name`."""
        report = dataclasses.replace(self.report, **changes)
        return self.replace(lineage=(*self.lineage[:-1], report))

    @property
    def report(self) -> FitReport:
        """The report of the last round.

        Raises:
            ConfigError: there is none: this posterior was made with an empty `lineage`.
        """
        if not self.lineage:
            raise ConfigError("this posterior has no report: it was made with an empty lineage")
        return self.lineage[-1]

    @property
    def used_rows(self) -> list[Tensor | None]:
        """(R,) hashes of the rows that were learnt or held out, and of those of the student; None
        where they are not known."""
        of_student = [] if self.student is None else [self.student.learnt_rows]
        return [self.learnt_rows, *of_student]

    @property
    def facts(self) -> dict[str, str]:
        """The facts of the model, and the guide, the number of rounds and the classes, in words."""
        names, guide = self.columns.label_names, self.guides[0].title()
        guide = guide if len(self.guides) == 1 else f"{len(self.guides)} x {guide}"
        facts = self.model.facts | {"guide": guide, "rounds": str(len(self.lineage))}
        facts |= {"student": self.student.report.in_short} if self.student else {}
        facts |= {"promise": self.promised.in_short} if self.promised else {}
        if kept := sum(map(bool, self.novelty.texts)) if self.novelty else 0:
            facts["texts"] = f"{kept} learnt ones are kept here, and in files"
        return facts | ({"classes": ", ".join(names)} if names else {})

    def __repr__(self) -> str:
        kind, facts = type(self).__name__, self.facts
        if not self.lineage:
            return f"{kind}(no round, {facts['guide']})"
        more = (f"\n{k}: {facts[k]}" for k in ("student", "promise", "texts") if k in facts)
        return f"{kind}(round {len(self.lineage)}, {facts['guide']})\n{self.report}{''.join(more)}"

    def encode(self, data: object, *, labelled: bool = True) -> Examples:
        """Read and tokenise data as the training data were; see `data.encode`."""
        return self.model.encode(data, self.columns, labelled=labelled)

    def sample(self, samples: int = 100, seed: int = 0) -> dict[str, Tensor]:
        """Joint draws of the weights: site name to `(samples, *site shape)`.

        Under `laplace` those of the head include the output scale, as do `weights` and exports.
        """
        draws = draw(self.model, self.guides, samples, seed)
        return {name: value[:, 0] for name, value in draws.items()}

    def weights(self, component: Part | None = None, draw: int | None = None) -> dict[str, Tensor]:
        """One value for each site, in its shape: central values, or a draw.

        Args:
            component: of a mixture, the one to take; or "student", for the weights of that.
            draw: the number of a draw, its seed; None for the component's central values.

        Raises:
            ConfigError: there is no such component, or no student; or a draw of a linearised
                posterior was asked for, which is no value of the network's weights.
            GuideError: the guide has no central values.
        """
        if component == "student":
            weights = self._student().weights.items()
            return {name: value.to(self.model.network.device) for name, value in weights}
        count = len(self.components)
        number = 0 if component is None and count == 1 else component
        name = 'component (or "student")' if self.student else "component"
        if (number := valid(Amount, name, number)) >= count:
            raise ConfigError(f"{name}={number}: there are {count}")
        part = self.components[number]
        if draw is None:
            return {name: value[0, 0] for name, value in point(part.model, part.guide).items()}
        check_not_linear(part.guide, f"draw={draw}")
        return {name: value[0] for name, value in part.sample(1, draw).items()}

    def bind(
        self, component: Part | None = None, draw: int | None = None
    ) -> AbstractContextManager[PreTrainedModel]:
        """Run the backbone itself under `weights(component, draw)`; see `RandomPEFT.bind`.

        >>> from bhpeft_pyro import fit
        >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
        >>> posterior = fit(tiny_model(), "delta", tiny_examples(), max_steps=1, progress=False)
        >>> with posterior.bind() as backbone:
        ...     backbone(**backbone.dummy_inputs).last_hidden_state.shape
        torch.Size([3, 5, 16])
        """
        return self.model.network.bind(self.weights(component, draw))

    @locked()
    def predict(
        self,
        data: object,
        samples: int | None = None,
        *,
        method: Method | None = None,
        max_rows: int = 64,
        seed: int = 0,
        keep_samples: bool = False,
        bf16: bool = False,
    ) -> AnyForecast:
        """Predict texts, with separate epistemic and aleatoric uncertainty.

        `forecast.method` says how the texts were predicted, and `forecast.passes` what it cost. If
        the posterior has a promise (`promise`) for this method, and no other argument changes the
        forecasts, `forecast.answered` says which texts are answered. One of the passes, of the
        frozen backbone, is for `forecast.novelty`, p-values that are small for texts unlike the
        learnt ones; `posterior.replace(novelty=None).predict(texts)` does not take it.

        Args:
            data: a list of texts, or anything that `fit` reads. Labels are kept if there are any.
            method: "student" takes one pass of the network that `distill` has trained, for any
                guide. For Laplace approximations, "exact" computes the covariance of the outputs by
                backward passes. None takes the first of these that the posterior has, in this
                order, but no student if `samples` or `keep_samples` is given; with `keep_samples`
                weights are drawn.
            samples: number of draws, rounded up to equally many for each component of a mixture. Of
                the weights, 32 by default. Of the outputs for a Laplace approximation, 1,000 by
                default, at almost no cost (ratings with one noise scale need none). 0 is a single
                pass at the central values of each component.
            max_rows: the largest number of sequences in one pass of the transformer; bounds memory.
            seed: the same seed gives the same forecast.
            keep_samples: draw weights and keep the prediction of each draw, as `forecast.samples`:
                `(S, N, C)` probabilities of classes or labels; of ratings as `forecast.means`,
                `(S, N)`.
            bf16: autocast to bfloat16.

        Raises:
            ConfigError: an argument is out of range; a
                `method` that this posterior does not have, or that does not draw what other
                arguments ask for.
            DataError: the data cannot be used, or the backbone makes non-finite numbers of a text.
            GuideError: `samples` is 0 and the guide has no central values.
            LikelihoodError: the likelihood's distribution has no finite mean and stddev.
        """
        drawn = {"samples": samples, "keep_samples": keep_samples or None}
        asked = [f"{name}={value}" for name, value in drawn.items() if value is not None]
        if method == "student" and asked:
            raise ConfigError(f"method='student' takes one pass; expected no {', '.join(asked)}")
        forecast: AnyForecast
        examples = self.encode(data, labelled=False)
        if method == "student" or (method is None and self.student is not None and not asked):
            forecast = self._student().predict(self.model, examples, max_rows, bf16)
        else:
            forecast = predict(
                self.model,
                self.guides,
                examples,
                samples,
                method=method,
                max_rows=max_rows,
                seed=seed,
                keep_samples=keep_samples,
                bf16=bf16,
            )
        if self.novelty is not None:
            forecast = self.novelty.noted(forecast, self.model, examples, max_rows)
        if self.promised is None or asked or seed or bf16:  # it is for the same forecasts alone
            return forecast
        return self.promised.on(forecast, self.report.id)

    def _student(self) -> Student:
        """The student of this round."""
        if self.student is None:
            raise ConfigError("this posterior has no student; posterior.distill(texts) makes one")
        if self.student.report.round != self.report.id:
            raise ConfigError(
                f"student: it is of round {self.student.report.round}, this is round "
                f"{self.report.id}; posterior.distill(texts) makes another"
            )
        return self.student

    def evaluate(
        self, data: object, samples: int | None = None, **options: Any
    ) -> dict[str, float]:
        """Accuracy, NLL, ECE and other metrics (`metrics.evaluate`) on labelled data.

        If some rows have texts that were learnt or held out, a warning says how many, and the
        scores of the others follow those of all, as "new/accuracy" and so on.
        """
        examples, known = self.encode(data), self.replace(novelty=None)  # no metric is about it
        new = new_among(examples, self.learnt_rows)
        scores = evaluate(known.predict(examples, samples, **options))
        if not 0 < len(new) < len(examples):
            return scores
        of_new = evaluate(known.predict(examples.subset(new), samples, **options))
        return scores | {f"new/{name}": value for name, value in of_new.items()}

    def promise(
        self,
        calibration: object,
        error: float | None = None,
        confidence: float = 0.9,
        *,
        tolerance: float | None = None,
        max_share_to_people: float | None = None,
        method: Method | None = None,
        answer_unlike: bool = False,
    ) -> Self:
        """Promise that few answers are wrong; predict then says which texts it answers.

        Later rounds, new labels and a new student drop the promise.

        Args:
            calibration: labelled rows like the texts to come, that nothing was learnt from or
                chosen by; best some hundreds. Rows with texts that this posterior has learnt or
                held out are left out. `forecast.sets` and `forecast.intervals` use them too.
            error: the largest share of wrong answers among the texts that are answered; 0.05 by
                default.
            confidence: how sure the promise is, over random draws of the calibration rows.
            tolerance: for ratings, the largest distance at which an answer is right.
            max_share_to_people: the largest share of texts that are not answered, in place of
                `error`, which then follows.
            method: of the forecasts that it is for, as for `predict`.
            answer_unlike: answer texts unlike what was learnt as well (`forecast.unlike`); by
                default they are left to people, however sure their forecast looks.

        Returns:
            This posterior with `promised`, of which `print` says word for word what it is.

        Raises:
            ConfigError: an argument is out of range.
            DataError: the rows cannot be used, or are too few; says how many would do. Too many are
                unlike what was learnt; or the posterior cannot tell which are.
        """
        asked = terms(self.model, error, confidence, tolerance, max_share_to_people)
        return with_promise(self, calibration, asked, method, answer_unlike)

    @locked()
    @with_gradients()
    def distill(
        self,
        texts: object,
        *,
        epochs: int = 3,
        batch_size: int = 16,
        lr: float = 1e-3,
        seed: int = 0,
        progress: bool = True,
    ) -> Self:
        """Train one network, the student, to predict what this posterior predicts for texts.

        It starts from the component with the lowest held-out NLL. Its probabilities or mean ratings
        become those of the mixture; how uncertain it is comes from the features of the same pass.
        `student.report` says how far it is from the posterior on a fifth of the texts, which it has
        not learnt. It is saved with the posterior, and exported by `to_peft(folder, "student")` and
        `merge("student")`. Later rounds start from the components, not from it.

        Args:
            texts: as data for `predict`, best some hundreds that the posterior has not learnt.
                Labels are not learnt; if there are any, the report has the NLL.
            epochs: passes over the texts, of which the best on held-out ones is kept.
            batch_size, lr, seed, progress: as for `fit`.

        Returns:
            This posterior with its `student`.

        Raises:
            DataError: there are fewer than 50 different texts.
            GuideError: the guide has no central values to start from.
            FitError: the training diverged.

        >>> from bhpeft_pyro import fit
        >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
        >>> options = {"max_steps": 3, "progress": False}
        >>> posterior = fit(tiny_model(), "laplace", tiny_examples(), components=2, **options)
        >>> posterior = posterior.distill(tiny_examples(60, seed=1), epochs=1, progress=False)
        >>> posterior.predict(["w5 w20"]).method
        'student'
        """
        from .distill import distill

        return distill(self, texts, epochs, batch_size, lr, seed, progress)


def lineage_of(number: int, lineage: Sequence[FitReport]) -> tuple[FitReport, ...]:
    """The reports of a component of the last round, whose number was another one in earlier rounds
    if a component before it has failed since."""
    reports: list[FitReport] = []
    for whole in reversed(lineage):
        parts = whole.components or [whole]
        by_id: dict[str | None, FitReport] = {part.id: part for part in parts}
        own = by_id.get(reports[0].parent) if reports else None
        reports.insert(0, own or parts[min(number, len(parts) - 1)])
    return tuple(reports)
