"""Names that functions and the program's options share.

What they stand for is slow to import; this module is not.
"""

from typing import Literal

Task = Literal["classes", "labels", "words", "ratings", "choices"]
"""What a table may be used for."""

Preset = Literal["adapter", "bh_peft", "head_only", "lora", "mam", "prefix", "unipelt"]
"""Functions of `peft.presets`."""

Family = Literal["laplace", "normal"]
"""Guides whose posterior can be the prior of a next round."""

GuideName = Literal["laplace", "normal", "delta", "down only", "A only"]
"""These, the point estimate, and presets that keep some weights at a point."""

Period = Literal["day", "week", "month", "quarter", "year"]
"""How long a batch of a stream may be."""
