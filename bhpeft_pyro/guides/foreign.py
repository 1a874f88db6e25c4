"""Guides that this package did not make: modules, functions with `pyro.param` statements, and the
draws of a sampler such as NUTS or SGLD."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint

from ..base.checks import shown, warn
from ..base.isolation import alone, locked
from ..data.batch import Batch
from ..errors import KEEP_TENSORS, ConfigError, GuideError
from ..model.model import Model
from ..priors import Prior, unpack
from ..priors.draw_by_draw import draw_by_draw
from .guide import Guide, key
from .latent import latents, normal_on


class ForeignGuide(Guide):
    """A guide of which only draws and their density are known. It can be fitted and used to
    predict, but cannot become the next round's prior."""

    instead = "derive your guide from bhpeft_pyro.guides.Guide and give it distributions()"

    def means(self) -> dict[str, Tensor]:
        raise GuideError(
            f"samples=0 needs the guide's central values, which {self.title()} does not have; "
            "expected samples=1 or more"
        )

    def as_prior(self) -> Prior:
        raise GuideError(
            f"{self.title()} does not say how its posterior becomes a prior; {self.instead}, or "
            "fit the new data under the moments of its draws (Posterior.from_draws)"
        )

    def options(self) -> dict[str, Any]:
        raise GuideError(
            f"{self.title()} cannot be saved; expected one that autoguide makes by name, a "
            f"function, or one that is derived from Guide. {KEEP_TENSORS}"
        )


def _sampled(guide: Callable[[Batch | None], Any], batch: Batch | None) -> dict[str, Tensor]:
    """Call a guide once for each draw, for which it is written."""

    def one_draw() -> dict[str, Tensor]:
        values = guide(batch)
        named = values if isinstance(values, Mapping) else {}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    return draw_by_draw(one_draw, GuideError)


class ModuleGuide(ForeignGuide):
    """Any module that is a Pyro guide; `fit` wraps it in this.

    One of Pyro's autoguides makes many draws at once; any other is called once for each draw.

    Args:
        module: the guide, which is fitted in place.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        if isinstance(module, AutoGuide):
            self.instead = f"fit the one that bh.autoguide({self.title()}, model) makes"

    def forward(self, batch: Batch | None = None) -> Any:
        if isinstance(self.module, AutoGuide):
            return self.module(batch)
        return _sampled(self.module, batch)

    def title(self) -> str:
        return type(self.module).__name__

    def means(self) -> dict[str, Tensor]:
        if not isinstance(self.module, AutoGuide):
            return super().means()
        with alone():
            return dict(self.module.median(None))


class FunctionGuide(ForeignGuide):
    """A guide function as a module that holds the parameters of its `pyro.param` statements.

    `fit` wraps functions in it. The parameters train with torch optimisers, are copied with their
    posterior, and stay out of Pyro's global store, where another guide could share them.

    Args:
        function: `guide(batch)`, which samples every latent. It is called once with None, as
            predictions call it too, and must declare all parameters then.

    Raises:
        GuideError: it cannot be called with None. Later: a parameter is only declared if there are
            data, or no loss depends on it.

    >>> import pyro.distributions as dist
    >>> import torch
    >>> def guide(batch):
    ...     pyro.sample("head.bias", dist.Delta(pyro.param("b", torch.zeros(2)), event_dim=1))
    >>> [name for name, _ in FunctionGuide(guide).named_parameters()]
    ['parameters_.b']
    """

    def __init__(self, function: Callable[[Batch | None], Any]) -> None:
        super().__init__()
        self.function = function
        with locked(), pyro.get_param_store().scope() as state, poutine.block():
            try:
                function(None)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise GuideError(
                    f"guide: calling {shown(function)} with None, as predictions do: {error} "
                    "(bh.autoguide takes an autoguide's class, with options)"
                ) from error
        self._constraints = state["constraints"]
        self._names = list(state["params"])
        if modules := {name.split("$$$")[0] for name in self._names if "$$$" in name}:
            raise GuideError(
                f"guide: the function registers the module {min(modules)!r}, of which it would "
                "have no copy; pass a module that samples as the guide itself"
            )
        # Copies, because the store holds the function's own initial tensors.
        copies = {key(name): value.detach().clone() for name, value in state["params"].items()}
        self.parameters_ = nn.ParameterDict(copies)

    @property
    def source(self) -> Any:
        return self.function

    def options(self) -> dict[str, Any]:
        return {}

    def load_store(self) -> None:
        """Take the parameters that Pyro's SVI has trained, from the global store; one that is not
        there is a GuideError."""
        trained = pyro.get_param_store().get_state()["params"]
        if missing := [name for name in self._names if name not in trained]:
            raise GuideError(
                f"guide: Pyro's store has no {', '.join(map(repr, missing))}; expected a guide "
                "that SVI has trained"
            )
        for name in self._names:
            self.parameters_[key(name)].data.copy_(trained[name])

    def check_trained(self) -> None:
        """Raise a GuideError if the loss does not depend on every parameter."""
        unused = [name for name in self._names if self.parameters_[key(name)].grad is None]
        if unused:
            raise GuideError(
                f"guide: the loss does not depend on {', '.join(map(repr, unused))}, which would "
                "not be trained; if the function calls a module, pass the module itself"
            )

    def forward(self, batch: Batch | None = None) -> Any:
        """Call the function with this module's parameters, once for each draw."""
        params = {name: self.parameters_[key(name)] for name in self._names}
        store = pyro.get_param_store()  # this guide's own
        store.set_state({"params": params, "constraints": self._constraints})
        values = _sampled(self.function, batch)
        if late := [name for name in store if name not in params]:
            raise GuideError(
                f"guide: the function declares {', '.join(map(repr, late))} only if it gets data; "
                "expected all parameters when it is called with None, as predictions call it"
            )
        return values


def as_guide(guide: object) -> Guide:
    """Any guide as one of this package; what is neither a module nor a function is a
    ConfigError."""
    if isinstance(guide, Guide):
        return guide
    if isinstance(guide, nn.Module):
        return ModuleGuide(guide)
    if callable(guide):
        return FunctionGuide(guide)
    raise ConfigError(f"guide: expected a guide's name, a module or a function, got {shown(guide)}")


class DrawsGuide(Guide):
    """S joint draws of all latents, each with probability 1 / S. There is nothing to train.

    As a prior it is independent Normals with the means and sds of the draws, in unconstrained
    coordinates: the independent Normals nearest in KL(q || p), except that variances are divided
    by S - 1.

    Args:
        model: the model whose latents were sampled.
        samples: S, at least 2. The draws are zero until `of` or a saved file sets them.
        statistics: names of what the sampler says of each draw.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> model = tiny_model(())
    >>> draws = {site.name: torch.randn(50, *site.shape) for site in model.sites}
    >>> guide = DrawsGuide.of(model, draws)
    >>> torch.equal(guide.means()["head.bias"], draws["head.bias"].mean(0))
    True
    """

    draws_kept: int

    def __init__(self, model: Model, samples: int, statistics: Sequence[str] = ()) -> None:
        super().__init__()
        self.draws_kept, self._named = samples, tuple(statistics)
        if self._named:
            self.register_buffer("_statistics", torch.zeros(len(self._named), samples).double())
        self._supports: dict[str, tuple[Constraint, tuple[int, ...]]] = {}
        for latent in latents(model):
            parts = latent.sites or {latent.name: tuple(latent.prior.event_shape)}
            for name, shape in parts.items():
                support = constraints.real if latent.sites else latent.support
                self._supports[name] = support, shape
                self.register_buffer(key(name), latent.loc.new_zeros(samples, *shape))

    @classmethod
    def of(
        cls, model: Model, draws: Mapping[str, Tensor], statistics: Mapping[str, Tensor] = {}
    ) -> DrawsGuide:
        """From draws `(S, *shape)` of each latent (sites that the prior computes are left out), and
        statistics `(S,)` by name.

        Raises:
            GuideError: a latent is missing or unknown, shapes differ, or a value is not possible.
        """
        values = dict(draws)
        for latent in latents(model):
            if latent.sites and latent.name in values:  # all sites in one vector
                joint = values.pop(latent.name)
                _check_shape("draws", latent.name, joint, (*joint.shape[:1], latent.loc.numel()))
                values |= unpack(joint, latent.sites)
        samples = max((len(value) for value in values.values() if value.dim()), default=0)
        if samples > 1 and all(bool((value == value[:1]).all()) for value in values.values()):
            warn(f"draws: all {samples} are equal, so the sampler has not moved")
        guide = cls(model, samples, [*statistics])
        names, sites = guide._supports.keys(), {site.name for site in model.sites}
        missing, unknown = names - values.keys(), values.keys() - names - sites
        if missing or unknown or samples < 2:
            raise GuideError(
                f"draws: expected 2 or more of {', '.join(names)}; got {samples}"
                + (f", none of {', '.join(sorted(missing))}" if missing else "")
                + (f", the unknown {', '.join(sorted(unknown))}" if unknown else "")
            )
        for name, (support, shape) in guide._supports.items():
            value = torch.as_tensor(values[name]).detach()
            _check_shape("draws", name, value, (samples, *shape))
            if not value.is_floating_point():
                raise GuideError(f"draws: {name!r} is of {value.dtype}; expected floating numbers")
            kept = guide.get_buffer(key(name)).copy_(value)  # in which a small one may be 0
            if not (support.check(kept).all() and biject_to(support).inv(kept).isfinite().all()):
                raise GuideError(
                    f"draws: {name!r} has values that are not finite or impossible in {kept.dtype}"
                )
        for row, (name, value) in enumerate(statistics.items()):
            _check_shape("statistics", name, value, (samples,))
            guide.get_buffer("_statistics")[row] = value
        return guide

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        values = self._values()
        start = next(iter(values.values())).new_zeros(())
        which = dist.Uniform(start, start + self.draws_kept)
        index = pyro.sample("draw", which, infer={"is_auxiliary": True}).long()
        index = index.clamp_max(self.draws_kept - 1)  # by rounding it may be S
        return {
            name: pyro.sample(name, dist.Delta(value[index], event_dim=value.dim() - 1))
            for name, value in values.items()
        }

    def spread_out(self, samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        # Each of the S draws once, in the sampler's order, before any comes again. Of fewer than S
        # any are taken.
        parts = [
            torch.randperm(self.draws_kept, generator=generator)[: samples - start].sort().values
            for start in range(0, samples, self.draws_kept)
        ]
        return {"draw": torch.cat(parts) + 0.5}

    def statistics(self, samples: int, seed: int) -> dict[str, Tensor]:
        which = self.spread_out(samples, torch.Generator().manual_seed(seed))["draw"].long()
        rows = enumerate(self._named)
        return {name: self.get_buffer("_statistics")[row].cpu()[which] for row, name in rows}

    def _values(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(key(name)) for name in self._supports}

    def means(self) -> dict[str, Tensor]:
        return {name: value.mean(0) for name, value in self._values().items()}

    def distributions(self) -> dict[str, TorchDistribution]:
        normals = {}
        for name, (support, _) in self._supports.items():
            free = biject_to(support).inv(self.get_buffer(key(name)))
            sd = free.std(0).clamp_min(torch.finfo(free.dtype).tiny)
            normals[name] = normal_on(support, free.mean(0), sd)
        return normals

    def options(self) -> dict[str, Any]:
        return {"samples": self.draws_kept, "statistics": [*self._named]}


def _check_shape(argument: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise GuideError(f"{argument}: {name!r} has shape {(*value.shape,)}, expected {shape}")
