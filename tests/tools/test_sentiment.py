"""The sentences of the demonstration: parsed right, checked, fetched once, and split."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
import types
import venv
from pathlib import Path

import pytest
from sentences import sentences

from bhpeft_pyro.errors import DataError
from tools import sentiment as source
from tools.sentiment import sentiment, two_rounds

STEMS = ("tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets")
RATED = '3_1\t-1.25\t  Not "bad", isn\'t it?\u2028Well\tyes.\r\n7\t2.5\tcafé\r\n'
SPREAD = "\ufeff3_1\t-1.25\t0.75\t[-1, -2]\n7\t2.6\t0.5\t[3, 2]\n\n"


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sdist(rated: str = RATED, spread: str = SPREAD, stems: tuple[str, ...] = STEMS) -> bytes:
    """A small file laid out like the sdist of vaderSentiment."""
    inner = {f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": rated.encode() for stem in stems}
    inner |= {f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt": spread.encode() for stem in stems}
    return tar({source._VADER_RATINGS: tar(inner)})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bhpeft_pyro"


@pytest.fixture
def vader(cache: Path, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A PyPI of one file, ours to shape: set `content`; `fetched` counts the downloads."""
    pypi = types.SimpleNamespace(content=sdist(), fetched=0, cache=cache)

    def download(folder: Path) -> None:
        pypi.fetched += 1
        (folder / source._VADER).write_bytes(pypi.content)

    def publish(content: bytes) -> None:
        pypi.content = content
        monkeypatch.setattr(source, "_VADER_SHA256", hashlib.sha256(content).hexdigest())

    pypi.publish = publish
    publish(pypi.content)
    monkeypatch.setattr(source, "_pip_download", download)
    return pypi


def test_sentences_are_parsed(vader: types.SimpleNamespace) -> None:
    """Quotes, tabs and Unicode line breaks belong to the text; the published mean is the rating."""
    domains = sentiment()
    assert list(domains) == ["tweets", "amazon", "movies", "nyt"]
    for domain in domains.values():
        assert domain.to_list() == [
            {
                "id": "3_1",
                "text": 'Not "bad", isn\'t it?\u2028Well\tyes.',
                "rating": -1.25,
                "rating_sd": 0.75,
            },
            {"id": "7", "text": "café", "rating": 2.5, "rating_sd": 0.5},
        ]


def test_domains_are_not_mixed_up(vader: types.SimpleNamespace) -> None:
    files = {}
    for number, stem in enumerate(STEMS):
        files[f"hutto_ICWSM_2014/{stem}_GroundTruth.txt"] = f"1\t{number}\ttext".encode()
        files[f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt"] = f"1\t{number}\t1\t[]".encode()
    vader.publish(tar({source._VADER_RATINGS: tar(files)}))
    domains = sentiment()
    assert {name: rows["rating"][0] for name, rows in domains.items()} == {
        "tweets": 0.0,
        "amazon": 1.0,
        "movies": 2.0,
        "nyt": 3.0,
    }


def test_a_file_is_fetched_once_and_anew_if_it_was_cut_off(vader: types.SimpleNamespace) -> None:
    first = sentiment()
    assert sentiment()["nyt"].to_list() == first["nyt"].to_list() and vader.fetched == 1
    (cached,) = vader.cache.iterdir()  # nothing is unpacked
    cached.write_bytes(cached.read_bytes()[:-20])
    assert len(sentiment()["tweets"]) == 2 and vader.fetched == 2
    assert cached.read_bytes() == vader.content


def test_an_altered_archive_is_refused(vader: types.SimpleNamespace) -> None:
    vader.content += b"altered"
    with pytest.raises(DataError, match="SHA-256"):
        sentiment()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar({"vaderSentiment-3.3.2/setup.py": b""}), "holds no file vaderSentiment-3.3.2"),
        (sdist(stems=STEMS[:3]), "holds no file hutto_ICWSM_2014/nytEditorialSnippets"),
        (sdist(rated="1\t2.0\r\n"), r"tweets_GroundTruth.txt, line 1: 2 fields, expected 3"),
        (sdist(rated=RATED + "9\t1\tunrated"), "'tweets': sentence '9' has no ratings"),
    ],
    ids=["no ratings", "no domain", "short row", "unrated sentence"],
)
def test_what_is_missing_is_named(
    vader: types.SimpleNamespace, content: bytes, message: str
) -> None:
    vader.publish(content)
    with pytest.raises(DataError, match=message):
        sentiment()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_pip_refuses_another_file_and_without_a_network_says_what_to_do(
    index: Path, cache: Path
) -> None:
    """The message gives pip's own words, and a way that needs no network."""
    with pytest.raises(DataError, match="No matching distribution") as caught:
        sentiment()
    assert f"put vaderSentiment-3.3.2.tar.gz into {cache}" in str(caught.value)
    (index / source._VADER).write_bytes(sdist(rated="1\t2.0\tforged"))
    with pytest.raises(DataError, match="pip could not fetch vaderSentiment"):
        sentiment()
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("cache")
def test_no_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tools make virtual environments without pip."""
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(DataError, match="No module named pip"):
        sentiment()


@pytest.fixture
def pypi() -> None:
    """In CI a fetch that fails is a failure; elsewhere there may be no network."""
    if os.environ.get("CI") != "true":
        pytest.skip("fetches from PyPI; set CI=true to run")


@pytest.mark.usefixtures("pypi", "cache")
def test_real_sentences() -> None:
    """Fetched from PyPI anew: counts and moments of the four domains."""
    domains = sentiment()
    counts = {"tweets": 4200, "amazon": 3708, "movies": 10605, "nyt": 5190}
    assert {name: len(rows) for name, rows in domains.items()} == counts
    for rows in domains.values():
        assert len(set(rows["id"])) == len(rows)
        assert all(text == text.strip() != "" for text in rows["text"])
        assert all(-4 <= rating <= 4 for rating in rows["rating"])
        assert all(0 <= sd <= 4 for sd in rows["rating_sd"])
    second = domains["tweets"][1]
    assert (second["id"], round(second["rating"], 4)) == ("2", 1.4433)
    assert round(second["rating_sd"], 4) == 0.9805


def test_no_text_is_in_two_parts_and_none_is_neutral() -> None:
    rows = sentences(5)
    repeats = [{**row, "text": row["text"].upper() + " "} for row in rows]
    neutral = [{"text": f"w40 w{15 + i}", "rating": 0.5} for i in range(20)]
    tweets = [
        {"text": f"w1 &amp; w{15 + i} w{16 + i}", "rating": 1.0 - i % 2 * 3} for i in range(34)
    ]
    domains = {"movies": rows + repeats + neutral, "tweets": rows[:20] + tweets}
    first, second = two_rounds(domains, (60, 10), 10, 12, seed=1)
    parts = [part for each in (first, second) for part in (each.train, each.validation, each.test)]
    assert [len(part) for part in parts] == [60, 10, 12, 10, 10, 12]
    texts = [text.casefold().strip() for part in parts for text in part["text"]]
    assert len(texts) == len(set(texts))
    assert not any(text.startswith("w40") for text in texts)
    for part in parts[:3]:  # the first word still tells the label: rows were not mixed up
        assert all((row["text"].casefold()[:2] == "w6") == row["label"] for row in part)


def test_rows_depend_on_the_seed_alone_and_too_few_are_refused() -> None:
    domains = {"movies": sentences(5), "tweets": sentences(8)}
    one, same, other = (two_rounds(domains, (40, 10), 10, 20, seed)[0] for seed in (0, 0, 1))
    assert one.train["text"] == same.train["text"] != other.train["text"]
    with pytest.raises(DataError, match=r"movies: \d+ usable sentences, needed 1020"):
        two_rounds(domains, (1000, 4), 10, 10, seed=0)
