"""Principal axes of the features: coordinates in which a mean-field head is nearly exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import DataError

__all__ = ["PrincipalAxes", "check_features"]

# The least variance of an axis, as a share of the mean: directions that no training text takes up
# keep a little prior, so a new kind of text can still move the outputs, and widen them.
_FLOOR = 0.01


def check_features(features: Tensor) -> Tensor:
    """The features, if they are numbers.

    Raises:
        DataError: they are not.
    """
    if not features.isfinite().all():
        raise DataError(
            "the backbone's features are not finite for some of these texts: its weights are "
            "damaged, or its dtype overflows; load it with dtype=torch.float32 or torch.bfloat16"
        )
    return features


class PrincipalAxes(nn.Module):
    """Centres features, turns them to their principal axes and weights each axis by its sd.

    The axes come from the frozen transformer's features of the first round's texts (no
    labels), and stay. In these coordinates

    * features are uncorrelated, so a head's exact posterior is nearly independent over its weights
      and a mean-field guide loses next to nothing;
    * one prior scale for all weights says that the leading axes of the pretrained features
      matter most: the prior variance of a function along an axis goes with its squared variance.

    The mean square of a coordinate is 1, as before. Until `fit` it is the identity.

    Args:
        width: D.

    >>> axes = PrincipalAxes(2)
    >>> axes.fit(torch.tensor([[2.0, 1.0], [-2.0, 1.0], [0.0, 2.0], [0.0, 0.0]]))
    >>> axes(torch.tensor([[2.0, 1.0]])).abs().amax().item() > 1.9
    True
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))
        self.register_buffer("fitted", torch.tensor(False))
        self.center: Tensor
        self.matrix: Tensor
        self.fitted: Tensor

    def fit(self, features: Tensor) -> None:
        """Take the axes from (N, D) features.

        Raises:
            DataError: fewer than two rows, or all alike.
        """
        if len(features) < 2:
            raise DataError(f"principal axes need two or more texts, got {len(features)}")
        centred = (features - features.mean(0)).double()
        variance, vectors = torch.linalg.eigh(centred.mT @ centred / len(features))
        variance = variance.clamp_min(0)
        if not variance.sum() > 0:
            raise DataError("principal axes: all texts have the same features")
        weights = (variance + _FLOOR * variance.mean()).sqrt()
        matrix = vectors * weights
        size = (centred @ matrix).square().mean().sqrt()
        self.center.copy_(features.mean(0))
        self.matrix.copy_(matrix / size)
        self.fitted.fill_(True)

    @property
    def sds(self) -> Tensor:
        """(D,) sd of each coordinate over the texts that the axes are of, in ascending order."""
        # A column of `matrix` has the squared length c (variance + _FLOOR * mean variance), where
        # c is such that the mean square of a coordinate is 1.
        length = self.matrix.double().square().sum(0)
        variance = length - _FLOOR / (1 + _FLOOR) * length.mean()
        square = (variance * length).clamp_min(0)
        return (square / square.mean()).sqrt().float()

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        with torch.autocast(features.device.type, enabled=False):
            return (features - self.center) @ self.matrix
