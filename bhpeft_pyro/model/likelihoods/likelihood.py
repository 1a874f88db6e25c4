"""The contract of likelihoods, their input, and one from a function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from ...base.distributions import base_of
from ...base.values import Names, checked_dataclass
from ...data.batch import Batch
from ...data.columns import Kind
from ...errors import LikelihoodError
from ...peft.sites import Site

Range = tuple[float | None, float | None]
"""The ends of the scale of ratings; None for an end that is open."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """The input of a likelihood for B examples: the network's outputs, and what goes with them.

    Attributes:
        values: `(*P, B, outputs)`, or `(*P, B, C, outputs)` for C choices, with any particle dims
            P.
        weights: for each of the likelihood's own sites `(*P, 1, *site.shape)`, or `site.shape`
            alone.
        choices: (B, C) bool, True where a choice exists; None if all do.
        extra: further columns of the data by name, each (B,), or (S, B/S) where S draws share the
            batch.

    >>> Outputs(torch.zeros(7, 5, 2)).values[..., 0].shape  # 7 draws, 5 examples
    torch.Size([7, 5])
    """

    values: Tensor
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    choices: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def of_existing(self, scores: Tensor) -> Tensor:
        """`(*P, B, C)` scores of the choices, -inf for those that do not exist."""
        if self.choices is None:
            return scores
        # Draws that share the batch out hold B/S examples each.
        shared = scores.dim() > 2
        exist = self.choices.reshape(-1, *scores.shape[-2:]) if shared else self.choices
        return scores.masked_fill(~exist, -torch.inf)


_KINDS: dict[Kind, tuple[type, str]] = {
    "class": (Categorical, "dist.Categorical over the classes (of two too: with Head(2))"),
    "choice": (Categorical, "dist.Categorical over the choices"),
    "labels": (Bernoulli, "dist.Bernoulli(...).to_event(1) over the labels"),
    "rating": (Distribution, "a distribution of one number"),
}


class Likelihood(ABC):
    """p(label | outputs, its weights). For one of your own, derive and define `distribution`.

    Attributes:
        kind: what a label is: "class", "labels" (any number of them), "rating" (a number) or
            "choice" (the right one of several texts).
        outputs: how many outputs it needs from the head; None: any number.
        linear_mean: whether labels are Normal, with a constant plus `unit` times the first output
            for the mean. Under Normal weights predictions then have a closed form, in which the
            noise of each text is that of the central weights.
        noise_site: the name of its site s () where labels are numbers with Normal noise whose sd is
            proportional to exp(s); None if there is no such noise. Held-out rows then choose the
            noise scale of a point estimate and, with a `linear_mean`, that of `laplace` together
            with its width.
        unit: the size of an output of 1 in the labels' own unit.
        softmax: whether only differences between the outputs (of classes or choices) matter.
            Derivatives with respect to the weights then take one backward pass fewer, and held-out
            rows choose a factor of the outputs of `laplace`, after its width.
        ordered: whether the order of the classes matters, which names in a table do not say.
        grows: whether new classes are new outputs, and nothing else (`Posterior.grow`).
        label_range: the ends of the scale of ratings; None for an end that is open.
        columns: further columns of numbers that it reads, such as an exposure or a rater.
            They come as `outputs.extra`, and broadcast against `outputs.values[..., 0]`.

    >>> import pyro.distributions as dist
    >>> class Counts(Likelihood):
    ...     kind, outputs = "rating", 1
    ...     def distribution(self, outputs):
    ...         return dist.Poisson(outputs.values[..., 0].exp())
    >>> Counts().distribution(Outputs(torch.zeros(7, 5, 1))).batch_shape  # 7 draws, 5 examples
    torch.Size([7, 5])
    """

    kind: Kind
    outputs: int | None = None
    linear_mean: bool = False
    noise_site: str | None = None
    unit: float = 1.0
    softmax: bool = False
    ordered: bool = False
    grows: bool = False
    columns: Sequence[str] = ()
    label_range: Range = (None, None)

    @property
    def picks_one(self) -> bool:
        """Whether a label is one of several classes or choices."""
        return self.kind in ("class", "choice")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The likelihood's own random tensors."""
        return ()

    def start(self, labels: Tensor) -> dict[str, Tensor]:
        """Starting values of its sites for a point estimate, given (N,) labels.

        Sites that are left out start at their own `init`.
        """
        return {}

    def standardised(self, labels: Tensor | None) -> Self:
        """The likelihood in the unit of (N,) labels, which `fit` gives it in the first round.

        Options that were given stay. Without labels the others get the values that they have
        without a fit.
        """
        return self

    def log_noise(self, weights: Mapping[str, Tensor]) -> Tensor:
        """(), the logarithm of the noise scale, in multiples of `unit`: the value of the
        `noise_site`."""
        assert self.noise_site is not None
        return weights[self.noise_site]

    def with_log_noise(self, log_noise: Tensor) -> dict[str, Tensor]:
        """The weights that set the noise scale to exp(log_noise)."""
        assert self.noise_site is not None
        return {self.noise_site: log_noise}

    def exported(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by site, among them a head's whose outputs mean what those of a Hugging Face
        classifier do: logits, or the mean rating.

        Raises:
            LikelihoodError: no head's outputs do; or the head has no bias, and needs one.
        """
        if self.softmax or self.kind == "labels":
            return dict(weights)
        raise LikelihoodError(
            f"likelihood: a Hugging Face classifier cannot express {self}; expected Categorical, "
            "MultipleChoice or MultiLabel, or ratings with one noise scale for all texts"
        )

    def off_scale(self, labels: Tensor) -> str | None:
        """In words which of (N,) labels are beyond the ends of the likelihood's scale, or so far
        from it that they are learnt poorly; None if there are none."""
        return None

    @abstractmethod
    def distribution(self, outputs: Outputs) -> TorchDistribution:
        """The distribution of the labels, of batch shape `(*P, B)`: over classes or choices a
        `dist.Categorical`, over K labels a `dist.Bernoulli` of event shape (K,)."""

    def num_labels(self, outputs: int) -> int | None:
        """The number of classes or labels when the head gives `outputs` numbers; None if it is not
        known.

        By default one output for each; of one output, as of ordered classes, there may be several
        classes.
        """
        one_each = self.kind == "labels" or (self.kind == "class" and outputs > 1)
        return outputs if one_each else None

    def checked(self, outputs: Outputs) -> TorchDistribution:
        """`distribution`, after a check that it has one label for each example.

        The weights may be `(*P, *shape)` or, as `distribution` gets them, `(*P, 1, *shape)`.

        Raises:
            LikelihoodError: a column that it reads is missing, the batch shape is another, or the
                distribution is not of the kind.
        """
        if missing := [name for name in self.columns if name not in outputs.extra]:
            raise LikelihoodError(
                f"{type(self).__name__}: it reads the column {missing[0]!r}, and the batch has "
                f"{', '.join(map(repr, outputs.extra)) or 'no extra columns'}"
            )
        expected = outputs.values.shape[: -2 if self.kind == "choice" else -1]
        weights = dict(outputs.weights)
        for site in self.sites:
            value = weights[site.name]
            lead = tuple(value.shape[: value.dim() - site.ndim])
            if lead and (len(lead) < len(expected) or lead[-1] != 1):
                lead = (*lead, 1)  # the place of the examples
                weights[site.name] = value.reshape(*lead, *site.shape)
            expected = torch.broadcast_shapes(expected, lead)
        distribution = self.distribution(replace(outputs, weights=weights))
        what, expected_kind = _KINDS[self.kind]
        if not isinstance(distribution, Distribution):
            raise LikelihoodError(
                f"{type(self).__name__}: got a {type(distribution).__name__} in place of a "
                f"distribution; expected {expected_kind}"
            )
        if distribution.batch_shape != expected:
            raise LikelihoodError(
                f"{type(self).__name__}: its distribution has batch shape "
                f"{tuple(distribution.batch_shape)}, expected (*P, B) = {tuple(expected)} for "
                f"outputs of shape {tuple(outputs.values.shape)}; did you take [..., 0] of them?"
            )
        events = len(distribution.event_shape)
        if not isinstance(base_of(distribution), what) or events != (self.kind == "labels"):
            raise LikelihoodError(
                f"{type(self).__name__}: its distribution is {type(distribution).__name__}; "
                f"expected {expected_kind}, which kind={self.kind!r} has"
            )
        return distribution

    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Observe the batch's labels, scaled to the whole data set (N / B), or sample some."""
        distribution = self.checked(outputs)
        shown = distribution.batch_shape[-1]  # B, or B/S where the batch is shared out
        size = len(batch) if batch.size is None else batch.size
        subsample = torch.arange(shown, device=outputs.values.device)
        plate = pyro.plate("data", size, subsample=subsample, dim=-1)
        with plate:
            return pyro.sample("label", distribution, obs=batch.labels)


@checked_dataclass
class Function(Likelihood):
    """Labels by a function from outputs to any of Pyro's distributions.

    `Model(network, likelihood=function)` makes one of the function alone. For random weights of its
    own, derive from `Likelihood`.

    Args:
        function: from `(*P, B, outputs)` to a distribution of batch shape `(*P, B)`. If there are
            `columns`, they are its second argument, by name. Predictions need a distribution with
            finite `mean` and `stddev`.
        kind, columns: as for `Likelihood`.

    Raises:
        ConfigError: `function` cannot be called, `kind` is unknown, or `columns` is not a
            sequence of str.

    >>> import pyro.distributions as dist
    >>> waits = Function(lambda outputs: dist.Exponential(outputs[..., 0].exp()))
    >>> waits.distribution(Outputs(torch.zeros(7, 5, 1))).mean.shape
    torch.Size([7, 5])
    """

    function: Callable[..., TorchDistribution]
    kind: Kind = "rating"
    columns: Names = ()

    def check_kind(self, outputs: int) -> None:
        """Refuse a function for ratings whose distribution is of another kind.

        Raises:
            LikelihoodError: names the kind that it needs.
        """
        try:
            labels: Any = self.function(torch.zeros(1, outputs))
            base, events = base_of(labels), len(labels.event_shape)
        except Exception:  # the function's own, which a fit will show
            return
        needs = "'class' or kind='choice'" if isinstance(base, Categorical) else None
        if isinstance(base, Bernoulli) and events == 1:
            needs = "'labels'"
        if self.kind == "rating" and needs:
            raise LikelihoodError(
                f"likelihood: the function's {type(base).__name__} is not of ratings; expected "
                f"bh.likelihoods.Function(function, kind={needs})"
            )

    def distribution(self, outputs: Outputs) -> TorchDistribution:
        more = ({name: outputs.extra[name] for name in self.columns},) if self.columns else ()
        labels = self.function(outputs.values, *more)
        if self.kind == "choice" and isinstance(labels, Categorical):
            return pyro.distributions.Categorical(logits=outputs.of_existing(labels.logits))
        return labels
