"""LoRA, adapter and prefix weights in a frozen transformer. There is no Pyro in here."""

from . import presets
from .architectures import Architecture, Part, register_architecture
from .attachment import Attachment
from .kinds import Adapter, Kind, LoRA, Prefix
from .sites import Site, Sites

__all__ = [
    "Adapter",
    "Architecture",
    "Attachment",
    "Kind",
    "LoRA",
    "Part",
    "Prefix",
    "Site",
    "Sites",
    "presets",
    "register_architecture",
]
