"""`bhpeft fit`: from labelled text to a saved posterior."""

from __future__ import annotations

from . import options
from .screen import say


def fit(
    data: options.Data,
    saving: options.Saving,
    reading: options.Reading,
    fitting: options.Stopping,
    config: options.Config = None,
    preset: options.Preset = "bh_peft",
    guide: options.Guide = "laplace",
    components: options.Components = None,
    device: options.Device = "auto",
) -> None:
    """Fit a posterior to labelled text, and save it.

    The data have columns text and label (classes by name or number, lists of several labels, or
    real-valued ratings), tokens and ner_tags (lists of words and of their labels), or question,
    choices and answer.

    Examples:
        bhpeft fit reviews.csv --backbone minilm --out runs/reviews
        bhpeft fit films.jsonl --label-column stars --task ratings --out runs/films
        bhpeft fit --config fit.yaml --epochs 5
    """
    from .. import FitOptions, presets
    from .. import fit as learn
    from ..data.copies import check_apart
    from ..posterior.distill import texts_for
    from .saved import check_out, check_samples, check_used, finish
    from .tables import LabelledTable

    how = FitOptions().change(**fitting.given)
    check_out(saving.out, saving.overwrite)
    check_used(fitting, guide, bool(saving.validation))  # it may be known before the rows are read
    table = LabelledTable(data, reading, saving.yes)
    model = table.task.model(*table.backbone(device), getattr(presets, preset)())
    examples = table.encode(model)
    columns = table.task.columns
    texts = None
    if saving.distill is not None:
        texts = texts_for(model, saving.distill, columns, how.seed)
    train, held_out = table.split(model, examples, saving.validation, how.seed)
    check_used(fitting, guide, held_out is not None)
    check_samples(saving.samples, guide, model.likelihood, held_out is not None)
    # Other fits do not depend on these rows: it is enough to evaluate them at the end.
    used = held_out if how.patience or guide in options.POINTS else None
    if used is None and held_out is not None:
        check_apart(train, held_out, "validation")
    where = f"{reading.backbone}, {model.network.device}"
    say(f"fitting {preset} on {where}, to {len(train)} {train.unit}")
    posterior = learn(
        model, guide, train, validation=used, options=how, components=components, columns=columns
    )
    finish(posterior, saving, data, examples, held_out, texts)
