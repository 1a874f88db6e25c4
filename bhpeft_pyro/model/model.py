"""`Model`: prior, network and likelihood as one ordinary Pyro model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor

from ..data import Columns, Examples, encode
from ..data.batch import Batch
from ..data.columns import wrong
from ..data.labels import numbered_names
from ..data.table import numbered, table
from ..errors import ConfigError, DataError, LikelihoodError, PriorError
from ..peft.architectures import positions_of
from ..peft.sites import Sites
from ..priors import Prior, PriorLike, as_prior, checked, default
from ..priors.any_prior import moved
from .likelihoods import Categorical, Function, Likelihood, Outputs
from .network import RandomPEFT


class Model(PyroModule):
    """p(weights) p(labels | texts, weights): an ordinary Pyro model, called with a `Batch`.

    `forward` has three lines: sample the weights, run the transformer, observe the labels. Any Pyro
    inference runs on it: SVI, NUTS (over a head), importance sampling, `Predictive`; and so it does
    on a function of your own with three other lines. `fit` takes a `Model`, whose structure is in
    its prior and its likelihood.

    `model.to(device)` moves its network along, and a prior that is an earlier posterior. A prior of
    your own stays as it is: make its tensors where its sites' are.

    Args:
        network: the frozen transformer and its sites.
        prior: a stochastic function of the sites or one of its short forms (`priors.as_prior`);
            by default `priors.default()`.
        likelihood: the distribution of the labels, given the network's outputs, or a function of
            these to one (`likelihoods.Function`); by default `likelihoods.Categorical()`.

    Raises:
        ConfigError: `network` is not a `RandomPEFT`.
        PriorError: `prior` is none of what `priors.as_prior` takes.
        LikelihoodError: `likelihood` is not a `Likelihood`, or needs another number of outputs.

    >>> import torch
    >>> from pyro import poutine
    >>> from bhpeft_pyro.model.head import Head
    >>> from bhpeft_pyro.testing import tiny_backbone
    >>> model = Model(RandomPEFT(tiny_backbone(), (), Head(3)))
    >>> batch = Batch({"input_ids": torch.ones(5, 4, dtype=torch.long)})
    >>> poutine.trace(model).get_trace(batch).nodes["label"]["value"].shape  # no labels: draws some
    torch.Size([5])
    """

    def __init__(
        self,
        network: RandomPEFT,
        prior: PriorLike | None = None,
        likelihood: Likelihood | Callable[[Tensor], TorchDistribution] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, RandomPEFT):
            raise ConfigError(f"network: expected a RandomPEFT, got {type(network).__name__}")
        if isinstance(prior, Likelihood):
            raise PriorError(f"prior: got {prior}; a likelihood goes to likelihood=")
        if callable(likelihood) and not isinstance(likelihood, Likelihood | type):
            likelihood = Function(likelihood)
            likelihood.check_kind(network.outputs)
        if not isinstance(likelihood, Likelihood | None):
            raise LikelihoodError(
                "likelihood: expected an instance of a Likelihood, or a function of the outputs, "
                f"got {likelihood!r:.60}" + "; did you forget ()?" * isinstance(likelihood, type)
            )
        if likelihood is not None and not hasattr(likelihood, "kind"):
            raise LikelihoodError(
                f'{type(likelihood).__name__}: it has no kind; expected kind = "rating", '
                '"class", "labels" or "choice"'
            )
        self.network = network
        self.prior: Prior = as_prior(default() if prior is None else prior)
        self.likelihood = Categorical() if likelihood is None else likelihood
        needed, given = self.likelihood.outputs, network.outputs
        if needed is not None and given != needed:
            raise LikelihoodError(
                f"{type(self.likelihood).__name__} needs a head with outputs={needed}, got {given}"
            )

    @property
    def sites(self) -> Sites:
        """Every random tensor of the PEFT kinds, the head and the likelihood, in this order."""
        of_likelihood = (site.to(self.network.device) for site in self.likelihood.sites)
        return Sites((*self.network.sites, *of_likelihood))

    @property
    def facts(self) -> dict[str, str]:
        """Backbone, PEFT kinds, number of random weights and likelihood, in words."""
        network = self.network
        return {
            "backbone": network.backbone.config._name_or_path or "unnamed",
            "PEFT": ", ".join(kind.name for kind in network.kinds) or "none, only the head",
            "random weights": f"{sum(site.numel for site in self.sites):,}",
            "likelihood": str(self.likelihood),
        }

    def _repr_html_(self) -> str:
        from ..plots.html import model_html  # matplotlib is slow to import

        return model_html(self)

    def with_prior(self, prior: PriorLike) -> Model:
        """A model of this network and likelihood under another prior."""
        return Model(self.network, prior, self.likelihood)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the module, as PyTorch does, with a prior that is an earlier posterior."""
        prior = moved(self.prior, fn)
        super()._apply(fn, recurse)
        self.prior = prior
        return self

    def encode(
        self,
        data: object,
        columns: Columns = Columns(),
        *,
        labelled: bool = True,
    ) -> Examples:
        """Read and tokenise data for this model, as `data.encode` does.

        Args:
            data, columns: as for `data.encode`; texts are cut to what tokenizer and backbone can
                take.
            labelled: whether labels must be there.

        Raises:
            DataError: as for `data.encode`; or the backbone cannot read `max_length` tokens; or the
                classes are ordered, and the data name them without saying their order.
        """
        if isinstance(data, str | Path):  # of a frame, `encode` reads the order of its categories
            data = table(data, columns.inputs(self.likelihood.kind))
        examples = encode(
            data,
            self.network.tokenizer,
            kind=self.likelihood.kind,
            columns=self.limited(columns, data),
            classes=self.likelihood.num_labels(self.network.outputs),
            labelled=labelled,
            ordered=self.likelihood.ordered,
        )
        with numbered(data):
            self._check_support(examples, columns.label)
        return examples

    def _check_support(self, examples: Examples, column: str) -> None:
        """Refuse a number that no label can be under the likelihood, such as a count of 2.5."""
        labels, device = examples.labels, self.network.device
        if labels is None or examples.kind != "rating":
            return

        def at(value: float, rows: slice = slice(None)) -> Any:
            """The distribution of some rows' labels where the network's outputs are all `value`."""
            sites = (site.to(device) for site in self.likelihood.sites)
            weights = {site.name: site.init() + value for site in sites}
            outputs = torch.full((len(labels[rows]), self.network.outputs), value, device=device)
            extra = {name: values[rows].to(device) for name, values in examples.extra.items()}
            return self.likelihood.checked(Outputs(outputs, weights, extra=extra))

        predicted, numbers = [at(0.0), at(1.0)], labels.to(device)
        try:
            moments = torch.stack([predicted[0].mean, predicted[0].stddev])  # which forecasts have
        except NotImplementedError:
            moments = torch.full((2,), torch.nan)
        if moments.isnan().any():
            what = type(predicted[0]).__name__
            classes = what in ("Categorical", "Bernoulli")
            raise LikelihoodError(
                f"{type(self.likelihood).__name__}: its {what} has no mean or no stddev; expected "
                "a distribution that has both"
                + ('; of classes bh.likelihoods.Function(..., kind="class")' if classes else "")
            )
        if self.likelihood.linear_mean:
            away = torch.stack([each.mean - moments[0] for each in (predicted[1], at(-2.0))]).T
            line = self.likelihood.unit * torch.tensor([1.0, -2.0]).to(away)
            near = 1e-3 * self.likelihood.unit + 1e-6 * moments.abs().max().item()
            if not torch.allclose(away, line.expand_as(away), atol=near):
                raise LikelihoodError(
                    f"{type(self.likelihood).__name__}: linear_mean says that its mean is a "
                    "constant plus unit times the output, which it is not; expected "
                    "linear_mean = False in the class"
                )
        support, other = (each.support for each in predicted)
        if _bounds(support) != _bounds(other):
            return  # it depends on the outputs, as a Pareto's does
        possible = support.check(numbers).expand(len(labels))
        if possible.all():  # also where the density is zero, as a Beta's may be at 0 and 1
            densities = torch.stack([each.log_prob(numbers) for each in predicted])
            possible = (densities > -torch.inf).any(0)
        if not possible.all():
            bad = (~possible).nonzero().flatten().cpu()
            row = int(bad[0])
            expected = at(0.0, slice(row, row + 1)).support
            what = f"{labels[row]:g} has probability 0 under {self.likelihood}; expected {expected}"
            raise wrong(column, bad.tolist(), what)

    def encode_texts(self, data: object, columns: Columns = Columns()) -> Examples:
        """`encode` the texts alone: labels are not looked at."""
        if not isinstance(data, Examples):
            kind = self.likelihood.kind
            data = table(data, columns.inputs(kind)).drop(
                columns=columns.target(kind), errors="ignore"
            )
        return replace(self.encode(data, columns, labelled=False), labels=None)

    def limited(self, columns: Columns, data: object) -> Columns:
        """`columns` with those that the likelihood reads, and a `max_length` that the backbone can.

        Raises:
            DataError: they ask for more than that.
        """
        extra = tuple(dict.fromkeys((*columns.extra, *self.likelihood.columns)))
        columns = replace(columns, extra=extra)
        limit, most = columns.max_length, positions_of(self.network.backbone.base_model)
        if most is None:
            return columns
        if isinstance(limit, int) and limit > most:
            raise DataError(
                f"max_length={limit}: the backbone has positions for {most} tokens; expected at "
                "most that many"
            )
        if limit is None:
            tokenizer = self.network.tokenizer
            encoded = isinstance(data, Examples)
            limit = most if encoded else min(most, tokenizer.model_max_length)
        return replace(columns, max_length=limit)

    def columns_of(self, examples: Examples, columns: Columns) -> Columns:
        """`columns` by which more data are read as these: with the names of the classes, and the
        columns that the likelihood reads."""
        extra = self.limited(columns, examples).extra
        return replace(columns, label_names=examples.label_names, extra=extra)

    def named(self, columns: Columns) -> Columns:
        """`columns` with names for the classes: "0", "1" and so on, unless they have others.

        Raises:
            LikelihoodError: it is not known how many classes there are.
        """
        if self.likelihood.kind not in ("class", "labels") or columns.label_names is not None:
            return columns
        count = self.likelihood.num_labels(self.network.outputs)
        if count is None:
            raise LikelihoodError(
                f"{type(self.likelihood).__name__}: the head's one output does not say how many "
                "classes there are; expected num_labels in the class, or Columns(label_names=...)"
            )
        return replace(columns, label_names=numbered_names(count))

    def outputs_under(self, weights: Mapping[str, Tensor], batch: Batch) -> Outputs:
        """The input of the likelihood for B examples under given weights."""
        return Outputs(self.network(weights, batch), weights, batch.choices, batch.extra)

    def predictive(self, weights: Mapping[str, Tensor], batch: Batch) -> TorchDistribution:
        """The distribution of the labels of B examples, of batch shape `(*P, B)`, under weights
        `(*P, *site.shape)` for each site; errors are those of the network and the likelihood."""
        return self.likelihood.checked(self.outputs_under(weights, batch))

    def forward(self, batch: Batch | None = None) -> Tensor | Mapping[str, Tensor]:
        """Sample the weights, run the transformer under them, observe the labels.

        Without a batch, sample the weights alone: what Pyro's guides trace for a prediction.
        """
        weights = checked(self.prior, self.sites)
        if batch is None:
            return weights
        self.network.in_use = True  # by Pyro's own inference, too: a later fit has a copy
        return self.likelihood(self.outputs_under(weights, batch), batch)


def _bounds(support: object) -> list[Any]:
    """The bounds of a support that are tensors, as lists."""
    return [bound.tolist() for bound in vars(support).values() if isinstance(bound, Tensor)]


def check_model(model: object) -> None:
    """Refuse anything but a `Model`, even a subclass, whose `forward` later rounds would lose."""
    if type(model) is not Model:
        raise ConfigError(
            f"model: expected a bh.Model itself, got {type(model).__name__}; write other model "
            "structure as its prior or its likelihood (any function works with Pyro's own "
            "inference)"
        )
