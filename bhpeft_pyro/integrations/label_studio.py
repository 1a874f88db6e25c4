"""Label Studio: tasks with what a posterior predicts go out, and what people annotated comes in.

Nothing of Label Studio is imported: both are JSON files, which its page and its API take and give.

>>> import tempfile
>>> from bhpeft_pyro import fit
>>> from bhpeft_pyro.review import labelled
>>> from bhpeft_pyro.testing import tiny_examples, tiny_model
>>> posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=3, progress=False)
>>> file = Path(tempfile.mkdtemp()) / "new.csv"
>>> _ = file.write_text("text\\nw30 w31\\n")
>>> pool = Pool.of(posterior, file)
>>> (task,) = to_tasks(pool)
>>> task["data"]["text"]
'w30 w31'
>>> result = {"from_name": "label", "value": {"choices": ["1"]}}
>>> task["annotations"] = [{"completed_by": 1, "result": [result]}]
>>> labelled(from_export([task], pool), pool)[0]["label"]
'1'
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from ..base.checks import shown, warn
from ..errors import DataError
from ..review.pool import Item, Pool
from ..review.session import Action, Decision

__all__ = ["from_export", "labelling_config", "to_tasks"]

_LABEL, _NOTE, _TEXT = "label", "note", "text"  # names of tags


def labelling_config(pool: Pool) -> str:
    """The XML of a project's labelling interface, for tasks of `to_tasks`.

    Args:
        pool: the texts; `review.Pool.of(posterior, "new.csv")`.
    """
    some = next(iter(pool.items.values()))
    texts = [
        f'<Text name="{name}" value="${name}"/>'
        for name, _ in zip(_names(some), some.texts, strict=True)
    ]
    to = f'name="{_LABEL}" toName="{_TEXT}"'
    if pool.kind == "rating":
        ends = ' min="{:g}" max="{:g}"'.format(*pool.scale) if pool.limited and pool.scale else ""
        control = f'<Number {to}{ends} step="any"/>'
    elif pool.kind == "choice":
        control = f'<Choices {to} choice="single" value="$choices"/>'
    else:
        many = "multiple" if pool.kind == "labels" else "single"
        choices = "".join(f"<Choice value={quoteattr(name)}/>" for name in some.options)
        control = f'<Choices {to} choice="{many}">{choices}</Choices>'
    note = f'<TextArea name="{_NOTE}" toName="{_TEXT}" rows="1" maxSubmissions="1"/>'
    return "<View>\n  " + "\n  ".join([*texts, control, note]) + "\n</View>\n"


def to_tasks(pool: Pool) -> list[dict[str, Any]]:
    """The texts to label as tasks with a prediction each, in the order of the pool.

    `json.dump` writes the file to import. The `score` of a prediction, by which Label Studio can
    order tasks, is the probability that it is right; of ratings 1 / (1 + sd). The data of a task
    hold the reason to doubt it and both parts of its uncertainty.

    Args:
        pool: the texts; `review.Pool.of(posterior, "new.csv")`.
    """
    tasks = []
    for key in pool.order:
        item = pool.items[key]
        value, score = _prediction(item, pool.kind)
        kind = "number" if pool.kind == "rating" else "choices"
        result = {
            "id": key,
            "from_name": _LABEL,
            "to_name": _TEXT,
            "type": kind,
            "value": {kind: value},
            "score": score,
        }
        data: dict[str, Any] = dict(zip(_names(item), item.texts, strict=True))
        if pool.kind == "choice":
            data["choices"] = [{"value": name} for name in item.options]
        data |= {"key": key, "reason": item.reason, **item.uncertainty}
        prediction = {"model_version": pool.round, "score": score, "result": [result]}
        tasks.append({"data": data, "predictions": [prediction]})
    return tasks


def from_export(export: str | Path | Sequence[Mapping[str, Any]], pool: Pool) -> list[Decision]:
    """What people annotated, as decisions: `review.labelled(decisions, pool)` are rows to update
    with, and `review.Session.keep` adds them to those of the page.

    An annotation without a label says that none fits; a skipped one ("was cancelled") is a skip.

    Args:
        export: a file that Label Studio exported as "JSON", or what is in it.
        pool: that of the tasks, of the same table.

    Raises:
        DataError: the file is no such export, or a label is not one of those that were asked for.
    """
    tasks: Any = export
    if isinstance(export, (str, Path)):
        try:
            tasks = json.loads(Path(export).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            what = f"export={shown(str(export))} cannot be read as JSON: {error}"
            raise DataError(what) from error
    decisions, unknown = [], 0
    for number, task in enumerate(tasks):
        try:
            key, annotations = task["data"]["key"], task["annotations"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"export: task {number} has no {error}; expected Label Studio's export as JSON, "
                "not JSON-MIN, of tasks that to_tasks made"
            ) from error
        if key not in pool.items:
            unknown += 1
            continue
        decisions += [_decision(key, one, pool) for one in annotations or ()]
    if unknown:
        what = f"export: {unknown} of {len(tasks)} tasks are of no text of this pool's table"
        if unknown == len(tasks):
            raise DataError(f"{what}; expected the table that they were made of")
        warn(f"{what}, so they are left out")
    return decisions


def _names(item: Item) -> list[str]:
    return [_TEXT, "pair"][: len(item.texts)]


def _prediction(item: Item, kind: str) -> tuple[Any, float]:
    """What is predicted, as Label Studio has it, and the score."""
    if item.rating is not None:
        variance = item.uncertainty["epistemic"] + item.uncertainty["aleatoric"]
        return float(f"{item.rating[0]:.4g}"), 1 / (1 + math.sqrt(variance))
    shares = item.probabilities
    if kind == "labels":
        chosen = [name for name, share in zip(item.options, shares, strict=True) if share > 0.5]
        return chosen, math.prod(max(share, 1 - share) for share in shares)
    best = max(range(len(shares)), key=shares.__getitem__)
    return [item.options[best]], shares[best]


def _decision(key: str, annotation: Mapping[str, Any], pool: Pool) -> Decision:
    results = {one.get("from_name"): one.get("value", {}) for one in annotation.get("result") or ()}
    by = annotation.get("completed_by")
    who = by.get("email") or by.get("id") if isinstance(by, Mapping) else by
    value = results.get(_LABEL, {})
    action: Action = "label"
    label: Any = None
    item = pool.items[key]
    if annotation.get("was_cancelled"):
        action = "skip"
    elif pool.kind == "rating":
        number = value.get("number", value.get("rating"))
        label = None if number is None else pool.rating(number)
    else:
        names = value.get("choices", ())
        if unknown := [name for name in names if name not in item.options]:
            raise DataError(f"export: {unknown[0]!r} is not one of {item.options}")
        chosen = [item.options.index(name) for name in names]
        if chosen or pool.kind == "labels":
            label = pool.label(item, chosen)
    if action == "label" and label is None:
        action = "none"
    said = results.get(_NOTE, {}).get("text", ())
    note = said if isinstance(said, str) else " ".join(said)
    at = str(annotation.get("updated_at") or annotation.get("created_at") or "")
    return Decision(key, "" if who is None else f"{who}", action, label, note, at, pool.round)
