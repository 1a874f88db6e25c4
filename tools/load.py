"""The load that a service bears on this machine, in less than three minutes.

    python -m tools.load RUN texts.csv

For 1 to 64 clients that each ask for one text at a time: texts a second, and the median and the
99th percentile of the time to an answer. Beside it what `posterior.predict` does with as many texts
at once, without a service; and transformers' own pipeline behind the same server, on the same
backbone with a classifier of random weights, which says nothing of its uncertainty. Server and
clients share the machine's processors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from transformers import pipeline

from bhpeft_pyro.data import Examples, table
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.serving.engine import Limits
from bhpeft_pyro.serving.rounds import Row, Served, Source
from bhpeft_pyro.serving.service import Service

_CLIENTS = (1, 4, 16, 64)
_SECONDS = 6.0  # of each measurement
_PORTS = {"service": 18771, "pipeline": 18772}


@dataclass(frozen=True, eq=False)
class Piped(Served):
    """A round whose texts the pipeline of transformers answers, with one network."""

    network: Any = field(default=None, kw_only=True)

    def answer(self, examples: Examples) -> list[Row]:
        """Labels and scores alone, in batches of 32 as the pipeline makes them."""
        outputs = self.network([*examples.texts], batch_size=32, top_k=None)
        return [
            {"reason": "", "scores": {each["label"]: each["score"] for each in row}}
            for row in outputs
        ]


def serve(run: Path, kind: str) -> None:
    """Serve in this process, until it is killed."""
    source = Source(run, device="cpu")
    served = source.load()
    if kind == "pipeline":
        name = served.posterior.facts["backbone"]
        model, tokenizer = load_backbone(name, "cpu", classifier=True)
        made = pipeline(  # type: ignore[call-overload]
            "text-classification", model=model, tokenizer=tokenizer, device="cpu"
        )
        served = Piped(served.posterior, served.folder, network=made)
    app = Service(source, served, Limits()).application
    uvicorn.run(app, port=_PORTS[kind], log_level="error", access_log=False)


@contextmanager
def serving(run: Path, kind: str) -> Iterator[int]:
    """The port of a server in a process of its own, once it answers."""
    command = (sys.executable, "-m", "tools.load", str(run), "--serve", kind)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while asyncio.run(_status(_PORTS[kind])) != 200:
            if process.poll() is not None:
                raise SystemExit(f"the {kind} did not start: {' '.join(command)}")
            time.sleep(0.2)
        yield _PORTS[kind]
    finally:
        process.kill()
        process.wait()


async def _status(port: int) -> int:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return 0
    writer.write(b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")
    status, _ = await _response(reader)
    writer.close()
    return status


async def _response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The status and the body of a response with a length."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def measured(port: int, texts: Sequence[str], clients: int) -> list[float]:
    """The seconds of each answer."""
    took: list[float] = []
    end = time.perf_counter() + _SECONDS

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (began := time.perf_counter()) < end:
            number += clients
            body = json.dumps({"inputs": texts[number % len(texts)]}).encode()
            head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            status, said = await _response(reader)
            if status != 200:
                raise SystemExit(f"status {status}: {said.decode()}")
            took.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    return took


def directly(served: Served, texts: Sequence[str], count: int) -> float:
    """Texts a second of `posterior.predict` with `count` texts at once."""
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < _SECONDS / 2 or not done:
        some = [texts[(done + i) % len(texts)] for i in range(count)]
        served.posterior.predict(some)
        done += count
    return done / passed if done else 0.0


def main() -> None:
    """Print a table of all measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a saved posterior of texts")
    parser.add_argument("texts", type=Path, nargs="?", help="a file with its texts")
    parser.add_argument("--serve", choices=_PORTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.run, given.serve)
        return
    served = Source(given.run, device="cpu").load()
    (column,) = served.texts
    texts = table(given.texts, [column])[column].tolist()
    alone = {count: directly(served, texts, count) for count in _CLIENTS}
    print(f"{served.way}; {torch.get_num_threads()} threads; texts a second (p50, p99 in ms)")
    print("clients  predict alone  " + "  ".join(f"{kind:>24}" for kind in _PORTS), flush=True)
    rows = {clients: f"{clients:7}  {rate:13.0f}" for clients, rate in alone.items()}
    for kind in _PORTS:
        with serving(given.run, kind) as port:
            for clients in _CLIENTS:
                took = torch.tensor(asyncio.run(measured(port, texts, clients)))
                p50, p99 = (1000 * took.quantile(torch.tensor([0.5, 0.99]))).tolist()
                rows[clients] += f"  {len(took) / _SECONDS:8.0f} ({p50:5.0f}, {p99:5.0f})"
    print("\n".join(rows.values()))


if __name__ == "__main__":
    main()
