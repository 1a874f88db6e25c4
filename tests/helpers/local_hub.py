"""A model hub on this machine: repositories in a folder, served as huggingface.co serves them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from datasets import Dataset, config
from huggingface_hub import constants
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import hub as transformers_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """Repositories, and the address they are served at.

    Attributes:
        root: a folder with `models/OWNER/NAME` and `datasets/OWNER/NAME`.
        moved: present names of repositories by former ones, which are redirected.
        url: for the variable HF_ENDPOINT.
    """

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root, url
        self.moved: dict[str, str] = {}

    def model(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Publish a transformer and its tokenizer."""
        folder = self.root / "models" / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def parquet(
        self, name: str, splits: Mapping[str, Dataset], *, config: str = "default", card: str = ""
    ) -> None:
        """Publish a data set as the hub has most of them: a Parquet file a split, and a card."""
        folder = self.root / "datasets" / name
        part = "data" if config == "default" else config
        (folder / part).mkdir(parents=True, exist_ok=True)
        for split, table in splits.items():
            table.to_parquet(folder / part / f"{split}-00000-of-00001.parquet")
        files = "".join(f"  - split: {split}\n    path: {part}/{split}-*\n" for split in splits)
        text = (folder / "README.md").read_text() if (folder / "README.md").exists() else "---\n"
        configs = text.removesuffix("---\n") if "configs:" in text else f"---\n{card}configs:\n"
        entry = f"- config_name: {config}\n  data_files:\n{files}"
        (folder / "README.md").write_text(f"{configs}{entry}---\n")

    def json_lines(self, name: str, splits: Mapping[str, Dataset]) -> None:
        """Publish a data set as bare JSON lines, without a card."""
        folder = self.root / "datasets" / name
        folder.mkdir(parents=True)
        for split, table in splits.items():
            table.to_json(folder / f"{split}.jsonl")


@contextmanager
def serving(root: Path) -> Iterator[LocalHub]:
    """A hub over the repositories in a folder, until the block is left."""
    (root / "models").mkdir()
    (root / "datasets").mkdir()
    hub = LocalHub(root, "")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub)) as server:
        hub.url = f"http://localhost:{server.server_address[1]}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: metadata, lists of files, and files."""

    def __init__(self, hub: LocalHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(json.loads(body or b"{}"))

    def _answer(self, asked: Mapping[str, Any] | None = None) -> None:
        path = self.path.partition("?")[0].replace("%3A", ":").strip("/")
        if not path:  # whether there is a hub
            return self._send(200)
        api = path.startswith("api/")
        kind = "datasets" if path.removeprefix("api/").startswith("datasets/") else "models"
        rest = path.removeprefix("api/").removeprefix(f"{kind}/").split("/")
        # A former name has one part.
        count = 1 if rest[0] in self.hub.moved or len(rest) < 2 else 2
        name, rest = "/".join(rest[:count]), rest[count:]
        if name in self.hub.moved:
            place = self.path.replace(f"/{name}", f"/{self.hub.moved[name]}", 1)
            return self._send(307, Location=place)
        folder = self.hub.root / kind / name
        if not folder.is_dir():
            return self._send(401, **{"X-Error-Code": "RepoNotFound"})
        if api and (not rest or rest[0] == "revision"):
            files = [{"rfilename": file} for file in _files(folder)]
            return self._json({"id": name, "sha": COMMIT, "siblings": files})
        place = folder.joinpath(*rest[2:])
        if api and rest[0] == "paths-info" and asked is not None:
            there = [folder / each for each in asked["paths"] if (folder / each).exists()]
            return self._json([_info(folder, each) for each in there])
        if api and rest[0] == "tree" and place.is_dir():
            found = place.rglob("*") if "recursive=true" in self.path.lower() else place.iterdir()
            return self._json([_info(folder, each) for each in sorted(found)])
        if rest[0] != "resolve" or not place.is_file():
            return self._send(404, **{"X-Error-Code": "EntryNotFound"})
        content = place.read_bytes()
        etag = sha1(content).hexdigest()
        self._send(200, content, **{"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

    def _json(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode(), **{"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _info(folder: Path, place: Path) -> dict[str, Any]:
    """An entry of a list of files."""
    path = str(place.relative_to(folder))
    if place.is_dir():
        return {"type": "directory", "oid": COMMIT, "size": 0, "path": path}
    content = place.read_bytes()
    return {"type": "file", "oid": sha1(content).hexdigest(), "size": len(content), "path": path}


@contextmanager
def local_hub(folder: Path) -> Iterator[LocalHub]:
    """Make huggingface_hub and datasets use a hub of this machine, and caches of its own."""
    (folder / "hub").mkdir()
    with serving(folder / "hub") as hub, pytest.MonkeyPatch.context() as patch:
        # What HF_ENDPOINT, HF_HUB_OFFLINE=0 and HF_HOME set when the libraries are imported.
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(folder / "models"),
        }.items():
            patch.setattr(constants, name, value)
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
            "HF_HUB_OFFLINE": False,
            "HF_DATASETS_CACHE": str(folder / "datasets"),
            "USE_PARQUET_EXPORT": False,  # another server's
        }.items():
            patch.setattr(config, name, value)
        # What transformers keeps of an earlier call asks the hub that there was then.
        patch.setattr(transformers_hub, "_hf_api", None, raising=False)
        yield hub
