"""The warnings of a fit's report, and what it says in words."""

from __future__ import annotations

import re
from typing import Any

import pyro.distributions as dist
import pytest

import bhpeft_pyro as bh
from bhpeft_pyro.diagnostics import diagnose
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.testing import tiny_examples, tiny_model


def report(**values: Any) -> bh.training.FitReport:
    return bh.training.FitReport(10, "", bh.FitOptions(), **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl": {"a": 300.0, "b": 3.0}, "scales": {"a": 1e-4, "b": 0.5}}, "collapsed: .* at a$"),
        (
            {"kl": {"a.A": 0.01, "a.B": 0.02, "b.A": 0.01, "b.B": 3.0}}
            | {"scales": {"a.A": 1.0, "a.B": 1.0, "b.A": 1.0, "b.B": 0.5}},
            "learnt nothing: .* at all sites of a$",
        ),
        ({"falling": True}, "not converged: the loss still falls"),
        ({"temperature": 0.1}, "temperature 0.1: a cold posterior, .* seen 10 times$"),
        ({"temperature": 4.0}, "temperature 4: a hot posterior, .* seen 0.25 times$"),
        ({"temperature": 0.0}, "temperature 0: maximum likelihood, no posterior$"),
    ],
)
def test_each_warning_speaks_alone_and_by_name(values: dict[str, Any], message: str) -> None:
    assert report(kl={"a": 3.0, "b": 0.2}, scales={"a": 0.3, "b": 0.99}).warnings == []
    found = report(**values)
    assert len(found.warnings) == 1
    assert re.match(message, found.warnings[0])
    assert found.warnings[0] in str(found).splitlines()


def test_a_points_temperature_is_not_that_of_its_width() -> None:
    point = report(temperature=0.0, point=True)
    wide = report(temperature=0.0, point=True, tau=3.0)
    assert len(point.warnings) == 1 and wide.warnings == []
    mixed = [bh.training.FitReport.of_mixture([one, one], one.options) for one in (point, wide)]
    assert len(mixed[0].warnings) == 1 and mixed[1].warnings == []


def test_a_points_loss_is_no_negative_elbo() -> None:
    """Of its prior there is a density: no KL, and lower than any."""
    for guide in ("normal", "delta", "laplace"):
        fitted = bh.fit(tiny_model(()), guide, tiny_examples(8), max_steps=2, progress=False)
        line = str(fitted.report).splitlines()[1]
        assert line.startswith("negative ELBO" if guide == "normal" else "loss"), line


def test_warnings_of_fits() -> None:
    """A site that the data say nothing of, one that is nailed down, one never moved."""
    data = tiny_examples(24)
    options: dict[str, Any] = {"batch_size": 24, "lr": 0.1, "progress": False}
    # LoRA's effect is nil at a prior this narrow, so its posterior is the prior.
    prior = {"lora.*": dist.Normal(0.0, 1e-6), "head.*": dist.Normal(0.0, 1.0)}
    model = tiny_model(prior=prior)
    posterior = bh.fit(model, "normal", data, max_steps=60, **options)
    nothing = next(line for line in posterior.report.warnings if line.startswith("learnt nothing"))
    assert nothing.endswith("at all sites of lora.query, lora.value")
    # The recipe that is a point in disguise: sds that start narrow and hardly move.
    model = tiny_model(())
    guide = MeanFieldGuide(model, ("normal", {"init_scale": 1e-4}))
    posterior = bh.fit(model, guide, data, max_steps=20, **{**options, "lr": 1e-4})
    words = " ".join(posterior.report.warnings)
    assert "collapsed" in words and "head.weight" in words
    assert diagnose(posterior, data).psis.verdict == "bad"
