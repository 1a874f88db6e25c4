"""`bhpeft compare`."""

from __future__ import annotations

import json

import pytest
from program import NAMES, QUICK, bhpeft, error, read_csv, write_csv


def test_methods_are_compared_on_rows_that_none_has_learnt(folder, tmp_path):
    """And what is saved predicts as the table says; a second call fits nothing."""
    test = write_csv(tmp_path / "test.csv", text=["w5 w9", "w6 w9", "w6", "w7"], label=NAMES[:4])
    out = tmp_path / "compared"
    data = (folder / "train.csv", "--backbone", folder / "tiny", "--out", out, "--test", test)
    command = ("compare", *data, "--components", 2, *QUICK)
    result = bhpeft(*command)
    rows = {row["method"]: row for row in read_csv(out / "table.csv")}
    assert list(rows)[-1] == "posterior (2 components)" and "ensemble of 2, scaled" in result.stdout
    assert "fitting an ensemble of 2\n" in result.stderr
    scores = json.loads(bhpeft("evaluate", out / "posterior", test, "--json").stdout)
    assert float(rows["posterior (2 components)"]["nll"]) == pytest.approx(scores["nll"], abs=1e-6)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    again = bhpeft(*command, "--json")
    assert "fitting" not in again.stderr
    assert json.loads(again.stdout)["test_rows"] == 4
    assert "another choice of max_steps" in error(*command, "--max-steps", 3)
    assert "--test: got 0; expected rows" in error(*command, "--test", "0")


@pytest.mark.parametrize("name", ["data", "test", "validation"])
def test_no_file_that_is_read_is_replaced(name, folder, tmp_path):
    files = dict.fromkeys(("data", "test", "validation"), folder / "train.csv")
    files[name] = write_csv(tmp_path / "table.csv", text=["w5", "w6"], label=NAMES[:2])
    before = files[name].read_bytes()
    parts = ("--test", files["test"], "--validation", files["validation"])
    command = ("compare", files["data"], *parts, "--backbone", folder / "none", "--out", tmp_path)
    assert f"--out: {files[name]} is the data; expected another place" in error(*command)
    assert files[name].read_bytes() == before
