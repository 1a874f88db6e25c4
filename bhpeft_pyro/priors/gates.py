"""Relaxed spike-and-slab gates: which layers need which PEFT kind?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..errors import PriorError
from ..peft.sites import Site
from .scales import FunctionSpacePrior, along, multiplied

if TYPE_CHECKING:
    from ..posterior.posterior import Posterior

__all__ = ["Gates", "gate_probabilities"]


@dataclass(frozen=True)
class Gates(FunctionSpacePrior):
    """A gate in (0, 1) for each PEFT kind and layer, on the weights that add to the layer's output.

        logits ~ Logistic(logit(probability) / relaxation, 1 / relaxation)   ("gates.<kind>", layer)
        weight = gate * slab,   gate = sigmoid(logits),   slab ~ N(0, sd^2)

    This is the binary Concrete distribution (Maddison et al. 2017): P(gate > 1/2) is `probability`
    whatever the relaxation, and as that goes to 0 the gates become 0 or 1. Sites of one kind (LoRA
    on queries and on values) share their gates. The numbers of `FunctionSpacePrior` are the slab's
    sds. Input sides, head and likelihood are Normal.

    Args:
        probability: that a layer needs a kind, before any data.
        relaxation: the temperature of the relaxed gates.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> trace = pyro.poutine.trace(Gates()).get_trace(tiny_model().sites)
    >>> trace.nodes["gates.lora"]["value"].shape
    torch.Size([2])
    """

    probability: float = 0.5
    relaxation: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.probability < 1:
            raise PriorError(f"Gates: probability must be below 1, got {self.probability}")

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        layers = gated_layers(sites)
        openness = torch.logit(torch.tensor(self.probability)).item() / self.relaxation
        gates: dict[str, Tensor] = {}
        values = {}
        for site in sites:
            if site.role != "output":
                values[site.name] = self.sample(site)
                continue
            kind = _kind(site)
            if kind not in gates:
                loc = site.unit.new_full((len(layers[kind]),), openness)
                logits = dist.Logistic(loc, 1 / self.relaxation).to_event(1)
                gates[kind] = pyro.sample(f"gates.{kind}", logits).sigmoid()
            own = gates[kind][..., [layers[kind].index(number) for number in site.layers]]
            factor = self.sd(site) * along(own, site, ("layer",))
            values[site.name] = multiplied(site, self.loc(site), factor)
        return values

    def sample(self, site: Site) -> Tensor:
        """Sample a site that has no gate."""
        return self.normal(site)


def gate_probabilities(
    posterior: Posterior, samples: int = 1000, seed: int = 0
) -> dict[str, dict[int, float]]:
    """The posterior probability that a layer needs a kind: that its gate is above 1/2.

    Args:
        posterior: of a fit under `Gates`, or an update of one.
        samples: draws.
        seed: of the draws.

    Returns:
        Kind to layer number to probability.

    Raises:
        PriorError: the posterior has no gates.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> model = tiny_model(prior=Gates())
    >>> fitted = fit(model, "normal", tiny_examples(), max_steps=3, progress=False)
    >>> list(gate_probabilities(fitted)["lora"])
    [0, 1]
    """
    draws = posterior.sample(samples, seed)
    found = {}
    for kind, layers in gated_layers(posterior.model.sites).items():
        if (logits := draws.get(f"gates.{kind}")) is not None:
            needed = (logits > 0).float().mean(0).tolist()
            found[kind] = dict(zip(layers, needed, strict=True))
    if not found:
        raise PriorError("gate_probabilities: this posterior has no gates; fit it under Gates")
    return found


def gated_layers(sites: Sequence[Site]) -> dict[str, list[int]]:
    """PEFT kind to the numbers of the layers that carry it."""
    found: dict[str, set[int]] = {}
    for site in sites:
        if site.role == "output":
            found.setdefault(_kind(site), set()).update(site.layers)
    return {kind: sorted(layers) for kind, layers in found.items()}


def _kind(site: Site) -> str:
    return site.name.split(".")[0]
