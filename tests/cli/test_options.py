"""Options: shares and files of options."""

from __future__ import annotations

import json
import re

import pytest
from program import bhpeft, error, loaded
from typer import BadParameter

from bhpeft_pyro.base.fit_options import FitOptions
from bhpeft_pyro.cli.options import share, share_or_file


@pytest.mark.parametrize("read", [share, share_or_file])
def test_shares(read):
    assert read("10%") == read("0.1") == read("1e-1") == pytest.approx(0.1)
    for text in ("10", "-1%", "nan", "101%"):
        with pytest.raises(BadParameter, match="is not a share"):
            read(text)


def test_a_text_that_is_no_number_may_be_a_file():
    assert share_or_file("owner/data") == "owner/data"
    with pytest.raises(BadParameter, match="'owner/data' is not a share"):
        share("owner/data")


def test_options_on_the_command_line_win_over_the_file(folder, tmp_path):
    config = tmp_path / "fit.yaml"
    config.write_text(
        f"data: {folder / 'train.csv'}\nbackbone: {folder / 'tiny'}\nmax_steps: 2\nbatch-size: 8\n"
        "preset: head_only\nvalidation: 0\ncomponents: 1\nbf16: yes\nseed: 5\npatience:\n"
        "device: cpu\n"
    )
    bhpeft("fit", "--config", config, "--out", tmp_path / "run", "--max-steps", 3, "--no-bf16")
    fitted = loaded(tmp_path / "run", folder)
    assert fitted.model.network.kinds == ()
    assert fitted.report.options == FitOptions(max_steps=3, batch_size=8, seed=5, bf16=False)
    bhpeft("fit", "--config", config, "--out", tmp_path / "bf16", "--max-steps", 1)
    assert loaded(tmp_path / "bf16", folder).report.options.bf16
    config.write_text("samples: 8\nseed: 3\njson: true\n")
    result = bhpeft("evaluate", folder / "run", folder / "train.csv", "--config", config)
    options = ("--samples", 8, "--seed", 3, "--json")
    expected = bhpeft("evaluate", folder / "run", folder / "train.csv", *options)
    assert json.loads(result.stdout) == json.loads(expected.stdout)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch: 3", "'epoch': expected an option of 'fit'.* there are also .*epochs"),
        ("config: other.yaml", "'config': expected an option of 'fit'"),
        ("- 1", "no `option: value` lines"),
        ("a: [", "cannot be read as YAML: while parsing"),
        ("epochs", "no `option: value` lines"),
        ("epochs: {}", "'epochs': expected .* with a single value"),
        ("? [a]\n: b", "no `option: value` lines"),
        ("max-steps: 2\nmax_steps: 3", "'max-steps': expected an option of 'fit', once"),
    ],
)
def test_a_bad_config_file_is_an_error(tmp_path, content, message):
    config = tmp_path / "fit.yaml"
    config.write_text(content)
    assert re.search(message, error("fit", "owner/data", "--out", tmp_path, "--config", config))
    config.write_text("epochs: 2.5")  # values are read as on the command line
    result = bhpeft("fit", "owner/data", "--out", tmp_path / "run", "--config", config, code=2)
    assert "'--epochs': Input should be a valid integer" in result.stderr
