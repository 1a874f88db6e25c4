"""Files are written whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from bhpeft_pyro.base.files import write, writing


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write(path, b"old")
    with pytest.raises(KeyError), writing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    (tmp_path / ".rows.csv.new").write_bytes(b"of one that was killed")
    (tmp_path / ".rows.csv.lock").touch()
    write(path, b"new")
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]
