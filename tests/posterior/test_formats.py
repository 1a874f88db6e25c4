"""Posteriors that an earlier version saved go on to load; `make_saved.py` made them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from make_saved import BACKBONE, SAVED, TEXTS
from saves import rewrite
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro.errors import SaveError
from bhpeft_pyro.posterior.saving import FORMAT, INDEX, read_index
from bhpeft_pyro.testing import tiny_tokenizer


@pytest.mark.parametrize("folder", sorted(SAVED.glob("format-*")), ids=lambda folder: folder.name)
def test_a_posterior_of_every_format_loads_and_can_be_updated(folder: Path) -> None:
    backbone = AutoModel.from_pretrained(BACKBONE)
    posterior = bh.Posterior.load(folder, backbone, tokenizer=tiny_tokenizer())
    expected = torch.tensor(json.loads((folder / "expected.json").read_text()))
    found = posterior.predict(TEXTS, samples=0).probabilities
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert len(posterior.lineage) == 2
    third = posterior.update({"text": ["w5 w33"], "label": ["no"]}, max_steps=1)
    assert len(third.lineage) == 3


def test_there_is_one_of_the_present_format() -> None:
    assert {folder.name for folder in SAVED.glob(f"format-{FORMAT}-*")} == {
        f"format-{FORMAT}-laplace",
        f"format-{FORMAT}-normal",
    }


def test_a_newer_format_says_which_version_can_read_it(tmp_path: Path) -> None:
    (folder,) = SAVED.glob(f"format-{FORMAT}-normal")
    content = read_index(folder)
    assert set(content["written_by"]) == {"bhpeft_pyro", "torch", "transformers"}
    shutil.copy(folder / INDEX, tmp_path)
    newer = {"format": FORMAT + 1, "written_by": {"bhpeft_pyro": "9.8.7"}}
    rewrite(tmp_path, lambda content: content.update(newer))
    message = rf"format {FORMAT + 1}, expected {FORMAT}; bhpeft_pyro 9\.8\.7 wrote it and can read"
    with pytest.raises(SaveError, match=message):
        bh.Posterior.load(tmp_path)
