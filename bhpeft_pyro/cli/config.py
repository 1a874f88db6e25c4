"""A YAML file in place of options: `--config fit.yaml`."""

from __future__ import annotations

from pathlib import Path

import typer
import yaml

from ..errors import ConfigError

__all__ = ["read_config"]


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a file's entries the defaults of a command, under the names its options have.

    What stands on the command line comes first. Values are read as they would be there.

    Raises:
        ConfigError: the file cannot be read, or has an entry that is no option.
    """
    if path is None:
        return None
    names: dict[str, str] = {}
    for parameter in context.command.params:
        assert parameter.name is not None
        if parameter.name != "config":
            names[max(parameter.opts, key=len).lstrip("-").replace("_", "-")] = parameter.name
    defaults = {}
    for key, value in _read(path).items():
        name = str(key).replace("_", "-")
        if name not in names:
            raise ConfigError(
                f"--config: {path} has {key!r}, which {context.info_name!r} does not know; "
                f"known: {', '.join(names)}"
            )
        if isinstance(value, (dict, list)):
            raise ConfigError(
                f"--config: {path}: {key!r} is a {type(value).__name__}; expected one value"
            )
        if value is not None:
            defaults[names[name]] = str(value)
    context.default_map = defaults
    return path


def _read(path: Path) -> dict[object, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is no YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} has no `option: value` lines")
    return content
