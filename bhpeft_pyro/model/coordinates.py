"""Coordinates in which weights matter equally and are nearly independent, for PEFT and head.

`Coordinates` changes variables between the sites and the PEFT weights, `PrincipalAxes` between the
transformer's features and what the head reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..peft.sites import Site, projection

# The least variance of an axis of the features, as a share of the mean: directions that no training
# text takes keep a little prior, so a new kind of text can still move the outputs and widen them.
_LEAST = 0.01
# Less variance of the features than this share of their mean square is a rounding error.
_ALIKE = 1e-6
# The least share of an axis in the prior variance, in units of the mean share.
_FLOOR = 1e-4
# Less sensitivity along a direction of the input, as a share of the largest, is a rounding error.
_ROUNDING = 1e-6
# A site with next to no effect is not enlarged beyond this multiple of its natural scale.
_MOST = 4.0
_SIDES = ("left", "right")


class Coordinates(nn.Module):
    """From a site's coordinates Z, in which priors and guides see its weights, to the weights W.

    The output side (LoRA's B, an adapter's up, a prefix's values) is W = left Z right', layer by
    layer. The axes are the eigenvectors of the two Kronecker factors of its Fisher information
    (Martens and Grosse 2015; George et al. 2018), so a posterior that is independent over Z, as in
    mean-field guides, is near the full one. Axes to which the predictions are sensitive get more of
    the prior variance: left's columns are weighted by their eigenvalues. The scale is such that
    Z ~ N(0, unit^2) changes the predictions by one nat (the expected KL divergence, to first
    order), for each site and layer.

    The input side (LoRA's A, an adapter's down, a prefix's keys) is W = anchor + Z: a projection,
    and what varies around it (see `Site.anchor`). The anchor is random at first; `fit_anchors`
    takes the directions of the input to which predictions are most sensitive.

    Until `fit_axes`, Z is W on the output side. Gates always keep their coordinates, and so do
    sites wider than 2,048. Points, and Laplace approximations around
    them, fit neither: they train the weights themselves.

    Args:
        sites: the sites of the PEFT kinds, as weights.

    Attributes:
        sites: the same in these coordinates.
        fitted: whether the axes are set.
        widest: the largest width of a site with axes, which take layers * width^2 numbers.
        wide: names of the output sides that are wider.
    """

    widest = 2048

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.register_buffer("fitted", torch.tensor(False))
        self.fitted: Tensor
        self.sites = tuple(replace(site, anchor=None) for site in sites)  # the anchor is at Z = 0
        self._inner = tuple(site for site in sites if site.anchor is not None)
        outer = [site for site in sites if site.role == "output" and site.dims[1:-1] == ("out",)]
        self._outer = tuple(site for site in outer if site.shape[1] <= self.widest)
        self.wide = tuple(site.name for site in outer if site.shape[1] > self.widest)
        for site in self._inner:
            assert site.anchor is not None
            self.register_buffer(_key(site.name, "anchor"), site.anchor.clone())
        for site in self._outer:
            for side in _SIDES:  # matrices once they are fitted
                self.register_buffer(_key(site.name, side), site.unit.new_zeros(0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the module, as PyTorch does, with its sites."""
        super()._apply(fn, recurse)
        self.sites, self._inner, self._outer = (
            tuple(site.to(self.fitted.device) for site in sites)
            for sites in (self.sites, self._inner, self._outer)
        )
        return self

    @property
    def inner(self) -> tuple[str, ...]:
        """Names of the sites whose anchor `fit_anchors` sets."""
        return tuple(site.name for site in self._inner if site.dims[0] == "layer")

    @property
    def outer(self) -> tuple[str, ...]:
        """Names of the sites that `fit_axes` gives axes."""
        return tuple(site.name for site in self._outer)

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights (S, *site.shape) from coordinates of the same shape."""
        weights = dict(values)
        for site in self._inner:
            weights[site.name] = self._buffer(site, "anchor") + values[site.name]
        if self.fitted:
            for site in self._outer:
                left, right = self._buffer(site, "left"), self._buffer(site, "right")
                # As matmuls, these would copy the factors for every draw.
                turned = torch.einsum("...lij,lbj->...lib", values[site.name], right)
                weights[site.name] = torch.einsum("lai,...lib->...lab", left, turned)
        return weights

    def anchor(self, name: str) -> Tensor | None:
        """The weights of an input side at Z = 0; None for other sites."""
        return next((self._buffer(s, "anchor") for s in self._inner if s.name == name), None)

    def another(self, name: str) -> Tensor | None:
        """The Z of another random projection of an input side; None for other sites."""
        site = next((site for site in self._inner if site.name == name), None)
        if site is None or site.anchor is None:
            return None
        sds = site.anchor / projection(name, site.shape).to(site.anchor)
        return torch.randn(site.shape, dtype=torch.float32).to(sds) * sds - self._buffer(
            site, "anchor"
        )

    def fit_anchors(self, leading: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Set the anchors from the largest eigenvalues of E[G' G] of each inner site, G its
        gradients, (layer, rank), and their eigenvectors, (layer, in, rank)."""
        for site in self._inner:
            if site.name not in self.inner:
                continue
            rank = min(site.shape[1:])
            strength, vectors = leading[site.name]
            # With fewer texts than ranks some directions are rounding errors: they get the least.
            top = strength[:, -1:].clamp_min(1e-30)
            strength = torch.where(strength > _ROUNDING * top, strength, top)
            mix = torch.linalg.qr(projection(site.name, (*site.shape[:2], rank)).to(vectors))[0]
            # Whitened and mixed, so that every rank carries as much as any other.
            rows = mix @ (vectors / strength.sqrt().unsqueeze(-2)).mT
            anchor = self._buffer(site, "anchor")
            size = anchor.double().flatten(1).norm(dim=1) / rows.flatten(1).norm(dim=1)
            anchor.copy_(rows * size[:, None, None])

    def fit_axes(self, lefts: Mapping[str, Tensor], rights: Mapping[str, Tensor]) -> None:
        """Set the axes from E[G G'], (layer, out, out), and E[G' G], (layer, r, r), with G the
        gradients of each outer site. The Fisher information is taken as
        `left x right / trace(right)`."""
        for site in self._outer:
            strength, vectors = torch.linalg.eigh(lefts[site.name].double())
            share = strength.clamp_min(0).square()
            share = share / share.mean(-1, keepdim=True).clamp_min(1e-30) + _FLOOR
            # At Z ~ N(0, unit^2): half the trace of Fisher information times covariance.
            unit = site.unit.double().flatten(1)[:, :1]
            nats = 0.5 * (strength.clamp_min(0) * share).sum(-1, keepdim=True) * unit.square()
            size = nats.clamp_min(1e-30).rsqrt().clamp_max(_MOST)
            left = vectors * (share.sqrt() * size).unsqueeze(-2)
            right = torch.linalg.eigh(rights[site.name].double())[1]
            for side, matrices in zip(_SIDES, (left, right), strict=True):
                setattr(self, _key(site.name, side), matrices.to(site.unit).contiguous())
        self.fitted.fill_(True)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load as PyTorch does; the axes to load may be fitted or not."""
        for site in self._outer:
            for side, size in zip(_SIDES, site.shape[1:], strict=True):
                key = _key(site.name, side)
                value = state_dict.get(prefix + key)
                if value is not None and value.shape in ((0,), (site.shape[0], size, size)):
                    setattr(self, key, torch.zeros_like(value, device=site.unit.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _buffer(self, site: Site, what: str) -> Tensor:
        return self.get_buffer(_key(site.name, what))


def _key(site: str, what: str) -> str:
    return f"{site}.{what}".replace(".", "/")


class PrincipalAxes(nn.Module):
    """Centres features, turns them to their principal axes and weights each axis by its sd.

    The axes come from the frozen transformer's features of the first round's texts (no labels), and
    stay. In these coordinates features are uncorrelated, so a head's exact posterior is nearly
    independent over its weights and a mean-field guide loses next to nothing. And one prior scale
    for all weights says that the leading axes of the pretrained features matter most: the prior
    variance of a function along an axis is proportional to its squared variance. The mean square of
    a coordinate stays 1. Until `fit` it is the identity.

    Args:
        width: D.

    >>> axes = PrincipalAxes(2)
    >>> axes.fit(torch.tensor([[2.0, 1.0], [-2.0, 1.0], [0.0, 2.0], [0.0, 0.0]]))
    >>> axes(torch.tensor([[2.0, 1.0]])).abs().amax().item() > 1.9
    True
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(width, dtype=torch.float32))
        self.register_buffer("matrix", torch.eye(width, dtype=torch.float32))
        self.register_buffer("fitted", torch.tensor(False))
        self.center: Tensor
        self.matrix: Tensor
        self.fitted: Tensor

    def fit(self, features: Tensor) -> None:
        """Take the axes from (N, D) features.

        Raises:
            DataError: fewer than two rows, or all alike but for rounding errors.
        """
        if len(features) < 2:
            raise DataError(f"principal axes need two or more texts, got {len(features)}")
        centred = (features - features.mean(0)).double()
        variance, vectors = torch.linalg.eigh(centred.mT @ centred / len(features))
        variance = variance.clamp_min(0)
        if not variance.mean() > _ALIKE * features.double().square().mean():
            raise DataError(
                f"principal axes: all {len(features)} texts have the same features, which say "
                "nothing about others; expected texts that differ"
            )
        weights = (variance + _LEAST * variance.mean()).sqrt()
        matrix = vectors * weights
        size = (centred @ matrix).square().mean().sqrt()
        self.center.copy_(features.mean(0))
        self.matrix.copy_(matrix / size)
        self.fitted.fill_(True)

    @property
    def sds(self) -> Tensor:
        """(D,) sd of each coordinate over the texts of `fit`, in ascending order."""
        # A column of `matrix` has the squared length c (variance + _LEAST * mean variance), where
        # c makes the mean square of a coordinate 1.
        length = self.matrix.double().square().sum(0)
        variance = length - _LEAST / (1 + _LEAST) * length.mean()
        square = (variance * length).clamp_min(0)
        return (square / square.mean()).sqrt().float()

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        with torch.autocast(features.device.type, enabled=False):
            return (features - self.center) @ self.matrix
