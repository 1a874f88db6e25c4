"""Pyro's own autoguides under this package's contract: they can be saved, and become priors.

What Pyro's autoguides say of their posteriors, as priors of this package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import autoguide as pyro_guides
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import biject_to, transform_to

from ..data.batch import Batch
from ..distributions import Constrained, Covariance, LowRankNormal
from ..errors import KEEP_TENSORS, GuideError
from ..model.model import Model
from ..priors import JointPrior, PosteriorPrior, Prior, checked, unpack
from .guide import Guide
from .latent import Latent, is_real, latents

__all__ = [
    "PYROS",
    "PyroGuide",
    "independent",
    "joint",
]


_LARGEST = 4096  # latents of a covariance that is made whole: 64 MiB


def independent(auto: AutoGuide, latents: Sequence[Latent]) -> dict[str, TorchDistribution] | None:
    """A distribution for each latent, detached and copied, if they are independent Normals."""
    shapes = {x.name: tuple(x.loc.shape) for x in latents}
    if isinstance(auto, pyro_guides.AutoNormal):
        pairs = [auto._get_loc_and_scale(name) for name in shapes]
    elif isinstance(auto, pyro_guides.AutoDiagonalNormal):
        locs, scales = (unpack(value, shapes) for value in (auto.loc, torch.as_tensor(auto.scale)))
        pairs = [(locs[name], scales[name]) for name in shapes]
    else:
        return None
    found: dict[str, TorchDistribution] = {}
    for latent, (loc, scale) in zip(latents, pairs, strict=True):
        normal = dist.Normal(loc.detach().clone(), scale.detach().clone()).to_event(loc.dim())
        found[latent.name] = (
            normal if is_real(latent.support) else Constrained(normal, latent.support)
        )
    return found


def joint(auto: AutoGuide, latents: Sequence[Latent]) -> JointPrior:
    """The posterior over all sites at once.

    Args:
        auto: a guide of all sites.
        latents: that it covers, in their order.

    Raises:
        GuideError: a point, a family that is no Normal, latents that are no sites or not real, or
            more of them than a covariance matrix can have.
    """
    name = type(auto).__name__
    shapes = {latent.name: tuple(latent.loc.shape) for latent in latents}
    if isinstance(auto, pyro_guides.AutoDelta | pyro_guides.AutoLaplaceApproximation):
        raise GuideError(
            f"{name} is a point, which has no width, so it cannot be a prior: fit 'laplace', or a "
            "'delta' guide with a width=..."
        )
    if others := [x.name for x in latents if not (x.is_site and is_real(x.support))]:
        raise GuideError(
            f"{name} also holds {', '.join(others)}, so its posterior cannot be a prior; expected "
            "sites of real weights alone, or 'normal' or AutoNormal"
        )
    size = sum(latent.loc.numel() for latent in latents)
    if size > _LARGEST:
        raise GuideError(
            f"{name} of {size:,} latents cannot be a prior: its covariance would be made whole, "
            f"for at most {_LARGEST:,}; 'laplace' passes its own on at any size"
        )
    if not isinstance(auto, pyro_guides.AutoContinuous) or isinstance(
        auto, pyro_guides.AutoNormalizingFlow
    ):
        raise GuideError(
            f"{name} does not say how its posterior becomes a prior; derive your guide from "
            "bhpeft_pyro.guides.Guide and give it distributions()"
        )
    posterior = auto.get_posterior()
    covariance = Covariance.dense(posterior.covariance_matrix)
    return JointPrior(LowRankNormal(posterior.mean.clone(), covariance), shapes)


PYROS: dict[str, type[AutoGuide]] = {
    "mvn": pyro_guides.AutoMultivariateNormal,
    "lowrank": pyro_guides.AutoLowRankMultivariateNormal,
    "structured": pyro_guides.AutoStructured,
    "iaf": pyro_guides.AutoIAFNormal,
    "AutoDelta": pyro_guides.AutoDelta,
    "AutoDiagonalNormal": pyro_guides.AutoDiagonalNormal,
    "AutoGaussian": pyro_guides.AutoGaussian,
    "AutoIAFNormal": pyro_guides.AutoIAFNormal,
    "AutoLaplaceApproximation": pyro_guides.AutoLaplaceApproximation,
    "AutoLowRankMultivariateNormal": pyro_guides.AutoLowRankMultivariateNormal,
    "AutoMultivariateNormal": pyro_guides.AutoMultivariateNormal,
    "AutoNormal": pyro_guides.AutoNormal,
    "AutoNormalizingFlow": pyro_guides.AutoNormalizingFlow,
    "AutoStructured": pyro_guides.AutoStructured,
}
"""Pyro's autoguides that can be made from a name and options."""


class PyroGuide(Guide):
    """One of Pyro's autoguides.

    It starts at our sites' own starting values (A Kaiming, B zero) rather than at Pyro's, a saddle
    of BA, and as wide as the prior where no `init_scale` is given; but a flow starts as Pyro's do.
    Its posterior becomes a prior by its density: independent Normals one a latent, any other Normal
    over all weights at once. A flow cannot be a prior.

    Args:
        model: the model whose latents it covers.
        family: the autoguide: a name in `PYROS`, or a class.
        options: of its constructor.

    Raises:
        GuideError: of two latents one is named "a" and the other "a.b".

    Attributes:
        auto: Pyro's guide itself.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> guide = PyroGuide(tiny_model(()), "mvn", init_scale=0.01)
    >>> type(guide.auto).__name__, guide.means()["head.bias"]
    ('AutoMultivariateNormal', tensor([0., 0.]))
    """

    def __init__(self, model: Model, family: str | type[AutoGuide], **options: Any) -> None:
        super().__init__()
        self.family, self._options = family, options
        # Under a joint prior it still covers the sites, one by one.
        own = Model(model.network, _apart(model.prior), model.likelihood)
        self._latents = latents(own)
        run = partial(_run, own)
        make: Any = PYROS[family] if isinstance(family, str) else family
        if not issubclass(make, pyro_guides.AutoContinuous):
            _check_names([x.name for x in self._latents], make.__name__)
        self.auto: AutoGuide
        if not issubclass(make, pyro_guides.AutoNormalizingFlow):
            starts = {x.name: biject_to(x.support)(x.loc) for x in self._latents}
            options = {"init_loc_fn": lambda site: starts[site["name"]], **options}
        self.auto = make(run, **options)
        if not self._waits():  # Pyro's make their parameters when they are first called
            with pyro.get_param_store().scope(), poutine.block(), torch.no_grad():
                self.auto(None)
            if "init_scale" not in options:
                self._widen()
        self.follow(model)

    @torch.no_grad()
    def _widen(self) -> None:
        """As wide as the prior: Pyro's own 0.1 is many times that, or a small part of it."""
        constraint = getattr(self.auto, "scale_constraint", None)
        if constraint is None:
            return
        inverse = transform_to(constraint).inv
        widths = {f"scales.{x.name}": inverse(x.scale) for x in self._latents}
        whole = torch.cat([x.scale.flatten() for x in self._latents])
        if isinstance(self.auto, pyro_guides.AutoLowRankMultivariateNormal):
            whole = whole / (1 + self.auto.cov_factor.square().sum(-1)).sqrt()  # which it adds
        widths["scale"] = inverse(whole)
        for name, parameter in self.auto.named_parameters():
            if (width := widths.get(name.removesuffix("_unconstrained"))) is not None:
                parameter.copy_(width.reshape(parameter.shape))  # AutoStructured has flat ones

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        if self._joint is None:
            drawn: dict[str, Tensor] = self.auto(batch)
            return drawn
        # The same draw, as parts of one latent, and the same density.
        with poutine.block(hide_fn=_is_latent), poutine.trace() as tracer:
            values = self.auto(batch)
        nodes: list[Any] = [node for node in tracer.trace.nodes.values() if _is_latent(node)]
        density = sum(node["fn"].log_density for node in nodes)
        shapes = self._joint.shapes
        flat = [values[k].reshape(*_batch(values[k], shape), -1) for k, shape in shapes.items()]
        point = dist.Delta(torch.cat(flat, -1), log_density=density, event_dim=1)
        infer: Any = {"sites": shapes}
        return unpack(pyro.sample(self._joint.name, point, infer=infer), shapes)

    def follow(self, model: Model) -> None:
        self._model = (model,)  # in a tuple it is no part of this module
        self._joint = model.prior if isinstance(model.prior, JointPrior) else None

    def means(self) -> dict[str, Tensor]:
        with pyro.get_param_store().scope(), torch.no_grad():
            if isinstance(self.auto, pyro_guides.AutoNormalizingFlow):
                center = self.auto.get_transform()(self.auto.get_base_dist().mean)
            elif isinstance(self.auto, pyro_guides.AutoContinuous):
                center = self.auto.loc.detach().clone()
            else:
                return dict(self.auto.median(None))
        values = unpack(center, {x.name: tuple(x.loc.shape) for x in self._latents})
        return {x.name: biject_to(x.support)(values[x.name]) for x in self._latents}

    def distributions(self) -> dict[str, TorchDistribution]:
        with pyro.get_param_store().scope(), torch.no_grad():
            if (found := independent(self.auto, self._latents)) is not None:
                return found
        raise GuideError(
            f"{type(self.auto).__name__} has no distribution for each site, only a joint one "
            "(as_prior)"
        )

    def as_prior(self) -> Prior:
        if self._waits():
            raise GuideError("structured before a fit: its dependencies are found in one")
        with pyro.get_param_store().scope(), torch.no_grad():
            if (found := independent(self.auto, self._latents)) is not None:
                return PosteriorPrior(found)
            return joint(self.auto, self._latents)

    def options(self) -> dict[str, Any]:
        """As plain data.

        Raises:
            GuideError: it cannot be made again from such.
        """
        name = self.family if isinstance(self.family, str) else self.family.__name__
        options = {k: v for k, v in self._made_with().items() if k != "init_loc_fn"}  # but a start
        if isinstance(self.family, type) and self.family is not PYROS.get(name):
            raise _not_plain(f"{name} is none of Pyro's own")
        try:
            json.dumps(options)
        except TypeError as error:
            raise _not_plain(f"{name} was made with {options}: {error}") from error
        return {"family": name, **options}

    def __deepcopy__(self, memo: dict[int, Any]) -> PyroGuide:
        """A new one in the same state: Pyro's would copy a run of the whole model too."""
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            new = PyroGuide(self._model[0], self.family, **self._made_with())
        if not self._waits():
            new.load_state_dict(self.state_dict())
        return new

    def _made_with(self) -> dict[str, Any]:
        """The options, with those that it found by itself."""
        found = ("conditionals", "dependencies")
        if isinstance(self.auto, pyro_guides.AutoStructured):
            return self._options | {name: getattr(self.auto, name) for name in found}
        return self._options

    def _waits(self) -> bool:
        """Whether it has to see data first: which latents depend on each other in the posterior."""
        auto = self.auto
        return isinstance(auto, pyro_guides.AutoStructured) and isinstance(auto.dependencies, str)


def _check_names(names: Sequence[str], guide: str) -> None:
    """Pyro keeps what it has of latent "a.b" as an attribute "b" of what it has of "a"."""
    for outer, inner in permutations(names, 2):
        if inner.startswith(f"{outer}."):
            rest = inner.removeprefix(f"{outer}.")
            raise GuideError(
                f"{guide}: the prior samples {outer!r} and {inner!r}, whose names collide, as Pyro "
                f"keeps them as attributes; rename the second, for example to {f'{rest}.{outer}'!r}"
            )


def _apart(prior: Prior) -> Prior:
    """A joint prior as one of sites: what is random, and where it starts."""
    if not isinstance(prior, JointPrior):
        return prior
    parts = prior.normal.mean, prior.normal.stddev
    locs, scales = (unpack(part, prior.shapes) for part in parts)
    return PosteriorPrior(
        {
            name: dist.Normal(locs[name], scales[name]).to_event(len(s))
            for name, s in prior.shapes.items()
        }
    )


def _run(model: Model, batch: Batch | None = None) -> Mapping[str, Tensor] | Tensor:
    """What Pyro's guides trace: without data the prior alone."""
    return checked(model.prior, model.sites) if batch is None else model(batch)


def _is_latent(node: Any) -> bool:
    return node["type"] == "sample" and isinstance(node["fn"], dist.Delta)


def _batch(value: Tensor, shape: tuple[int, ...]) -> torch.Size:
    return value.shape[: value.dim() - len(shape)]


def _not_plain(why: str) -> GuideError:
    return GuideError(
        f"{why}, so it cannot be made again from plain data. {KEEP_TENSORS}; or derive it from "
        "bhpeft_pyro.guides.Guide and update(guide='normal') before saving"
    )
