"""Which way of fine-tuning suits your data: a handful of them on the same rows, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .data import Columns
from .errors import ConfigError
from .forecast import ClassForecast
from .forecast.metrics import evaluate, nlls
from .inference.predict import AnyForecast
from .model.model import Model
from .options import FitOptions
from .peft import Kind, presets
from .posterior import io
from .posterior.fit import fit
from .posterior.posterior import MixturePosterior, Posterior

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["BASELINE", "Comparison", "compare"]

BASELINE = "hybrid"
"""The method that the others are compared with: ordinary fine-tuning of all PEFT weights."""

_SCALED = ", scaled"  # ranks examples as without, so its curve would be the same
_METRICS = ("accuracy", "mse", "nll", "ece", "coverage_90")


@dataclass(frozen=True)
class Comparison:
    """Forecasts of the same test rows by several methods.

    Attributes:
        forecasts: by method.
        seconds: what each method's fit took, without what it shares with the method before it.
        posteriors: the fitted posteriors, by their folders' names.
    """

    forecasts: Mapping[str, AnyForecast]
    seconds: Mapping[str, float]
    posteriors: Mapping[str, Posterior]

    def table(self) -> pandas.DataFrame:
        """A row for each method: metrics on the test rows, and how far its NLL is from `BASELINE`'s
        (negative is better), with a 95 % interval over test rows (paired bootstrap)."""
        import pandas

        base = nlls(self.forecasts[BASELINE]).numpy()
        rows: dict[str, dict[str, float]] = {}
        for name, forecast in self.forecasts.items():
            scores = evaluate(forecast)
            rows[name] = {metric: scores[metric] for metric in _METRICS if metric in scores}
            if name != BASELINE:
                away = nlls(forecast).numpy() - base
                low, high = _interval(away)
                rows[name] |= {"nll difference": away.mean(), "low": low, "high": high}
            rows[name]["seconds"] = self.seconds[name]
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("method")

    def plot(self) -> Figure:
        """NLL differences with their intervals, and accuracy (or MSE) of what is kept when the
        least certain rows are rejected."""
        from matplotlib.figure import Figure

        from .plots import rejection

        table = self.table().drop(index=BASELINE)
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        at = np.arange(len(table))[::-1]
        middle = table["nll difference"]
        ends = [middle - table["low"], table["high"] - middle]
        left.errorbar(middle, at, xerr=ends, fmt="o", color="black", capsize=3)
        left.axvline(0, color="grey", linewidth=0.8)
        left.set_yticks(at, table.index)
        left.set_xlabel(f"NLL less that of {BASELINE!r} (nats; lower is better)")
        plain = {k: v for k, v in self.forecasts.items() if not k.endswith(_SCALED)}
        rejection(plain, ax=right, by="total")
        return figure


def compare(
    model: Callable[[Sequence[Kind]], Model],
    data: object,
    validation: object,
    test: object,
    out: str | Path,
    *,
    columns: Columns = Columns(),
    components: int = 5,
    options: FitOptions | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Comparison:
    """Fit a handful of methods to the same rows, and predict the same test rows.

    They are the head alone, LoRA and the hybrid as point estimates; the hybrid with temperature
    scaling (classes); `components` hybrids from different starts as an ensemble, also scaled; and
    the default posterior around those very points. The validation rows stop the points, fit the
    temperatures and choose the widths.

    Each fitted posterior is saved in `out` as soon as it is there, so a comparison that was
    interrupted goes on, and the one you like is loaded with `Posterior.load`.

    Args:
        model: makes a model with the PEFT weights given; `compare` calls it for each method.
        data, validation, test: labelled, as for `fit`.
        out: the folder of posteriors.
        columns: as for `fit`.
        components: of the ensemble and of the posterior.
        options: of each fit.
        say: told what is done.

    Raises:
        ConfigError: `out` holds a comparison of other data or options, or `components` is below 2.
        DataError: as for `fit`.

    >>> import tempfile
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> rows = tiny_examples(48)
    >>> parts = rows.subset(range(24)), rows.subset(range(24, 36)), rows.subset(range(36, 48))
    >>> how = FitOptions(max_steps=2, progress=False)
    >>> with tempfile.TemporaryDirectory() as out:
    ...     found = compare(tiny_model, *parts, out, components=2, options=how)
    >>> list(found.forecasts)
    ['head only', 'LoRA', 'hybrid', 'hybrid, scaled', '2 hybrids', '2 hybrids, scaled', \
'2 components']
    """
    if components < 2:
        raise ConfigError(f"components={components!r} must be at least 2: an ensemble is compared")
    options = options or FitOptions()
    folder = Path(out)
    posteriors: dict[str, Posterior] = {}

    def learn(name: str, kinds: Sequence[Kind], count: int) -> Posterior:
        made, place = model(kinds), folder / name.replace(" ", "-")
        point = _saved(place, made, options, count)
        if point is None:
            say(f"fitting {name}")
            point = fit(
                made,
                "delta",
                data,
                validation=validation,
                columns=columns,
                options=options,
                components=count,
            )
            point.save(place)
        else:
            say(f"{name} is in {place}")
        train = point.encode(data)
        if point.report.given != train.fingerprint:
            raise ConfigError(f"out: {place} was fitted to other data; expected another folder")
        posteriors[name] = point
        return point

    learn("head only", presets.head_only(), 1)
    learn("LoRA", presets.lora(), 1)
    points = learn("points", presets.bh_peft(), components)
    assert isinstance(points, MixturePosterior)
    several = f"{components} hybrids"
    first, *_ = points.components
    named: dict[str, Posterior] = {
        "head only": posteriors["head only"],
        "LoRA": posteriors["LoRA"],
        BASELINE: first,
        several: points,
    }
    say(f"measuring the width of {components} points")
    wide = points.widen(data, validation=validation)
    wide.save(folder / "posterior", overwrite=True)
    posteriors["posterior"] = wide
    forecasts: dict[str, AnyForecast] = {}
    seconds: dict[str, float] = {}
    for name, posterior in named.items():
        forecasts[name] = forecast = posterior.predict(test)
        seconds[name] = posterior.report.seconds
        if isinstance(forecast, ClassForecast) and posterior in (first, points):
            known = posterior.predict(validation)
            assert isinstance(known, ClassForecast)
            forecasts[name + _SCALED], _ = forecast.tempered(known)
            seconds[name + _SCALED] = seconds[name]
    forecasts[f"{components} components"] = wide.predict(test)
    seconds[f"{components} components"] = wide.report.seconds
    return Comparison(forecasts, seconds, posteriors)


def _saved(folder: Path, model: Model, options: FitOptions, count: int) -> Posterior | None:
    """What an earlier run has left in a folder, if anything.

    Raises:
        ConfigError: it was fitted in another way.
    """
    if not io.exists(folder):
        return None
    network = model.network
    found = Posterior.load(folder, network.backbone, tokenizer=network.tokenizer)
    wanted = replace(options, progress=True)
    if replace(found.report.options, progress=True) != wanted or (
        max(1, len(found.report.components)) != count
    ):
        raise ConfigError(
            f"out: {folder} was fitted with other options; expected the same, or another folder"
        )
    return found


def _interval(away: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean over rows like these."""
    from scipy.stats import bootstrap

    found = bootstrap((away,), np.mean, n_resamples=2000, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
