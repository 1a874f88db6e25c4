"""`Posterior`: a fitted guide and everything needed to use, update and keep it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.checks import Number, as_path, check
from ..base.files import naming
from ..base.fit_options import FitOptions
from ..base.names import Method
from ..base.threads import fitting, with_gradients
from ..data import Columns, Examples
from ..decisions.novelty import Novelty
from ..decisions.promises import Promise, with_promise
from ..decisions.queue import By, Queue, to_label
from ..errors import ConfigError
from ..forecast.metrics import evaluate
from ..guides import Guide, GuideLike
from ..guides.guide import check_not_linear, prior_of
from ..model.model import Model
from ..prediction.draws import draw, point
from ..prediction.predict import AnyForecast, predict
from ..prediction.student import Student
from ..priors import Prior, PriorLike, with_fixed_scales
from ..training.loop import Callback, OptimizerFactory
from ..training.report import FitReport

if TYPE_CHECKING:
    from pyro.infer import MCMC

    from ..diagnostics import Diagnosis
    from ..streams import Drift

__all__ = ["Posterior"]

Part = int | Literal["student"]
"""A component of a posterior, by its number, or its student."""


@dataclass(eq=False, repr=False)
class Posterior:
    """A fitted guide with its model, its reports and the columns of its data.

    Its methods lead to later parts of the package (`streams`, `diagnostics`, `integrations`), which
    they import when they are called.

    Attributes:
        model: the model, with the prior that the guide was fitted under.
        guide: the fitted guide.
        lineage: one report per round, the first round first.
        columns: how data are read.
        first_prior: the prior of the first round; None if it is a function of your own that was
            not passed to `load`.
        student: one network that predicts in place of all components (`distill`), if there is one.
        learnt_rows: (R,) hashes of the texts of all rows that have been learnt or held out, by
            which `queue` leaves them out; None if they are not known.
        promised: what is promised of answers (`promise`), if anything is.
        novelty: what recognises texts unlike those of all rounds; None if it is not known.
        is_mixture: whether it has components that are posteriors of their own.
    """

    model: Model
    guide: Guide
    lineage: tuple[FitReport, ...]
    columns: Columns = Columns()
    first_prior: Prior | None = None
    student: Student | None = None
    learnt_rows: Tensor | None = None
    promised: Promise | None = None
    novelty: Novelty | None = None

    @staticmethod
    def of(
        model: Model, guide: nn.Module | Callable[..., Any], *args: Any, **how: Any
    ) -> Posterior:
        """A posterior of a guide that `fit` has not trained; see `posterior.from_pyro.of`."""
        from .from_pyro import of

        return of(model, guide, *args, **how)

    @staticmethod
    def from_draws(
        model: Model, draws: Mapping[str, Tensor] | MCMC, *args: Any, **how: Any
    ) -> Posterior:
        """A posterior of draws of any sampler; see `posterior.from_pyro.from_draws`."""
        from .from_pyro import from_draws

        return from_draws(model, draws, *args, **how)

    is_mixture: ClassVar[bool] = False

    @property
    def components(self) -> tuple[Posterior, ...]:
        """The independent fits of a mixture; otherwise the posterior itself."""
        return (self,)

    def replace(self, **changes: Any) -> Self:
        """The same posterior with some attributes changed."""
        new = copy.copy(self)
        vars(new).update(changes)
        return new

    def with_guides(self, guides: Sequence[Guide]) -> Self:
        """The same posterior with a guide for each component."""
        return self.replace(guide=guides[0])

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
    def facts(self) -> dict[str, str]:
        """The facts of the model, and the guide, the number of rounds and the classes, in words."""
        names, parts = self.columns.label_names, self.components
        guide = parts[0].guide.title()
        guide = guide if parts[0] is self else f"{len(parts)} x {guide}"
        facts = self.model.facts | {"guide": guide, "rounds": str(len(self.lineage))}
        facts |= {"student": self.student.report.in_short} if self.student else {}
        facts |= {"promise": self.promised.in_short} if self.promised else {}
        if kept := sum(map(bool, self.novelty.texts)) if self.novelty else 0:
            facts["texts"] = f"{kept} learnt ones are kept here, and in files"
        return facts | ({"classes": ", ".join(names)} if names else {})

    def __repr__(self) -> str:
        kind, guide = type(self).__name__, self.facts["guide"]
        if not self.lineage:
            return f"{kind}(no round, {guide})"
        more = (
            f"\n{name}: {self.facts[name]}"
            for name in ("student", "promise", "texts")
            if name in self.facts
        )
        return f"{kind}(round {len(self.lineage)}, {guide})\n{self.report}{''.join(more)}"

    def _repr_html_(self) -> str:
        from ..plots.html import posterior_html  # matplotlib is slow to import

        return posterior_html(self)

    def encode(self, data: object, *, labelled: bool = True) -> Examples:
        """Read and tokenise data as the training data were; see `data.encode`."""
        return self.model.encode(data, self.columns, labelled=labelled)

    def sample(self, samples: int = 100, seed: int = 0) -> dict[str, Tensor]:
        """Joint draws of the weights: site name to `(samples, *site shape)`.

        Under `laplace` those of the head include the output scale, as do `weights` and exports.
        """
        draws = draw(self.model, self.guide, samples, seed)
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
            return dict(self._student().weights)
        count = len(self.components)
        number = 0 if component is None and count == 1 else component
        part = self.components[Number(least=0, most=count - 1, whole=True)("component", number)]
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

        `forecast.method` says how it was done, and `forecast.passes` what it cost. If something is
        promised (`promise`) of forecasts by this method, with no other argument that changes them,
        `forecast.answered` says of which. One of the passes, of the frozen backbone, is for
        `forecast.novelty`, p-values that are small for texts unlike the learnt ones;
        `posterior.replace(novelty=None).predict(texts)` does without.

        Args:
            data: a list of texts, or anything that `fit` reads. Labels are kept if there are any.
            method: of a Laplace approximation, "components" takes a forward pass of each, and the
                covariance of its outputs is what the fit has learnt of it; "exact" computes this
                covariance by backward passes. "student" takes one pass of the network that
                `distill` has trained, for any guide. None takes the cheapest that there is, in the
                order "student", "components", "exact"; no student where `samples` or `keep_samples`
                is given, and draws of the weights where the latter is.
            samples: number of draws, rounded up to equally many for each component of a mixture. Of
                the weights, 32 by default. Of the outputs for a Laplace approximation, 1,000 by
                default, at almost no cost (ratings with one noise scale need none). 0 is a single
                pass at the central values of each component.
            max_rows: the largest number of sequences in one pass of the transformer; bounds memory.
            seed: the same seed gives the same forecast.
            keep_samples: draw weights and keep the prediction of each draw, as `forecast.samples`:
                `(S, N, C)` probabilities of classes or labels, or `(S, N)` means of ratings.
            bf16: autocast to bfloat16.

        Raises:
            ConfigError: an argument is out of range, or there is no memory for so many draws; a
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
                self.guide,
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

    @fitting()
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
            This posterior with its `student`. Components of `laplace` that have not learnt the
            covariance of their outputs have done so, if there were 250 texts or more.

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

    def queue(self, texts: object, n: int = 20, *, by: By = "information", seed: int = 0) -> Queue:
        """Which texts to label next, the most useful first, with a reason for each.

        Texts that have been learnt or held out are left out, and of copies all but the first.

        Args:
            texts: as data for `predict`; labels are not looked at.
            n: how many; there may be fewer different texts.
            by: "information" takes the texts whose labels say most, together, about the labels of
                all texts (`decisions.queue.most_informative`). "typical" looks for texts that are
                like many others, as `decisions.queue.first_to_label`. "random" draws.
            seed: of the draws of the weights, of the clusters, or of the choice.

        Raises:
            ConfigError: an argument is out of range; words have labels of their own; or `by` is
                "typical" and scikit-activeml is missing (`pip install 'bhpeft_pyro[decisions]'`).
            DataError: the texts cannot be used, or all have been learnt.
            GuideError: `by` is "information", and this is a single point estimate.

        >>> from bhpeft_pyro import fit
        >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
        >>> posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=3, progress=False)
        >>> posterior.queue(tiny_examples(60, seed=1), 2).rows.shape
        torch.Size([2])
        """
        return to_label(self.model, self, texts, self.columns, n, by, seed)

    def promise(
        self,
        calibration: object,
        error: float | None = None,
        confidence: float = 0.9,
        *,
        tolerance: float | None = None,
        max_share_to_people: float | None = None,
        method: Method | None = None,
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

        Returns:
            This posterior with `promised`, of which `print` says word for word what it is.

        Raises:
            ConfigError: an argument is out of range; or words have labels of their own.
            DataError: the rows cannot be used, or are too few; says how many would do.
        """
        how = (error, confidence, tolerance, max_share_to_people, method)
        return with_promise(self, calibration, *how)

    def evaluate(
        self, data: object, samples: int | None = None, **options: Any
    ) -> dict[str, float]:
        """Accuracy, NLL, ECE and other metrics (`metrics.evaluate`) on labelled data."""
        known = self.replace(novelty=None)  # which no metric is about
        return evaluate(known.predict(self.encode(data), samples, **options))

    def to_arviz(
        self,
        data: object | None = None,
        *,
        samples: int | None = None,
        sites: str | Sequence[str] | None = None,
        max_bytes: int = 2**30,
        seed: int = 0,
    ) -> Any:
        """Draws, the trace of the fit and, given data, predictions; see
        `integrations.arviz.to_arviz`."""
        from ..integrations.arviz import to_arviz

        return to_arviz(self, data, samples=samples, sites=sites, max_bytes=max_bytes, seed=seed)

    def diagnose(self, data: object, samples: int = 200, seed: int = 0) -> Diagnosis:
        """How good the approximation is; see `diagnostics.diagnose`."""
        from ..diagnostics import diagnose

        return diagnose(self, data, samples, seed)

    def as_prior(self) -> Prior:
        """The posterior as a prior for new data. Later training of the guide does not change it.

        Raises:
            GuideError: the guide is a point estimate, or not one of this package's.
        """
        # `update` itself leaves scales open.
        return with_fixed_scales(prior_of(self.model, self.guide))

    @with_gradients()
    def widen(self, data: object, *, validation: object | None = None, **changes: Any) -> Posterior:
        """Add a Laplace approximation to a fitted point estimate, without training it again.

        Each component is widened, and they stay a mixture. The predictive means of ratings are
        those of the point estimates; the logits of classes are multiplied by an output scale.

        Args:
            data: the data that the point estimate was fitted to.
            validation: as for `fit`: rows outside the training data, by which the width and the
                output scale are chosen. By default the rows that the fit held out of `data`.
            changes: options of the fit, such as `tau`.

        Raises:
            DataError: the data cannot be used.
            GuideError: the guide is not a point estimate, or its prior is not Normal at every site.
        """
        from .widen import widen

        return widen(self, data, validation=validation, changes=changes)

    @fitting()
    @with_gradients()
    def update(
        self,
        data: object,
        *,
        validation: object | None = None,
        options: FitOptions | None = None,
        optimizer: OptimizerFactory | None = None,
        callback: Callback | None = None,
        executor: Executor | None = None,
        guide: GuideLike | None = None,
        prior: PriorLike | None = None,
        keep: float | Mapping[str, float] = 1.0,
        grow: bool = False,
        again: bool = False,
        distill: object | None = None,
        **changes: Any,
    ) -> Posterior:
        """Learn new data: fit them with this posterior as the prior and as the start.

        This posterior does not change. The new one has the reports of all rounds. Options that are
        not given are those of the last round; without `validation`, `patience` is dropped.

        Args:
            data, validation, options, optimizer, callback, executor: as for `fit`, but no
                rows are held out of `data`.
            guide: another family for this round and later ones, by the name or mapping that `fit`
                takes. The prior is then this posterior if the family can represent it, or else the
                nearest member of the family. `FitReport.projection` is the KL between the two.
            prior: a prior of your own in place of this posterior, for example a mixture of it and
                something wide (docs/priors.md). The guide goes on from where it is, whatever its
                family; with `guide`, a new one starts at that prior. Components share it.
            keep: forget on purpose (`posterior.forgetting`): the prior is proportional to
                q^keep p0^(1 - keep), with q this posterior and p0 the first prior. One number, or
                one per pattern of site names ("lora.*"); other sites are kept.
            grow: give labels that are new in `data` an output (`grow`).
            again: learn `data` even if an earlier round did; their evidence then counts twice.
            distill: texts to make a student of the new posterior with (`distill`), which are
                checked before the round. Labels are not looked at.

        Raises:
            DataError: the data cannot be used, or an earlier round learnt them.
            ConfigError: `prior` comes with `keep`.
            GuideError: the guide is a point estimate, or one of the guides is not of this package
                and there is no `prior`.
            PriorError: forgetting has no closed form between these priors.
            FitError: as for `fit`; if the round was learnt and there is no student, the error's
                `posterior` has learnt it.
        """
        from .update import update

        check(options, FitOptions | None, "options", "bh.FitOptions(...) or None")
        if options is None and validation is None:  # the last round's patience had rows of its own
            changes = {"patience": None, **changes}
        return update(
            self,
            data,
            validation=validation,
            options=(options or self.report.options).change(**changes),
            optimizer=optimizer,
            callback=callback,
            executor=executor,
            guide=guide,
            prior=prior,
            keep=keep,
            grow=grow,
            again=again,
            distill=distill,
        )

    def assess(self, data: object, samples: int = 64, **options: Any) -> Drift:
        """How surprising new data are before they are learnt; see `streams.assess`."""
        from ..streams.drift import assess

        return assess(self, data, samples, **options)

    def grow(self, labels: Sequence[str] | int) -> Posterior:
        """Add labels to the head; see `posterior.growth`."""
        from .growth import grow

        return grow(self, labels)

    def to_peft(
        self,
        folder: str | Path,
        component: Part | None = None,
        *,
        draws: int = 0,
        seed: int = 0,
        overwrite: bool = False,
    ) -> Path:
        """Write adapters that the `peft` library loads; see `integrations.huggingface.to_peft`."""
        from ..integrations.huggingface import to_peft

        return to_peft(self, folder, component, draws=draws, seed=seed, overwrite=overwrite)

    def merge(self, component: Part | None = None) -> PreTrainedModel:
        """A plain Hugging Face classifier; see `integrations.huggingface.merge`."""
        from ..integrations.huggingface import merge

        return merge(self, component)

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """`save`, with a model card; see `integrations.huggingface.save_pretrained`."""
        from ..integrations.huggingface import save_pretrained

        return save_pretrained(self, folder, overwrite)

    @staticmethod
    def from_pretrained(name: str | Path, *args: Any, **options: Any) -> Posterior:
        """`load`, also from the Hugging Face hub; see
        `integrations.huggingface.from_pretrained`."""
        from ..integrations.huggingface import from_pretrained

        return from_pretrained(name, *args, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload to the Hugging Face hub; see `integrations.huggingface.push_to_hub`."""
        from ..integrations.huggingface import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write to a folder, as `posterior.safetensors`. Nothing is pickled.

        Args:
            path: the folder.
            overwrite: replace a posterior that is there.

        Raises:
            SaveError: the folder holds a posterior already, or the guide, prior or likelihood
                cannot be described by an import path and plain options.
            WriteError: the disk is full, or it cannot be written for another reason; what was
                there before is unchanged.
        """
        from . import saving

        folder = as_path("path", path)
        with naming(folder):
            return saving.save(self, folder, overwrite)

    @classmethod
    @with_gradients()
    def load(
        cls,
        path: str | Path,
        backbone: PreTrainedModel | str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prior: PriorLike | None = None,
        likelihood: object = None,
        guide: object = None,
        device: str = "auto",
    ) -> Posterior:
        """Read a saved posterior, with the backbone that it was fitted on.

        The backbone's weights are not in the folder, only its name and a fingerprint, which is
        checked.

        Args:
            path: the folder.
            backbone: the transformer, or its name or folder. None loads the name that was saved,
                with `AutoModel.from_pretrained` (`AutoModelForSequenceClassification` for a
                `ClassifierHead`) and `trust_remote_code=False`.
            tokenizer: as for `RandomPEFT`; by default the one of the same name, if the backbone is
                loaded here.
            prior: the prior function, if it was your own: the last round's, if it had one by
                `update(prior=...)`. Otherwise it is the first round's, which after that round only
                forgetting and new labels need.
            likelihood: what the model had, if it was your own: the class, an object of it, or the
                function. Its options are those that were saved.
            guide: the guide, if it was your own: the class, an object of it, or the function.
            device: for a backbone that is loaded here: "cpu", "cuda", or "auto" for a GPU if there
                is one.

        Raises:
            SaveError: files are missing, cut off or altered; the backbone is another one or has no
                name; or code of your own is needed, or has another name than what was saved.
            ConfigError: there is no model of this name, or no such device.
            ArchitectureError: transformers does not have the code of this model.
        """
        from . import saving

        own = {"likelihood": likelihood, "guide": guide}
        return saving.load(as_path("path", path), backbone, tokenizer, prior, device, **own)
