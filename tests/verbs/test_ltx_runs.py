"""Whole runs of LTX-Video, Latte, Open-Sora and further variants over tiny folders, and plans at full size, when asked for.

QVGEN_LONG_TESTS=1 asks for them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qvgen.cli import main
from qvgen.config.leaves import load_leaf
from qvgen.deploy.checkpoint import load_packed
from qvgen.layers.swap import packed_layers
from tests.models.ltx_folders import make_latte_folder, make_ltx_folder
from tests.models.opensora_folders import make_opensora_folder
from tests.verbs.test_hub_models import MODELS as FAMILIES
from tests.verbs.test_hub_models import (
    WHOLE_WAY,
    check_groups_of_vidit_q,
    check_two_processes,
    check_whole_way,
    write_clips,
)

MODELS: dict[str, Any] = {"ltx": make_ltx_folder, "latte": make_latte_folder, "opensora": make_opensora_folder}
OTHERS = {name: partial(make, variant=variant) for name, (make, variant) in FAMILIES.items() if name not in WHOLE_WAY}
"""The variants of Wan and CogVideoX that tests/verbs/test_hub_models.py leaves to this file."""


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_from_mp4_files_to_videos_of_the_packed_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_whole_way(name, (MODELS | OTHERS)[name](tmp_path / "model"), tmp_path, capsys)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_the_same(name: str, tmp_path: Path) -> None:
    """Loss and packed bytes of DDP and FSDP are those of one process."""
    check_two_processes(name, MODELS[name](tmp_path / "model"), tmp_path)


def test_latte_is_trained_from_static_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are trained, folded, packed and sampled with: an entry for each of the sampler's steps in every layer."""
    static = ["init=static", "calibration.videos=1", f"calibration.cache={tmp_path}", "model.num_inference_steps=3"]
    check_whole_way("latte", make_latte_folder(tmp_path / "model"), tmp_path, capsys, overrides=static)
    layers = packed_layers(load_packed(tmp_path / "run" / "packed")).values()
    assert {tuple(layer.static_scale.shape) for layer in layers} == {(3,)}


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_at_full_size_needs_no_weights(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = write_clips(tmp_path / "clips", fps=load_leaf("model", name).fps)
    keys = [f"data.path={clips}", "bits=4", "dry_run=true", "devices=1", "device_memory_gib=141"]
    assert main(["train", f"model={name}", *keys]) == 0
    plan = capsys.readouterr().out
    assert "DOES NOT FIT" not in plan
    assert " x ".join(map(str, load_leaf("model", name).sample_shape)) in plan


def test_open_sora_has_the_four_groups_of_vidit_q_with_their_metrics(tmp_path: Path) -> None:
    spatial, temporal = ({f"{kind}_blocks.{index}" for index in range(2)} for kind in ("spatial", "temporal"))
    groups = {
        "self_attention": spatial, "cross_attention": spatial | temporal, "temporal_attention": temporal,
        "ffn": spatial | temporal,
    }  # fmt: skip
    check_groups_of_vidit_q("opensora", make_opensora_folder(tmp_path / "model"), tmp_path, groups)
