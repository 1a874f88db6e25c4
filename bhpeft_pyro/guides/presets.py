"""Ready choices of what is random and what is a point.

>>> down_only(["lora.query.A", "lora.query.B", "head.bias"])
{'*.A': 'normal', '*': 'delta'}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..errors import GuideError
from ..patterns import first_match
from .blocks import Family

__all__ = ["PRESETS", "a_only", "down_only"]


def down_only(names: Sequence[str], width: float | None = None) -> dict[str, Family]:
    """Normal down-projections (LoRA A, adapter, prefix encoder), as the code of the paper has it
    (arXiv 2508.02711).

    Points: up-projections, the embedding of the prefix, a prefix without encoder, and the head.

    Args:
        names: of the model's latents.
        width: of the points, as priors of a next round (`DeltaGuide`).

    Raises:
        GuideError: there is no down-projection.
    """
    return _random("down only", ("*.A", "*.down"), names, width)


def a_only(names: Sequence[str], width: float | None = None) -> dict[str, Family]:
    """Normal LoRA A, all else a point, as in BLoB (Wang et al. 2024).

    Args:
        names, width: as for `down_only`.

    Raises:
        GuideError: there is no LoRA.
    """
    return _random("A only", ("lora.*.A",), names, width)


PRESETS: dict[str, Callable[..., dict[str, Family]]] = {"down only": down_only, "A only": a_only}
"""Ready mappings for `autoguide`, by name."""


def _random(
    preset: str, stems: Iterable[str], names: Sequence[str], width: float | None
) -> dict[str, Family]:
    # Latents that the prior has in place of a site, or for its scale, have names that go on.
    patterns = [pattern for stem in stems for pattern in (stem, f"{stem}.*")]
    found = [p for p in patterns if any(first_match(name, [p]) for name in names)]
    if not found:
        raise GuideError(
            f"guide: {preset!r} has nothing to be random, no site is named like "
            f"{' or '.join(stems)}; sites: {', '.join(names)}"
        )
    points: Family = "delta" if width is None else ("delta", {"width": width})
    families: dict[str, Family] = dict.fromkeys(found, "normal")
    if any(first_match(name, found) is None for name in names):
        families["*"] = points
    return families
