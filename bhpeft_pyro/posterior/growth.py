"""New labels in a later round: new rows of the head, under the first prior."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.checks import shown
from ..base.values import Count, Names, valid
from ..data import Examples
from ..data.copies import called, warn_of_look_alikes, warn_of_single_rows
from ..data.labels import by_name, in_one_form, name_of
from ..data.table import need, table
from ..errors import ConfigError, DataError, LikelihoodError
from ..guides import Guide
from ..guides.guide import prior_of
from ..model.head import ClassifierHead, Head
from ..model.model import Model
from ..model.network import RandomPEFT
from ..priors.any_prior import independent_normals, with_rows
from .posterior import Posterior

_HEAD = ("head.weight", "head.bias")  # the latter not in every classifier


def grow(posterior: Posterior, labels: Sequence[str] | int) -> Posterior:
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
        labels: the new names; or their number, if the labels have no names.

    Raises:
        ConfigError: there is no new label, or one is there already.
        PriorError: the first prior is unknown, not Normal at the head, or has observations or
            factors.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> old = fit(tiny_model(()), "normal", tiny_examples(), max_steps=3, progress=False)
    >>> new = grow(old, 1)
    >>> new.guide.means()["head.weight"].shape
    torch.Size([3, 16])
    >>> bool((new.guide.means()["head.weight"][:2] == old.guide.means()["head.weight"]).all())
    True
    """
    names, before = _names(posterior, labels), posterior.columns.label_names or ()
    count = int(labels) if names is None else len(names) - len(before)  # type: ignore[arg-type]
    old, head = posterior.model.network, _head(posterior.model)
    head = dataclasses.replace(head, outputs=head.outputs + count)
    network = RandomPEFT(old.backbone, old.kinds, head, old.tokenizer)
    network.load_state_dict(old.state_dict())
    network.in_use = True
    there = [site.name for site in posterior.model.sites if site.name in _HEAD]
    first = with_rows(posterior.first_prior, dict.fromkeys(there, count))
    model = Model(network, first, posterior.model.likelihood)
    normals = independent_normals(first, model.sites, there, "grow")
    rows = {site: (mean[-count:], sd[-count:]) for site, (mean, sd) in normals.items()}
    guide = _grown(posterior.guide, rows)
    # The prior of the next round is also the one that this round would be fitted under.
    model = model.with_prior(prior_of(model, guide))
    guide.set_prior(model)
    return posterior.replace(
        model=model,
        guide=guide,
        columns=dataclasses.replace(posterior.columns, label_names=names),
        first_prior=first,
        student=None,
        promised=None,
    )


def check_growing(model: Model, guide: Guide) -> None:
    """Check before a fit that `grow` will work with this likelihood and guide."""
    _head(model)
    row = {site.name: torch.ones(1, *site.shape[1:]) for site in model.sites if site.name in _HEAD}
    _grown(guide, {name: (ones, ones) for name, ones in row.items()})


def unknown_labels(posterior: Posterior, data: object) -> tuple[str, ...] | int:
    """The labels in `data` without an output: their names, or their number."""
    names, likelihood = posterior.columns.label_names, posterior.model.likelihood
    count = likelihood.num_labels(posterior.model.network.outputs)
    if likelihood.kind != "class" or count is None:
        return 0
    if isinstance(data, Examples):
        if data.label_names is not None and names is not None:
            return tuple(name for name in data.label_names if name not in names)
        return max((data.num_labels or 0) - count, 0)
    values = _labels(posterior, data)
    if names is not None:
        return tuple(sorted({value for value in values if isinstance(value, str)} - {*names}))
    return max(max(_numbers(values), default=0) + 1 - count, 0)


def with_outputs_for(posterior: Posterior, data: object, grow: bool) -> Posterior:
    """The posterior with an output for every label in `data`. Raises a DataError if a label is new
    and `grow` is false."""
    labels = unknown_labels(posterior, data)
    if not labels:
        return posterior
    names = posterior.columns.label_names or ()
    if isinstance(labels, tuple):
        new, old = ", ".join(called(label, names) for label in labels), str(names)
    else:
        count = posterior.model.likelihood.num_labels(posterior.model.network.outputs) or 0
        new, old = f"label {count + labels - 1}", f"0 to {count - 1}"
        if names:  # then only examples have numbers
            raise DataError(
                f"data: {new} is new, and the classes have names {names}; expected labels by name"
            )
        if grow:
            _check_no_gap(posterior, data, count)
    if not grow:
        raise DataError(
            f"data: {new} is not among the labels {old}; grow=True adds outputs for new labels"
        )
    if names and not isinstance(data, Examples):
        values = [value for value in _labels(posterior, data) if isinstance(value, str)]
        warn_of_single_rows(posterior.columns.label, values, names)
    return posterior.grow(labels)


def _check_no_gap(posterior: Posterior, data: object, count: int) -> None:
    """Refuse a new number, after labels 0 to `count` - 1, if one before it has no example."""
    where = f"column {posterior.columns.label!r}"
    if isinstance(data, Examples):
        where, numbers = "data", set() if data.labels is None else {*data.labels.tolist()}
    else:
        numbers = _numbers(_labels(posterior, data))
    if missing := set(range(count, max(numbers, default=0))) - numbers:
        raise DataError(
            f"{where}: label {max(numbers)} is new, but there is no example of {min(missing)}; "
            f"expected new numbers without gaps, from {count} on"
        )


def _labels(posterior: Posterior, data: object) -> list[Any]:
    columns = posterior.columns
    rows, label = table(data, columns.inputs("class")), columns.label
    values = need(rows, columns.text, label)[label].tolist()
    return by_name(values, columns.label_names)


def _numbers(values: Sequence[Any]) -> set[int]:
    return {int(text) for text in map(name_of, values) if re.fullmatch(r"\d+", text)}


def _names(posterior: Posterior, labels: Sequence[str] | int) -> tuple[str, ...] | None:
    before = posterior.columns.label_names
    if before is None:
        valid(Count, "labels", labels)
        return None
    new = tuple(in_one_form(valid(Names, "labels", labels), before))
    blank, repeated = not all(map(str.strip, new)), len({*before, *new}) < len(before) + len(new)
    if not new or blank or repeated:
        raise ConfigError(f"labels={shown(new)}: expected one or more names not in {before}")
    warn_of_look_alikes(posterior.columns.label, new, before)
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
