"""Which way of fine-tuning suits your data: a handful of methods on the same rows, in one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas

from ..base.files import write
from ..base.fit_options import FitOptions
from ..base.progress import bars
from ..base.values import Several, checked_call
from ..data import Columns
from ..data.copies import check_apart
from ..errors import ConfigError, DataError
from ..forecast.metrics import compared, evaluate, mean_and_error
from ..model.model import Model, check_model
from ..peft import Kind, presets
from ..posterior import Posterior, saving
from ..posterior.fit import fit
from ..prediction.predict import AnyForecast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BASELINE", "Comparison", "compare"]

BASELINE = "hybrid"
"""The method that the others are compared with: ordinary fine-tuning of all PEFT weights."""

_LORA = "LoRA"
_SETUP = "comparison.json"
_SCALED = ", scaled"
_FEW = 30  # rows
_WIDTH = 1.96  # standard errors to each end of a 95 % interval
_METRICS = ("accuracy", "mse", "nll", "ece", "coverage_90")


@dataclass(frozen=True)
class Comparison:
    """Forecasts of the same test rows by several methods.

    Attributes:
        forecasts: by method.
        seconds: how long each method's fits took, their widths included.
        posteriors: the fitted posteriors, by the names of their folders.
    """

    forecasts: Mapping[str, AnyForecast]
    seconds: Mapping[str, float]
    posteriors: Mapping[str, Posterior]

    def table(self) -> pandas.DataFrame:
        """A row for each method: its metrics on the test rows, and its NLL minus that of `BASELINE`
        (negative is better) with the ends of its 95 % interval, 1.96 standard errors over test rows
        on each side."""
        base = self.forecasts[BASELINE].nlls()
        rows: dict[str, dict[str, float]] = {}
        for name, forecast in self.forecasts.items():
            scores = evaluate(forecast)
            rows[name] = {metric: scores[metric] for metric in _METRICS if metric in scores}
            if name != BASELINE:
                mean, error = mean_and_error(forecast.nlls() - base)
                ends = {"low": mean - _WIDTH * error, "high": mean + _WIDTH * error}
                rows[name] |= {"nll difference": mean} | ends
            rows[name]["seconds"] = self.seconds[name]
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("method")

    def verdict(self) -> str:
        """In a sentence, whether the posterior is better than LoRA, and what it costs."""
        *_, name = self.forecasts
        difference = compared(self.forecasts[name], self.forecasts[_LORA])
        times = self.seconds[name] / max(self.seconds[_LORA], 1e-9)
        return (
            f"the {name} beside LoRA, with standard errors: {difference}. Its fit took "
            f"{times:.1f} times as long"
        )

    def plot(self) -> Figure:
        """NLL differences with their intervals, and accuracy (or MSE) of the rest when the least
        certain rows are rejected."""
        from matplotlib.figure import Figure

        from ..plots import rejection

        table = self.table().drop(index=BASELINE)
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        at = np.arange(len(table))[::-1]
        middle = table["nll difference"]
        ends = [middle - table["low"], table["high"] - middle]
        left.errorbar(middle, at, xerr=ends, fmt="o", color="black", capsize=3)
        left.axvline(0, color="grey", linewidth=0.8)
        left.set_yticks(at, table.index)
        left.set_xlabel(f"NLL minus that of {BASELINE!r} (nats; lower is better)")
        # With two classes scaling does not change the order of examples, so curves would be equal.
        others = {
            k: v
            for k, v in self.forecasts.items()
            if not (k.endswith(_SCALED) and v.probabilities.shape[1] == 2)  # type: ignore[union-attr]
        }
        rejection(others, ax=right, by="total")
        return figure


@checked_call
def compare(
    model: Callable[[Sequence[Kind]], Model],
    data: object,
    validation: object,
    test: object,
    out: str | Path,
    *,
    components: Several = 5,
    options: FitOptions | None = None,
    say: Callable[[str], object] = lambda text: None,
    columns: Columns = Columns(),
) -> Comparison:
    """Fit a handful of methods to the same rows, and predict the same test rows.

    The methods are point estimates of the head alone, of LoRA and of the hybrid; the hybrid with
    temperature scaling (classes); `components` hybrids from different starts as an ensemble, also
    scaled; and the default posterior around the points of that ensemble. The validation rows stop
    the training of points, and choose temperatures, widths and output scales.

    Each posterior is saved in `out` as soon as it is fitted. So a comparison that was interrupted
    continues where it was, and any of its posteriors can be loaded with `Posterior.load`.

    Args:
        model: a function from PEFT kinds to a new model.
        data, validation, test: labelled, as for `fit`.
        out: the folder of posteriors.
        components: the size of the ensemble and of the posterior.
        options: of each fit.
        say: is called with a line for each step.
        columns: as for `fit`.

    Raises:
        ConfigError: `out` holds a comparison of another model, of other rows or options; or
            `components` is less than 2.
        DataError: as for `fit`; or `test` has one row only, or no text that is not among the
            others.

    >>> import tempfile
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> rows = tiny_examples(48)
    >>> parts = rows.subset(range(24)), rows.subset(range(24, 36)), rows.subset(range(36, 48))
    >>> how = FitOptions(max_steps=2, progress=False)
    >>> with tempfile.TemporaryDirectory() as out:
    ...     compared = compare(tiny_model, *parts, out, components=2, options=how)
    >>> list(compared.forecasts)
    ['head only', 'LoRA', 'hybrid', 'hybrid, scaled', 'ensemble of 2', 'ensemble of 2, scaled', \
'posterior (2 components)']
    """
    options = options or FitOptions()
    folder = Path(out)
    head = model(presets.head_only())
    check_model(head)
    with bars(options.progress):
        rows = head.encode(data, columns)
        columns = head.columns_of(rows, columns)
        held_out, tested = (head.encode(given, columns) for given in (validation, test))
    if len(tested) < 2:
        raise DataError(f"test: {len(tested)} row; expected 2 or more, for intervals over rows")
    for part in (rows, held_out):
        check_apart(part, tested, "test")
    if min(len(held_out), len(tested)) < _FEW:
        say(f"fewer than {_FEW} validation or test rows: temperatures and intervals may be far off")
    setup = {"data": rows.fingerprint, "validation": held_out.fingerprint, "components": components}
    setup |= {k: v for k, v in head.facts.items() if k != "backbone"}  # which `load` checks
    _check_setup(folder, setup | asdict(options.change(progress=True)))

    def saved(name: str, doing: str, make: Callable[[], Posterior]) -> Posterior:
        """What is in the folder already, or else is made and saved there."""
        place, network = folder / name.replace(" ", "-"), head.network
        if saving.exists(place):
            say(f"{name} is in {place}")
            needed: Any = {"prior": head.prior, "likelihood": head.likelihood}
            return Posterior.load(place, network.backbone, tokenizer=network.tokenizer, **needed)
        say(doing)
        posterior = make()
        posterior.save(place)
        return posterior

    def points_of(name: str, made: Model, count: int) -> Posterior:
        how: Any = {"validation": held_out, "columns": columns, "options": options}
        make = partial(fit, made, "delta", rows, components=count, **how)
        what = f"an ensemble of {count}" if count > 1 else name
        return saved(name, f"fitting {what}", make)

    head_only = points_of("head only", head, 1)
    lora = points_of(_LORA, model(presets.lora()), 1)
    points = points_of("points", model(presets.bh_peft()), components)
    widening = f"measuring the widths of the posterior's {components} components"
    wide = saved("posterior", widening, partial(points.widen, rows, validation=held_out))
    ensemble = f"ensemble of {components}"
    methods = {
        "head only": head_only,
        _LORA: lora,
        BASELINE: points.components[0],
        ensemble: points,
        f"posterior ({components} components)": wide,
    }
    forecasts: dict[str, AnyForecast] = {}
    seconds: dict[str, float] = {}
    for name, posterior in methods.items():
        posterior = posterior.replace(novelty=None)
        with bars(options.progress):
            forecast: Any = posterior.predict(tested)
            forecasts[name], seconds[name] = forecast, posterior.report.seconds
            # The noise of ratings suits the validation rows already.
            if head.likelihood.picks_one and name in (BASELINE, ensemble):
                forecasts[name + _SCALED], _ = forecast.tempered(posterior.predict(held_out))
                seconds[name + _SCALED] = seconds[name]
    posteriors = {"head only": head_only, _LORA: lora, "points": points, "posterior": wide}
    return Comparison(forecasts, seconds, posteriors)


def _check_setup(folder: Path, setup: Mapping[str, Any]) -> None:
    """Note how a comparison is made, or check that the one in the folder was made so."""
    file = folder / _SETUP
    if not file.exists():
        if any(saving.exists(path) for path in (folder, *folder.glob("*"))):
            raise ConfigError(f"out: {folder} holds posteriors of something else; expected another")
        folder.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(setup, indent=1).encode())
        return
    try:
        before = {**json.loads(file.read_text())}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"out: {file} cannot be read ({error}); expected another folder"
        ) from error
    if other := [name for name, value in setup.items() if before.get(name) != value]:
        raise ConfigError(
            f"out: {folder} holds a comparison with another choice of {', '.join(other)}; expected "
            "the same, or another folder"
        )
