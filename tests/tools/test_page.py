"""The numbers of README and of the page of results are those of the stored files."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tools.experiments import page

ROOT = Path(__file__).parents[2]
TABLES = (page.RESULTS / "tables.md").read_text()
DECIMAL = re.compile(r"\d+\.\d+")


def test_tables_are_what_the_stored_files_say() -> None:
    """Else `python -m tools.experiments page` was not run. The last digit may differ by 1, since
    temperatures are fitted in floating point."""
    made = page.text()
    assert DECIMAL.sub("#", made) == DECIMAL.sub("#", TABLES)
    pairs = zip(DECIMAL.findall(made), DECIMAL.findall(TABLES), strict=True)
    assert [pair for pair in pairs if abs(float(pair[0]) - float(pair[1])) > 0.0011] == []


def test_figures_are_drawn_from_the_stored_files() -> None:
    drawn = page.figures()
    for path, figure in drawn.items():
        assert figure.axes and (page.RESULTS / path).exists()
        plt.close(figure)
    assert {*drawn} == {str(path.relative_to(page.RESULTS)) for path in page.RESULTS.rglob("*.png")}


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_pages_state_only_numbers_that_the_tables_have(name: str) -> None:
    """Every number of three decimals, with its standard error and its minus sign if it has them."""
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    stated = re.findall(r"(?<![\w.])-?\d+\.\d{3}\b(?: ± \d+\.\d{3})?", " ".join(text.split()))
    assert len(stated) > 10
    assert [number for number in stated if number not in TABLES] == []


def _lines(text: str, title: str) -> dict[str, dict[str, str]]:
    """The cells of the first table under a heading, by its first column and then by the others."""
    section = text[text.index(f"\n## {title}\n") :]
    section = section[section.index("\n|") + 1 :].split("\n\n")[0]
    names, _, *rows = (line.strip("|").split("|") for line in section.splitlines())
    cells = [dict(zip(map(str.strip, names), map(str.strip, row), strict=True)) for row in rows]
    return {line[names[0].strip()]: line for line in cells}


def test_novelty_is_told_as_it_was_measured() -> None:
    """The AUROC and the share that is flagged, in whole percents, of each kind."""
    told = _lines((ROOT / "docs/decisions.md").read_text(), "Unlike what was learnt")
    auroc, flagged = (
        _lines(TABLES, f"Texts of other kinds, {what}")
        for what in (
            "AUROC of their novelty",
            "share flagged where 5 % of false alarms are allowed",
        )
    )
    assert told.keys() == auroc.keys() == flagged.keys()
    for learnt, line in told.items():
        alarms = float(line.pop("false alarms").rstrip("%"))
        assert alarms / 100 == pytest.approx(_mean(flagged[learnt]["false alarms"]))
        cells = {name: cell for name, cell in line.items() if cell and name != "learnt"}
        assert cells.keys() == {name for name, cell in auroc[learnt].items() if "±" in cell}
        for name, cell in cells.items():
            score, share = cell.rstrip("%)").split(" (")
            assert score == auroc[learnt][name].split()[0], (learnt, name)
            assert abs(float(share) / 100 - _mean(flagged[learnt][name])) < 0.0051, (learnt, name)


def _mean(cell: str) -> float:
    return float(cell.split()[0])


def test_the_circle_is_told_as_it_was_measured() -> None:
    """Each number of the table of the page, rounded to as many decimals as it is told with."""
    told = _lines((ROOT / "docs/decisions.md").read_text(), "The whole circle")
    measured = _lines(TABLES, "Weekly news: the whole circle")
    assert told.keys() == measured.keys()
    for arm, line in told.items():
        for name, cell in line.items():
            if name != "arm" and cell:
                decimals = len(cell.partition(".")[2])
                assert cell == f"{float(measured[arm][name].split()[0]):.{decimals}f}", (arm, name)
