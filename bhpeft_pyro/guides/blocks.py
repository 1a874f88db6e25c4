"""Guides made of others: a family for each group of sites, and the prior as a guide."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.fit_options import FitOptions
from ..base.names import sort_by_pattern
from ..data.batch import Batch
from ..errors import GuideError
from ..model.model import Model
from ..priors import checked
from ..priors.any_prior import check_no_evidence
from .guide import Guide
from .latent import check_separate, latents
from .mean_field import DeltaGuide, NormalGuide

FAMILIES: dict[str, type[NormalGuide | DeltaGuide]] = {"normal": NormalGuide, "delta": DeltaGuide}
Family = str | tuple[str, Mapping[str, Any]]
"""The name of a family, or a pair of a name and its options."""


class BlockGuide(Guide):
    """q(w) = prod_b q_b(w_b): some weights are Normal, others point estimates.

    Point estimates ("delta") have no KL. They add minus their log prior density to the loss, so
    they are MAP estimates given draws of the other weights.

    Args:
        model: the model whose latents it covers.
        families: from patterns of names to "normal" or "delta", or to a pair of such a name and
            its options. The first pattern that matches a latent is used. Latents that are not
            sites, such as scales, are matched by their own names.

    Raises:
        GuideError: a family is unknown; no pattern matches a latent, or a pattern
            matches none; or the prior samples several sites jointly.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> guide = BlockGuide(tiny_model(), {"lora.*.A": "normal", "*": "delta"})
    >>> guide.title()
    'BlockGuide(lora.*.A: normal, *: delta)'
    """

    def __init__(self, model: Model, families: Mapping[str, Family]) -> None:
        super().__init__()
        self.families = dict(families)
        covered = latents(model)
        check_separate(type(self).__name__, covered)
        self._parsed = {pattern: _parsed(pattern, family) for pattern, family in families.items()}
        names = [latent.name for latent in covered]
        pattern_of = sort_by_pattern(names, families, "guide", GuideError)
        self.guides = nn.ModuleList(
            FAMILIES[family](model, names=[n for n in names if pattern_of[n] == pattern], **options)
            for pattern, (family, options) in self._parsed.items()
        )

    @property
    def blocks(self) -> list[Any]:
        """The guides of the groups, in the order of the patterns."""
        return [*self.guides]

    @property
    def point(self) -> bool:  # type: ignore[override]
        """Whether every block is a point estimate."""
        return all(block.point for block in self.blocks)

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        return {name: value for guide in self.blocks for name, value in guide(batch).items()}

    def distributions(self) -> dict[str, TorchDistribution]:
        return {k: q for block in self.blocks for k, q in block.distributions().items()}

    def means(self) -> dict[str, Tensor]:
        return {k: value for block in self.blocks for k, value in block.means().items()}

    def move(self, values: Mapping[str, Tensor]) -> None:
        for block in self.blocks:
            block.move(values)

    def scales(self) -> dict[str, Tensor]:
        return {k: value for block in self.blocks for k, value in block.scales().items()}

    def points(self) -> list[str]:
        return [name for block in self.blocks for name in block.points()]

    def optimizers(self, options: FitOptions, examples: int) -> list[Optimizer]:
        return [step for block in self.blocks for step in block.optimizers(options, examples)]

    def set_prior(self, model: Model) -> None:
        for block in self.blocks:
            block.set_prior(model)

    def free_sds(self) -> bool:
        return any(block.free_sds() for block in self.blocks)

    def narrow(self, information: Mapping[str, Tensor]) -> None:
        for block in self.blocks:
            block.narrow(information)

    def parameters_of(self, sites: Collection[str]) -> list[nn.Parameter]:
        return [p for block in self.blocks for p in block.parameters_of(sites)]

    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for block in self.blocks:
            if more := {name: rows[name] for name in block.means() if name in rows}:
                block.grow(more)

    def options(self) -> dict[str, Any]:
        return {"families": self.families}

    def title(self) -> str:
        lines = []
        for pattern, (name, options) in self._parsed.items():
            listed = ", ".join(f"{option}={value!r}" for option, value in options.items())
            lines.append(f"{pattern}: {name}" + (f"({listed})" if listed else ""))
        return f"{type(self).__name__}({', '.join(lines)})"


def prior_like(model: Model, guide: Guide) -> Guide:
    """The prior that a guide was fitted under, to predict with as the guide does.

    Under a `linear` guide the network is linearised around the guide's means.
    """
    return PriorGuide(guide.under_prior(model), guide.means() if guide.linear else None)


class PriorGuide(Guide):
    """A model's prior in the form of a guide, to draw from and to predict with.

    Args:
        model: the model.
        around: weights at which the network is linearised for predictions; by default it is not.

    Raises:
        PriorError: the prior has observations or factors, which its draws would leave out.
    """

    def __init__(self, model: Model, around: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        check_no_evidence(model.prior, model.sites, "draws of the prior")
        self._model = (model,)  # a tuple keeps it out of the submodules
        self._around, self.linear = around, around is not None

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        (model,) = self._model
        return checked(model.prior, model.sites)

    def means(self) -> dict[str, Tensor]:
        if self._around is None:
            raise GuideError("a prior has no central values; expected samples=1 or more")
        return dict(self._around)


def _parsed(pattern: str, family: Family) -> tuple[str, Mapping[str, Any]]:
    match family:
        case str(name):
            options: Mapping[str, Any] = {}
        case (str(name), Mapping() as options):  # a pair that was saved is a list
            pass
        case _:
            raise GuideError(
                f"guide: got {family!r} at {pattern!r}, expected a family's name, or a pair of a "
                "name and a mapping of options"
            )
    if name not in FAMILIES:
        raise GuideError(
            f"guide: unknown family {name!r} at {pattern!r}; expected one of {', '.join(FAMILIES)}"
        )
    return name, options
