"""Hugging Face in and out: adapters of the `peft` library, plain classifiers, and the hub.

Adapters and classifiers rest on `ClassifierHead`: the model runs as Hugging Face wrote it, and LoRA
weights and the last linear layer mean the same on both sides.
"""

from .hub import from_pretrained, push_to_hub, save_pretrained
from .reading import from_peft
from .writing import merge, to_peft

__all__ = ["from_peft", "from_pretrained", "merge", "push_to_hub", "save_pretrained", "to_peft"]
