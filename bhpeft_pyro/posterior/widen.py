"""A Laplace approximation around point estimates that are fitted already."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..base.fit_options import FitOptions
from ..base.progress import bars, work
from ..data import Examples
from ..data.copies import check_apart
from ..decisions.novelty import Novelty
from ..errors import DataError, GuideError
from ..guides.laplace.laplace_strategy import around_point
from ..training.estimated_noise import has_noise, settle_noise
from ..training.initialization import centred
from .mixture import Fitted, joined, parts_of
from .posterior import Posterior
from .round import Round, temperature
from .update import note_first_prior

# Fields of a report that a width changes. A `History` may have the point estimate too, by its id;
# and the metrics are of that.
_NEW = (
    "id",
    "options",
    "temperature",
    "point",
    "held_out",
    "metrics",
    "score",
    "output_scale",
    "seconds",
)


def widen(
    posterior: Posterior, data: object, *, validation: object | None, changes: Mapping[str, Any]
) -> Posterior:
    """See `Posterior.widen`."""
    parts = posterior.components
    for part in parts:
        if not part.guide.point:
            raise GuideError(
                f"widen: {part.guide.title()} cannot get a width; expected a 'delta' guide"
            )
    examples, novelty = posterior.encode(data), posterior.novelty
    every, first = examples, len(posterior.lineage) == 1
    held_out = None if validation is None else posterior.encode(validation)
    if held_out is None:
        examples, held_out = posterior.report.parted(examples)
        if (last := posterior.report).data not in ("", examples.fingerprint):
            raise DataError(
                f"data: these {len(examples)} examples are not the {last.examples} that the last "
                "round learnt, or are in another order; expected these, or validation rows"
            )
    else:
        check_apart(examples, held_out, "validation")
    options = posterior.report.options.change(**changes)
    with bars(options.progress), work("width", parts_of(len(parts)), at_once=True) as whole:
        fitted = []
        for number, part in enumerate(parts, 1):
            whole.name(f"component {number} of {len(parts)}")
            how = part.report.options.change(**changes)
            fitted.append(_widened(part, examples, held_out, how))
            whole.next()
        whole.name("mixture")
        lineage = posterior.lineage[:-1] if posterior.is_mixture else ()
        if novelty is None and first:  # of an adapter that was trained elsewhere
            novelty = Novelty.of(posterior.model, every, options.keep_texts)
        widened = joined(fitted, held_out, options, examples.labels, lineage)
        return widened.replace(novelty=novelty).with_report(name=posterior.report.name)


def _widened(
    part: Posterior, examples: Examples, held_out: Examples | None, options: FitOptions
) -> Fitted:
    guide = around_point(part.model, part.guide)
    log_noise = part.model.likelihood.log_noise
    if has_noise(guide, part.model) and not log_noise(guide.means()).any():  # not yet set
        settle_noise(part.model, guide, examples)
    model = centred(part.model, guide)
    lineage, last = part.lineage[:-1], part.report
    if lineage:
        note_first_prior(guide, part)
    one = Round(
        model,
        guide,
        examples,
        held_out,
        options,
        temperature=temperature(guide, options, True, last.temperature),
        facts={name: value for name, value in vars(last).items() if name not in _NEW}
        | {"examples": len(examples), "data": examples.fingerprint},
        columns=part.columns,
        lineage=lineage,
        first_prior=part.first_prior,
        learnt_rows=part.learnt_rows,
    )
    return one.with_width({"seconds": last.seconds}, time.monotonic())
