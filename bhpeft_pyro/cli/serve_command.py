"""`bhpeft serve`: answer texts over HTTP with a saved round."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .screen import say


def serve(
    run: Annotated[
        Path,
        typer.Argument(
            help="The folder of a saved posterior, of a stream, or of several saved posteriors.",
            show_default=False,
        ),
    ],
    config: options.Config = None,
    round: Annotated[
        str | None,
        typer.Option(
            help="The round to serve: its id or the beginning of it, or its folder's name.",
            show_default="the newest",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)
    ] = 8080,
    method: options.Method = None,
    max_requests: Annotated[
        int, typer.Option(help="Requests at the same time; further ones get 429.", min=1)
    ] = 512,
    max_texts: Annotated[int, typer.Option(help="Texts in a request.", min=1)] = 64,
    max_tokens: Annotated[
        int,
        typer.Option(help="Tokens in a request, with padding.", min=1),
    ] = 16_384,
    max_bytes: Annotated[int, typer.Option(help="Bytes in a request.", min=1)] = 2_000_000,
    max_seconds: Annotated[
        float, typer.Option(help="Seconds until a request is given up, with 429.", min=0.001)
    ] = 30.0,
    nearest: Annotated[
        bool,
        typer.Option(
            "--nearest",
            help="Tell clients the learnt text nearest to theirs, after fit --keep-texts. They "
            "can read most of the texts that were kept by asking.",
        ),
    ] = False,
    allow_host: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Names of this machine, with commas between, that clients may use besides "
            "addresses and names without a dot.",
            show_default="none",
        ),
    ] = None,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
) -> None:
    """Answer texts over HTTP with a saved round.

    POST /predict takes texts as Text Embeddings Inference does; with "details" the answer has all
    columns of bhpeft predict. POST /feedback takes labels. GET /health, /ready, /info and /metrics
    are for monitoring.

    POST /admin/swap loads another round alongside and switches to it without losing requests;
    /admin/rollback switches back. They need a token, in the variable BHPEFT_ADMIN_TOKEN.

    Examples:
        bhpeft serve runs/reviews
        bhpeft serve runs/weeks --round 5f0c --port 9000 --method student
    """
    from ..base.checks import optional_library

    for library in ("starlette", "prometheus_client"):
        optional_library(library, "serve")
    uvicorn = optional_library("uvicorn", "serve")
    from ..data.encoding import CutWarning
    from ..forecast.base import way_in_words
    from ..serving.engine import Limits
    from ..serving.rounds import Source
    from ..serving.service import Service

    warnings.filterwarnings("ignore", category=CutWarning)  # of each request anew
    limits = Limits(max_requests, max_texts, max_tokens, max_bytes, max_seconds)
    source = Source(run, backbone, device, method, nearest)
    served = source.load(round)
    say(f"serving round {served.id} of {served.folder}: {way_in_words(served.way)}")
    if served.promised is None:
        say(f"nothing is promised: {served.no_promise}")
    else:
        say(f"promised: {served.promised.in_short}")
    hosts = [host, *(allow_host or "").split(",")]
    uvicorn.run(
        Service(source, served, limits, os.environ.get("BHPEFT_ADMIN_TOKEN"), hosts).application,
        host=host,
        port=port,
        access_log=False,
        timeout_graceful_shutdown=math.ceil(max_seconds),
    )
