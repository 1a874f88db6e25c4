"""New labels in a later round: new rows of the head, under the first prior."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.checks import shown
from ..base.values import Names, valid
from ..data import Columns, Examples
from ..data.copies import called, warn_of_look_alikes, warn_of_single_rows
from ..data.labels import are_positions, in_order, name_of, placed
from ..data.table import need, table
from ..errors import ConfigError, DataError, LikelihoodError
from ..guides import Guide
from ..guides.guide import prior_of
from ..model.head import ClassifierHead, Head
from ..model.model import Model
from ..model.network import RandomPEFT
from ..priors import Prior
from ..priors.any_prior import independent_normals, with_rows
from .posterior import Posterior

_HEAD = ("head.weight", "head.bias")  # the latter not in every classifier


def grow(posterior: Posterior, labels: Sequence[str]) -> Posterior:
    """Append outputs for new labels to the head.

    All weights so far keep their joint posterior; the head's new rows have the first prior. In any
    draw the logits of the old labels are unchanged, and so are the ratios of their probabilities,
    but each probability falls from exp(z_k) / sum exp(z) to exp(z_k) / (sum exp(z) + sum exp(u)),
    with z the old logits and u the new ones.

    This is not a round: the lineage is unchanged. `Posterior.update(..., grow=True)` does it for
    labels that are new in the data. Call `diagnose` and `widen` before: afterwards the model's
    prior is the posterior, in which the last round's data count already.

    Args:
        posterior: with a `Head`, a `Categorical` likelihood, and a guide in which the head is
            random.
        labels: the names of the new labels.

    Raises:
        ConfigError: there is no new label, or one is there already.
        PriorError: the first prior is unknown, not Normal at the head, or has observations or
            factors.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> old = fit(tiny_model(()), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> new = grow(old, ["2"])
    >>> new.guide.means()["head.weight"].shape
    torch.Size([3, 16])
    >>> bool((new.guide.means()["head.weight"][:2] == old.guide.means()["head.weight"]).all())
    True
    """
    head, before = _head(posterior.model), posterior.columns.label_names or ()
    names = _names(posterior.columns, labels)
    count, old = len(names) - len(before), posterior.model.network
    head = dataclasses.replace(head, outputs=head.outputs + count)
    network = RandomPEFT(old.backbone, old.kinds, head, old.tokenizer)
    network.load_state_dict(old.state_dict())
    network.in_use = True
    there = [site.name for site in posterior.model.sites if site.name in _HEAD]
    guides, priors, firsts = list[Guide](), list[Prior](), list[Prior | None]()
    for guide, before_first in zip(posterior.guides, posterior.first_priors, strict=True):
        first = with_rows(before_first, dict.fromkeys(there, count))
        model = Model(network, first, posterior.model.likelihood)
        normals = independent_normals(first, model.sites, there, "grow")
        rows = {site: (mean[-count:], sd[-count:]) for site, (mean, sd) in normals.items()}
        guide = _grown(guide, rows)
        # The prior of the next round is also the one that this round would be fitted under.
        model = model.with_prior(prior_of(model, guide))
        guide.set_prior(model)
        guides.append(guide)
        priors.append(model.prior)
        firsts.append(first)
    return posterior.replace(
        model=model.with_prior(priors[0]),
        guides=tuple(guides),
        columns=dataclasses.replace(posterior.columns, label_names=names),
        priors=tuple(priors),
        first_priors=tuple(firsts),
        student=None,
        promised=None,
    )


def check_growing(model: Model, guide: Guide) -> None:
    """Check before a fit that `grow` will work with this likelihood and guide."""
    _head(model)
    row = {site.name: torch.ones(1, *site.shape[1:]) for site in model.sites if site.name in _HEAD}
    _grown(guide, {name: (ones, ones) for name, ones in row.items()})


def unknown_labels(posterior: Posterior, data: object) -> tuple[str, ...]:
    """The classes in `data` without an output."""
    if posterior.model.likelihood.kind != "class":
        return ()
    names = posterior.columns.label_names or ()
    return in_order({*_labels(posterior, data)} - {*names})


def with_outputs_for(posterior: Posterior, data: object, grow: bool) -> Posterior:
    """The posterior with an output for every label in `data`. Raises a DataError if a label is new
    and `grow` is false."""
    labels = unknown_labels(posterior, data)
    if not labels:
        return posterior
    names = posterior.columns.label_names or ()
    if not grow:
        new = ", ".join(called(label, names) for label in labels)
        raise DataError(
            f"data: {new} is not among the labels {names}; grow=True adds outputs for new labels"
        )
    if not isinstance(data, Examples):
        warn_of_single_rows(posterior.columns.label, _labels(posterior, data), names)
    return posterior.grow(labels)


def _labels(posterior: Posterior, data: object) -> Sequence[str]:
    """The classes of data by name, but for cells that have none; none where they are positions."""
    if isinstance(data, Examples):
        return placed(data.label_names or (), posterior.columns.label_names or ())
    columns = posterior.columns
    rows, label = table(data, columns.inputs("class")), columns.label
    names = columns.label_names or ()
    cells = [
        value
        for value in need(rows, columns.text, label)[label].tolist()
        if isinstance(value, str | int | float) and value == value and value not in ("", -1)
    ]
    return [] if are_positions(cells, names) else [name_of(cell, names) for cell in cells]


def _names(columns: Columns, labels: Sequence[str]) -> tuple[str, ...]:
    before = columns.label_names or ()
    new = tuple(name_of(label, labels) for label in valid(Names, "labels", labels))
    blank, repeated = not all(map(str.strip, new)), len({*before, *new}) < len(before) + len(new)
    if not new or blank or repeated:
        raise ConfigError(f"labels={shown(new)}: expected one or more names not in {before}")
    warn_of_look_alikes(columns.label, new, before)
    return (*before, *new)


def _head(model: Model) -> Head | ClassifierHead:
    likelihood = model.likelihood
    if not likelihood.grows:
        raise LikelihoodError(
            "grow: expected a likelihood whose new classes are new outputs, such as Categorical; "
            f"this model has {type(likelihood).__name__}"
        )
    return model.network.head


def _grown(guide: Guide, rows: dict[str, tuple[Tensor, Tensor]]) -> Guide:
    """A copy of a guide with more rows of the head."""
    guide = copy.deepcopy(guide)
    guide.grow(rows)
    return guide
