"""A real MLflow: its SQLite store, its registry, and its program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from packaging.requirements import Requirement
from saves import backbone_in
from transformers import AutoModel

import bhpeft_pyro as bh
from bhpeft_pyro.errors import SaveError
from bhpeft_pyro.testing import tiny_examples, tiny_model

mlflow = pytest.importorskip("mlflow")
from mlflow.models import Model  # noqa: E402

import bhpeft_pyro.integrations.mlflow as own  # noqa: E402
from bhpeft_pyro.integrations.mlflow import (  # noqa: E402
    get_default_pip_requirements,
    load_model,
    log_model,
    save_model,
)

QUICK = {"max_steps": 3, "progress": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A new SQLite store, whose files of models are beside it."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    mlflow.create_experiment("reviews", artifact_location=str(folder / "files"))
    mlflow.set_experiment("reviews")
    return uri


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(backbone_in(tmp_path_factory.mktemp("tiny")))


@pytest.mark.slow  # MLflow takes a while to make its tables, and its program to start
def test_rounds_are_versions_and_the_program_predicts_a_table(store: str, tmp_path: Path) -> None:
    first = bh.fit(tiny_model(()), "normal", tiny_examples(), **QUICK)
    second = first.update(tiny_examples(10, seed=3), max_steps=3)
    for number, posterior in enumerate((first, second), 1):
        info = log_model(posterior, "posterior", registered_model_name="reviews")
        for alias in ("champion", f"round-{number}"):
            mlflow.MlflowClient().set_registered_model_alias("reviews", alias, number)
        assert info.registered_model_version == number
        assert info.metadata == {
            "round": number,
            "round_id": posterior.report.id,
            "parent_id": first.report.id if number == 2 else None,
        }
    texts = ["w5 w20", "w6 w21"]
    for uri, posterior in (("@round-1", first), ("@champion", second), ("/2", second)):
        loaded = load_model(f"models:/reviews{uri}", device="cpu")
        assert [report.id for report in loaded.lineage] == [r.id for r in posterior.lineage]
        assert torch.equal(
            loaded.predict(texts).probabilities, posterior.predict(texts).probabilities
        )
    assert len(loaded.update(tiny_examples(8, seed=5), max_steps=3).lineage) == 3

    table, out = tmp_path / "new.csv", tmp_path / "predictions.json"
    pd.DataFrame({"text": texts, "shop": [1, 2]}).to_csv(table, index=False)
    command = [sys.executable, "-m", "mlflow", "models", "predict", "--env-manager", "local"]
    command += ["-m", "models:/reviews@champion", "-t", "csv", "-i", str(table), "-o", str(out)]
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"MLFLOW_TRACKING_URI": store},
    )
    found = pd.DataFrame(pd.read_json(out)["predictions"].tolist())
    forecast = second.predict(texts)
    assert found["prediction"].tolist() == forecast.predicted
    for column, values in (
        ("probability", forecast.confidence),
        ("epistemic", forecast.epistemic),
        ("aleatoric", forecast.aleatoric),
    ):
        assert found[column].tolist() == pytest.approx(values.tolist(), rel=1e-5)


def test_a_folder_holds_no_pickle_and_the_backbone_if_it_is_from_a_folder(
    backbone: str, tmp_path: Path
) -> None:
    network = bh.RandomPEFT(AutoModel.from_pretrained(backbone), (), bh.Head(1))
    model = bh.Model(network, likelihood=bh.likelihoods.Normal(3.0, 1.0))
    data = {"review": ["w5 w6", "w6", "w7"], "stars": [1.0, 2.0, 5.0]}
    columns = bh.Columns(text="review", label="stars")
    posterior = bh.fit(model, "normal", data, columns=columns, **QUICK)
    save_model(posterior, tmp_path / "named", save_backbone=False)
    options: dict[str, Any] = {"extra_pip_requirements": ["pandas"], "metadata": {"team": "x"}}
    # A folder of this machine is no use on others.
    save_model(posterior, tmp_path / "whole", **options)
    assert "pandas" in (tmp_path / "whole" / "requirements.txt").read_text().split()
    noted = Model.load(tmp_path / "whole").metadata
    assert noted["team"] == "x" and noted["round_id"] == posterior.report.id
    rows = pd.DataFrame({"review": ["w5", "w9 w8"]})
    for name in ("named", "whole"):
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
        requirements = (tmp_path / name / "requirements.txt").read_text()
        assert "bhpeft_pyro==" not in requirements and "+cpu" not in requirements
        assert (tmp_path / name / "data/posterior/backbone").exists() == (name == "whole")
        loaded = mlflow.pyfunc.load_model(str(tmp_path / name))
        found = loaded.predict(rows)
        assert found["prediction"].tolist() == pytest.approx(
            posterior.predict(rows).mean.tolist(), rel=1e-5
        )
        assert list(found)[1:4] == ["sd", "lower_90", "upper_90"]
        assert loaded.metadata.get_input_schema().input_names() == ["review"]
        assert loaded.metadata.get_output_schema().input_names() == list(found)


WHEEL = {"url": "file:///w/bhpeft_pyro-0.1.0-py3-none-any.whl", "archive_info": {}}
CLONE = {"url": "https://host/r.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        (WHEEL, "bhpeft_pyro @ file:///w/bhpeft_pyro-0.1.0-py3-none-any.whl"),
        (CLONE, "bhpeft_pyro @ git+https://host/r.git@abc"),
        (None, None),
    ],
)
def test_nobody_else_s_package_is_required(
    noted: dict[str, Any] | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is not taken on PyPI: whoever takes it would be installed."""
    text = None if noted is None else json.dumps(noted)
    monkeypatch.setattr(own, "distribution", lambda _: SimpleNamespace(read_text=lambda _: text))
    found = get_default_pip_requirements()
    assert [each for each in found if "bhpeft" in each] == ([expected] if expected else [])
    assert all(Requirement(each) for each in found)


def test_a_model_is_read_with_its_own_prior_and_nothing_outside_its_folder(tmp_path: Path) -> None:
    prior = {"*": dist.Normal(0.0, 0.5)}
    posterior = bh.fit(tiny_model((), prior=prior), "normal", tiny_examples(), **QUICK)
    save_model(posterior, tmp_path / "model")
    again = load_model(str(tmp_path / "model"), prior=prior, device="cpu")
    assert torch.equal(again.predict(["w5"]).probabilities, posterior.predict(["w5"]).probabilities)
    posterior.save(tmp_path)
    described = tmp_path / "model" / "MLmodel"
    text = described.read_text()
    assert "data: data/posterior" in text
    described.write_text(text.replace("data: data/posterior", "data: .."))
    with pytest.raises(SaveError, match=r"model_uri: .*MLmodel names '..' as its data"):
        load_model(str(tmp_path / "model"), device="cpu")


def test_requirements_are_added_from_a_list_or_a_file_and_none_are_the_usual_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("requirements.txt").write_text("rich\nhttpx\n")
    posterior = bh.fit(tiny_model(()), "normal", tiny_examples(), **QUICK)
    usual = get_default_pip_requirements()
    for number, (options, expected) in enumerate(
        (
            ({"pip_requirements": None, "conda_env": None}, usual),
            ({"extra_pip_requirements": ["rich"]}, [*usual, "rich"]),
            ({"extra_pip_requirements": "requirements.txt"}, [*usual, "rich", "httpx"]),
            ({"pip_requirements": "requirements.txt"}, ["rich", "httpx"]),
        )
    ):
        save_model(posterior, f"model{number}", **options)
        found = Path(f"model{number}", "requirements.txt").read_text().split("\n")
        assert [each for each in found if not each.startswith("mlflow")] == expected


def test_predictions_keep_the_index_of_the_table(tmp_path: Path) -> None:
    posterior = bh.fit(tiny_model(()), "normal", tiny_examples(), **QUICK)
    save_model(posterior, tmp_path / "model")
    table = pd.DataFrame({"text": ["w5 w20", "w6 w21", "w7"]}, index=[7, 8, 1])
    found = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(table)
    assert found.index.tolist() == [7, 8, 1]
    assert found["prediction"].tolist() == posterior.predict(table).predicted
