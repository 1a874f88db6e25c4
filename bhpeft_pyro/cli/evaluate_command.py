"""`bhpeft evaluate`: how good a posterior is on labelled data."""

from __future__ import annotations

from . import options
from .screen import print_json, show_metrics


def evaluate(
    run: options.Run,
    data: options.Data,
    config: options.Config = None,
    samples: options.Samples = None,
    draw_seed: options.DrawSeed = 0,
    backbone: options.Backbone = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure accuracy, NLL, calibration and more on labelled data.

    Examples:
        bhpeft evaluate runs/reviews test.csv
        bhpeft evaluate runs/reviews test.csv --json | jq .ece
    """
    from ..data.sources import in_file
    from .runs import check_samples, guide_of, open_run, rows_for

    posterior = open_run(run, backbone, device)
    check_samples(samples, guide_of(posterior), posterior.model.likelihood)
    with in_file(data):
        examples = posterior.encode(rows_for(posterior, data, labelled=True))
    scores = posterior.evaluate(examples, samples, seed=draw_seed)
    if as_json:
        print_json({"examples": len(examples), **scores})
    else:
        show_metrics(f"{len(examples)} {examples.unit} of {data}", {"value": scores})
