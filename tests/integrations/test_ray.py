"""A local cluster of Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import pandas
import pytest
from components import fit
from jobs import assert_same
from torch.optim import Adam

ray = pytest.importorskip("ray")
from bhpeft_pyro.integrations.ray import RayExecutor  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    """The mixture is that of a fit in this process."""
    killed = tmp_path / "killed"

    def optimizer(parameters: Any) -> Adam:
        try:
            killed.touch(exist_ok=False)
        except FileExistsError:
            return Adam(parameters, lr=0.3)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    found = fit(executor=RayExecutor(), optimizer=optimizer)
    assert killed.exists()
    assert_same(found, fit(optimizer=optimizer))


def test_a_future_that_is_cancelled_cancels_its_task(tmp_path: Path) -> None:
    executor = RayExecutor(num_cpus=2)
    first = executor.submit(sleep, 3)
    waiting = executor.submit((tmp_path / "began").touch)
    assert waiting.cancel()
    assert executor.submit(pow, 2, 5).result(200) == 32
    assert first.done() and not (tmp_path / "began").exists()


def test_batches_of_a_dataset_have_the_forecasts_of_the_whole() -> None:
    posterior = fit()
    rows = pandas.DataFrame({"id": range(40), "text": [f"w5 w{i}" for i in range(8, 48)]})
    texts = ray.data.from_items(rows.to_dict("records"), override_num_blocks=4)

    def forecasts(batch: pandas.DataFrame) -> pandas.DataFrame:
        return batch[["id"]].join(posterior.predict(batch).table())

    of_batches = texts.map_batches(forecasts, batch_format="pandas", batch_size=7).to_pandas()
    of_batches = of_batches.sort_values("id", ignore_index=True)
    pandas.testing.assert_frame_equal(of_batches, forecasts(rows), check_dtype=False, atol=1e-5)
