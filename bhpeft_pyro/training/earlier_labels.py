"""A round with new labels: earlier rows say that texts like theirs have none of these.

Where some classes are new, the likelihood of an earlier row has two factors: the probability of its
class among the earlier ones, which the last posterior has learnt, and the probability that its
class is an earlier one. The second is not in that posterior, which had no outputs for new classes.
In it rows of the round with earlier labels, and texts that were kept, stand for all earlier rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn import functional

from ..data import Examples
from ..data.copies import among
from ..guides.earlier import Earlier


class EarlierLabels(Messenger):
    """An effect handler that adds a factor to the model, evidence as a prior's own factors are: for
    each row with an earlier label, with the log density times * log p(an earlier label | x).

    Args:
        learnt: (C,) bool, which labels are earlier ones. The label C stands for any of them: such a
            row is in the factor alone.
        times: how many earlier rows such a row stands for.

    >>> with EarlierLabels(torch.tensor([True, True, False]), 3.0):
    ...     trace = pyro.poutine.trace(pyro.sample).get_trace(
    ...         "label", dist.Categorical(logits=torch.zeros(3, 3)), obs=torch.tensor([0, 2, 3])
    ...     )
    >>> trace.compute_log_prob()
    >>> trace.nodes["label"]["log_prob"]  # log 1/3; log 1/3; nothing
    tensor([-1.0986, -1.0986,  0.0000])
    >>> trace.nodes["earlier labels"]["log_prob"]  # 3 log 2/3; nothing; 3 log 2/3
    tensor([-1.2164, -0.0000, -1.2164])
    """

    def __init__(self, learnt: Tensor, times: float) -> None:
        super().__init__()
        self.learnt, self.times = learnt, times

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != "label" or not isinstance(msg["fn"], dist.Categorical):
            return
        labels, logits = msg["value"], msg["fn"].logits  # these are normalised
        learnt = self.learnt.to(labels.device)
        any_label = labels == len(learnt)
        msg["value"], msg["fn"] = labels.masked_fill(any_label, 0), msg["fn"].mask(~any_label)
        there = functional.pad(learnt, (0, 1), value=True)[labels]
        pyro.factor("earlier labels", self.times * logits[..., learnt].logsumexp(-1) * there)


def with_earlier_texts(
    earlier: Earlier | None, examples: Examples
) -> tuple[Examples, EarlierLabels | None]:
    """What a round learns: its examples, with the earlier texts if a label is new, even one that
    none of its rows has; and the handler to learn these under, if any has an earlier label."""
    if earlier is None or earlier.learnt is None or not earlier.rows or examples.labels is None:
        return examples, None
    there = earlier.learnt[examples.labels]
    rows, texts = int(there.sum()), earlier.texts
    if texts is not None:
        others = ~among(texts.hashes, examples.hashes)  # the same text may get a new label
        if count := int(others.sum()):
            texts = texts.subset(others.nonzero().flatten())
            labels = torch.full((count,), len(earlier.learnt))
            texts = replace(texts, labels=labels, label_names=examples.label_names)
            rows, examples = rows + count, examples.concat(texts)
    return examples, EarlierLabels(earlier.learnt, earlier.rows / rows) if rows else None
