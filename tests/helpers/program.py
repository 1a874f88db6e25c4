"""Running the program `bhpeft` in this process, and files for it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

import bhpeft_pyro as bh
from bhpeft_pyro.cli.app import app
from bhpeft_pyro.model.backbone import load_backbone

QUICK = ("--max-steps", "4", "--batch-size", "8", "--device", "cpu")
ONE = (*QUICK, "--components", "1")
FIFTH = ("--validation", "20%")
TEXTS = [f"w{5 + i % 2} w{10 + i} w{40 - i}" for i in range(20)]
NAMES = ["good" if i % 2 else "bad" for i in range(20)]
UNLABELLED = [f"w{5 + i % 9} w{10 + i % 30} w{40 - i % 25}" for i in range(60)]


def bhpeft(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def error(*arguments: object, code: int = 2) -> str:
    """The one line of an error, with nothing on stdout."""
    result = bhpeft(*arguments, code=code)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output and result.stdout == ""
    return lines[0]


def usage_error(*arguments: object) -> str:
    """What is said about a value that an option does not take, without the frame around it."""
    result = bhpeft(*arguments, code=2)
    assert "Usage: bhpeft" in result.stderr and result.stdout == ""
    return " ".join(result.stderr.replace("│", " ").split())


def write_csv(path: Path, **columns: Any) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def loaded(run: Path, folder: Path) -> bh.Posterior:
    """A posterior on the backbone `tiny` of a folder."""
    backbone, _ = load_backbone(str(folder / "tiny"), "cpu")
    return bh.Posterior.load(run, backbone)


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]
