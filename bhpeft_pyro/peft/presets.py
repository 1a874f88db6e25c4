"""Named combinations of PEFT kinds.

>>> [kind.name for kind in mam()]
['adapter', 'prefix']
"""

from __future__ import annotations

from .kinds import Adapter, Kind, LoRA, Prefix

__all__ = ["adapter", "bh_peft", "head_only", "lora", "mam", "prefix", "unipelt"]


def bh_peft() -> tuple[Kind, ...]:
    """LoRA, adapter and prefix together: the hybrid of BH-PEFT.

    The adapter keeps the scale 4 of He et al. (2022) and of the paper, so that published prior
    scales mean the same here. Ten prefix positions: LoRA already moves queries and values.
    """
    return LoRA(("query", "value"), rank=8, alpha=16.0), Adapter(size=8, scale=4.0), Prefix(10)


def mam() -> tuple[Kind, ...]:
    """Mix-and-match adapter (He et al. 2022): an adapter and a short prefix, no LoRA.

    Thirty positions are the prefix of that paper's own mix: attention needs few parameters, so most
    of them belong beside the feed-forward block.
    """
    return Adapter(size=8, scale=4.0), Prefix(30)


def unipelt() -> tuple[Kind, ...]:
    """UniPELT (Mao et al. 2022): all three, gated, with its sequential adapter of width 48."""
    return (
        LoRA(("query", "value"), rank=8, alpha=16.0, gated=True),
        Adapter(size=48, scale=1.0, placement="sequential", gated=True),
        Prefix(10, gated=True),
    )


def lora(rank: int = 8, alpha: float = 16.0) -> tuple[Kind, ...]:
    """LoRA on queries and values alone."""
    return (LoRA(rank=rank, alpha=alpha),)


def adapter(size: int = 8, scale: float = 4.0) -> tuple[Kind, ...]:
    """The scaled parallel adapter alone."""
    return (Adapter(size=size, scale=scale),)


def prefix(length: int = 30) -> tuple[Kind, ...]:
    """A prefix alone."""
    return (Prefix(length),)


def head_only() -> tuple[Kind, ...]:
    """No PEFT: only the head is random."""
    return ()
