"""Pyro's autoguides under this package's contract: they can be saved, and become priors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import autoguide as pyro_guides
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import init_to_mean
from torch import Tensor, nn
from torch.distributions import biject_to, transform_to

from ..base.distributions import Covariance, LowRankNormal
from ..base.isolation import alone, undisturbed
from ..data.batch import Batch
from ..errors import KEEP_TENSORS, GuideError
from ..model.model import Model
from ..priors import JointPrior, Prior, unpack
from ..priors.any_prior import joint
from .guide import Guide
from .latent import check_attributes, is_real, latents, normal_on

_LARGEST = 4096  # latents of a dense covariance: 64 MiB

_NAMES = (
    *("AutoDelta", "AutoDiagonalNormal", "AutoGaussian", "AutoIAFNormal"),
    *("AutoLaplaceApproximation", "AutoLowRankMultivariateNormal", "AutoMultivariateNormal"),
    *("AutoNormal", "AutoNormalizingFlow", "AutoStructured"),
)
PYROS: dict[str, type[AutoGuide]] = {
    "mvn": pyro_guides.AutoMultivariateNormal,
    "lowrank": pyro_guides.AutoLowRankMultivariateNormal,
    "structured": pyro_guides.AutoStructured,
    "iaf": pyro_guides.AutoIAFNormal,
    **{name: getattr(pyro_guides, name) for name in _NAMES},
}
"""Pyro's autoguides that can be made from a name and options."""


class PyroGuide(Guide):
    """One of Pyro's autoguides.

    It starts at the sites' own initial values. Without an `init_scale` it starts as wide as the
    prior, and `fit` first fits the head and sets the sds, as those of a `MeanFieldGuide`; a flow
    starts as in Pyro. The posterior becomes a prior of independent Normals, or of one Normal over
    all weights. A flow cannot be a prior.

    Args:
        model: the model whose latents it covers.
        family: the autoguide: a name in `PYROS`, or a class.
        options: of its constructor.

    Raises:
        GuideError: the prior samples both "a" and "a.b", whose names collide in some autoguides.

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
        together = joint(model.prior)  # its sites are covered one by one
        by_site = model if together is None else model.with_prior(together.independent())
        self._latents = latents(by_site)
        self._shapes = {x.name: tuple(x.loc.shape) for x in self._latents}
        make: Any = PYROS[family] if isinstance(family, str) else family
        if not issubclass(make, pyro_guides.AutoContinuous):
            check_attributes([*self._shapes], make.__name__)
        if not issubclass(make, pyro_guides.AutoNormalizingFlow):
            starts = {x.name: biject_to(x.support)(x.loc) for x in self._latents}

            def start(site: dict[str, Any]) -> Tensor:
                if site["name"] in starts:
                    return starts[site["name"]]
                return init_to_mean(site)  # one that poutine.reparam has put in place of a latent

            options = {"init_loc_fn": start, **options}
        self.auto: AutoGuide = make(by_site, **options)
        if not self._waits():  # Pyro's guides make their parameters when they are first called
            with alone():
                self.auto(None)
            self._sds = {x.name: x.scale for x in self._latents}
            if self.free_sds():
                self._start()
        self.set_prior(model)

    def title(self) -> str:
        return type(self.auto).__name__

    @classmethod
    def of(cls, model: Model, auto: AutoGuide) -> PyroGuide | None:
        """An autoguide that Pyro has trained on this model, as a `PyroGuide` if it can be made
        again from its class."""
        if type(auto) not in PYROS.values():
            return None
        structured = isinstance(auto, pyro_guides.AutoStructured)
        names = ("conditionals", "dependencies") if structured else ("rank",)
        options = {name: getattr(auto, name) for name in names if hasattr(auto, name)}
        if isinstance(auto, pyro_guides.AutoIAFNormal):
            made: Any = auto._init_transform_fn  # a partial of what its constructor was given
            options = {"num_transforms": made.args[0], **made.keywords}
            options["hidden_dim"] = options.pop("hidden_dims")
        try:
            guide = cls(model, type(auto), **options)
            if "scale_tril" in auto.state_dict():  # of `laplace_approximation`, not constrained
                normal, new = auto.get_posterior(), cast(Any, guide.auto)
                scale = normal.scale_tril.diagonal()
                new.loc.data.copy_(normal.loc)
                new.scale = scale.clone()
                new.scale_tril = normal.scale_tril / scale.unsqueeze(-1)
            else:
                guide.auto.load_state_dict(auto.state_dict())
        except (RuntimeError, TypeError):  # other sizes, or options that cannot be guessed
            return None
        return guide

    def free_sds(self) -> bool:
        has = hasattr(self.auto, "scale_constraint") and not self._waits()
        return has and "init_scale" not in self._options

    def narrow(self, information: Mapping[str, Tensor]) -> None:
        if not self.free_sds():
            return
        for latent in self._latents:
            if latent.name in information and is_real(latent.support):
                sd = self._sds[latent.name]
                self._sds[latent.name] = (sd**-2 + information[latent.name]).rsqrt()
        self._start()

    def _start(self) -> None:
        """Start with these sds, where Pyro starts at 0.1."""
        auto: Any = self.auto
        inverse = transform_to(auto.scale_constraint).inv
        widths = {f"scales.{name}": inverse(sd) for name, sd in self._sds.items()}
        whole = torch.cat([sd.flatten() for sd in self._sds.values()])
        if isinstance(self.auto, pyro_guides.AutoLowRankMultivariateNormal):
            whole = whole / (1 + self.auto.cov_factor.square().sum(-1)).sqrt()  # the factor adds
        self._set(widths | {"scale": inverse(whole)})

    def move(self, values: Mapping[str, Tensor]) -> None:
        """Set locations. A flow has none; those of AutoStructured wait for its first batch."""
        if self._waits():
            return
        parts = self.means() | dict(values)
        locs = {x.name: biject_to(x.support).inv(parts[x.name]).to(x.loc) for x in self._latents}
        whole = torch.cat([loc.flatten() for loc in locs.values()])
        self._set({f"locs.{name}": loc for name, loc in locs.items()} | locs | {"loc": whole})

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        """Set those of Pyro's parameters that have these names."""
        for name, parameter in self.auto.named_parameters():
            if (value := values.get(name.removesuffix("_unconstrained"))) is not None:
                parameter.copy_(value.reshape(parameter.shape))  # flat in AutoStructured

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        if self._joint is None:
            drawn: dict[str, Tensor] = self.auto(batch)
            return drawn
        # The same draw with the same density, as one latent.
        with poutine.block(hide_fn=_is_latent), poutine.trace() as tracer:
            values = self.auto(batch)
        nodes: list[Any] = [node for node in tracer.trace.nodes.values() if _is_latent(node)]
        density = sum(node["fn"].log_density for node in nodes)
        shapes = self._joint.shapes
        dims = {name: values[name].dim() - len(shape) for name, shape in shapes.items()}
        flat = [values[k].reshape(*values[k].shape[:lead], -1) for k, lead in dims.items()]
        point = dist.Delta(torch.cat(flat, -1), log_density=density, event_dim=1)
        infer: Any = {"sites": shapes}
        return unpack(pyro.sample(self._joint.name, point, infer=infer), shapes)

    def parameters_of(self, sites: Collection[str]) -> list[nn.Parameter]:
        named = self.auto.named_parameters()  # "locs.head.bias", where it keeps sites apart
        return [p for n, p in named if n.removesuffix("_unconstrained").partition(".")[2] in sites]

    def set_prior(self, model: Model) -> None:
        self._model = (model,)  # a tuple keeps it out of the submodules
        self._joint = joint(model.prior)

    def means(self) -> dict[str, Tensor]:
        with alone():
            if isinstance(self.auto, pyro_guides.AutoNormalizingFlow):
                center = self.auto.get_transform()(self.auto.get_base_dist().mean)
            elif isinstance(self.auto, pyro_guides.AutoContinuous):
                center = self.auto.loc.detach().clone()
            else:
                return dict(self.auto.median(None))
        values = unpack(center, self._shapes)
        return {x.name: biject_to(x.support)(values[x.name]) for x in self._latents}

    def distributions(self) -> dict[str, TorchDistribution]:
        auto = self.auto
        with alone():
            if isinstance(auto, pyro_guides.AutoNormal):
                pairs = {name: auto._get_loc_and_scale(name) for name in self._shapes}
            elif isinstance(auto, pyro_guides.AutoDiagonalNormal):
                locs, scales = (
                    unpack(torch.as_tensor(x), self._shapes) for x in (auto.loc, auto.scale)
                )
                pairs = {name: (locs[name], scales[name]) for name in self._shapes}
            else:
                raise GuideError(
                    f"{self.title()} has no distribution for each site, only a joint one (as_prior)"
                )
        return {
            x.name: normal_on(x.support, *(part.detach().clone() for part in pairs[x.name]))
            for x in self._latents
        }

    def as_prior(self) -> Prior:
        if isinstance(self.auto, pyro_guides.AutoNormal | pyro_guides.AutoDiagonalNormal):
            return super().as_prior()
        size = sum(map(prod, self._shapes.values()))
        others = [x.name for x in self._latents if not (x.is_site and is_real(x.support))]
        posterior: Any = None
        with alone():
            if isinstance(self.auto, pyro_guides.AutoContinuous) and size <= _LARGEST:
                posterior = self.auto.get_posterior()
            why = None
            made = [site.name for site in self._model[0].sites if site.name not in self._shapes]
            if made:
                why = f"the prior computes {', '.join(made)}, which would be lost"
            elif others:
                why = f"it also covers {', '.join(others)}, which are not real-valued sites"
            elif size > _LARGEST:
                why = f"its covariance of {size:,} weights would be dense, for at most {_LARGEST:,}"
            elif not hasattr(posterior, "covariance_matrix"):
                why = "its posterior is not a Normal of known moments"
            if why is not None:
                fit = "'normal'" if others or made else "'laplace' or 'normal'"
                raise GuideError(
                    f"{self.title()} cannot be a prior: {why}; fit {fit}, or derive "
                    "your guide from bhpeft_pyro.guides.Guide and give it distributions()"
                )
            covariance = Covariance.dense(posterior.covariance_matrix)
            return JointPrior(LowRankNormal(posterior.mean.clone(), covariance), self._shapes)

    def options(self) -> dict[str, Any]:
        name = self.family if isinstance(self.family, str) else self.family.__name__
        if isinstance(self.family, type) and self.family is not PYROS.get(name):
            raise GuideError(
                f"{name} is not one of Pyro's own, so it cannot be saved. {KEEP_TENSORS}; or "
                "derive it from bhpeft_pyro.guides.Guide"
            )
        options = {k: v for k, v in self._made_with().items() if k != "init_loc_fn"}
        return {"family": name, **options}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle it as a new guide in the same state: Pyro's own copy would include a run
        of the model, or lack the model."""
        state = None if self._waits() else self.state_dict()
        return _made_again, (self._model[0], self.family, self._made_with(), state)

    def __deepcopy__(self, memo: dict[int, Any]) -> PyroGuide:
        make, arguments = self.__reduce__()
        return make(*arguments)

    def _made_with(self) -> dict[str, Any]:
        """The options, with the dependencies that AutoStructured finds in its first step."""
        if not isinstance(self.auto, pyro_guides.AutoStructured):
            return self._options
        names = ("conditionals", "dependencies")
        return self._options | {name: getattr(self.auto, name) for name in names}

    def _waits(self) -> bool:
        """Whether it needs data first, to find which latents depend on each other."""
        auto = self.auto
        return isinstance(auto, pyro_guides.AutoStructured) and isinstance(auto.dependencies, str)


def _made_again(
    model: Model, family: Any, options: dict[str, Any], state: dict[str, Any] | None
) -> PyroGuide:
    with undisturbed():
        new = PyroGuide(model, family, **options)
    if state is not None:
        new.load_state_dict(state)
    return new


def _is_latent(node: Any) -> bool:
    return node["type"] == "sample" and isinstance(node["fn"], dist.Delta)
