"""`bhpeft fit`: from labelled text to a saved posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from .. import fitting as library
from ..errors import ConfigError
from ..guides import GUIDES, PRESETS
from ..inference import FitOptions
from ..peft import Kind, presets
from . import options
from .backbone import load_backbone
from .quality import conclude
from .runs import check_out, hold_out, read_table
from .screen import bars, say
from .task import TaskName, infer, named

__all__ = ["EXAMPLES", "fit"]

_GUIDES = (*GUIDES, *PRESETS)

EXAMPLES = (
    "bhpeft fit reviews.csv --backbone roberta-base --out runs/reviews",
    "bhpeft fit films.jsonl --text-column review --label-column stars --task ratings "
    "--out runs/films",
    "bhpeft fit --config fit.yaml --epochs 5",
)


def fit(
    context: typer.Context,
    data: options.Data,
    out: options.Out,
    backbone: Annotated[
        str,
        typer.Option(help="The frozen transformer: a name on the hub, a folder, or minilm (PyPI)."),
    ] = "roberta-base",
    config: options.Config = None,
    task: Annotated[
        TaskName | None,
        typer.Option(help="What is to be predicted.", show_default="from columns and labels"),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="The column to read.", show_default="text")
    ] = None,
    pair_column: Annotated[
        str | None, typer.Option(help="A second text, read after the first.", show_default="none")
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(help="The column to predict.", show_default="label, rating, stars or score"),
    ] = None,
    preset: Annotated[
        str, typer.Option(help=f"The random PEFT weights: {', '.join(presets.__all__)}.")
    ] = "bh_peft",
    guide: Annotated[
        str, typer.Option(help=f"The family of the posterior: {', '.join(_GUIDES)}.")
    ] = "normal",
    noise_by_text: Annotated[
        bool, typer.Option("--noise-by-text", help="Ratings: a noise scale for each text.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Cut longer texts.", show_default="the tokenizer's limit")
    ] = None,
    validation: options.Validation = "10%",
    samples: options.Samples = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    epochs: options.Epochs = None,
    max_steps: options.MaxSteps = None,
    batch_size: options.BatchSize = None,
    particles: options.Particles = None,
    lr: options.LR = None,
    natural_lr: options.NaturalLR = None,
    temperature: options.Temperature = None,
    patience: options.Patience = None,
    bf16: options.Bf16 = None,
    seed: options.Seed = None,
) -> None:
    """Fit a posterior to labelled text, and save it.

    The data has columns text and label (classes by name or number, or real-valued ratings), or
    question, choices and answer.
    """
    how = FitOptions(progress=bars()).change(**options.given(context))
    check_out(out, overwrite)
    kinds = _kinds(preset)
    if guide not in _GUIDES:
        raise ConfigError(f"--guide: unknown guide {guide!r}; known: {', '.join(_GUIDES)}")
    table = read_table(data)
    found = infer(table, task, text_column, label_column, pair_column)
    say(f"{len(table)} rows, {found}")
    table = named(table, found.columns.label, found.names)
    train, held_out = hold_out(table, validation, how.seed)
    if isinstance(held_out, str):
        held_out = named(read_table(held_out), found.columns.label, found.names)
    model = found.model(*load_backbone(backbone, device), kinds, noise_by_text)
    say(f"fitting {preset} on {backbone}, {model.network.device}, to {len(train)} rows")
    posterior = library.fit(
        model,
        guide,
        train,
        # Without patience nothing depends on it: it is looked at once, at the end.
        validation=held_out if how.patience else None,
        columns=found.columns,
        max_length=max_length,
        label_names=found.names,
        options=how,
    )
    posterior.save(out, overwrite)
    say(f"{posterior.report}\nsaved in {out}")
    conclude(posterior, held_out, samples, as_json)


def _kinds(preset: str) -> Sequence[Kind]:
    if preset not in presets.__all__:
        raise ConfigError(f"--preset: unknown {preset!r}; known: {', '.join(presets.__all__)}")
    kinds: Sequence[Kind] = getattr(presets, preset)()
    return kinds
