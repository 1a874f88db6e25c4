"""Processes that work together by gloo: children of this process, which import nothing anew."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from forks import start, wait
from torch import distributed as dist


def together(
    work: Callable[[], Any], codes: Sequence[int] = (0, 0), launched: bool = False
) -> list[Any]:
    """What `work` returns on each rank.

    Args:
        work: of one rank.
        codes: the exit code that each is to have.
        launched: leave the process group to `work`, with the environment that a launcher makes.
    """
    with TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as server:
        folder, port = Path(name), server.getsockname()[1]
        server.close()

        def child(rank: int) -> None:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(codes), "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {k: str(v) for k, v in own.items()}
            if not launched:
                dist.init_process_group("gloo", timeout=timedelta(seconds=60))
            torch.save(work(), folder / str(rank))

        ranks = range(len(codes))
        children = [start(lambda rank=rank: child(rank)) for rank in ranks]  # type: ignore[misc]
        assert [wait(each) for each in children] == list(codes)
        ended = [rank for rank in ranks if codes[rank] == 0]
        return [torch.load(folder / str(rank), weights_only=False) for rank in ended]
