"""Videos that two processes sample together, each a part of the tokens, against those of one process.

The model is `tiny`, of Wan's class, packed and in full precision. Every token is computed as one process does; on a CPU the
pixels of its videos are the same.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.data.video_reader import read_video
from qvgen.verbs._packed_family import load_family
from qvgen.verbs._shared_videos import check_shared_videos
from qvgen.verbs._video_request import read_request
from qvgen.verbs._video_sampler import VideoSampler
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder
from tests.stops import run_stopped
from tests.verbs.test_hub_models import tiny_keys

PROMPTS = ("a red three moving up left", "a blue five standing still")
TOGETHER = ("devices=2", "context_parallel=2")


def test_an_evaluation_is_that_of_one_process(short_run: Path, tmp_path: Path) -> None:
    metrics = ["suite.metrics=[psnr,prediction_error_high]", "+metric.prediction_error_high.videos=1"]
    found = []
    for name, words in (("one", ["devices=1"]), ("two", TOGETHER)):
        out = tmp_path / name
        command = ["evaluate", f"run_dir={short_run}", f"prompts=[{','.join(PROMPTS)}]", "seeds=1", *metrics]
        assert main([*command, "wandb=false", f"references={out}/references", f"out={out}", *words]) == DONE
        files = sorted([*(out / "videos").glob("*.safetensors"), *(out / "references").rglob("*.safetensors")])
        assert len(files) == 4
        videos = {str(file.relative_to(out)): load_file(file)["frames"] for file in files}
        found.append((videos, json.loads((out / "evaluation.json").read_text())))
    (one, alone), (two, together) = found
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [video["seed"] for video in together["videos"]] == [video["seed"] for video in alone["videos"]]
    for ours, theirs in zip(together["videos"], alone["videos"], strict=True):
        assert ours["values"] == pytest.approx(theirs["values"], rel=1e-6)
    log = (tmp_path / "two" / "logs" / "rank1.log").read_text()
    assert "Traceback" not in log
    assert "video 1 of 2" not in log  # rank 0 keeps the videos, and says so


def test_a_stopped_call_goes_on_behind_the_videos_that_are_there(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", f"packed={short_run / 'packed'}", f"prompt=[{','.join(PROMPTS)}]", "num_steps=1"]
    out = {name: tmp_path / name for name in ("one", "together", "apart")}
    assert main([*command, f"out={out['one']}"]) == DONE
    wanted = {path.name: path.read_bytes() for path in out["one"].glob("*.mp4")}
    assert len(wanted) == 2
    words = [*command, f"out={out['together']}", *TOGETHER]
    assert run_stopped(words, signal.SIGTERM, "os.rename", "00-a-red-three") != DONE
    assert "stopped after 1 of 2 videos, which are in" in capsys.readouterr().err
    (first,) = out["together"].glob("00-*.mp4")
    date = first.stat().st_mtime_ns
    assert main([*words, "dry_run=true"]) == DONE
    assert "2 processes: groups of 2, each of which shares one video's tokens out" in capsys.readouterr().out
    assert main(words) == DONE
    assert first.stat().st_mtime_ns == date
    assert ".mp4" not in (out["together"] / "logs" / "rank1.log").read_text()
    assert main([*command, f"out={out['apart']}", "devices=2"]) == DONE  # each a video
    for name in ("together", "apart"):
        assert {path.name: path.read_bytes() for path in out[name].glob("*.mp4")} == wanted
        assert not list(out[name].glob(".unfinished*"))


def test_two_groups_of_two_make_the_videos_of_one_process(short_run: Path, tmp_path: Path) -> None:
    groups = ("devices=4", "context_parallel=2")
    made = []
    for name, words in (("one", ["devices=1"]), ("four", groups)):
        out = tmp_path / name
        prompts = ",".join([*PROMPTS, "a green seven moving down"])
        command = ["evaluate", f"run_dir={short_run}", f"prompts=[{prompts}]", "seeds=1", "num_steps=2"]
        command += ["suite.metrics=[psnr]", "wandb=false", f"references={out}/references", f"out={out}"]
        assert main([*command, *words]) == DONE
        generated = ["generate", f"packed={short_run / 'packed'}", f"prompt=[{prompts}]", "num_steps=2"]
        assert main([*generated, f"out={out}/generated", *words]) == DONE
        files = sorted([*(out / "videos").glob("*.safetensors"), *(out / "references").rglob("*.safetensors")])
        frames = {str(file.relative_to(out)): load_file(file)["frames"] for file in files}
        frames |= {file.name: torch.from_numpy(read_video(file)) for file in (out / "generated").glob("*.mp4")}
        made.append(frames)
    one, four = made
    assert one.keys() == four.keys()
    assert len(one) == 9
    assert all(torch.equal(one[name], four[name]) for name in one)


def test_both_experts_share_a_videos_tokens_out(tmp_path: Path) -> None:
    words = [*tiny_keys("wan2.2-a14b", make_wan_folder(tmp_path / "model", "a14b")), "prompt=a red boat"]
    videos = []
    for name, more in (("one", ()), ("two", TOGETHER)):
        assert main(["generate", *words, f"out={tmp_path / name}", *more]) == DONE
        (file,) = (tmp_path / name).glob("*.mp4")
        videos.append(read_video(file))
    one, two = videos
    assert one.shape == two.shape
    assert np.abs(one.astype(int) - two).mean() < 1  # a lossy coder lies between
    config = build("generate", compose_plain("generate", words))
    family = load_family(config)
    first, second = VideoSampler(config, family, read_request(config, family)).transformers
    assert first is not second


def check(*words: str) -> None:
    config = build("generate", compose_plain("generate", [*words, *TOGETHER]))
    check_shared_videos(config, load_family(config))


def test_models_and_sizes_that_cannot_are_refused(tmp_path: Path) -> None:
    cogvideox = tiny_keys("cogvideox", make_cogvideox_folder(tmp_path / "cogvideox", "2b"))
    with pytest.raises(
        ValueError, match=r"^context_parallel=2 and model=cogvideox: a CogVideoXTransformer3DModel can't"
    ):
        check(*cogvideox)
    wan = tiny_keys("wan", make_wan_folder(tmp_path / "wan"))
    check(*wan)
    with pytest.raises(ValueError, match=r"are 1 tokens, .*; write context_parallel=1, or another size of the videos"):
        check(*wan, "model.sampling_frames=1", "model.height=16", "model.width=16")
    with pytest.raises(ValueError, match=r"^context_parallel=2 and model=wan2\.2-ti2v: .* a timestep for each token"):
        check(*tiny_keys("wan2.2-ti2v", make_wan_folder(tmp_path / "ti2v", "ti2v")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "model=tiny", "context_parallel=2"], "devices=1 can't be; write for example devices=2"),
        (["generate", "model=tiny", "context_parallel=0"], "context_parallel=0 must be greater than 0"),
        (
            ["evaluate", "videos=a", "reference=b", *TOGETHER],
            "context_parallel=2 is of sampling, and nothing is sampled",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
