"""The whole way of models that no family is named after, over tiny folders of the real classes: `model=diffusers`.

QVGEN_LONG_TESTS=1 asks for them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvgen.cli import main
from tests.models.any_folders import VARIANTS, make_any_folder
from tests.verbs.test_hub_models import (
    CAPTIONS,
    FEW,
    check_groups_of_vidit_q,
    check_two_processes,
    check_whole_way,
    tiny_keys,
    write_clips,
)

IMAGES = ("model.num_frames=1", "model.sampling_frames=1")
SIZES = {"skyreels": (), "sana_video": ("model.width=64",), "pixart_sigma": IMAGES}
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"  # diffusers' DPM-Solver
)


def write_pictures(folder: Path) -> Path:
    """Eight pictures of 64 x 96 pixels with a bright square, PNG and JPEG, and their table."""
    folder.mkdir()
    rows = ["file_name,text"]
    for index, caption in enumerate(CAPTIONS):
        pixels = np.full((64, 96, 3), 20 * index, dtype=np.uint8)
        pixels[8:40, 4 * index : 4 * index + 32, index % 3] = 230
        name = f"{index}.{'png' if index % 2 else 'jpg'}"
        Image.fromarray(pixels).save(folder / name)
        rows.append(f"{name},{caption}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_clips_to_videos_of_the_packed_model(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_any_folder(tmp_path / "model", variant)
    clips = write_pictures(tmp_path / "pictures") if "pixart" in variant else write_clips(tmp_path / "clips", fps=16)
    check_whole_way("diffusers", folder, tmp_path, capsys, clips=clips, overrides=SIZES[variant])


@pytest.mark.parametrize("variant", ["skyreels", "pixart_sigma"])
def test_two_processes_train_the_same(variant: str, tmp_path: Path) -> None:
    """Loss and packed bytes of DDP and FSDP are those of one process."""
    clips = write_pictures(tmp_path / "pictures") if "pixart" in variant else None
    folder = make_any_folder(tmp_path / "model", variant)
    check_two_processes("diffusers", folder, tmp_path, clips=clips, overrides=SIZES[variant])


@pytest.mark.parametrize("variant", ["pixart_alpha", "pixart_sigma"])
def test_images_have_the_groups_of_vidit_q_with_their_metrics(variant: str, tmp_path: Path) -> None:
    """All but the temporal one, which an image has not."""
    blocks = {f"transformer_blocks.{index}" for index in range(2)}
    groups = dict.fromkeys(("self_attention", "cross_attention", "ffn"), blocks)
    groups["other"] = {"adaln_single", "caption_projection", "proj_out"}
    folder = make_any_folder(tmp_path / "model", variant)
    check_groups_of_vidit_q("diffusers", folder, tmp_path, groups, overrides=[*IMAGES, "init.steps=2"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_calibrated_start_needs_prompts_alone(variant: str, tmp_path: Path) -> None:
    folder, run_dir = make_any_folder(tmp_path / "model", variant), tmp_path / "run"
    keys = [*tiny_keys("diffusers", folder), *SIZES[variant], *FEW, f"calibration.cache={tmp_path / 'statistics'}"]
    assert main(["ptq", *keys, "init=smoothquant", "bits=w4a8", f"run_dir={run_dir}"]) == 0
    report = json.loads((run_dir / "report.json").read_text())
    assert 0 < report["relative_error"]["ptq"] < 1
    assert report["packed_codes_equal"] is True
