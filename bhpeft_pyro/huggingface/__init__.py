"""Hugging Face in and out: adapters of the `peft` library, and plain classifiers.

All of it rests on `ClassifierHead`: the model runs as Hugging Face wrote it, and LoRA weights and
the last linear layer mean the same on both sides.
"""

from .reading import from_peft
from .writing import merge, to_peft

__all__ = ["from_peft", "merge", "to_peft"]
