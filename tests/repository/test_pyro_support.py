"""What Pyro offers, tried: the end of docs/from-pyro.md says what this finds.

To write it anew: `python tests/repository/test_pyro_support.py`.
"""

from __future__ import annotations

import re
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer import autoguide
from pyro.infer.reparam.strategies import AutoReparam
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import BHPEFTError
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "from-pyro.md"
HEAD = "## What works"
INTRODUCTION = """
`tests/repository/test_pyro_support.py` tries each of these, and fails if this page says something
else. For an autoguide, "result" lists which of `bh.fit`, `save` and `update` work. A note gives the
error of whatever is missing, then the way round it. "Refused" means an error of this package.
"""
QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}

# What is tried otherwise than as it is, and what to do where it fails.
NOTES = {
    "JitTrace_ELBO": "with `svi.step(batch=batch)`, which compiles once for each batch object",
    "JitTraceGraph_ELBO": "as JitTrace_ELBO",
    "JitTraceMeanField_ELBO": "as JitTrace_ELBO",
    "JitTraceEnum_ELBO": "as JitTrace_ELBO",
    "TraceTailAdaptive_ELBO": "with several vectorised particles",
    "ReweightedWakeSleep": "with several vectorised particles",
    "AutoCallable": "give `fit` the function itself",
    "AutoDiscreteParallel": "weights are continuous",
    "AutoGuideList": "a mapping from site patterns to families does this",
    "AutoLaplaceApproximation": "`fit` finds the mode only; for the covariance give "
    "`Posterior.of` the `laplace_approximation`, made under `sdpa_kernel(SDPBackend.MATH)`",
    "AutoNormalizingFlow": "with a function that makes its transform",
    "reparam": "of the prior, with AutoReparam",
    "lift": "of a prior's parameters: they are samples then",
}


def _svi(elbo: Any) -> None:
    guide = autoguide.AutoNormal(model := tiny_model(()))
    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(2):
        svi.step(batch=tiny_batch(6))


def elbos() -> Iterator[tuple[str, Callable[[], object]]]:
    many = {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1}
    options: dict[str, dict[str, Any]] = {
        "ReweightedWakeSleep": many,
        "TraceTailAdaptive_ELBO": many,
    }
    for name in (
        *("Trace_ELBO", "TraceMeanField_ELBO", "TraceGraph_ELBO", "TraceEnum_ELBO"),
        *("RenyiELBO", "TraceTailAdaptive_ELBO", "ReweightedWakeSleep", "EnergyDistance"),
        *("JitTrace_ELBO", "JitTraceMeanField_ELBO", "JitTraceGraph_ELBO", "JitTraceEnum_ELBO"),
    ):
        yield name, lambda name=name: _svi(getattr(infer, name)(**options.get(name, {})))


def autoguides() -> Iterator[tuple[str, Callable[[], object]]]:
    """Fitted by `fit`, then saved, then updated."""
    for name in autoguide.__all__:
        family = getattr(autoguide, name)
        if family in (autoguide.AutoGuide, autoguide.AutoContinuous):
            continue  # abstract
        if isinstance(family, type) and issubclass(family, autoguide.AutoGuide):
            yield name, lambda family=family: _fitted(family)


def _fitted(family: Any) -> tuple[str, str]:
    options: dict[str, Any] = {}
    if family is autoguide.AutoNormalizingFlow:
        options["init_transform_fn"] = dist.transforms.planar
    guide = bh.autoguide(family, tiny_model(()), **options)
    posterior = bh.fit(tiny_model(()), guide, tiny_examples(), **QUICK)
    found, refused = ["fit"], []
    for what, call in (
        ("save", lambda: posterior.save(tempfile.mkdtemp(), overwrite=True)),
        ("update", lambda: posterior.update(tiny_examples(9, seed=5))),
    ):
        try:
            call()
        except BHPEFTError as error:
            refused.append(f"{what}: {_short(error)}")
        else:
            found.append(what)
    return ", ".join(found), "; ".join(refused)


def _short(error: Exception) -> str:
    """What a message says before the way out, which is on other pages."""
    return re.sub(r" at 0x\w+", "", re.split("; |, so it", str(error))[0])


def handlers() -> Iterator[tuple[str, Callable[[], object]]]:
    zero = {"head.bias": torch.zeros(2)}
    model, batch = tiny_model(()), tiny_batch(6)
    traced = poutine.trace(model).get_trace(batch)

    def lifted(sites: Any) -> dict[str, Tensor]:
        return {s.name: pyro.param(s.name, torch.zeros(s.shape)) for s in sites}

    def standard() -> object:
        prior = poutine.reparam(bh.priors.default(), AutoReparam(centered=0.0))
        return bh.fit(tiny_model((), prior=prior), "AutoNormal", tiny_examples(), **QUICK)

    normal = dist.Normal(0.0, 1.0)
    tried: dict[str, Any] = {
        "block": poutine.block(model, hide=["head.bias"]),
        "condition": poutine.condition(model, data=zero),
        "do": poutine.do(model, data=zero),
        "infer_config": poutine.infer_config(model, config_fn=lambda site: {}),
        "mask": poutine.mask(model, mask=torch.tensor(False)),
        "replay": poutine.replay(model, trace=traced),
        "scale": poutine.scale(model, scale=0.5),
        "seed": poutine.seed(model, rng_seed=1),
        "substitute": poutine.substitute(model, data={}),
        "uncondition": poutine.uncondition(model),
    }
    for name, handled in tried.items():
        yield name, lambda handled=handled: poutine.trace(handled).get_trace(batch).log_prob_sum()
    yield "lift", lambda: poutine.trace(poutine.lift(lifted, prior=normal)).get_trace(model.sites)
    yield "reparam", standard


def samplers() -> Iterator[tuple[str, Callable[[], object]]]:
    model, batch = tiny_model(()), tiny_batch(6)

    def mcmc(kernel: Any) -> None:
        chain = infer.MCMC(kernel, num_samples=3, warmup_steps=2, disable_progbar=True)
        chain.run(batch)
        bh.Posterior.from_draws(model, chain.get_samples()).predict(["w5 w6"])

    yield "NUTS", lambda: mcmc(infer.NUTS(model))
    yield "HMC", lambda: mcmc(infer.HMC(model))
    yield "RandomWalkKernel", lambda: mcmc(infer.RandomWalkKernel(model))
    yield "Importance", lambda: infer.Importance(model, num_samples=3).run(batch)
    yield "Predictive", lambda: infer.Predictive(model, num_samples=3)(batch)
    yield (
        "Predictive, parallel",
        lambda: infer.Predictive(model, num_samples=3, parallel=True)(batch),
    )


def verdict(call: Callable[[], object]) -> tuple[str, str]:
    """What a trial gives, and why not more."""
    pyro.clear_param_store()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            pyro.set_rng_seed(0)
            given = call()
    except BHPEFTError as error:
        return "refused", _short(error)
    except Exception as error:
        return "fails", type(error).__name__
    finally:
        pyro.clear_param_store()
    return given if isinstance(given, tuple) else ("works", "")


def section() -> str:
    """The end of the page: what works as it is by name, the rest in a table."""
    lines = [HEAD, INTRODUCTION]
    for title, rows in (
        ("Losses of SVI", elbos()),
        ("Autoguides", autoguides()),
        ("Handlers", handlers()),
        ("Samplers and predictions", samplers()),
    ):
        works, table = [], []
        for name, call in rows:
            found, why = verdict(call)
            note = "; ".join(filter(None, [why, NOTES.get(name.split(",")[0], "")]))
            if note or found not in ("works", "fit, save, update"):
                table.append(f"| `{name}` | {found} | {note} |")
            else:
                works.append(f"`{name}`")
        line = f"**{title}** that work as they are: {', '.join(works)}."
        lines.append(textwrap.fill(line, 100, break_on_hyphens=False) + "\n")
        if table:
            lines += ["| name | result | notes |", "|---|---|---|", *table, ""]
    return "\n".join(lines)


@pytest.mark.slow
def test_the_page_says_what_is_found() -> None:
    assert PAGE.read_text().endswith(section())


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(HEAD)[0] + section())
