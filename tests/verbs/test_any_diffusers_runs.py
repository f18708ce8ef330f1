"""The whole way of models that no family is named after, over tiny folders of the real classes: `model=diffusers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.any_folders import make_any_folder
from tests.verbs.test_hub_models import check_whole_way

SIZES = {
    "skyreels": (),
    "sana_video": ("model.width=64",),
    "pixart": ("model.num_frames=1", "model.sampling_frames=1"),
}


@pytest.mark.parametrize("variant", SIZES)
def test_from_clips_to_videos_of_the_packed_model(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_any_folder(tmp_path / "model", variant)
    check_whole_way("diffusers", folder, tmp_path, capsys, sizes=SIZES[variant])
