"""Image-to-video models on tiny folders: clips with their first frames, prompts with images, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qvgen.cli import BAD_INPUT, main
from tests.models.hub_folders import make_wan_folder
from tests.models.image_folders import make_cogvideox_image_folder, make_wan_image_folder, write_prompts
from tests.verbs.test_hub_models import tiny_keys, write_clips


def test_clips_bring_their_first_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of training and errors have the clips' own images, and so have the table's videos; no prompt has one."""
    folder, clips = make_wan_image_folder(tmp_path / "model"), write_clips(tmp_path / "clips", fps=16)
    data = [*tiny_keys("wan-i2v-14b", folder), f"data.path={clips}", f"data.cache={tmp_path / 'cache'}"]
    given = [
        "steps=2", "batch_size=2", "bits=4", "phi.ranks=[2]", "init=rtn", "method.caption_dropout=0.5",
        "evaluation.samples=2", "evaluation.quality_videos=1", "evaluation.videos=0", "evaluation.start_videos=false",
        "evaluation.video_every_steps=null", "logger=csv", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main(["train", *data, *given]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 0 < report["relative_error"]["qat"] < 1
    assert report["phi_rank_final"] == 0
    assert report["packed_codes_equal"] is True
    assert len(report["layers_skipped"]) == 2
    found = [load_file(path) for path in (tmp_path / "cache" / "latents").rglob("*.safetensors")]
    assert len(found) == 8
    for tensors in found:
        assert set(tensors) == {"latents", "first_frame", "image_latents", "image_embeds"}
        assert (tensors["first_frame"].shape, tensors["first_frame"].dtype) == ((32, 48, 3), torch.uint8)
        assert tensors["image_latents"].shape == (8, 3, 4, 6)
        assert tensors["image_latents"][:4, 0].eq(1).all()
        assert not tensors["image_latents"][:4, 1:].any()
    capsys.readouterr()
    assert main(["precompute", *data, "data=clips"]) == 0
    assert "8 clips ready (0 encoded by this process)" in capsys.readouterr().out


def test_generate_takes_images_by_line_and_refuses_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, prompts = make_cogvideox_image_folder(tmp_path / "model"), write_prompts(tmp_path)
    given = ["generate", *tiny_keys("cogvideox-i2v", folder)]
    with caplog.at_level(logging.INFO, logger="qvgen"):
        assert main([*given, f"prompts={prompts}", f"out={tmp_path / 'out'}"]) == 0
    found = capsys.readouterr()
    assert (
        "second.png: 60 x 70 pixels are resized to 32 x 48, as diffusers does, in another aspect ratio" in caplog.text
    )
    first, second = (Path(line).read_bytes() for line in found.out.splitlines())
    assert first != second

    def refused(*words: str) -> str:
        assert main([*given, *words, f"out={tmp_path / 'no'}"]) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "'a boat' has none; write prompts=FILE.jsonl with lines like" in refused("prompt=a boat")
    assert f"image={prompts} can't be read as an image" in refused("prompt=a boat", f"image={prompts}")
    assert "can't be read as an image (" in refused("prompt=a boat", "image=nothing.png")
    prompts.write_text('{"prompt": "a boat", "image": "nothing.png"}\n')
    assert "prompts.jsonl:1: image=nothing.png is no file" in refused(f"prompts={prompts}")
    assert "has learned positions for 32 x 48 alone; write model.height=32 model.width=48" in refused(
        "prompt=a boat", "model.height=64"
    )
    folder = make_wan_folder(tmp_path / "text")
    capsys.readouterr()
    text = ["generate", *tiny_keys("wan", folder), "prompt=a boat", f"out={tmp_path / 'no'}"]
    assert main([*text, f"image={tmp_path / 'first.png'}"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "model=wan makes a video of a caption alone, and 'a boat' has image=" in line
    assert not (tmp_path / "no").exists()


def test_folders_of_the_other_kind_name_the_right_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, text = make_wan_image_folder(tmp_path / "image"), make_wan_folder(tmp_path / "text")
    capsys.readouterr()
    for name, folder, right in (("wan", image, "wan-i2v-14b"), ("wan-i2v-14b", text, "wan or model=wan-14b")):
        assert (
            main(["generate", f"model={name}", f"model.path={folder}", "prompt=a", f"out={tmp_path / 'out'}"])
            == BAD_INPUT
        )
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"use model={right}")
        assert "the image condition is " in line
