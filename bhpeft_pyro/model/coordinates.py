"""Coordinates of the PEFT sites: those in which weights matter alike and are nearly independent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..peft.sites import Site, projection

__all__ = [
    "Coordinates",
    "between",
]


# Axes as matrices take layers * width^2 numbers a site; wider sites keep their own coordinates.
_WIDEST = 2048
# The least share of an axis in the prior variance, in units of the mean share.
_FLOOR = 1e-4
# The least sensitivity along a direction of the input, of the largest one, that counts as measured.
_TOLD = 1e-6
# A site that does next to nothing is not blown up beyond so many times its natural scale.
_MOST = 4.0
_SIDES = ("left", "right")


class Coordinates(nn.Module):
    """From a site's coordinates, which priors and guides see, to the weights of the transformer.

    The output side (LoRA's B, an adapter's up, a prefix's values) is W = left Z right', layer by
    layer. The axes are the eigenvectors of the two Kronecker factors of its Fisher information
    (Martens and Grosse 2015; George et al. 2018), so a posterior that is independent over Z, as
    mean-field guides are, is near the full one. Axes to which the predictions are sensitive get
    more of the prior variance: left's columns are weighted by their eigenvalues. The whole is
    scaled so that Z ~ N(0, unit^2) changes the predictions by one nat (the expected KL divergence,
    to first order), for each site and layer.

    The input side (LoRA's A, an adapter's down, a prefix's keys) is W = anchor + Z: a projection,
    and what varies around it. Around zero, every draw would be another projection, and the output
    side could learn nothing that survives the next draw. The anchor is random at first; `fit` takes
    the directions of the input along which predictions are most sensitive.

    Until fitted, Z is W on the output side; what a prefix encoder gives out, and gates, keep their
    coordinates. Points, and Laplace approximations around them, never fit them: they train the
    weights themselves, as is usual.

    Args:
        sites: the sites of the PEFT kinds, as weights.

    Attributes:
        sites: the same in these coordinates.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.register_buffer("fitted", torch.tensor(False))
        self.fitted: Tensor
        self.sites = tuple(map(_started, sites))
        self._inner = tuple(site for site in sites if site.anchor is not None)
        self._outer = tuple(
            site
            for site in sites
            if site.role == "output" and site.dims[1] == "out" and site.shape[1] <= _WIDEST
        )
        for site in self._inner:
            assert site.anchor is not None
            self.register_buffer(_key(site.name, "anchor"), site.anchor.clone())
        for site in self._outer:
            for side in _SIDES:  # matrices once they are fitted
                self.register_buffer(_key(site.name, side), torch.zeros(0, device=site.unit.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As every module's, which moves it; the sites come along."""
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
                weights[site.name] = between(left, values[site.name], right)
        return weights

    def anchor(self, name: str) -> Tensor | None:
        """Where an input side is at zero; None for other sites."""
        site = next((site for site in self._inner if site.name == name), None)
        return None if site is None else self._buffer(site, "anchor")

    def another(self, name: str) -> Tensor | None:
        """Where another random projection of an input side lies; None for other sites."""
        site = next((site for site in self._inner if site.name == name), None)
        if site is None or site.anchor is None:
            return None
        sds = site.anchor / projection(name, site.shape).to(site.anchor)
        anew = torch.randn(site.shape).to(sds) * sds
        return anew - self._buffer(site, "anchor")

    def fit_anchors(self, leading: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Set the anchors.

        Args:
            leading: for each inner site the largest eigenvalues of E[G' G], G its gradients,
                (layer, rank), and their eigenvectors, (layer, in, rank), in double precision.
        """
        for site in self._inner:
            if site.name not in self.inner:
                continue
            rank = min(site.shape[1:])
            strength, vectors = leading[site.name]
            # Of fewer texts than ranks some directions are mere rounding: they get the least.
            top = strength[:, -1:].clamp_min(1e-30)
            strength = torch.where(strength > _TOLD * top, strength, top)
            mix = torch.linalg.qr(projection(site.name, (*site.shape[:2], rank)).to(vectors))[0]
            # Whitened and mixed, so that every rank carries as much as any other.
            rows = mix @ (vectors / strength.sqrt().unsqueeze(-2)).mT
            anchor = self._buffer(site, "anchor")
            size = anchor.double().flatten(1).norm(dim=1) / rows.flatten(1).norm(dim=1)
            anchor.copy_(rows * size[:, None, None])

    def fit_axes(self, lefts: Mapping[str, Tensor], rights: Mapping[str, Tensor]) -> None:
        """Set the axes; the Fisher information is taken as `left x right / trace(right)`.

        Args:
            lefts: for each outer site E[G G'], (layer, out, out), of its gradients G.
            rights: E[G' G], (layer, r, r).
        """
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
        """As every module's; the axes may have been fitted or not."""
        for site in self._outer:
            for side in _SIDES:
                key = _key(site.name, side)
                if (value := state_dict.get(prefix + key)) is not None:
                    setattr(self, key, torch.zeros_like(value, device=site.unit.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _buffer(self, site: Site, what: str) -> Tensor:
        return self.get_buffer(_key(site.name, what))


def _started(site: Site) -> Site:
    """The site with the start that it has in its coordinates."""
    if site.anchor is not None:  # around which an input side starts at zero
        return replace(site, anchor=None, init=partial(torch.zeros_like, site.anchor))
    if site.dims == ("layer", "out", "position"):  # between anchored keys, positions differ at zero
        return replace(site, init=lambda: torch.zeros(site.shape, device=site.unit.device))
    return site


def _key(site: str, what: str) -> str:
    return f"{site}.{what}".replace(".", "/")


def between(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """left X right', layer by layer, of every X in (..., layer, a, b).

    As matmuls, these would copy the factors for every draw.
    """
    turned = torch.einsum("...lij,lbj->...lib", x, right)
    return torch.einsum("lai,...lib->...lab", left, turned)
