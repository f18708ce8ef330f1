"""`qvgen generate`: mp4 files from a packed directory alone, with the noise that the run's own videos had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config.leaves import load_leaf
from qvgen.deploy.checkpoint import load_packed
from qvgen.layers.packed_linear import PackedLinear
from qvgen_kernels import LinearSpec, available_kernels
from tests.runs import train_config

PROMPT = "a red three moving up left"


@pytest.fixture(scope="module")
def packed(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed directory far from its run."""
    return Path(shutil.copytree(short_run / "packed", tmp_path_factory.mktemp("elsewhere") / "packed"))


def test_the_videos_are_those_of_the_run(
    packed: Path, short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", f"packed={packed}", f"prompt={PROMPT}", f"out={tmp_path / 'out'}"]) == DONE
    (video,) = (tmp_path / "out").iterdir()
    assert capsys.readouterr().out.splitlines() == [str(video)]
    (of_the_run,) = (short_run / "videos").glob("*-packed.mp4")
    assert video.name == of_the_run.name
    assert video.read_bytes() == of_the_run.read_bytes()


def test_one_video_for_each_caption_and_seed(packed: Path, tmp_path: Path) -> None:
    captions = f"prompt=[{PROMPT},a blue five standing still]"
    assert main(["generate", f"packed={packed}", captions, "seed=[1,2]", "num_steps=1", f"out={tmp_path}"]) == DONE
    videos = sorted(tmp_path.iterdir())
    assert [video.name.partition("-")[2] for video in videos] == [
        "a-red-three-moving-up-left-seed1-packed.mp4",
        "a-red-three-moving-up-left-seed2-packed.mp4",
        "a-blue-five-standing-still-seed1-packed.mp4",
        "a-blue-five-standing-still-seed2-packed.mp4",
    ]
    assert len({video.read_bytes() for video in videos}) == 4


def test_earlier_videos_are_not_written_over_in_silence(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", f"packed={packed}", f"prompt={PROMPT}", f"out={tmp_path}"]
    assert main([*arguments, "num_steps=1", "seed=[1,2]"]) == DONE
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    for dry_run in ("true", "false"):
        assert main([*arguments, "num_steps=2", "seed=[3,2]", f"dry_run={dry_run}"]) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert "holds 1 of the 2 files that would be written, from an earlier call (first: 01-a-red-three" in line
        assert "overwrite=true" in line
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main([*arguments, "num_steps=2", "seed=[3,2]", "overwrite=true"]) == DONE
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {f"0{index}-a-red-three-moving-up-left-seed{seed}-packed.mp4" for index, seed in ((0, 3), (1, 2))}


def test_the_video_is_the_same_on_every_backend(packed: Path) -> None:
    family = train_config().model
    names = available_kernels(LinearSpec(in_features=8, out_features=8, weight_bits=4, activation_bits=4))
    videos = []
    for name in names:
        transformer = load_packed(packed, kernel=name)
        videos.append(family.generate(transformer, [PROMPT], [7], num_steps=2, guidance_scale=2.0))
        assert {layer.prepack_() for layer in transformer.modules() if isinstance(layer, PackedLinear)} == {name}
    assert "reference" in names
    assert all(torch.equal(videos[0], video) for video in videos)


def test_norms_are_fused_where_that_is_asked_for(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qvgen.deploy.checkpoint")
    for option, said in (("fused_norms=true", True), ("fused_norms=false", False)):
        caplog.clear()
        arguments = [f"packed={packed}", f"prompt={PROMPT}", "num_steps=1", f"out={tmp_path / str(said)}", option]
        assert main(["generate", *arguments]) == DONE
        assert any("blocks gated, with their norms" in message for message in caplog.messages) == said
    capsys.readouterr()
    assert main(["generate", "model=tiny", "fused_norms=true", f"out={tmp_path / 'none'}"]) == BAD_INPUT
    assert "fused_norms=true is of packed layers; write packed=DIR" in capsys.readouterr().err


def test_the_seed_alone_decides_the_noise(packed: Path) -> None:
    family = train_config().model
    transformer = load_packed(packed)

    def generate(captions: list[str], seeds: list[int]) -> torch.Tensor:
        return family.generate(transformer, captions, seeds, num_steps=2, guidance_scale=2.0)

    alone = generate([PROMPT], [7])
    batch = generate(["a blue five standing still", PROMPT, PROMPT], [1, 7, 8])
    # A batch mate changes no input; sums of another batch size may differ in the last bit, and a rounded pixel with them.
    assert (batch[1].int() - alone[0].int()).abs().max() <= 1
    assert (batch[2].int() - alone[0].int()).abs().max() > 10


def test_the_manifest_carries_what_the_family_needs(packed: Path) -> None:
    base = json.loads((packed / "manifest.json").read_text())["base"]
    family = load_leaf("model", base["name"], **base["arguments"])
    assert family.num_inference_steps == 2  # the run's own, not the default's
    assert "weights" not in base["arguments"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("prompt=a purple cow", "caption 'a purple cow' is no 'a COLOR DIGIT MOTION'"),
        ("prompt=[]", "prompt=[] is empty"),
        ("num_steps=0", "num_steps=0 must be greater than 0"),
        ("seed=-1", "seed=-1 is outside"),
        ("guidance_scale=-1", "guidance_scale=-1.0 is negative"),
        ("kernel=fast", "kernel='fast' is unknown"),
        ("packed=nowhere", "nowhere/manifest.json is missing"),
    ],
)
def test_bad_input_writes_nothing(
    option: str, message: str, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"packed={packed}", f"out={tmp_path / 'out'}", option]
    assert main(["generate", *arguments]) == BAD_INPUT
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert message in line
    assert shown.out == ""
    assert not (tmp_path / "out").exists()


def test_a_directory_of_unknown_origin_is_refused(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "packed"))
    content = json.loads((copy / "manifest.json").read_text())
    for name, message in (("", "does not say which model it was made from"), ("../fold", "unknown model=../fold")):
        content["base"]["name"] = name
        (copy / "manifest.json").write_text(json.dumps(content))
        assert main(["generate", f"packed={copy}", f"out={tmp_path / 'out'}"]) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    content["base"]["name"] = "tiny"
    content["base"]["arguments"] = {"_target_": "qvgen.config.run_config.read_plain"}
    (copy / "manifest.json").write_text(json.dumps(content))
    assert main(["generate", f"packed={copy}", f"out={tmp_path / 'out'}"]) == BAD_INPUT
    assert "_target_" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
