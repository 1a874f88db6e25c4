"""Whether `fit` can use a prior of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import count

import pyro
import torch
from pyro import poutine

from ..errors import PriorError
from ..peft.sites import Site
from .prior import Prior, checked

__all__ = ["check_prior"]


def check_prior(prior: Prior, sites: Sequence[Site], vectorised: bool = False) -> None:
    """Run a prior once as a fit does.

    Args:
        prior: any.
        sites: of the model.
        vectorised: under several draws at once. Here their number is that of no dim of a site, so
            that a value which is combined with a site along the wrong dim never goes unseen.

    Raises:
        PriorError: it mixes draws up, is not of the default dtype, or has parameters, which nothing
            would train.
    """
    dims = {size for site in sites for size in site.shape}
    draws = next(number for number in count(2) if number not in dims)
    with (
        torch.random.fork_rng(range(torch.cuda.device_count())),
        torch.no_grad(),
        pyro.get_param_store().scope(),
        poutine.block(),
        poutine.trace() as tracer,
        pyro.plate("draws", draws, dim=-2) if vectorised else nullcontext(),
    ):
        try:
            values = checked(prior, sites)
        except PriorError:
            raise
        except ValueError as error:  # Pyro's: of plates that collide, and the like
            raise PriorError(
                f"prior: {str(error).splitlines()[0]}. Expected no plates: under several draws "
                "their dims are those of the draws; declare dims as events with .to_event()"
            ) from error
    for site in sites:
        if (dtype := values[site.name].dtype) != torch.get_default_dtype():
            raise PriorError(
                f"prior: the site {site.name!r} has dtype {dtype}, expected "
                f"{torch.get_default_dtype()}: numbers from NumPy need .float()"
            )
    if names := [name for name, node in tracer.trace.nodes.items() if node["type"] == "param"]:
        raise PriorError(
            f"prior: {', '.join(map(repr, names))} would stay as they are, as a fit trains the "
            "guide alone; expected a pyro.sample statement for what is to be learnt (or "
            "priors.EmpiricalBayes), and plain tensors for what is not"
        )
