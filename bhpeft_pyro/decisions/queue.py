"""What to label next: batches of texts whose labels teach most together, and not one text twenty
times."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from ..base.values import Count, Seed, checked_call, valid
from ..data import Columns, Examples
from ..data.batch import random_order
from ..data.copies import among
from ..errors import ConfigError, DataError, GuideError
from ..model.model import Model
from .novelty import Novelty, states_of

if TYPE_CHECKING:
    from ..posterior.posterior import Posterior

__all__ = ["By", "Queue", "first_to_label", "most_informative", "to_label"]

By = Literal["information", "typical", "random"]
"""How texts are chosen."""

CANDIDATES = 400
"""Random texts of the pool among which a batch is chosen by information; more for long ones."""
_CLUSTERED, _COVERED = 4000, 400  # texts of the pool, and learnt ones, at most
_NEIGHBOURS = 5  # by whose distance a text is typical
_DRAWS = 200  # of the weights, jointly for all candidates
_LEAST = 1e-4  # of the variance of a label, in units of its mean over all
_SAME = 0.999  # a correlation of draws, above which two texts are the same to the network
_LIKELY = 0.1  # a class that is named in a reason


@dataclass(frozen=True, eq=False)
class Queue:
    """Texts to label, the most useful first.

    Attributes:
        rows: (n,) their places in the texts that were given.
        texts: these n texts.
        reasons: for each, in words, why it is there.
        by: how they were chosen.
        learnt: how many texts were left out, because they have been learnt.
        copies: how many were left out, because another one has the same text.

    >>> queue = Queue(torch.tensor([2]), ("cold soup",), ("drawn at random",), "random", 1, 0)
    >>> print(queue)
    1 text to label, by random (left out: 1 learnt, 0 copies)
    2: cold soup (drawn at random)
    """

    rows: Tensor
    texts: tuple[str, ...]
    reasons: tuple[str, ...]
    by: By
    learnt: int
    copies: int

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        what = f"{len(self)} text{'s' * (len(self) != 1)} to label, by {self.by}"
        lines = [f"{what} (left out: {self.learnt} learnt, {self.copies} copies)"]
        for row, text, reason in zip(self.rows.tolist(), self.texts, self.reasons, strict=True):
            lines.append(f"{row}: {text} ({reason})")
        return "\n".join(lines)


def first_to_label(
    model: Model,
    texts: object,
    n: int = 20,
    *,
    by: By = "typical",
    columns: Columns = Columns(),
    seed: int = 0,
) -> Queue:
    """Texts to label before there is any label, from the frozen transformer's features alone.

    Args:
        model: one that has not been fitted. Only its transformer is used.
        texts: as for `Posterior.predict`.
        n: how many; there may be fewer different texts.
        by: "typical" makes n clusters, and takes the text with the nearest neighbours of each, the
            largest cluster first (TypiClust; Hacohen, Dekel and Weinshall 2022). "random" draws;
            "information" needs a posterior.
        columns: how the texts are read.
        seed: of the clusters, or of the choice.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the texts cannot be used.

    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> queue = first_to_label(tiny_model(()), tiny_examples(40), 3)
    >>> len(queue), queue.reasons[0].startswith("typical of")
    (3, True)
    """
    return to_label(model, None, texts, columns, n, by, seed)


@checked_call
def to_label(
    model: Model,
    posterior: Posterior | None,
    texts: object,
    columns: Columns,
    n: Count,
    by: By,
    seed: Seed,
) -> Queue:
    """See `Posterior.queue`, and `first_to_label` where there is no posterior."""
    valid(By, "by", by)
    if by == "information":
        if posterior is None:
            raise ConfigError("by='information' needs a posterior; expected 'typical' or 'random'")
        guide, *others = posterior.guides
        if not others and guide.point and not guide.linear:
            raise GuideError(
                "by='information': a single point estimate does not know what it does not know; "
                "expected by='typical' or by='random', or a posterior with a width"
            )
    examples = model.encode_texts(texts, columns)
    rows, left_out = _different(examples, None if posterior is None else posterior.learnt_rows)
    if not len(rows):
        raise DataError(
            f"texts: all of the {len(examples)} have been learnt; expected some that have no label"
        )
    count, rest = min(n, len(rows)), examples.subset(rows)
    if by == "random":
        chosen = random_order(len(rows), seed)[:count]
        reasons = ["drawn at random"] * count
    elif by == "typical":
        known = None if posterior is None else posterior.novelty
        chosen, reasons = _typical(model, rest, count, seed, known)
    else:
        assert posterior is not None
        chosen, reasons = _informative(posterior, rest, count, seed)
    chosen_texts = tuple(rest.texts[i] for i in chosen.tolist())
    copies = len(examples) - len(rows) - left_out
    return Queue(rows[chosen], chosen_texts, tuple(reasons), by, left_out, copies)


def _different(examples: Examples, learnt: Tensor | None) -> tuple[Tensor, int]:
    """The places of the texts that have not been learnt, of copies the first; and how many have
    been."""
    known = among(examples.hashes, learnt)
    first = {value: i for i, value in reversed([*enumerate(examples.hashes.tolist())])}
    places = torch.tensor(sorted(first.values()))
    return places[~known[places]], int(known.sum())


def _typical(
    model: Model, examples: Examples, n: int, seed: int, known: Novelty | None
) -> tuple[Tensor, list[str]]:
    """TypiClust on the centred unit states of the frozen transformer. Clusters in which a text has
    been learnt are left out."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(examples), generator=generator)[: max(_CLUSTERED, n)]
    _, states = states_of(model.network, examples.subset(some))
    learnt = states[:0]
    if known is not None:
        learnt = known.last[torch.randperm(len(known.last), generator=generator)[:_COVERED]]
    states = torch.cat([learnt, states])
    points = normalize(states - states.mean(0)).numpy()
    kmeans = KMeans(min(len(learnt) + n, len(points)), random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fewer different texts than clusters
        cluster = kmeans.fit_predict(points)
    new = np.setdiff1d(cluster, cluster[: len(learnt)])
    members = sorted((np.flatnonzero(cluster == k) for k in new), key=len, reverse=True)[:n]
    order: dict[int, str] = {}
    for places in members:
        reason = f"typical of {len(places)} texts" if len(places) > 1 else "like no other text"
        order[places[_most_typical(points[places])] - len(learnt)] = reason
    order |= {i: "like a text before" for i in range(len(some)) if i not in order}
    chosen = [*order.items()][:n]
    return some[torch.tensor([i for i, _ in chosen])], [reason for _, reason in chosen]


def _most_typical(points: NDArray[Any]) -> int:
    """The place of the point with the smallest mean distance to its nearest neighbours."""
    count = min(_NEIGHBOURS, len(points) - 1)
    if not count:
        return 0
    distances, _ = NearestNeighbors(n_neighbors=count).fit(points).kneighbors()
    return int(distances.mean(1).argmin())


def _informative(
    posterior: Posterior, examples: Examples, n: int, seed: int
) -> tuple[Tensor, list[str]]:
    """The n texts whose labels say most about the labels of all texts, together.

    A random part of the pool stands for it: labels of the texts of the highest uncertainty alone
    say much about odd texts, and are worse than random ones where there are few.
    """
    among = random_order(len(examples), seed)[: max(CANDIDATES, 4 * n)]
    some, kind = examples.subset(among), posterior.model.likelihood.kind
    # All texts see the same draws, so that texts whose labels say the same are known as such.
    known = posterior.replace(novelty=None)
    drawn: Any = known.predict(some, samples=_DRAWS, keep_samples=True, seed=seed)
    if kind == "rating":
        unit = drawn.total.mean()  # so that it does not matter in which unit ratings are
        values = (drawn.means / unit.sqrt()).unsqueeze(-1)
        noise = (drawn.aleatoric / unit).unsqueeze(-1)
    else:
        values = drawn.samples
        noise = (values * (1 - values)).mean(0)
    best = most_informative(values, noise, n)
    forecast = posterior.predict(some.subset(best))
    return among[best], [*_reasons(forecast, kind)]


def most_informative(values: Tensor, noise: Tensor, n: int) -> Tensor:
    """The n examples whose labels say most about the labels of all, one after the other.

    If the outputs of all examples are jointly Normal with the covariance K of the draws, and labels
    are they plus noise, a label lowers the variance of each other label by their squared
    correlation, given those that are known. The sum over all examples is what is made largest in
    each step: to first order twice the information about their labels (EPIG; Bickford Smith et al.
    2023). Information about the weights (BALD, BatchBALD) prefers odd examples instead. The noise
    of examples that are the same to the network is not independent: a second one comes last.

    Args:
        values: (S, N, E) draws of E outputs of N examples, the same weights for all examples.
        noise: (N, E) variances of the labels given the outputs.
        n: how many, at most N.

    Returns:
        (n,) the examples in order.

    >>> values = torch.tensor([[1.0, 1.0, 0.5], [-1.0, -1.0, 0.5], [0.0, 0.0, -1.0]])
    >>> most_informative(values.unsqueeze(-1), torch.ones(3, 1), 2)  # the second is a copy
    tensor([0, 2])
    """
    draws, count, width = values.shape
    x = (values - values.mean(0)).double() / (max(draws - 1, 1) * noise.clamp_min(_LEAST)).sqrt()
    unit = x / x.square().sum((0, 2), keepdim=True).sqrt().clamp_min(1e-12)
    given = x.clone()  # A^-1 x, with A = I + the sum of x x' over those chosen, (S, S)
    alike = torch.zeros(count, dtype=torch.bool)
    order: list[int] = []
    for _ in range(n):
        covariance = torch.einsum("sne,snf->nef", x, given) + torch.eye(width).to(x)  # of labels
        spread = (x / covariance.diagonal(dim1=1, dim2=2).sqrt()).flatten(1)
        of_all = (spread @ spread.mT @ given.flatten(1)).view_as(given)
        explained = torch.einsum("sne,snf->nef", given, of_all)
        share = torch.linalg.solve(covariance, explained).diagonal(dim1=1, dim2=2).sum(1)
        share /= count * width
        usable = share - 2.0 * alike  # no share is above 1
        usable[order] = -torch.inf
        best = int(usable.argmax())
        order.append(best)
        alike |= torch.einsum("se,sne->n", unit[:, best], unit) > _SAME
        learnt = given[:, best]
        across = torch.einsum("se,snf->enf", learnt, x).flatten(1)
        given = given - (learnt @ torch.linalg.solve(covariance[best], across)).view_as(given)
    return torch.tensor(order)


def _reasons(forecast: Any, kind: str) -> Iterator[str]:
    """What is open about each example of a forecast, and why."""
    between = forecast.between
    unlike = torch.zeros(len(forecast)) if forecast.novelty is None else forecast.unlike()
    for i in range(len(forecast)):
        epistemic = forecast.epistemic[i].item()
        if kind == "rating":
            what = f"mean rating {forecast.mean[i]:.3g}, known to ±{epistemic**0.5:.2g}"
        else:
            share = open_ = forecast.probabilities[i]
            if kind == "labels":  # each is there or not
                open_ = torch.minimum(share, 1 - share)
            first, *others = open_.argsort(descending=True, stable=True).tolist()
            names = forecast.label_names
            likely = [first, *(k for k in others[:1] if open_[k] >= _LIKELY)]
            what = " or ".join(f"{names[k]} ({share[k]:.0%})" for k in likely)
        if between is not None and epistemic > 0:
            apart = between[i].item() > epistemic / 2
            what += "; models disagree" if apart else "; each model is unsure"
        yield f"{what}; unlike what was learnt" if unlike[i] else what
