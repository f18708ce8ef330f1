"""`profile.attention=int8` on the command line: PTQ, packed model, videos; and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config.leaves import leaf_names, load_leaf
from qvgen.deploy.checkpoint import load_packed
from qvgen.layers.attention_swap import packed_attentions
from tests.models.hub_folders import make_cogvideox_folder
from tests.runs import SHORT, shallow
from tests.verbs.test_hub_models import tiny_keys

INT8 = "profile.attention=int8"
PROMPT = "a red three moving up left"


def ptq(run_dir: Path, *words: str) -> int:
    keys = [key for key in SHORT if not key.startswith(("steps", "phi"))]
    return main(["ptq", *keys, "init=rtn", "evaluation.start_videos=false", f"run_dir={run_dir}", *words])


def test_the_tiny_models_videos_are_those_of_its_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ptq(tmp_path / "run", "bits=w4a8", *shallow(1), INT8) == DONE
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["attentions_quantized"] == ["blocks.0.attn1", "blocks.0.attn2"]
    assert (report["packed_codes_equal"], report["packed_vs_fake_max_abs"]) == (True, 0.0)
    assert report["trajectory_psnr_db"] == "inf"
    error = report["relative_error"]
    assert error["ptq"] == error["packed"]
    assert "2 in 8 bits" in (tmp_path / "run" / "report.html").read_text()
    packed, out = tmp_path / "run" / "packed", tmp_path / "out"
    assert main(["generate", f"packed={packed}", f"prompt={PROMPT}", f"out={out}"]) == DONE
    (of_the_run,) = (tmp_path / "run" / "videos").glob("*-packed.mp4")
    (video,) = out.iterdir()
    assert video.read_bytes() == of_the_run.read_bytes()
    together = ["devices=2", "context_parallel=2", f"out={tmp_path / 'together'}"]
    capsys.readouterr()
    assert main(["generate", f"packed={packed}", f"prompt={PROMPT}", *together]) == BAD_INPUT
    assert "has 2 attentions in 8 bits, and that of a shared sequence is diffusers' own" in capsys.readouterr().err


def test_a_cogvideox_folder_is_packed_and_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_cogvideox_folder(tmp_path / "model", "2b")
    keys = [*tiny_keys("cogvideox", folder), "logger=csv", "evaluation.samples=0", "init=rtn", "bits=w4a8"]
    keys += [f"calibration.cache={tmp_path / 'cache'}", "calibration.videos=1", "calibration.steps=1"]
    keys += ["profile.attention={kind:int8,smooth_key:auto,rotation:auto}", f"run_dir={tmp_path / 'run'}"]
    assert main(["ptq", *keys, "dry_run=true"]) == DONE
    assert "calibration: attention from 1 videos of 1 steps" in capsys.readouterr().out
    assert main(["ptq", *keys]) == DONE
    (errors,) = (tmp_path / "cache").glob("attention-*.json")
    assert [len(of) for of in json.loads(errors.read_text()).values()] == [4, 4]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    loaded = load_packed(tmp_path / "run" / "packed")
    assert report["attentions_quantized"] == list(packed_attentions(loaded))
    assert len(packed_attentions(loaded)) == 2
    options = {"height": 32, "width": 48, "num_frames": 9, "sampling_frames": 9, "path": str(folder)}
    family = load_leaf("model", "cogvideox", **options, dtype="float32", text_encoder_dtype="float32")
    videos = [
        family.generate(
            load_packed(tmp_path / "run" / "packed", kernel=kernel), ["a dog"], [7], num_steps=1, guidance_scale=1.0
        )
        for kernel in ("auto", "reference")
    ]
    assert torch.equal(*videos)


@pytest.mark.parametrize("profile", [name for name in leaf_names("profile") if name != "paper"])
def test_profiles_of_other_runtimes_refuse_it(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bits = {"svdq_g64": "4", "convrot": "4"}.get(profile, "w4a8")
    for attention in (INT8, "profile.attention=int8_qk"):
        assert ptq(tmp_path / "run", f"profile={profile}", f"bits={bits}", attention) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert f"profile={profile} is for" in line
        assert f"{attention} computes attention with integers, which that does not have; choose profile=paper" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile.attention=int4"], "profile.attention='int4' is unknown; use none, int8 or int8_qk"),
        (["profile.attention={kind:int8,rotate:true}"], "profile.attention.rotate"),
        (["profile.attention={kind:none,clips:true}"], "options of an attention that is not quantized"),
        (["profile.attention={kind:int8,clips:1}"], "profile.attention.clips"),
        (["profile.attention={kind:int8,clips:auto}"], "profile.attention.clips='auto' is neither true nor false"),
        (
            ["profile.attention={kind:int8,rotation:some}"],
            "profile.attention.rotation='some' is neither true, false nor auto",
        ),
        (["profile.attention={kind:int8,include:[encoder.*]}"], "matches none of the 6 attentions"),
        ([INT8, "export=comfy", "profile=paper"], "computes attention in floating point, and blocks.0.attn1"),
    ],
)
def test_what_has_no_meaning_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ptq(tmp_path / "run", "bits=w4a8", *words) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([INT8, "strategy.context_parallel=2", "devices=2"], "strategy.context_parallel=2 and profile.attention=int8"),
        (
            [
                "init=mse",
                "profile.attention={kind:int8,clips:true}",
                "strategy=fsdp",
                "devices=2",
                "strategy.low_host_memory=true",
            ],
            "learned clips of attention are in no file",
        ),
        (
            [
                "init=mse",
                "profile.attention={kind:int8,rotation:auto}",
                "strategy=fsdp",
                "devices=2",
                "strategy.low_host_memory=true",
            ],
            "forms of attention are chosen by what a whole model samples; write true or false in place of auto",
        ),
    ],
)
def test_ways_to_train_that_can_not_have_it(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "logger=csv", "steps=4", f"run_dir={tmp_path / 'run'}", "dry_run=true", *words]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
