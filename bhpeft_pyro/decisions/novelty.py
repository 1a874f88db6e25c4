"""Texts unlike those that were learnt, recognised by the states of the frozen transformer.

A text is read once, without PEFT weights, whatever the number of components. Two scores say how far
it is from the learnt texts; they are standardised and added:

- its Mahalanobis distance in the hidden states at two thirds of the depth, mean over its tokens,
  with the covariance of Ledoit and Wolf (2004);
- the variance that a Gaussian process has left at it, in the unit vectors of the last layer. They
  are not centred: what all learnt texts have in common is what other texts lack.

The p-value of a text is its rank among the learnt texts, each scored as if it had been left out. No
rows need to be held out for it, and it is uniform for texts like the learnt ones: at most 5 % of
these have a p-value of up to 5 % (conformal prediction; Barber et al. 2021, the jackknife).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Annotated, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ..base.isolation import without_autocast
from ..base.progress import tracked
from ..base.values import Finite, checked_dataclass
from ..data import Examples
from ..data.batch import random_order, within
from ..errors import DataError
from ..model.cached_batches import MAX_ROWS, most_tokens
from ..model.head import check_features
from ..model.model import Model
from ..model.network import RandomPEFT
from ..prediction.predict import PART, AnyForecast

__all__ = ["LEAST", "MOST", "Novelty", "states_of"]

LEAST = 19
"""Learnt texts from which a p-value can be 5 %."""
NONE_KNOWN = (
    "this posterior does not know what it has learnt: it is of an earlier version or was made "
    f"without data, or there were fewer than {LEAST} texts"
)
MOST = 2000
"""Learnt texts whose states are kept."""

_DEPTH = 2 / 3
_NOISE = 0.1  # of the Gaussian process, whose own variance is 1
_SAME = 0.01  # a distance of unit vectors up to which two texts are copies
_TINY = 1e-9  # in place of 0
_HowMany = Annotated[Finite, Field(ge=0, le=2**53)]  # beyond which float64 no longer counts

F = TypeVar("F", bound=AnyForecast)


@checked_dataclass(eq=False)
class Novelty:
    """What recognises texts unlike the learnt ones: the frozen states of a sample of these.

    Of multiple choice, the states of a text are the mean over its choices. Copies of a text count
    once.

    Attributes:
        middle: (S, D) at two thirds of the depth, mean over tokens.
        last: (S, D') in the last layer, mean over tokens; D' is D but for few backbones.
        count: of how many learnt texts, less what is forgotten, the S are a random sample; at most
            `MOST` are kept.
        texts: the S texts themselves, each "" if it was not to be kept (`FitOptions.keep_texts`);
            or none.

    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> model = tiny_model(())
    >>> novelty = Novelty.of(model, tiny_examples(200))
    >>> p = novelty.p_values(model, tiny_examples(200, seed=1))  # texts like them
    >>> bool((p <= 0.05).double().mean() < 0.1)
    True
    """

    middle: Tensor
    last: Tensor
    count: _HowMany
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model, examples: Examples, keep_texts: bool = False) -> Novelty:
        """That of these examples alone, which are read once by the frozen transformer.

        Args:
            model: with the backbone that reads them.
            examples: what has been learnt.
            keep_texts: keep the texts too, to show which of them is `nearest` to another one.

        Raises:
            DataError: the backbone makes non-finite numbers of some texts.
        """
        times = max(1.0, len(examples) / MOST)  # as many are there as are read
        if times > 1:
            examples = examples.subset(random_order(len(examples))[:MOST].sort().values)
        texts = examples.texts if keep_texts else ()
        middle, last = states_of(model.network, examples)
        return cls(middle, last, times * len(last), texts)._sample(MOST)._distinct()

    def merged(self, new: Novelty, keep: float = 1.0) -> Novelty:
        """What it is after a round that learnt other texts, and forgot a share 1 - `keep` of these.

        If there are more than `MOST`, a random part of both is kept, in proportion to `count`.
        """
        old = replace(self, count=keep * self.count)._sample(round(keep * self.count))
        total = old.count + new.count
        if len(old.last) + len(new.last) > MOST:
            share = min(round(MOST * old.count / total), len(old.last))
            old, new = old._sample(share), new._sample(MOST - share)
        # The new ones first: of copies the first stays.
        middle, last = torch.cat([new.middle, old.middle]), torch.cat([new.last, old.last])
        texts = [one.texts or ("",) * len(one.last) for one in (new, old)]
        every = (*texts[0], *texts[1]) if new.texts or old.texts else ()
        return Novelty(middle, last, total, every)._distinct()

    def p_values(self, model: Model, examples: Examples, max_rows: int = MAX_ROWS) -> Tensor:
        """(N,) float64 p-values of examples: small for those unlike the learnt texts.

        Args:
            model: with the backbone that read the learnt texts.
            examples: N; they are read a part at a time.
            max_rows: the largest number of sequences in one pass.

        Raises:
            DataError: there are not `enough` learnt texts.
        """
        if not self.enough:
            raise DataError(f"novelty: {len(self.last)} texts are learnt; expected {LEAST} or more")
        return self._read(model, examples, max_rows)[0]

    def noted(self, forecast: F, model: Model, examples: Examples, max_rows: int) -> F:
        """A forecast of examples with their p-values, the nearest learnt text if these are kept,
        and the pass that this took; unchanged if there are not `enough` texts."""
        if not self.enough:
            return forecast
        p, nearest = self._read(model, examples, max_rows)
        passes = (forecast.passes or 0) + 1
        return replace(forecast, novelty=p, nearest=nearest, passes=passes)

    def check(self, model: Model) -> None:
        """Refuse states that are not of the model's backbone, by a ValueError."""
        network = model.network
        token = torch.ones(1, 1, dtype=torch.long, device=network.device)
        known = _of_two_layers(network, {"input_ids": token, "attention_mask": token})
        shapes = [(*states.shape,) for states in (self.middle, self.last)]
        if shapes != [(len(self.last), states.shape[1]) for states in known]:
            raise ValueError(f"its states have shapes {shapes}")
        if not 0 < len(self.last) <= MOST:
            raise ValueError(f"it has {len(self.last)} states")
        if {self.middle.dtype, self.last.dtype} != {torch.float32}:
            raise ValueError("its states are not torch.float32")
        if self.texts and len(self.texts) != len(self.last):
            raise ValueError(f"{len(self.texts)} texts for {len(self.last)} states")

    @property
    def enough(self) -> bool:
        """Whether as many texts are known as p-values need."""
        return len(self.last) >= LEAST

    def _sample(self, size: int) -> Novelty:
        """A random part of the states, which stand for as many texts as all do."""
        if size >= len(self.last):
            return self
        seed = round(self.count)  # another one in every round
        order = random_order(len(self.last), seed)
        return self._subset(order[:size].sort().values)

    def _subset(self, rows: Tensor) -> Novelty:
        texts = tuple(self.texts[row] for row in rows.tolist()) if self.texts else ()
        texts = texts if any(texts) else ()
        return replace(self, middle=self.middle[rows], last=self.last[rows], texts=texts)

    def _distinct(self) -> Novelty:
        """Without copies of earlier texts: a left-out text with a copy would look well known."""
        units = normalize(self.last.double(), dim=1)
        near = torch.cdist(units, units) <= _SAME
        kept = ~near.tril(-1).any(1)
        count = self.count * kept.double().mean().item()
        return replace(self._subset(kept.nonzero().squeeze(1)), count=count)

    def _read(
        self, model: Model, examples: Examples, max_rows: int
    ) -> tuple[Tensor, tuple[str, ...] | None]:
        """(N,) p-values and the N nearest learnt texts, if any are kept."""
        values: list[Tensor] = []
        nearest: list[str] = []
        for at in torch.arange(len(examples)).split(PART):
            part = examples if len(at) == len(examples) else examples.subset(at)
            middle, last = states_of(model.network, part, max_rows)
            values.append(self._ranked(middle, last))
            nearest += self._nearest(last) if self.texts else ()
        return torch.cat(values), tuple(nearest) if self.texts else None

    def _nearest(self, last: Tensor) -> list[str]:
        """Of each of (N, D) states the kept text with the highest cosine similarity."""
        known = [row for row, text in enumerate(self.texts) if text]
        likeness = normalize(last, dim=1) @ normalize(self.last[known], dim=1).mT
        return [self.texts[known[row]] for row in likeness.argmax(1).tolist()]

    @cached_property
    def _measures(self) -> tuple[_Mahalanobis, _Process]:
        return _Mahalanobis.fitted(self.middle.double()), _Process.fitted(self.last.double())

    @cached_property
    def _left_out(self) -> Tensor:
        """(S,) the scores of the learnt texts, each without itself, in ascending order."""
        return self._score(*(measure.left_out for measure in self._measures)).sort().values

    def _score(self, *distances: Tensor) -> Tensor:
        """(N,) the sum of both (N,) distances, standardised as those of left-out texts are."""
        usual = [measure.left_out for measure in self._measures]
        parts = [
            (values - by.mean()) / by.std().clamp_min(_TINY)
            for values, by in zip(distances, usual, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def _ranked(self, middle: Tensor, last: Tensor) -> Tensor:
        """(N,) p-values of states (N, D), (N, D)."""
        distance, process = self._measures
        scores = self._score(distance(middle.double()), process(last.double()))
        below = torch.searchsorted(self._left_out, scores).double()  # how many are less far
        return (1 + len(self._left_out) - below) / (len(self._left_out) + 1)


class _Mahalanobis(NamedTuple):
    """(a - m)' P (a - m), with a (D,) mean m and the inverse P (D, D) of a shrunk covariance."""

    mean: Tensor
    precision: Tensor
    left_out: Tensor

    @classmethod
    def fitted(cls, states: Tensor) -> _Mahalanobis:
        """To (S, D) states; `left_out` (S,) is of each with the mean and covariance of the others,
        shrunk as those of all are."""
        from sklearn.covariance import ledoit_wolf_shrinkage  # slow to import

        count, width = states.shape
        mean = states.mean(0)
        away = states - mean
        covariance = away.mT @ away / count
        shrinkage = max(float(ledoit_wolf_shrinkage(states.numpy())), _TINY)
        size = covariance.trace().clamp_min(_TINY) / width
        ball = shrinkage * size * torch.eye(width, dtype=states.dtype)
        precision = _inverse((1 - shrinkage) * covariance + ball)
        # Without row i the scatter is that of all less n/(n-1) d d': Sherman and Morrison.
        factor = (1 - shrinkage) * count / (count - 1)
        inverse = _inverse(factor * covariance + ball)
        along = ((away @ inverse) * away).sum(1)
        left_out = (count / (count - 1)) ** 2 * along / (1 - factor / (count - 1) * along)
        return cls(mean, precision, left_out)

    def __call__(self, states: Tensor) -> Tensor:
        """(N,) of (N, D)."""
        away = states - self.mean
        return ((away @ self.precision) * away).sum(1)


class _Process(NamedTuple):
    """1 - k (K + noise I)^-1 k', with k = exp(-|u - u'|^2 / length) between unit vectors."""

    points: Tensor
    inverse: Tensor
    length: Tensor
    left_out: Tensor

    @classmethod
    def fitted(cls, states: Tensor) -> _Process:
        """To (S, D) states; the length is the median squared distance. `left_out` (S,) is the
        variance at each given the others (Rasmussen and Williams 2006, eq. 5.12)."""
        points = normalize(states, dim=1)
        count = len(points)
        squares = torch.cdist(points, points).square()
        pairs = torch.ones(count, count, dtype=torch.bool).triu(1)
        length = squares[pairs].median().clamp_min(_TINY)
        kernel = (-squares / length).exp() + _NOISE * torch.eye(count, dtype=states.dtype)
        inverse = _inverse(kernel)
        return cls(points, inverse, length, 1 / inverse.diagonal() - _NOISE)

    def __call__(self, states: Tensor) -> Tensor:
        """(N,) of (N, D)."""
        near = torch.cdist(normalize(states, dim=1), self.points).square()
        near = (-near / self.length).exp()
        return 1 - ((near @ self.inverse) * near).sum(1)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


@without_autocast()
def states_of(
    network: RandomPEFT, examples: Examples, max_rows: int = MAX_ROWS
) -> tuple[Tensor, Tensor]:
    """(N, D) and (N, D'), float32 on the CPU, of each text in `middle` and in `last`."""
    tokens, counts = examples.tokens, examples.counts

    def read(rows: Tensor) -> list[Tensor]:
        inputs = {name: value.to(network.device) for name, value in tokens.padded(rows).items()}
        return [check_features(states).cpu() for states in _of_two_layers(network, inputs)]

    order = tokens.lengths.argsort(descending=True)
    batches = within(order, tokens.lengths, max_rows, most_tokens(network.device))
    reading = tracked(batches, "reading frozen states", len(batches))
    parts = [read(rows) for rows in reading]
    middle, last = (torch.cat(states)[order.argsort()] for states in zip(*parts, strict=True))
    if counts is None:
        return middle, last
    of_choices = (part.split(counts.tolist()) for part in (middle, last))
    middle, last = (torch.stack([one.mean(0) for one in each]) for each in of_choices)
    return middle, last


def _of_two_layers(network: RandomPEFT, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(R, D) and (R, D') means over the tokens of R rows, in `middle` and in `last`."""
    means = network.attachment.layer_means(network.accepted(inputs), inputs["attention_mask"])
    return means[round(_DEPTH * (len(means) - 1))], means[-1]
