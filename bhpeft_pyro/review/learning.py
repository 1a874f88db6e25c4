"""An update in the background: another process learns the labels, and makes the next queue."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import pandas as pd
from transformers import logging

from ..base.progress import told_to, work
from ..data import LabelWarning
from ..errors import BHPEFTError, BusyError, ConfigError
from ..posterior import Posterior, saving
from ..training.report import FitReport
from .pool import Pool


@dataclass(frozen=True)
class Where:
    """What is updated, and what with.

    Attributes:
        run: the folder of the posterior that labels are added to. It stays as it is.
        out: the folder for the new round; the one before of the same labels is replaced.
        data: the rows with the texts, as `bh.data.table` reads them.
        labels: the table of labels.
        backbone, device: as for `Posterior.load`.
    """

    run: Path
    out: Path
    data: pd.DataFrame
    labels: Path
    backbone: str | None = None
    device: str = "auto"

    @property
    def name(self) -> str:
        """Of the rounds made here, the file of the labels with its folder."""
        return "/".join(self.labels.resolve().parts[-2:])

    def newer(self) -> FitReport | None:
        """The report of the round in `out`, or a ConfigError if it is not of these labels."""
        if not saving.exists(self.out):
            return None
        there = saving.read_report(self.out)
        if (there.parent, there.name) != (saving.read_report(self.run).id, self.name):
            raise ConfigError(
                f"--new-round: {self.out} is no round of {self.run} with the labels {self.name}; "
                f"expected another folder, or {self.out} as RUN, to go on from that round"
            )
        return there


@dataclass(frozen=True)
class State:
    """How far an update is: `share` of 1, and in words what is being done, or was done.

    Attributes:
        running: whether it goes on.
        share: of 1, how much is done.
        words: what is being done, or what came of it.
        labels: how many labels the newest round has learnt.
    """

    running: bool = False
    share: float = 0.0
    words: str = ""
    labels: int = 0


class Learning:
    """Updates one after the other, each of the first round with all labels there are.

    So a label that was changed is learnt as it is now, and none is learnt twice.

    Args:
        where: the round, the labels, and where to save.
        take: is called with the pool of the new round.
        labels: how many the newest round has learnt.
    """

    def __init__(self, where: Where, take: Callable[[Pool], object], labels: int = 0) -> None:
        self.where, self.take = where, take
        self.state = State(labels=labels)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin an update.

        Raises:
            BusyError: one is running.
        """
        with self._lock:
            if self.state.running:
                raise BusyError("update: one is running; wait until it has ended")
            self.state = replace(self.state, running=True, share=0.0, words="starting")
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        ended = "The update stopped without a message; it may have run out of memory."
        try:
            context = multiprocessing.get_context("spawn")  # threads are running: no fork
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_learn, args=(there, self.where), daemon=True)
            process.start()
            there.close()  # so that the end of the process is the end of what comes
            while True:
                told = here.recv()
                if isinstance(told, str):
                    ended = told
                elif isinstance(told, tuple):
                    share, words = told
                    self.state = replace(self.state, share=share, words=words)
                else:
                    pool, labels, ended = told["pool"], told["labels"], told["words"]
                    self.take(pool)
                    self.state = replace(self.state, labels=labels)
        except EOFError:
            process.join()
        except BHPEFTError as error:
            ended = f"The update failed: {error}"
        except OSError:  # no process can be made, or it was killed while it told something
            pass
        finally:
            self.state = replace(self.state, running=False, share=1.0, words=ended)


def _learn(there: Connection, where: Where) -> None:
    """What the other process does."""
    if hasattr(os, "nice"):
        os.nice(10)  # the page comes first
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which ends this
    logging.disable_progress_bar()  # which would be printed between the lines of the program
    label_warnings: list[str] = []

    def tell(title: str, share: float | None, note: str) -> None:
        if share is not None:
            there.send((share, title))

    try:
        with warnings.catch_warnings(record=True) as given, told_to(tell):
            warnings.simplefilter("always")
            with work("learning the labels", parts=2, at_once=True) as whole:
                where.newer()  # somebody may have saved another round there
                before = Posterior.load(where.run, where.backbone, device=where.device)
                after = before.update(str(where.labels), progress=True)
                after.with_report(name=where.name).save(where.out, overwrite=True)
                whole.next()
                whole.name("")
                pool = Pool.of(after, where.data)
                whole.next()
            label_warnings = [
                str(one.message) for one in given if issubclass(one.category, LabelWarning)
            ]
        count, changed, compared = (
            getattr(after.report, name) for name in ("examples", "changed", "compared")
        )
        done = f"Round {pool.number} has learnt {count} labels and is in {where.out}."
        words = [done, *label_warnings]
        if compared:
            words.append(f"It changed {changed} of {compared} answers to texts learnt before.")
        there.send({"pool": pool, "labels": count, "words": " ".join(words)})
    except BHPEFTError as error:
        there.send(f"The update failed: {error}")
    except Exception as error:
        there.send(f"The update failed: {type(error).__name__}: {error}")
        raise  # the program prints the rest
    finally:
        there.close()
