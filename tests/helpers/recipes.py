"""The priors of docs/own-model.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.priors import FunctionSpaceNormal

PAGE = (Path(__file__).parents[2] / "docs" / "own-model.md").read_text()
RECIPES = ("ard", "horseshoe", "gates")


def recipe(name: str, ready: FunctionSpaceNormal) -> Callable[[Sequence[Site]], dict[str, Tensor]]:
    """A prior of docs/own-model.md, over the sds of a ready one."""
    (code,) = re.findall(rf"^def {name}\(sites.*?(?=\n\n\n)", PAGE, re.MULTILINE | re.DOTALL)
    namespace = {"torch": torch, "pyro": pyro, "dist": dist, "ready": ready}
    exec(code, namespace)
    made: Any = namespace[name]
    return made
