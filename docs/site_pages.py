"""A hook of mkdocs: one reference page for each room of qvgen, made while the site is built, and no file of it is kept.

docs/api.md has the public API; these pages have every module behind it, read from the sources without importing them.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "quant",
    "quantizers",
    "lowrank",
    "layers",
    "initializers",
    "methods",
    "models",
    "data",
    "deploy",
    "evaluation",
)
"""Rooms that can be used or replaced from outside; verbs, training and config are the program's own."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the rooms, which mkdocs.yml lists."""
    described = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    for room in ROOMS:
        modules = [path for path in sorted((ROOT / "qvgen" / room).rglob("*.py")) if not path.stem.startswith("_")]
        names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
        text = "\n".join([f"# qvgen.{room}\n", *(_directive(name, described) for name in names)])
        files.append(File.generated(config, f"reference/{room}.md", content=text))
    return files


def _directive(module: str, described: list[str]) -> str:
    """All of a module but what docs/api.md describes: each object has one place that links lead to."""
    elsewhere = [name.removeprefix(f"{module}.") for name in described if name.rpartition(".")[0] == module]
    filters = ", ".join(f"'{pattern}'" for pattern in ("!^_", *(f"!^{name}$" for name in elsewhere)))
    return f"::: {module}\n    options: {{filters: [{filters}]}}\n"
