"""`Posterior`: a fitted guide and everything needed to use, update and keep it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.files import naming
from ..base.fit_options import FitOptions
from ..base.isolation import locked, with_gradients
from ..data import Columns
from ..decisions.queue import By, Queue, to_label
from ..guides.guide import prior_of
from ..model.model import Model
from ..priors import Prior, PriorLike
from ..priors.any_prior import with_fixed_scales
from ..training.loop import Callback, OptimizerFactory
from ..training.report import FitReport
from .predictor import Part, Predictor

if TYPE_CHECKING:
    from pyro.infer import MCMC

    from ..diagnostics import Diagnosis
    from ..streams import Drift

__all__ = ["Posterior"]


class Posterior(Predictor):
    """A fitted guide with its model, its reports and the columns of its data.

    Its forecasts are in `Predictor`. Methods that lead to later parts of the package (`streams`,
    `diagnostics`, `integrations`) import them when they are called.

    Attributes:
        model: the model, with the prior that the first component was fitted under.
        guides: the fitted guide of each component. With several, this is a mixture of independent
            fits with equal weights (`fit(..., components=K)`): a mixture of posteriors (Wilson and
            Izmailov 2020), or of point estimates a deep ensemble (Lakshminarayanan et al. 2017).
            The weights stay equal: the components are K approximations of one posterior and not K
            hypotheses.
        lineage: one report per round, the first round first.
        columns: how data are read.
        priors: that each component was fitted under; by default the model's.
        first_priors: the prior of each component in the first round; None if it is a function of
            your own that was not passed to `load`.
        student: one network that predicts in place of all components (`distill`), if there is one.
        learnt_rows: (R,) hashes of the texts of all rows that have been learnt or held out, by
            which `queue` leaves them out; None if they are not known.
        promised: the promise about its answers (`promise`), or None.
        novelty: what recognises texts unlike those of all rounds; None if it is not known.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> options = {"max_steps": 3, "progress": False}
    >>> both = fit(tiny_model(()), "normal", tiny_examples(), components=2, **options)
    >>> len(both.guides), both.predict(["w5 w20"], samples=3, keep_samples=True).samples.shape
    (2, torch.Size([4, 1, 2]))
    """

    @classmethod
    def mixture(cls, fits: Sequence[Posterior]) -> Posterior:
        """Independent fits of the same rows as one posterior, with a new report.

        Args:
            fits: of one network; each has one component.

        >>> from bhpeft_pyro import fit
        >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
        >>> model, data, how = tiny_model(()), tiny_examples(), {"max_steps": 3, "progress": False}
        >>> fits = [fit(model, "normal", data, seed=seed, **how) for seed in range(2)]
        >>> len(Posterior.mixture(fits).components)
        2
        """
        first = fits[0]
        report = FitReport.of_mixture([part.report for part in fits], first.report.options)
        return first.replace(
            guides=tuple(part.guide for part in fits),
            lineage=(report,),
            priors=tuple(part.model.prior for part in fits),
            first_priors=tuple(part.first_priors[0] for part in fits),
            student=None,
            promised=None,
        )

    @staticmethod
    def of(
        model: Model,
        guide: nn.Module | Callable[..., Any],
        data: object | None = None,
        columns: Columns = Columns(),
    ) -> Posterior:
        """A posterior of a guide that `fit` has not trained; see `posterior.from_pyro.of`."""
        from .from_pyro import of

        return of(model, guide, data, columns)

    @staticmethod
    def from_draws(
        model: Model,
        draws: Mapping[str, Tensor] | MCMC,
        data: object | None = None,
        columns: Columns = Columns(),
        *,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> Posterior:
        """A posterior of draws of any sampler; see `posterior.from_pyro.from_draws`."""
        from .from_pyro import from_draws

        return from_draws(model, draws, data, columns, statistics=statistics)

    def _repr_html_(self) -> str:
        from ..plots.html import posterior_html  # matplotlib is slow to import

        return posterior_html(self)

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
            ConfigError: an argument is out of range.
            DataError: the texts cannot be used, or all have been learnt.
            GuideError: `by` is "information", and this is a single point estimate.

        >>> from bhpeft_pyro import fit
        >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
        >>> posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=3, progress=False)
        >>> posterior.queue(tiny_examples(60, seed=1), 2).rows.shape
        torch.Size([2])
        """
        return to_label(self.model, self, texts, self.columns, n, by, seed)

    def to_arviz(
        self,
        data: object | None = None,
        *,
        samples: int | None = None,
        sites: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> Any:
        """Draws, the trace of the fit and, given data, predictions; see
        `integrations.arviz.to_arviz`."""
        from ..integrations.arviz import to_arviz

        return to_arviz(self, data, samples=samples, sites=sites, seed=seed)

    def diagnose(self, data: object, samples: int = 200, seed: int = 0) -> Diagnosis:
        """How good the approximation is; see `diagnostics.diagnose`."""
        from ..diagnostics import diagnose

        return diagnose(self, data, samples, seed)

    def as_prior(self) -> Prior:
        """The posterior as a prior for new data. Later training of the guide does not change it.

        `fit(model.with_prior(posterior.as_prior()), guide, data)` learns new data with another
        family of guides. What several components have learnt is no one prior: each of
        `components` has its own.

        Raises:
            ConfigError: there are several components.
            GuideError: the guide is a point estimate, or not one of this package's.
        """
        # `update` itself leaves scales open.
        return with_fixed_scales(prior_of(self.model, self.guide))

    @locked()
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

    @locked()
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
        keep: float = 1.0,
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
            keep: forget on purpose (`posterior.forgetting`): the prior is proportional to
                q^keep p0^(1 - keep), with q this posterior and p0 the first prior.
            grow: give labels that are new in `data` an output (`grow`).
            again: learn `data` even if an earlier round did; their evidence then counts twice.
            distill: texts to make a student of the new posterior with (`distill`), which are
                checked before the round. Labels are not looked at.

        Raises:
            DataError: the data cannot be used, or an earlier round learnt them.
            GuideError: the guide is a point estimate, draws of a sampler, or not of this package.
            PriorError: forgetting has no closed form between these priors, or the first one has
                observations or factors.
            FitError: as for `fit`; if the round was learnt and there is no student, the error's
                `posterior` has learnt it.
        """
        from .update import update

        how = (validation, options, optimizer, callback, executor)
        return update(self, data, *how, keep, grow, again, distill, changes)

    def assess(self, data: object, samples: int = 64, *, seed: int = 0) -> Drift:
        """How surprising new data are before they are learnt; see `streams.assess`."""
        from ..streams.drift import assess

        return assess(self, data, samples, seed=seed)

    def grow(self, labels: Sequence[str]) -> Posterior:
        """Add labels to the head; see `posterior.growth`."""
        from .growth import grow

        return grow(self, labels)

    def to_peft(self, folder: str | Path, component: Part | None = None) -> Path:
        """Write adapters that the `peft` library loads; see `integrations.peft_out.to_peft`."""
        from ..integrations.peft_out import to_peft

        return to_peft(self, folder, component)

    def merge(self, component: Part | None = None) -> PreTrainedModel:
        """A plain Hugging Face classifier; see `integrations.peft_out.merge`."""
        from ..integrations.peft_out import merge

        return merge(self, component)

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """`save`, with a model card; see `integrations.hub.save_pretrained`."""
        from ..integrations.hub import save_pretrained

        return save_pretrained(self, folder, overwrite)

    @staticmethod
    def from_pretrained(name: str | Path, *args: Any, **options: Any) -> Posterior:
        """`load`, also from the Hugging Face hub; see `integrations.hub.from_pretrained`."""
        from ..integrations.hub import from_pretrained

        return from_pretrained(name, *args, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload to the Hugging Face hub; see `integrations.hub.push_to_hub`."""
        from ..integrations.hub import push_to_hub

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

        folder = Path(path)
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
            prior: the first round's prior, if it was your own. After that round only forgetting and
                new labels need it.
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
        return saving.load(Path(path), backbone, tokenizer, prior, device, **own)
