"""The batches of a data set; what does not depend on PEFT weights is computed only once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..base.checks import shown
from ..base.isolation import without_autocast
from ..base.progress import tracked
from ..data import Columns, Examples
from ..data.batch import Batch, shuffled, within
from ..data.tokens import Tokens
from ..errors import BHPEFTError, DataError, FitError, is_out_of_memory
from .head import check_features
from .model import Model, check_model
from .network import RandomPEFT

BATCH = 32
"""Texts per pass of a single draw."""
MAX_ROWS = 64
"""Sequences per pass of the transformer."""
_ON_CPU = 768  # tokens per pass there: more leave its cache, fewer leave its units idle
_MAX_STATES = 2**30  # bytes of hidden states that are kept for a data set


class CachedBatches:
    """Training and prediction batches of a data set.

    Without PEFT weights, or with `frozen`, which leaves them out, the transformer's features never
    change. They are computed once, so that a head-only fit costs no more than the head. With PEFT
    weights in the upper layers alone, the hidden states below them never change. These too are
    computed once, unless they would take more than 1 GiB: then all layers are run each time.

    Attributes:
        features: (N, D) or, with C choices, (N, C, D); None if they are not computed once.
        states: (total, D) the hidden states of each token of `examples.tokens` at the first layer
            with PEFT weights; None if they are not computed once.
    """

    @without_autocast()
    def __init__(self, model: Model, examples: Examples, frozen: bool = False) -> None:
        self.examples = examples
        self.features: Tensor | None = None
        self.states: Tensor | None = None
        network = model.network
        if frozen or not network.kinds:
            self._compute(model)
        elif network.attachment.constant:
            self.states = _constant_states(network, examples.tokens)

    def training(
        self, batch_size: int, particles: int, generator: torch.Generator
    ) -> Iterator[Batch]:
        """One epoch of shuffled batches, each split over particles."""
        if self.features is None:
            how: Any = {"generator": generator, "multiple_of": particles, "states": self.states}
            drawn = self.examples.batches(batch_size, shuffle=True, **how)
        else:
            alike = torch.zeros(len(self.examples), dtype=torch.long)
            drawn = map(self.batch, shuffled(alike, batch_size, particles, generator))
        return (batch.split(particles) for batch in drawn)

    def prediction(self, batch_size: int) -> Iterator[tuple[Tensor, Batch]]:
        """Batches with every example once, and their indices."""
        return ((indices, self.batch(indices)) for indices in self.plan(batch_size))

    def plan(self, batch_size: int, most: int | None = None) -> tuple[Tensor, ...]:
        """The indices of the examples in each batch; batches that the transformer reads have at
        most `most` tokens."""
        if self.features is None:
            return self.examples.plan(batch_size, most)
        return torch.arange(len(self.examples)).split(batch_size)

    def batch(self, indices: Tensor) -> Batch:
        """The examples `indices`, with what was computed once."""
        if self.features is None:
            return self.examples.batch(indices, self.states)
        labels, choices = self.examples.labels, self.examples.choices
        return Batch(
            {},
            None if labels is None else labels[indices],
            size=len(self.examples),
            choices=None if choices is None else choices[indices],
            features=self.features[indices],
            extra={name: values[indices] for name, values in self.examples.extra.items()},
        )

    def _compute(self, model: Model) -> None:
        def features_of(indices: Tensor) -> Tensor:
            batch = self.examples.batch(indices).to(model.network.device)
            features = model.network.features(batch).cpu()
            with naming_rows(model, data=self.examples):
                return check_features(features)

        plan = self.plan(MAX_ROWS, most_tokens(model.network.device))
        reading = tracked(plan, "reading features", len(plan))
        parts = [(indices, features_of(indices)) for indices in reading]
        # Examples come with the most choices first, so the first batch is the widest.
        first = parts[0][1]
        self.features = first.new_zeros(len(self.examples), *first.shape[1:])
        for indices, features in parts:
            self.features[indices, : features.shape[1]] = features


@torch.inference_mode(False)  # samplers take gradients
def whole_batch(model: Model, data: object, columns: Columns = Columns()) -> Batch:
    """All examples as one batch, for samplers such as NUTS, which run the model many times.

    What does not depend on PEFT weights is computed here, once, as in `fit`: for a head alone the
    features, so that a step of a sampler costs no more than the head.

    Args:
        model: the model that is sampled; after a fit of it, its head has principal axes. A fit that
            comes later uses a copy, so what is sampled stays valid.
        data, columns: as for `fit`, and so are the errors.

    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> whole_batch(tiny_model(()), tiny_examples(12)).features.shape
    torch.Size([12, 16])
    """
    check_model(model)
    examples = model.encode(data, columns)
    model.network.in_use = True  # features mean what they do in its present axes
    ((_, batch),) = CachedBatches(model, examples).prediction(len(examples))
    return batch.to(model.network.device)


@torch.inference_mode(False)  # they enter passes with gradients
def _constant_states(network: RandomPEFT, tokens: Tokens) -> Tensor | None:
    """The `states` of a `CachedBatches`."""
    total, states = int(tokens.lengths.sum()), None
    order, most = tokens.lengths.argsort(descending=True), most_tokens(network.device)
    batches = within(order, tokens.lengths, MAX_ROWS, most)
    for rows in tracked(batches, "reading hidden states", len(batches)):
        padded = network.constant_states(Batch(tokens.padded(rows)).to(network.device))
        assert padded is not None
        if total * padded[0, 0].nbytes > _MAX_STATES:
            return None
        if states is None:
            states = padded.new_empty(total, padded.shape[-1], device="cpu")
        at, real = tokens.places(rows)
        states[at[real]] = padded.cpu()[real]
    return states


def most_tokens(device: torch.device) -> int | None:
    """How many tokens a pass should have at most, for speed; None if it makes no difference."""
    return _ON_CPU if device.type == "cpu" else None


def check_all(model: Model, **sources: Examples | None) -> None:
    """Raise a DataError if the frozen transformer's output is not finite for some texts. It names
    them; `sources` are the data by the name of the argument that they came in."""
    for what, examples in sources.items():
        if examples is None:
            continue
        bad: list[int] = []
        for rows, batch in examples.by_length(BATCH):
            features = model.network.features(batch.to(model.network.device))
            off = ~features.isfinite().all(-1).cpu()
            if batch.choices is not None:
                off = (off & batch.choices.cpu()).any(-1)
            bad += rows[off].tolist()
        if bad:
            bad.sort()
            raise DataError.of_rows(
                what,
                bad,
                f"of {shown(examples.texts[bad[0]])} the backbone makes numbers that are not "
                "finite; drop the row; in Python, loading the backbone with dtype=torch.float32 "
                "may help",
            )


@contextmanager
def naming_rows(model: Model, **sources: Examples | None) -> Iterator[None]:
    """If non-finite values end a fit, name the row that caused them, if one did."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # A refused argument says nothing about the texts, and a pass over all of them takes long.
        refused = isinstance(error, BHPEFTError) and not isinstance(error, DataError | FitError)
        if not (refused or is_out_of_memory(error.__cause__ or error)):
            check_all(model, **sources)
        raise
