"""Laplace approximation: the MAP point, and around it the curvature of the log posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from ..batch import Batch
from ..distributions import Covariance, LowRankNormal
from ..errors import GuideError
from ..kronecker import KroneckerCovariance
from ..model import Model
from .joint import JointGuide

__all__ = ["STRUCTURES", "LaplaceGuide"]

STRUCTURES = ("dense", "diagonal", "kronecker")
_TENSORS = ("scale", "axes", "ratio")


class LaplaceGuide(JointGuide):
    """q(w) = N(w*, (prior precision + N F(w*))^-1) at the MAP estimate w* (MacKay 1992).

    `fit` takes steps of a point under the prior's density, then measures F, the Fisher information
    of one example, here the generalised Gauss-Newton matrix: over every outcome that the
    likelihood may have, on up to 512 examples. As that is the curvature of the network linearised
    at w*, it predicts with that network (Immer, Korzepa and Bauer 2021; `predict(linear=False)`
    for the network itself).

    Args:
        model: its prior must be Normal at every site, or an earlier posterior of this guide.
        structure: of F. "dense": all of it, for up to some thousand weights. "diagonal": at any
            size. "kronecker": of each matrix of weights along the eigenvectors of E[G G'] and
            E[G' G], G its gradients, where F's diagonal is taken (George et al. 2018); it is exact
            where F is a Kronecker product. The axes are those of the first round.

    Raises:
        GuideError: no such structure, another prior; if asked before a fit, that nothing has been
            measured yet.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "laplace", tiny_examples(), max_steps=3, progress=False)
    >>> posterior.guide.scales()["head.bias"].shape
    torch.Size([2])
    """

    def __init__(self, model: Model, structure: str = "kronecker") -> None:
        if structure not in STRUCTURES:
            raise GuideError(
                f"LaplaceGuide: structure={structure!r} is none of {', '.join(STRUCTURES)}"
            )
        self.structure = structure
        super().__init__(model)
        self._covariance: Covariance | None = None

    def follow(self, model: Model) -> None:
        super().follow(model)
        prior = self.prior.covariance
        joint = prior.rank and not isinstance(prior, KroneckerCovariance)
        if joint and self.structure == "kronecker":
            raise GuideError(
                "laplace: 'kronecker' needs a prior of independent Normals, or its own posterior; "
                "this one is joint: expected structure='dense'"
            )

    @property
    def measured(self) -> bool:
        """Whether a fit has come to its end."""
        return "ratio" in self._buffers

    @property
    def covariance(self) -> Covariance:
        """The covariance, over all weights in the order of the sites."""
        if not self.measured:
            raise GuideError(
                "laplace before a fit: its covariance is measured at the end of one; until then it "
                "is a point"
            )
        # Kept as one object, which remembers its divergence from a prior.
        if self._covariance is None or self._covariance.scale is not self.scale:
            self._covariance = self._gathered()
        return self._covariance

    def hold(self) -> None:
        """Be a point again, as it is while it is fitted."""
        self._covariance, self.linear = None, False
        self._buffers.clear()

    def spread(self, covariance: Covariance) -> None:
        """Be the posterior."""
        tensors = {name: getattr(covariance, name) for name in _TENSORS}
        if isinstance(covariance, KroneckerCovariance):
            for number, pair in enumerate(covariance.factors):
                tensors |= {f"left{number}": pair[0], f"right{number}": pair[1]}
        for name, value in tensors.items():
            self.register_buffer(name, value)
        self._covariance, self.linear = covariance, True

    def _gathered(self) -> Covariance:
        """The covariance that the buffers are of: loaded, copied or moved since it was measured."""
        scale, axes, ratio = map(self.get_buffer, _TENSORS)
        if self.structure != "kronecker":
            return Covariance(scale, axes, ratio)
        own = self.prior.covariance
        if isinstance(own, KroneckerCovariance):  # the same axes, and known to be
            return KroneckerCovariance(scale, ratio, own.factors)
        pairs = [
            (self.get_buffer(f"left{i}"), self.get_buffer(f"right{i}"))
            for i in range(len(self._shapes))
        ]
        return KroneckerCovariance(scale, ratio, tuple(pairs))

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        infer: Any = {"is_auxiliary": not self._joint, "sites": self._shapes}
        if self.measured:
            normal = LowRankNormal(self.loc, self.covariance, validate_args=False)
            values = self.unpack(pyro.sample(self.latent, normal, infer=infer))
        elif self._joint:
            point = dist.Delta(self.loc, event_dim=1)
            values = self.unpack(pyro.sample(self.latent, point, infer=infer))
        else:
            values = self.unpack(self.loc)
        return self._sites(values)

    def options(self) -> dict[str, Any]:
        return {"structure": self.structure}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """As every module's; a covariance comes with it if one has been measured."""
        if f"{prefix}ratio" in state_dict:
            for key, value in state_dict.items():
                if key.startswith(prefix) and (name := key.removeprefix(prefix)) != "loc":
                    self.register_buffer(name, value.to(self.loc).clone())
            self.linear = True
        super()._load_from_state_dict(state_dict, prefix, *args)
