"""Copies: rows with the same text, which must not be both learnt and held out."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

if TYPE_CHECKING:
    from .examples import Examples


def plain(text: str) -> str:
    """The text without differences of case, white space and Unicode form.

    >>> plain("  Cafe\\u0301 at\\tNINE ") == plain("caf\\u00e9 at nine")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def hashes_of(rows: Iterable[Sequence[str]]) -> Tensor:
    """(R,) int64, a hash of all texts of each row, as `plain`: copies have the same one, also in
    other data sets.

    >>> first, second, third = hashes_of([("A b", "c"), ("a  B", "C"), ("a", "b c")]).tolist()
    >>> first == second, first == third
    (True, False)
    """
    joined = ("\n".join(map(plain, row)).encode(errors="surrogatepass") for row in rows)
    digests = b"".join(blake2b(each, digest_size=8).digest() for each in joined)
    return torch.from_numpy(np.frombuffer(digests, "<i8").astype(np.int64))


def apart(order: Tensor, hashes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows in random order in two parts without copies of each other, of which the second has
    `count` rows, or somewhat fewer where copies leave no other way.

    Args:
        order: (R,) the numbers of the rows, in random order.
        hashes: (R,) of rows 0, 1, ...

    >>> rest, held_out = apart(torch.tensor([3, 0, 1, 2, 4]), torch.tensor([7, 8, 9, 7, 6]), 3)
    >>> rest.tolist(), held_out.tolist()
    ([2, 4], [3, 0, 1])
    """
    _, groups, sizes = hashes[order].unique(return_inverse=True, return_counts=True)
    room, chosen, size = count, [], sizes.tolist()
    for group in dict.fromkeys(groups.tolist()):
        if size[group] <= room:
            chosen.append(group)
            room -= size[group]
        if not room:
            break
    held_out = torch.isin(groups, torch.tensor(chosen, dtype=groups.dtype))
    return order[~held_out], order[held_out]


def warn_of_copies(examples: Examples) -> None:
    """Say how many rows of data of which some are held out are copies."""
    if examples.copies:
        warnings.warn(
            f"{examples.copies} of {len(examples.row_hashes)} rows repeat another's text (case and "
            "spaces aside); such rows are held out together or not at all, and each still counts "
            "as an observation",
            stacklevel=2,
        )


def shared(data: Examples, others: Examples) -> int:
    """How many rows of `others` have the text of a row of `data`."""
    return int(torch.isin(others.row_hashes, data.row_hashes).sum())


def check_apart(data: Examples, held_out: Examples, name: str) -> None:
    """Refuse rows to test on or to choose by that are all copies of `data`; warn if some are."""
    rows, found = len(held_out.row_hashes), shared(data, held_out)
    if found == rows:
        raise DataError(
            f"{name}: each of the {rows} rows has the text of a row that is learnt (case and "
            "spaces aside); expected rows that are not learnt"
        )
    if found:
        warnings.warn(
            f"{name}: {found} of {rows} rows have the text of a row that is learnt (case and "
            "spaces aside), so scores on them are too good; leave them out",
            stacklevel=2,
        )
