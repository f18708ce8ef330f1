"""`model.negative_prompt` in everything that samples: another one is another video, and the report says which.

Checked against direct calls of the model's own sampling with the negative prompt as an argument.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config import TrainConfig
from qvgen.config.prompts.prompt import Prompts
from qvgen.evaluation.prompts import evaluation_prompts, shown_videos
from qvgen.evaluation.report.json_content import to_json_dict
from qvgen.evaluation.report.writer import render_html
from qvgen.evaluation.sampled_inputs import SampledInputs
from qvgen.models.guidance import texts_to_encode
from qvgen.training.calibration.statistics import SEED_OFFSET
from qvgen.training.mixed_precision.trajectory import sampling_of
from qvgen.verbs._parts import sampled_teacher
from tests.evaluation.report.example_report import report_data
from tests.models.hub_folders import make_wan_folder
from tests.parts import calibrated_model, video_callback
from tests.runs import train_config
from tests.verbs.test_hub_models import tiny_keys, write_clips

CAPTION = "a red three moving up left"
NEGATIVE, OTHER = "a blue five standing still", "a green six moving down"
QUICK = ("method=ptq", "steps=0", "init=smoothquant", "calibration.videos=1", "calibration.steps=2", "bits=4")


def config_of(tmp_path: Path, *more: str) -> TrainConfig:
    return train_config(*QUICK, f"calibration.cache={tmp_path}", f"model.negative_prompt={NEGATIVE}", *more)


def lines(*entries: dict[str, object]) -> str:
    return "\n".join(map(json.dumps, entries))


def sample(config: TrainConfig, caption: str, seed: int, negative: str | None) -> torch.Tensor:
    family = config.model
    found: torch.Tensor = family.generate(
        family.load_teacher(), [caption], [seed], num_steps=2, guidance_scale=2.0, negative_prompts=[negative]
    )
    return found[0]


def test_the_models_own_counts_where_nothing_else_is_said(tmp_path: Path) -> None:
    family = config_of(tmp_path).model
    plain = train_config().model
    teacher = family.load_teacher()

    def videos(of: object, *, guidance: float = 2.0, negatives: Sequence[str | None] | None = None) -> torch.Tensor:
        found: torch.Tensor = of.generate(  # type: ignore[attr-defined]
            teacher, [CAPTION, CAPTION], [1, 2], num_steps=2, guidance_scale=guidance, negative_prompts=negatives
        )
        return found

    guided = videos(family)
    assert torch.equal(guided, videos(plain, negatives=[NEGATIVE, NEGATIVE]))
    assert torch.equal(videos(plain), videos(family, negatives=["", ""]))
    assert not torch.equal(guided, videos(plain))
    mixed = videos(family, negatives=[None, ""])
    assert torch.equal(mixed[0], guided[0])
    assert not torch.equal(mixed[1], guided[1])
    assert torch.equal(videos(family, guidance=1.0), videos(plain, guidance=1.0))
    with pytest.raises(ValueError, match="2 captions and 1 negative prompts"):
        videos(plain, negatives=[""])


def test_validation_samples_with_it_and_with_a_lines_own(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines({"prompt": CAPTION, "seed": 7}, {"prompt": CAPTION, "seed": 7, "negative_prompt": OTHER}))
    config = config_of(tmp_path, f"evaluation.prompts={file}", "evaluation.videos=2", "evaluation.video_every_steps=1")
    teacher = config.model.load_teacher()
    videos = video_callback(config, run_dir=tmp_path, teacher=teacher, encode=None)
    assert videos is not None
    assert (videos.files.seeds, videos.files.negatives) == ([7, 7], [NEGATIVE, OTHER])
    for index, negative in enumerate((NEGATIVE, OTHER)):
        frames = videos._sample(teacher, index)
        assert np.array_equal(frames, sample(config, CAPTION, 7, negative).numpy())
        videos.files.write_student(index, frames, step=0, teacher=None, measured={})
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("validation/step-000000/*.json"))]
    assert [record["negative_prompt"] for record in records] == [NEGATIVE, OTHER]


def test_calibration_samples_with_it(tmp_path: Path) -> None:
    """Statistics have a key of their own for each negative prompt and seed, and are those of the videos of that prompt."""
    found = {}
    for name, line in {
        "own": {"prompt": CAPTION, "negative_prompt": NEGATIVE},
        "models": {"prompt": CAPTION},
        "other": {"prompt": CAPTION, "negative_prompt": OTHER},
        "seed": {"prompt": CAPTION, "seed": 7},
    }.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text(lines(line))
        config = config_of(tmp_path, f"calibration.prompts={file}")
        teacher = config.model.load_teacher()
        calibrated = calibrated_model(config, teacher=teacher, encode=config.model.encode, num_bands=50)
        found[name] = (calibrated.folder, calibrated("proj_out").abs_max)
    assert len({folder for folder, _ in found.values()}) == 4
    maxima = {name: abs_max for name, (_, abs_max) in found.items()}
    assert torch.equal(maxima["own"], maxima["models"])
    assert not torch.equal(maxima["own"], maxima["other"])
    assert not torch.equal(maxima["seed"], maxima["models"])
    prompts = Prompts.of(config.model.prompts)
    sampling = sampling_of(calibrated.teacher, prompts, videos=2, steps=2, seed_offset=1)
    assert (sampling.negatives, sampling.seeds) == ((None, None), (43, 44))
    assert SEED_OFFSET == 10_000


def test_recorded_inputs_have_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, "evaluation.samples=2")
    inputs = SampledInputs(
        sampled_teacher(config, config.model.load_teacher(), encode=config.model.encode),
        prompts=evaluation_prompts(config.evaluation, config.model),
        num_samples=2,
        num_steps=config.calibration.steps,
    )
    _, named = inputs._calls[0]
    first = config.model.prompts[0]
    assert torch.equal(named["encoder_hidden_states"], config.model.encode([first, NEGATIVE])["encoder_hidden_states"])


def test_the_report_says_which(short_run: Path) -> None:
    report = json.loads((short_run / "report.json").read_text())
    assert report["quality"]["negative_prompt"] == report["videos"][0]["negative_prompt"] == ""
    assert "guidance 2, negative prompt empty." in (short_run / "report.html").read_text()
    data = report_data()
    own, others = replace(data.videos[0], negative_prompt="grey <b>"), data.videos[1:]
    told = replace(data, quality=replace(data.quality, negative_prompt="blurred"), videos=(own, *others))
    content = to_json_dict(told)
    assert content["quality"]["negative_prompt"] == "blurred"
    assert [video["negative_prompt"] for video in content["videos"]] == ["grey <b>", *["blurred"] * len(others)]
    page = render_html(told, {})
    assert "negative prompt “blurred”" in page
    assert "negative prompt “grey &lt;b&gt;”" in page
    unguided = to_json_dict(replace(data, quality=replace(data.quality, negative_prompt=None)))
    assert unguided["videos"][0]["negative_prompt"] is None


def test_shown_videos_take_the_files_seeds(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines({"prompt": CAPTION, "seed": [7, 8]}))
    config = config_of(tmp_path, f"evaluation.prompts={file}", "evaluation.videos=3")
    shown = shown_videos(config.evaluation, config.model, seed=config.seed)
    assert [video.seed for video in shown] == [7, 8, 44]


def test_generate_reads_prompts_seeds_and_negative_prompts_from_a_file(
    short_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = tmp_path / "my prompts.jsonl"
    file.write_text(
        lines(
            {"prompt": CAPTION},
            {"prompt": CAPTION, "seed": [4, 5]},
            {"prompt": CAPTION, "seed": 3, "negative_prompt": OTHER},
        )
    )
    common = ["generate", f"packed={short_run / 'packed'}", "seed=3"]
    assert main([*common, f"prompts={file}", f"negative_prompt={NEGATIVE}", f"out={tmp_path / 'file'}"]) == DONE
    assert "3 prompts" not in caplog.text
    assert "2 prompts name their own seeds; seed=[3] counts for the other 1" in caplog.messages
    assert f"negative prompt: {NEGATIVE!r} | {OTHER!r}" in caplog.messages
    found = sorted((tmp_path / "file").iterdir())
    words = "a-red-three-moving-up-left"
    assert [path.name for path in found] == [
        f"{index:02d}-{words}-seed{seed}-packed.mp4" for index, seed in enumerate((3, 4, 5, 3))
    ]
    for key, name in ((NEGATIVE, 0), (OTHER, 3)):
        out = tmp_path / key.replace(" ", "-")
        assert main([*common, f"prompt={CAPTION}", f"negative_prompt={key}", f"out={out}"]) == DONE
        (alone,) = out.iterdir()
        assert alone.read_bytes() == found[name].read_bytes()
    assert found[0].read_bytes() != found[3].read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("prompt=a red three moving up", "prompts=[a red six moving up]"),
            "prompt=... and prompts=FILE are given both",
        ),
        (("prompt=mine.txt",), "prompt=mine.txt names a file; write prompts=mine.txt"),
        (("prompts=mine.txt",), "prompts=mine.txt can't be read as a text file (No such file or directory)"),
        (("negative_prompt=x", "guidance_scale=1"), "negative_prompt has no effect with guidance_scale=1.0"),
        (("negative_prompt=a purple cow",), "caption 'a purple cow' is no 'a COLOR DIGIT MOTION'"),
    ],
)
def test_what_generate_refuses(
    overrides: tuple[str, ...], message: str, short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", f"packed={short_run / 'packed'}", f"out={tmp_path / 'out'}", *overrides]
    assert main(arguments) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_cache_holds_it_beside_the_empty_caption(tmp_path: Path) -> None:
    """Precompute leaves nothing for a training's text encoder, with the model's negative prompt and with a file's."""
    folder, clips = make_wan_folder(tmp_path / "model"), write_clips(tmp_path / "clips", fps=16)
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines({"prompt": "a red boat", "negative_prompt": "two dogs"}))
    keys = [*tiny_keys("wan", folder), f"data.path={clips}", f"data.cache={tmp_path / 'cache'}"]
    assert main(["precompute", *keys, f"prompts={file}"]) == DONE
    config = train_config(*keys, f"evaluation.prompts={file}")
    family, source = config.model, config.data
    assert config.evaluation.prompts is not None
    needed = texts_to_encode(family, config.evaluation.prompts)
    assert needed == ["a red boat", "two dogs", family.negative_prompt]
    assert source.is_complete(family, captions=needed)
    cache = source.latent_cache(family)
    for text in ("", family.negative_prompt, "two dogs"):  # training drops captions by the first
        assert torch.equal(
            cache.encode([text])["encoder_hidden_states"], family.encode([text])["encoder_hidden_states"]
        )
    assert not torch.equal(*(cache.encode([text])["encoder_hidden_states"] for text in ("", family.negative_prompt)))
    assert not source.is_complete(family, captions=["never seen"])
    unguided = train_config(*keys, "model.guidance_scale=1").model
    assert texts_to_encode(unguided, Prompts.of(["a red boat"])) == ["a red boat"]
