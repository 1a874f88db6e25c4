"""Cells of CSV files, which people open in spreadsheets.

A spreadsheet takes a text that begins with "=", "+", "-" or "@" for a formula, which may run a
program or send other cells elsewhere. OWASP's advice is an apostrophe before it. Reading takes it
away again, so that a file that was written comes back as it was.
"""

from __future__ import annotations

import re

_FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")


def safe(value: object) -> object:
    """What to write for a cell: of a formula the text; numbers stay as they are.

    >>> safe("=1+1"), safe("-1.5"), safe("'tis"), safe("'=1")
    ("'=1+1", '-1.5', "'tis", "''=1")
    """
    if isinstance(value, str) and _FORMULA.match(value) and not _is_number(value):
        return f"'{value}"
    return value


def meant(cell: str) -> str:
    """What was meant by a cell that `safe` has made.

    >>> meant("'=1+1"), meant("-1.5"), meant("'tis")
    ('=1+1', '-1.5', "'tis")
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
