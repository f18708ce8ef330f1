"""A hook of mkdocs: one reference page for each room of qvgen, made while the site is built, and no file of it is kept.

docs/api.md has the public API; these pages have every module behind it, read from the sources without importing them.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation, Section

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
    """Add the pages of the rooms, and the kernels' contract, which lies beside the kernels."""
    for room in ROOMS:
        modules = [path for path in sorted((ROOT / "qvgen" / room).rglob("*.py")) if not path.stem.startswith("_")]
        names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
        text = "\n".join([f"# qvgen.{room}\n", *(f"::: {name}\n" for name in names)])
        files.append(File.generated(config, f"reference/{room}.md", content=text))
    return files


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Put the rooms' pages behind the rest: they are no files of docs/, so mkdocs.yml can't list them."""
    del config
    pages = [files.get_file_from_path(f"reference/{room}.md") for room in ROOMS]
    children = [file.page for file in pages if file is not None and file.page is not None]
    section = Section("Modules", children)
    for child in children:
        child.parent = section
    nav.items.append(section)
    return nav
