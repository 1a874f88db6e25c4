r"""The application for servers that make it themselves, in several processes.

    BHPEFT_RUN=runs/weeks uvicorn --factory bhpeft_pyro.serving.workers:application --workers 2 \
        --http bhpeft_pyro.serving.connections:Connection --limit-concurrency 900

Each process loads a round of its own. `/admin/...` would exchange that of one process alone, so it
is refused here: SIGHUP starts uvicorn's or gunicorn's processes anew, and each loads the newest
round.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from starlette.applications import Starlette

from ..base.names import Method
from ..base.values import valid
from ..data.encoding import CutWarning
from ..errors import ConfigError
from .engine import Limits
from .loading import Source
from .server import Service


def application() -> Starlette:
    """An application by environment variables: BHPEFT_RUN, and what `bhpeft serve` has as options:
    BHPEFT_ROUND, BHPEFT_METHOD, BHPEFT_BACKBONE, BHPEFT_DEVICE, BHPEFT_MAX_TEXTS and so on;
    BHPEFT_NEAREST is 0 or 1.

    Raises:
        ConfigError: BHPEFT_RUN is missing, or another one has a value that cannot work.
        SaveError: as for `Source.load`.
    """
    given = {
        name.removeprefix("BHPEFT_").lower(): value
        for name, value in os.environ.items()
        if name.startswith("BHPEFT_") and value
    }
    if "run" not in given:
        raise ConfigError("BHPEFT_RUN is not set; expected the folder of a saved posterior")
    method: Any = given.get("method")
    if method is not None:
        method = valid(Method, "BHPEFT_METHOD", method)
    device = valid(Literal["auto", "cpu", "cuda"], "BHPEFT_DEVICE", given.get("device", "auto"))
    warnings.filterwarnings("ignore", category=CutWarning)  # of each request anew
    nearest = valid(Literal["0", "1"], "BHPEFT_NEAREST", given.get("nearest", "0")) == "1"
    source = Source(Path(given["run"]), given.get("backbone"), device, method, nearest)
    limits, hosts = _limits(given), given.get("allow_host", "").split(",")
    _forget_killed()
    return Service(source, source.load(given.get("round")), limits, hosts=hosts).application


def _forget_killed() -> None:
    """Remove what killed processes left in the folder of prometheus-client, whose requests would
    count as running for ever."""
    folder = Path(os.environ.get("PROMETHEUS_MULTIPROC_DIR", ""))
    for file in folder.glob("gauge_live*_*.db") if folder.name else ():
        with suppress(ValueError, PermissionError):  # of another user's process, which lives
            try:
                os.kill(int(file.stem.rpartition("_")[2]), 0)
            except ProcessLookupError:
                file.unlink(missing_ok=True)


def _limits(given: dict[str, str]) -> Limits:
    kinds: dict[str, Any] = {f"max_{field.name}": type(field.default) for field in fields(Limits)}
    limits = Limits()
    for name in (name for name in given if name.startswith("max_")):
        variable = f"BHPEFT_{name.upper()}={given[name]!r}"
        if name not in kinds:
            there = ", ".join(f"BHPEFT_{kind.upper()}" for kind in kinds)
            raise ConfigError(f"{variable}: there is no such limit; expected {there}")
        try:
            limits = replace(limits, **{name.removeprefix("max_"): kinds[name](given[name])})
        except ValueError as error:  # a ConfigError too
            raise ConfigError(f"{variable}: {error}") from None
    return limits
