"""Which data are the same: copies, rows with the same text, which must not be both learnt and held
out; classes whose names look alike; and the fingerprint of a data set."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..base.checks import few, shown, warn
from ..errors import BHPEFTWarning, DataError

if TYPE_CHECKING:
    from .examples import Examples

BY_CHANCE = 0.1  # share of rows; a few short texts, such as "ok", come again by chance
_SHOWN = 3  # classes in a warning
_MANY = 10  # labels: of fewer, any class may have but one


class LabelWarning(BHPEFTWarning):
    """Labels may be a mistake: a class occurs once or looks like another one, a text has different
    labels, or the labels of a round contradict the posterior or are all new.

    An error instead: `warnings.simplefilter("error", bh.data.LabelWarning)`.
    """


def plain(text: str) -> str:
    """The text without differences of case, white space and Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def hashes_of(rows: Iterable[Sequence[str]]) -> Tensor:
    """(R,) int64, a hash of all texts of each row, as `plain`: copies have the same one, also in
    other data sets."""
    joined = ("\n".join(map(plain, row)).encode(errors="surrogatepass") for row in rows)
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in joined)
    return torch.from_numpy(np.frombuffer(digests, "<i8").astype(np.int64))


def keys_of(hashes: Tensor, choices: Sequence[object] = ()) -> list[str]:
    """A name of each row's text, by which copies are one. Of a question it is also that of its
    choices as they are, in this order, as an answer may be a position or a name."""
    keys = [f"{value % 2**64:016x}" for value in hashes.tolist()]
    if not choices:
        return keys
    orders = (hashlib.sha256(json.dumps(cell).encode()).hexdigest()[:16] for cell in choices)
    return [f"{key}-{order}" for key, order in zip(keys, orders, strict=True)]


def among(hashes: Tensor, *known: Tensor | None) -> Tensor:
    """(R,) bool, which hashes are among those that are known; none if it is not known which."""
    there = [some for some in known if some is not None]
    return torch.isin(hashes, torch.cat([hashes[:0], *there]))


def apart(order: Tensor, hashes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows in random order in two parts without copies of each other, of which the second has
    `count` rows, or somewhat fewer where copies leave no other way.

    Args:
        order: (R,) the numbers of the rows, in random order.
        hashes: (R,) of rows 0, 1, ...
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
        warn(
            f"{examples.copies} of {len(examples)} rows repeat another's text (case and "
            "spaces aside); such rows are held out together or not at all, and each still counts "
            "as an observation"
        )


def warn_of_contradictions(*parts: Examples | None) -> None:
    """Say how many texts come with different labels, and show one. Ratings of a text may differ."""
    labels: dict[int, set[str]] = defaultdict(set)
    texts: dict[int, str] = {}
    for part in parts:
        if part is None or part.labels is None or part.kind == "rating" or not part.copies:
            continue
        keys = part.hashes.tolist()
        for key, label in zip(keys, part.labels.tolist(), strict=True):
            labels[key].add(str(label))
        texts |= dict(zip(keys, part.texts, strict=True))
    if several := [key for key, of_text in labels.items() if len(of_text) > 1]:
        count = f"{len(several)} text{'s come' if len(several) > 1 else ' comes'}"
        warn(
            LabelWarning(
                f"data: {count} with different labels (case and spaces aside), such as "
                f"{shown(texts[several[0]])}; mend the labels, or leave these rows out"
            )
        )


def called(name: str, others: Iterable[str]) -> str:
    """A class as a message shows it, with the other one that is written most like it, if any is."""
    written = {plain(other): other for other in others}
    near = get_close_matches(plain(name), written, n=1, cutoff=0.8)
    return f"{name!r} (may mean {written[near[0]]!r})" if near else repr(name)


def warn_of_classes(column: str, labels: Sequence[str]) -> None:
    """Warn of classes that may be mistakes, by the labels of all rows."""
    warn_of_look_alikes(column, sorted({*labels}))
    warn_of_single_rows(column, labels)


def warn_of_look_alikes(column: str, new: Iterable[str], old: Iterable[str] = ()) -> None:
    """Warn of new classes that differ from others in case or spaces alone."""
    first, pairs = {plain(name): name for name in old}, []
    for name in new:
        if (other := first.setdefault(plain(name), name)) != name:
            pairs.append(f"{other!r} and {name!r} are two classes")
    if pairs:
        warn(LabelWarning(f"column {column!r}: {few(pairs, _SHOWN, '; ', '; and {} more pairs')}"))


def warn_of_single_rows(column: str, labels: Sequence[str], old: Sequence[str] = ()) -> None:
    """Warn of new classes that have one row, unless there are few rows."""
    if len(labels) < _MANY:
        return
    rows: Counter[str] = Counter()  # look-alikes count together: they have a warning of their own
    for name, count in Counter(labels).items():
        rows[plain(name)] += count
    new = sorted({*labels} - {*old})
    single = [name for name in new if rows[plain(name)] == 1]
    if single:
        others = [*old, *(name for name in new if name not in single)]
        once = [f"{called(name, others)} occurs once" for name in single]
        warn(LabelWarning(f"column {column!r}: {few(once, _SHOWN, '; ', '; and {} more do')}"))


def shared(data: Examples, others: Examples) -> int:
    """How many rows of `others` have the text of a row of `data`."""
    return int(torch.isin(others.hashes, data.hashes).sum())


def new_among(examples: Examples, learnt: Tensor | None) -> Tensor:
    """(M,) the numbers of the examples whose texts are new, by the hashes `learnt` of the rows that
    were learnt or held out (None: not known). Warns of the others, whose scores are too good."""
    known = among(examples.hashes, learnt)
    if known.any():
        warn(
            f"data: {int(known.sum())} of {len(known)} rows were learnt or held out "
            "(by their texts, case and spaces aside), so scores on them are too good"
        )
    return (~known).nonzero().flatten()


def check_apart(data: Examples, held_out: Examples, name: str) -> None:
    """Refuse rows to test on or to choose by that are all copies of `data`; warn if some are."""
    rows, copies = len(held_out), shared(data, held_out)
    if copies == rows:
        raise DataError(
            f"{name}: each of the {rows} rows has the text of a row that is learnt (case and "
            "spaces aside); expected rows that are not learnt"
        )
    if copies:
        warn(
            f"{name}: {copies} of {rows} rows have the text of a row that is learnt (case and "
            "spaces aside), so scores on them are too good; leave them out"
        )


def fingerprint_of(data: Examples) -> str:
    """SHA-256 over token ids and labels, the same for the same examples in any order."""
    tokens, single = data.tokens, torch.ones(len(data), dtype=torch.long)
    sequences = torch.ones_like(tokens.lengths) if data.counts is None else data.counts
    ends = tokens.lengths.cumsum(0)[sequences.cumsum(0) - 1]  # of each example's tokens
    spans = ends.diff(prepend=ends.new_zeros(1))
    parts: dict[str, Iterable[bytes]] = {
        "lengths": _pieces(tokens.lengths, sequences),
        "ids": _pieces(tokens.ids, spans),
    }
    if tokens.types is not None:
        parts["types"] = _pieces(tokens.types, spans)
    if data.labels is not None:
        parts["labels"] = _pieces(data.labels, single)
    parts |= {f"extra {name}": _pieces(values, single) for name, values in data.extra.items()}
    examples = map(b"".join, zip(*parts.values(), strict=True))
    digests = sorted(hashlib.sha256(example).digest() for example in examples)
    what = f"{data.kind} {' '.join(parts)}"
    return hashlib.sha256(what.encode() + b"".join(digests)).hexdigest()


def _pieces(tensor: Tensor, sizes: Tensor) -> Iterator[bytes]:
    """Each example's number of entries, and these entries in 32 or 64 bits."""
    entries = tensor.numpy().astype("<f4" if tensor.is_floating_point() else "<i8")
    for some in np.split(entries, sizes.cumsum(0)[:-1].numpy()):
        yield len(some).to_bytes(8, "little") + some.tobytes()
