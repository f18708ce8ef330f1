"""config.yaml of a run's folder: the plain configuration that the run began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qvgen.errors import UserError

CONFIG_FILE = "config.yaml"


def read_plain(path: Path) -> dict[str, Any]:
    """Read what :func:`write_plain` wrote.

    Raises:
        UserError: The file is missing or no YAML mapping.
    """
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; is {path.parent} the folder of a run?") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML file; restore it or start another run") from error
    if not isinstance(plain, dict):
        raise UserError(f"{path} holds no mapping; restore it or start another run")
    return plain


def read_config(run_dir: Path) -> dict[str, Any]:
    """The plain configuration of the run in a folder; raises UserError where there is none."""
    return read_plain(run_dir / CONFIG_FILE)
