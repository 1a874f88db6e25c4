"""`python -m bhpeft_pyro.demo`: the package on real text, with what PyPI offers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from transformers import AutoModel, AutoTokenizer, logging

from ..errors import DataError
from . import assets
from .data import two_rounds
from .run import STEPS, run
from .steps import Settings
from .story import Story


def main(
    out: Annotated[Path, typer.Option(help="Folder for all that is written.")] = Path("runs/demo"),
    small: Annotated[
        bool, typer.Option("--small", help="To see that it runs; the numbers mean nothing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of data, draws and starting values.")] = 0,
) -> None:
    """Bayesian against deterministic fine-tuning of MiniLM on film reviews, then on tweets."""
    settings = Settings(seed=seed)
    if small:
        settings = settings.smaller()
    console = Console()
    console.rule("bhpeft_pyro: Bayesian hybrid fine-tuning of a frozen transformer")
    try:
        folder, domains = assets.minilm(), assets.sentiment()
        out.mkdir(parents=True, exist_ok=True)
    except (DataError, OSError) as error:
        console.print(f"[bold red]Cannot start:[/] {error}", highlight=False)
        raise typer.Exit(1) from error
    logging.disable_progress_bar()  # loading 22 million parameters takes no time
    backbone, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rounds = two_rounds(domains, settings.train, settings.validation, settings.test, seed)
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    console.print(
        f"Transformer: MiniLM-L6, {weights / 1e6:.1f} M parameters, all frozen. "
        "Task: is a sentence positive or negative?",
        highlight=False,
    )
    for number, each in enumerate(rounds, 1):
        console.print(f"Round {number}, {each}", highlight=False)
    if small:
        console.print("A small run to see that everything works: its numbers mean nothing.")
    run(backbone, tokenizer, rounds, settings, out, Story(console, STEPS))


if __name__ == "__main__":
    typer.run(main)
