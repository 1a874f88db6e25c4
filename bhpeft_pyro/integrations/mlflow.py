"""Posteriors as models of MLflow: `save_model`, `log_model` and `load_model`.

They need the extra `mlflow`. A model holds what `Posterior.save` writes, so nothing is pickled.
MLflow's own programs load it too (`mlflow.pyfunc.load_model`): a table of texts in, and the columns
of `bhpeft predict` out. `load_model` gives the `Posterior` itself, to be updated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..base.checks import optional_library
from ..errors import SaveError
from ..model.backbone import shared_name
from ..posterior.posterior import Posterior

if TYPE_CHECKING:
    from mlflow.models.model import ModelInfo

__all__ = ["get_default_pip_requirements", "load_model", "log_model", "save_model"]

mlflow = optional_library("mlflow", "mlflow")

_BACKBONE = "backbone"  # its folder, in that of the posterior


def save_model(
    posterior: Posterior, path: str | Path, *, save_backbone: bool | None = None, **options: Any
) -> None:
    """Write a posterior to a folder, as a model of MLflow.

    Args:
        posterior: the posterior.
        path: the folder, which must be new or empty.
        save_backbone: keep the backbone's weights and its tokenizer with the posterior, and not
            only its name. By default they are kept unless it has a name on the hub or PyPI.
        options: of `mlflow.pyfunc.save_model`, such as `input_example` or `pip_requirements`.

    Raises:
        SaveError: the guide, prior or likelihood cannot be described.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=2, progress=False)
    >>> with TemporaryDirectory() as folder:
    ...     save_model(posterior, folder)
    ...     load_model(folder).report.steps
    2
    """
    with _written(posterior, save_backbone, options) as model:
        mlflow.pyfunc.save_model(str(path), **model)


def log_model(
    posterior: Posterior, name: str, *, save_backbone: bool | None = None, **options: Any
) -> ModelInfo:
    """Log a posterior to the active run, or to a new one.

    Args:
        posterior, save_backbone: as for `save_model`.
        name: of the logged model.
        options: of `mlflow.pyfunc.log_model`; `registered_model_name="reviews"`, for example,
            makes it the next version of a registered model.

    Returns:
        MLflow's description, with `model_uri` and `registered_model_version`. Its `metadata` has
        the number of the round, its id and that of the round before.

    Raises:
        SaveError: as for `save_model`.
    """
    with _written(posterior, save_backbone, options) as model:
        return mlflow.pyfunc.log_model(name=name, **model)


def load_model(model_uri: str, *, device: str = "auto", **given: Any) -> Posterior:
    """The posterior of a saved, logged or registered model.

    Args:
        model_uri: as for `mlflow.pyfunc.load_model`: a folder, "models:/reviews/2" or
            "models:/reviews@champion".
        device: of the backbone: "cpu", "cuda", or "auto" for a GPU if there is one.
        given: the prior, likelihood or guide if it was your own, as for `Posterior.load`.

    Raises:
        SaveError: as for `Posterior.load`; or the model names a folder outside its own.
    """
    folder = Path(mlflow.artifacts.download_artifacts(model_uri)).resolve()
    flavor = mlflow.models.Model.load(folder).flavors[mlflow.pyfunc.FLAVOR_NAME]
    data = flavor[mlflow.pyfunc.DATA]
    place = (folder / str(data)).resolve()
    if not place.is_relative_to(folder):
        raise SaveError(
            f"model_uri: {folder / 'MLmodel'} names {data!r:.60} as its data; expected a folder "
            "in the model's own"
        )
    return _loaded(place, device, **given)


def get_default_pip_requirements() -> list[str]:
    """The requirements of an environment that predicts, in the versions that are installed.

    This package is named with where it was installed from, such as a wheel or a repository. Without
    that it is left out: on an index, its name may be somebody else's.
    """
    others = {name: version(name) for name in ("pyro-ppl", "torch", "transformers")}
    # No registry has the builds that PyTorch calls "+cpu" or "+cu126".
    pinned = [f"{name}=={number.split('+')[0]}" for name, number in others.items()]
    try:  # the address that pip noted when it installed this package, if it did (PEP 610)
        noted = distribution("bhpeft_pyro").read_text("direct_url.json")
    except PackageNotFoundError:
        noted = None
    if noted is None:
        return pinned
    source = json.loads(noted)
    url, repository = source["url"], source.get("vcs_info")
    if repository:
        url = f"{repository['vcs']}+{url}@{repository['commit_id']}"
    return [f"bhpeft_pyro @ {url}", *pinned]


def _load_pyfunc(path: str) -> _Predictor:
    """The function of a `loader_module` that MLflow calls."""
    return _Predictor(_loaded(Path(path), "auto"))


class _Predictor:
    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior

    def predict(self, table: pd.DataFrame) -> pd.DataFrame:
        answers = self.posterior.predict(table).table().drop(columns="text")
        return answers.set_index(table.index)


def _loaded(folder: Path, device: str, **given: Any) -> Posterior:
    backbone = folder / _BACKBONE
    name = str(backbone) if backbone.exists() else None
    return Posterior.load(folder, name, device=device, **given)


@contextmanager
def _written(
    posterior: Posterior, save_backbone: bool | None, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Arguments of MLflow's functions, `options` among them, while the files are there."""
    network, report = posterior.model.network, posterior.report
    if save_backbone is None:
        save_backbone = shared_name(network.backbone) is None
    # Any text would do, but for choices: in a cell they are a list in JSON.
    likelihood = posterior.model.likelihood
    cells: dict[str, list[Any]] = {
        name: ['["yes", "no"]'] for name in posterior.columns.inputs(likelihood.kind)
    }
    extra = {*posterior.columns.extra, *likelihood.columns}
    example = pd.DataFrame(cells | {name: [1.0] for name in sorted(extra)})
    with TemporaryDirectory() as temporary:
        folder = posterior.save(Path(temporary) / "posterior")
        if save_backbone:
            network.backbone.save_pretrained(folder / _BACKBONE)
            network.tokenizer.save_pretrained(folder / _BACKBONE)
        lineage = {"round": len(posterior.lineage), "round_id": report.id}
        lineage |= {"parent_id": report.parent}
        arguments: dict[str, Any] = {
            "loader_module": __name__,
            "data_path": str(folder),
            "signature": mlflow.models.infer_signature(
                example, _Predictor(posterior).predict(example)
            ),
        } | options
        arguments["metadata"] = lineage | (options.get("metadata") or {})
        given = (options.get("conda_env"), options.get("pip_requirements"))
        if given == (None, None):  # MLflow takes one of three
            more = arguments.pop("extra_pip_requirements", None) or []
            more = [f"-r {more}"] if isinstance(more, str) else more  # a file of requirements
            arguments["pip_requirements"] = [*get_default_pip_requirements(), *more]
        yield arguments
