"""`qvgen evaluate`: what it writes, that a stop anywhere changes no byte of it, and input that does not fit, by name.

The model is a packed one of a short run; the metrics are those that need no network.
"""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config.leaves import load_leaf
from qvgen.config.processes import launched_world
from qvgen.data.video import write_video
from qvgen.data.video_reader import read_video
from qvgen.deploy.checkpoint import load_packed
from qvgen.evaluation.comparison import video_name
from qvgen.evaluation.distance import RelativeError, psnr_db
from qvgen.evaluation.placement import placed
from qvgen.evaluation.suite.case import noise_seed
from tests.stops import run_stopped

PROMPTS = ("a red three moving up left", "a blue five standing still")
METRICS = "suite.metrics=[psnr,ssim,temporal_flickering,prediction_error_high]"
FILES = {"evaluation.json", "evaluation.html", "evaluation.md", "evaluation.tex", "evaluation.csv"}


@pytest.fixture(scope="module")
def command(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command without its folder; the reference's videos are kept in one place."""
    kept = tmp_path_factory.mktemp("references")
    return [
        "evaluate", f"run_dir={short_run}", f"prompts=[{','.join(PROMPTS)}]", "seeds=2", METRICS,
        "+metric.prediction_error_high.videos=1", f"references={kept}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*command, f"out={out}"]) == DONE
    return out


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_the_numbers_are_those_of_the_videos(command: list[str], whole: Path, short_run: Path) -> None:
    """Sampled again here with the same noise by both models, one video at a time, and measured by another path."""
    content = json.loads((whole / "evaluation.json").read_text())
    assert (content["num_videos"], content["num_prompts"], content["skipped"]) == (4, 2, {})
    assert list(content["metrics"]) == ["psnr", "ssim", "temporal_flickering", "prediction_error_high"]
    family = load_leaf("model", "tiny", num_inference_steps=2)
    models = load_packed(short_run / "packed"), family.load_teacher()
    for number, video in enumerate(content["videos"]):
        caption = PROMPTS[number // 2]
        assert (video["caption"], video["seed"]) == (caption, noise_seed(caption, number % 2))
        ours, theirs = (
            family.generate(model, [caption], [video["seed"]], num_steps=2, guidance_scale=family.guidance_scale)[0]
            for model in models
        )
        assert video["values"]["psnr"] == pytest.approx(psnr_db(ours, theirs, max_value=255), rel=1e-12)
        changes = theirs.double().diff(dim=0).abs().mean()
        assert video["reference_values"]["temporal_flickering"] == pytest.approx(float((255 - changes) / 255))
        assert ("prediction_error_high" in video["values"]) == (number == 0)
    values = [video["values"]["psnr"] for video in content["videos"]]
    entry = content["metrics"]["psnr"]
    assert entry["value"] == pytest.approx(np.mean(values))
    assert entry["low"] <= entry["value"] <= entry["high"]
    assert content["metrics"]["temporal_flickering"]["difference"]["videos_to_settle"] >= 2
    assert entry["better"] == "higher"
    assert entry["num_videos"] == 4


def test_prediction_error_is_that_of_the_reference_s_own_inputs(whole: Path, short_run: Path) -> None:
    content = json.loads((whole / "evaluation.json").read_text())
    family = load_leaf("model", "tiny", num_inference_steps=2)
    packed, teacher = load_packed(short_run / "packed"), family.load_teacher()
    error, forward = RelativeError(), teacher.forward

    def both(*arguments: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = forward(*arguments, **named)
        if float(named["timestep"].mean()) >= 667:
            error.update(packed(*arguments, **named)[0], output[0])
        return tuple(output)

    teacher.forward = both
    family.generate(
        teacher, [PROMPTS[0]], [noise_seed(PROMPTS[0], 0)], num_steps=2, guidance_scale=family.guidance_scale
    )
    found = content["videos"][0]["values"]["prediction_error_high"]
    assert found == pytest.approx(error.compute(), rel=1e-9)


def test_page_and_rows_say_the_same(whole: Path) -> None:
    content = json.loads((whole / "evaluation.json").read_text())
    page = (whole / "evaluation.html").read_text()
    assert page.count("data:video/mp4;base64,") == 8  # all four pairs
    assert 'src="http' not in page
    rows = list(csv.DictReader((whole / "evaluation.csv").read_text().splitlines()))
    assert [row["metric"] for row in rows] == list(content["metrics"])
    assert float(rows[0]["value"]) == content["metrics"]["psnr"]["value"]
    markdown, latex = (whole / "evaluation.md").read_text(), (whole / "evaluation.tex").read_text()
    shown = f"{content['metrics']['psnr']['value']:.1f} ["
    assert all(shown in text for text in (page, markdown, latex))
    assert latex.count("&") == 8
    assert "PSNR (dB) $\\uparrow$" in latex
    assert "full precision" in markdown


def test_a_stopped_evaluation_goes_on_to_the_same_bytes(
    command: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped where a video, a measurement of the models, one of the videos, and a result is put in place."""
    out, own = tmp_path / "out", tmp_path / "references"
    words = [*command[:-1], f"references={own}", f"out={out}"]
    for number, part in ((signal.SIGINT, "references"), (signal.SIGTERM, "videos"), (signal.SIGINT, "models"),
                         (signal.SIGINT, "measured/videos/01-a-blue"), (signal.SIGTERM, "evaluation.csv")):  # fmt: skip
        assert run_stopped(words, number, "os.rename", part) != DONE
        line = capsys.readouterr().err.splitlines()[-1]
        assert "; continue with: qvgen evaluate run_dir=" in line, line
    assert main(words) == DONE
    capsys.readouterr()
    assert results(out) == results(whole)
    dates = {path: path.stat().st_mtime_ns for path in (out / "videos").glob("*.safetensors")}
    assert len(dates) == 4
    (next((out / "measured" / "videos").iterdir())).unlink()
    damaged = sorted(own.glob("*/*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert main(words) == DONE  # nothing but what was lost is made again
    assert {path: path.stat().st_mtime_ns for path in (out / "videos").glob("*.safetensors")} == dates
    assert results(out) == results(whole)


def test_two_processes_leave_the_bytes_of_one(command: list[str], whole: Path, tmp_path: Path) -> None:
    """Both sample and measure, whoever is free; nothing is made twice."""
    out, references = tmp_path / "out", tmp_path / "references"
    assert main([*command[:-1], f"references={references}", f"out={out}", "devices=2"]) == DONE
    assert results(out) == results(whole)
    assert len([*out.glob("videos/*.safetensors"), *references.glob("*/*.safetensors")]) == 8
    assert (out / "logs" / "rank1.log").is_file()


def test_tasks_of_a_launcher_share_out_the_work(
    command: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rank 1 comes first, makes everything and writes no result; rank 0 finds it made, and writes it."""
    out = tmp_path / "out"
    step = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
    }  # fmt: skip
    try:
        for name, value in step.items():
            monkeypatch.setenv(name, value)
        for rank in (1, 0):
            monkeypatch.setenv("SLURM_PROCID", str(rank))
            monkeypatch.setenv("SLURM_LOCALID", str(rank))
            assert main([*command, f"out={out}"]) == DONE
            assert (out / "evaluation.json").exists() == (rank == 0)
        assert main([*command, f"out={out}", "devices=2"]) == BAD_INPUT
        assert "devices=2: SLURM started 2 processes, which share out the work" in capsys.readouterr().err
    finally:
        launched_world.enter(None)
    assert results(out) == results(whole)


def test_the_reference_is_sampled_once_for_all(
    command: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (kept,) = [word.partition("=")[2] for word in command if word.startswith("references=")]
    dates = {path: path.stat().st_mtime_ns for path in Path(kept).glob("*/*.safetensors")}
    assert len(dates) == 4
    turned = [f"prompts=[{','.join(PROMPTS[::-1])}]" if word.startswith("prompts") else word for word in command]
    assert main([*turned, f"out={tmp_path / 'out'}", "seeds=3", "dry_run=true"]) == DONE
    shown = capsys.readouterr().out
    assert "6 videos of 2 prompts" in shown
    assert "full precision: 2 of them are to be sampled" in shown
    assert main([*command, f"out={tmp_path / 'out'}", f"against={whole}", "suite.metrics=[psnr]"][:-1]) == DONE
    assert {path: path.stat().st_mtime_ns for path in Path(kept).glob("*/*.safetensors")} == dates
    (run_dir,) = [word.partition("=")[2] for word in command if word.startswith("run_dir=")]
    assert f"against {Path(run_dir).name}: PSNR" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["against"]["metrics"]["psnr"]
    assert (found["value"], found["p"], found["videos_to_settle"]) == (0.0, 1.0, None)


def test_folders_of_files_are_measured_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, reference = tmp_path / "mine", tmp_path / "theirs"
    frames = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 3), dtype=np.uint8)
    for folder, shift in ((videos, 3), (reference, 0)):
        for index in range(3):
            write_video(folder / f"clip{index}.mp4", frames[index] // 2 + shift, fps=8, scale=4)
    words = ["evaluate", f"videos={videos}", f"reference={reference}", f"out={tmp_path / 'out'}"]
    assert main([*words, "suite.metrics=[psnr,clipsim,prediction_error_low]"]) == DONE
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["metrics"]["psnr"]["value"] > 35
    assert content["settings"] == {}
    assert set(content["skipped"]) == {"clipsim", "prediction_error_low"}
    assert "needs the captions" in content["skipped"]["clipsim"]
    capsys.readouterr()
    assert (
        main([*words[:2], "reference=null", "suite.metrics=[psnr,temporal_flickering]", f"out={tmp_path / 'b'}"])
        == DONE
    )
    assert "reference=null" in capsys.readouterr().out
    write_video(reference / "clip1.mp4", frames[1], fps=8, scale=2)
    assert main([*words, "suite.metrics=[psnr]", "overwrite=true"]) == BAD_INPUT
    assert "clip1: the video has 64x64 pixels and the reference 32x32" in only_line(capsys)


def test_files_are_measured_beside_the_model_that_their_names_ask_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompt and seed are in the names; the reference is sampled with them, and what does not fit it is refused."""
    family, videos = load_leaf("model", "tiny"), tmp_path / "videos"
    drawn = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 16, 3), dtype=np.uint8)
    paths = [videos / video_name(index, caption, seed=5, variant="packed") for index, caption in enumerate(PROMPTS)]
    for path, frames in zip(paths, drawn, strict=True):
        write_video(path, frames, fps=family.fps, scale=1)
    words = [
        "evaluate", f"videos={videos}", "model=tiny", f"prompts=[{','.join(PROMPTS)}]", "num_steps=2",
        "suite.metrics=[psnr]", f"references={tmp_path / 'references'}", f"out={tmp_path / 'out'}",
    ]  # fmt: skip
    assert main(words) == DONE
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [(video["caption"], video["seed"]) for video in content["videos"]] == [(caption, 5) for caption in PROMPTS]
    with placed(teacher := family.load_teacher()):
        theirs = family.generate(teacher, [PROMPTS[1]], [5], num_steps=2, guidance_scale=family.guidance_scale)[0]
    found = content["videos"][1]["values"]["psnr"]
    assert found == pytest.approx(psnr_db(torch.from_numpy(read_video(paths[1])), theirs, max_value=255), rel=1e-9)
    capsys.readouterr()
    for frames, rate, message in (
        (drawn[0], 2 * family.fps, f"has {2 * family.fps} frames a second, and the model's videos {family.fps}"),
        (drawn[0, :4], family.fps, "seed5: the video is 4 frames of 16x16 and the reference 8 frames of 16x16"),
    ):
        write_video(paths[0], frames, fps=rate, scale=1)
        assert main([*words, "overwrite=true"]) == BAD_INPUT
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_metric_of_the_user_s_own_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class beside the command and a file in its --config-dir, as for every other leaf; measured again if it changes."""
    monkeypatch.chdir(tmp_path)
    source = """
from qvgen.evaluation.metrics.base import VideoMetric

class Brightness(VideoMetric):
    title, unit, source = "brightness", "levels", "mean of all values"
    high, better, paired = 255.0, "neither", False

    def __init__(self, *, factor: float) -> None:
        self.factor = factor

    def measure(self, pair):
        return float(pair.video.frames.double().mean()) * self.factor
"""
    Path("my_metrics.py").write_text(source)
    Path("conf/metric").mkdir(parents=True)
    Path("conf/metric/brightness.yaml").write_text("_target_: my_metrics.Brightness\nfactor: 1.0\n")
    write_video("videos/a.mp4", np.full((2, 32, 32, 3), 80, dtype=np.uint8), fps=8, scale=1)
    words = ["evaluate", "videos=videos", "reference=null", "suite.metrics=[brightness]", "--config-dir", "conf"]
    for further, expected in (([], 80), (["+metric.brightness.factor=2", "overwrite=true"], 160)):
        assert main([*words, *further]) == DONE
        entry = json.loads(Path("evaluation/evaluation.json").read_text())["metrics"]["brightness"]
        assert entry["value"] == pytest.approx(expected, abs=4)
        assert (entry["unit"], entry["range"], entry["low"]) == ("levels", [0.0, 255.0], None)
    assert main([word for word in words if word not in ("--config-dir", "conf")]) == BAD_INPUT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of packed=DIR, run_dir=RUN and videos=FOLDER, not none"),
        (["packed=a", "videos=b"], "not packed and videos"),
        (["packed=nowhere"], "nowhere/manifest.json is missing"),
        (["videos=nowhere", "reference=null"], "videos=nowhere is no folder"),
        (["videos=nowhere"], "videos=FOLDER reference=teacher needs model=NAME and prompts=FILE"),
        (["packed=a", "devices=0"], "devices=0 must be greater than 0"),
        (["packed=a", "seeds=0"], "seeds=0 must be greater than 0"),
        (["packed=a", "suite=fats"], "unknown suite=fats; did you mean 'fast'"),
        (["packed=a", "suite.metrics=[]"], "suite.metrics=[] is empty"),
        (["packed=a", "suite.metrics=[psnr,psnr]"], "suite.metrics names psnr twice"),
        (["packed=a", "against=nowhere"], "against=nowhere holds no evaluation: nowhere/evaluation.json can't be read"),
        (["packed=a", "+metric.psnr=1"], "metric.psnr=1 is a section; write +metric.psnr.KEY=VALUE"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["evaluate", *words, f"out={tmp_path / 'out'}"]) == BAD_INPUT
    assert message in only_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["suite.metrics=[psnrr]"], "unknown metric=psnrr; did you mean 'psnr'"),
        (["suite.metrics=[clipsim]"], "none of the 1 metrics can be measured; clipsim: no folder of a CLIP"),
        (["suite.metrics=[ssim]", "+metric.psnr.x=1"], "metric.psnr has no effect: suite.metrics names no psnr"),
        (["suite.metrics=[psnr]", "+metric.psnr.x=1"], "unknown key 'metric.x'"),
        (["suite.metrics=[psnr]", "prompts=[a purple cow]"], "caption 'a purple cow' is no 'a COLOR DIGIT MOTION'"),
        (
            ["suite.metrics=[psnr]", "prompts=[a red one standing still,a red one standing still]"],
            "twice with the seed",
        ),
    ],
)
def test_what_the_model_and_the_metrics_refuse_is_one_line(
    words: list[str], message: str, short_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ["evaluate", f"run_dir={short_run}", f"out={tmp_path / 'out'}", f"references={tmp_path / 'references'}"]
    assert main([*common, *words]) == BAD_INPUT
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_another_evaluation_is_not_replaced_in_silence(
    command: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    assert main([*command, f"out={out}", "seeds=1"]) == BAD_INPUT
    assert "evaluation.json is of another evaluation; write out=ANOTHER, or overwrite=true" in only_line(capsys)
    assert results(out) == results(whole)
    assert main([*command, f"out={out}", "seeds=1", "overwrite=true"]) == DONE
    assert json.loads((out / "evaluation.json").read_text())["num_videos"] == 2
