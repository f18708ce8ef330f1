"""A run that is continued, folded or shared out is the run that began: each thing that it depends on is changed for once.

Checked against the uninterrupted run's bytes, and against the folder, which a refusal leaves as it was.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config import TrainConfig, UserError
from qvgen.config.run_config import read_config
from qvgen.data.cache_fill import fill
from qvgen.data.clip_source import ClipSource
from qvgen.models.weight_file import load_weights, save_weights
from qvgen.run_directory import write_plain
from qvgen.run_identity import IDENTITY_FILE, RunIdentity, read_changes
from qvgen.training.checkpoint.file import RUN_KEY
from qvgen.training.identity import check_worker
from qvgen.training.source_checksum import sources_checksum
from qvgen.training.start.file import LAYERS_FILE, START_FILE, load_start
from qvgen.verbs._parts import claim, run_facts
from tests.data.pooling_encoder import encode_captions, encode_video
from tests.data.video_files import write_clip
from tests.parts import prepared
from tests.runs import copy_until, one_block, packed_bytes, shallow, snapshot, train, train_config


def teacher_file() -> Path:
    """The weights of the run's model."""
    return Path(shallow(1)[1].removeprefix("model.weights="))


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's weights with another last layer, and their card."""
    tensors = load_weights(teacher_file())
    tensors["proj_out.weight"] *= 1.5
    return save_weights(tensors, tmp_path_factory.mktemp("teacher") / "other.safetensors", card={})


def test_another_teacher_is_refused_and_force_goes_on_and_the_report_says_so(
    block_run: Path, other_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy_until(block_run, tmp_path / "run", step=9)
    before = snapshot(run_dir)
    keys = [*one_block(), f"model.weights={other_teacher}"]
    assert train(run_dir, *keys, "resume=true") == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    there, here = (json.loads(path.with_suffix(".json").read_text())["sha256"][:12] for path in (
        teacher_file(), other_teacher,
    ))  # fmt: skip
    assert f"model.transformer was {there} and is {here}" in line
    assert "resume=force" in line
    assert snapshot(run_dir) == before

    assert train(run_dir, *keys, "resume=force") == DONE
    (change,) = json.loads((run_dir / "report.json").read_text())["changes"]
    assert (change["step"], change["name"], change["before"][:12]) == (9, "model.transformer", there)
    page = (run_dir / "report.html").read_text()
    assert "Continued with other code, models or data" in page
    assert "from step 9 on <b>model.transformer</b>" in page


def test_a_run_that_nothing_happened_to_says_nothing(block_run: Path) -> None:
    assert json.loads((block_run / "report.json").read_text())["changes"] == []
    assert 'id="changes"' not in (block_run / "report.html").read_text()


def test_every_checkpoint_holds_the_mark_of_its_run(block_run: Path) -> None:
    known = RunIdentity.read(block_run)
    assert known is not None
    assert known.run is not None
    for path in (block_run / "checkpoints").iterdir():
        assert torch.load(path, weights_only=True)[RUN_KEY] == known.run


@cache
def configured(*keys: str) -> TrainConfig:
    """The run's configuration, with changes."""
    return train_config(*one_block(), *keys)


def go_on(run_dir: Path, *keys: str, resume: Any = True) -> None:
    """What the verb does between the claim and the first thing that it writes."""
    claim(replace(configured(*keys), run_dir=run_dir, resume=resume)).release()


def record(run_dir: Path, name: str, value: str) -> None:
    """As if the run had begun with another fact."""
    known = RunIdentity.read(run_dir)
    assert known is not None
    assert name in known.facts
    replace(known, facts={**known.facts, name: value}).write(run_dir)


@pytest.fixture
def run_dir(block_run: Path, tmp_path: Path) -> Path:
    return copy_until(block_run, tmp_path / "copied to" / "another place", step=6)


def test_the_same_run_goes_on_in_another_folder_and_from_another_place(run_dir: Path, tmp_path: Path) -> None:
    before = snapshot(run_dir)
    shutil.copytree(teacher_file().parent, tmp_path / "assets")  # the same weights elsewhere
    go_on(run_dir)
    go_on(
        run_dir,
        f"model.weights={tmp_path / 'assets' / teacher_file().name}",
        "calibration.cache=elsewhere",
        "debug=true",
    )
    assert snapshot(run_dir) == before


def test_a_run_that_began_with_something_else_does_not_go_on(run_dir: Path) -> None:
    names = ["code.qvgen", "code.torch", "data.handwriting", "prompts.shown", "machine.device"]
    for name in names:
        record(run_dir, name, "another one")
        with pytest.raises(UserError, match=f"{name} was another one and is .*resume=force"):
            go_on(run_dir)
        go_on(run_dir, resume="force")
    go_on(run_dir)
    known = RunIdentity.read(run_dir)
    assert known is not None
    assert [(change.step, change.name) for change in known.changes] == [(6, name) for name in names]


def test_an_environment_that_changes_arithmetic_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # decides nothing: strategy.threads does
    go_on(run_dir)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with pytest.raises(UserError, match=r"machine\.settings was .* and is MKL_CBWR=COMPATIBLE"):
        go_on(run_dir)


def test_a_run_without_a_record_needs_force_unless_it_has_computed_nothing(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / IDENTITY_FILE).unlink()
    with pytest.raises(UserError, match=r"has no identity\.json"):
        go_on(run_dir)
    go_on(run_dir, resume="force")
    new = tmp_path / "new"
    go_on(new)
    (new / IDENTITY_FILE).unlink()  # killed between the claim and the record
    go_on(new)
    assert (new / IDENTITY_FILE).is_file()


def test_a_run_of_another_version_goes_on_with_its_keys_once_it_is_told_to(run_dir: Path) -> None:
    plain = read_config(run_dir)
    del plain["strategy"]["threads"]  # it began before there was this one
    plain["a_key_that_was"] = 3
    write_plain(run_dir / "config.yaml", plain)
    before = snapshot(run_dir)
    with pytest.raises(UserError, match=r"strategy\.threads is null there and 1 here.* another version .*resume=force"):
        go_on(run_dir)
    with pytest.raises(UserError, match=r"seed is 42 there and 1 here; choose another run_dir$"):
        go_on(run_dir, "seed=1", resume="force")
    assert snapshot(run_dir) == before
    go_on(run_dir, resume="force")
    assert read_config(run_dir)["strategy"]["threads"] == 1
    known = RunIdentity.read(run_dir)
    assert known is not None
    assert [change.name for change in known.changes] == ["config.a_key_that_was", "config.strategy.threads"]
    go_on(run_dir)


def test_a_run_goes_on_with_other_processes_and_its_record_says_so(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = snapshot(run_dir)
    with pytest.raises(UserError, match=r"run: seed is 42 there and 1 here; choose another run_dir$"):
        go_on(run_dir, "seed=1", "devices=2", "strategy=fsdp")
    with pytest.raises(UserError, match=r"run: accumulate is 2 there and 1 here; choose another run_dir$"):
        go_on(run_dir, "accumulate=1")
    assert snapshot(run_dir) == before
    go_on(run_dir, "devices=2", "strategy=fsdp", "accumulate=1")
    assert "goes on at step 6 with other processes: config.devices was 1 and is 2; config" in caplog.text
    wanted = {"accumulate": ("2", "1"), "devices": ("1", "2"), "strategy.name": ("single", "fsdp")}
    changes = {change.name.removeprefix("config."): change for change in read_changes(run_dir)}
    assert {name: (changes[name].before, changes[name].after) for name in wanted} == wanted
    assert {change.step for change in changes.values()} == {6}
    assert read_config(run_dir)["devices"] == 2
    go_on(run_dir, "devices=2", "strategy=fsdp", "accumulate=1")
    assert len(read_changes(run_dir)) == len(changes)


def test_validation_videos_of_another_teacher_are_made_again(run_dir: Path) -> None:
    kept = run_dir / "validation" / "teacher" / "00-teacher.npy"
    kept.parent.mkdir(parents=True)
    for name in ("code.torch", "model.transformer"):
        kept.touch()
        record(run_dir, name, "another one")
        go_on(run_dir, resume="force")
        assert kept.exists() == (name == "code.torch")


def test_a_process_that_sees_something_else_than_rank_0_ends(run_dir: Path) -> None:
    config = replace(configured(), run_dir=run_dir)
    record(run_dir, "machine.device", "the first of two different GPUs")
    check_worker(config.run_dir, config.plain, family=config.model, method=config.method)
    for name in ("model.transformer", "code.qvgen"):
        record(run_dir, name, "another one")
        with pytest.raises(UserError, match=rf"{name} was another one and is .*; give all processes the same files"):
            check_worker(config.run_dir, config.plain, family=config.model, method=config.method)


def test_folding_checks_code_and_model_and_no_more(
    run_dir: Path, block_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(block_run / "checkpoints", run_dir / "checkpoints", dirs_exist_ok=True)
    record(run_dir, "machine.device", "another one")
    record(run_dir, "data.handwriting", "another one")
    record(run_dir, "code.qvgen", "0.0.1, source of another day")
    before = snapshot(run_dir)
    assert main(["fold", f"run_dir={run_dir}"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "code.qvgen was 0.0.1, source of another day and is 0.1.0, source " in line
    assert line.endswith("; bring back what was there, or fold all the same with force=true")
    assert "another one" not in line
    assert snapshot(run_dir) == before
    assert main(["fold", f"run_dir={run_dir}", "force=true", f"out={tmp_path / 'out'}"]) == DONE
    assert snapshot(tmp_path / "out") == snapshot(block_run / "packed")


def test_one_bit_of_the_start_is_noticed_and_nothing_is_lost(
    block_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy_until(block_run, tmp_path / "run", step=9)
    flip(run_dir / START_FILE, -1000)
    before = snapshot(run_dir)
    assert train(run_dir, *one_block(), "resume=true") == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{run_dir / START_FILE} is damaged: its sha256 is " in line
    assert "delete it and write resume=true" in line
    assert snapshot(run_dir) == before
    flip(run_dir / START_FILE, -1000)
    flip(run_dir / LAYERS_FILE, -20)
    assert main(["fold", f"run_dir={run_dir}"]) == BAD_INPUT
    assert f"{run_dir / LAYERS_FILE} is damaged: its sha256 is " in capsys.readouterr().err.splitlines()[-1]
    for name in (START_FILE, LAYERS_FILE):
        (run_dir / name).unlink()
    assert train(run_dir, *one_block(), "resume=true") == DONE
    assert packed_bytes(run_dir) == packed_bytes(block_run)
    for name in (START_FILE, LAYERS_FILE):
        assert (run_dir / name).read_bytes() == (block_run / name).read_bytes()


def test_a_run_with_a_checkpoint_goes_on_without_the_starts_tensors(run_dir: Path) -> None:
    (run_dir / START_FILE).unlink()
    student, _ = prepared(configured())
    load_start(student, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(ValueError, match=f"{START_FILE} does not hold this run's start"):
        load_start(student, run_dir)


def test_the_sources_count_wherever_they_lie(tmp_path: Path) -> None:
    package = Path(__file__).parents[2] / "qvgen" / "quant"
    copied = shutil.copytree(package, tmp_path / "elsewhere" / "quant")
    (copied / "notes.txt").write_text("no source")
    whole = sources_checksum({"quant": package})
    assert sources_checksum({"quant": copied}) == whole
    (copied / "affine.py").write_bytes((copied / "affine.py").read_bytes() + b"# edited\n")
    assert sources_checksum({"quant": copied}) != whole
    shutil.copy(package / "affine.py", copied)
    (copied / "affine.py").rename(copied / "affine_grid.py")
    assert sources_checksum({"quant": copied}) != whole


class PoolingFamily:
    """As much of a family as clips are cut and encoded by."""

    name, latent_revision, text_revision = "pooling", "pool-4", "bytes-8"
    height, width, num_frames, fps = 32, 48, 5, 8
    sample_shape = (3, 5, 8, 12)
    encode_video = staticmethod(encode_video)
    encode = staticmethod(encode_captions)

    def check_clip(self, *, frames: int, height: int, width: int) -> None:
        pass


def clip_facts(table: Path, cache: Path, family: Any = None, **changes: Any) -> dict[str, str]:
    """Fill what is missing, and say what the samples are."""
    family = family or PoolingFamily()
    keys = {"videos": None, "fps": None, "buckets": None, "max_bad": 0.5, "held_out": 1, "timeout_s": 60.0}
    source = ClipSource(**{**keys, "path": str(table), "cache": str(cache), **changes})
    fill(source.latent_cache(family), source.table(), encode_video=encode_video, encode_captions=encode_captions)
    return source.identity(family)


def write_table(folder: Path, rows: dict[str, str]) -> None:
    lines = [f"{name},{text}" for name, text in rows.items()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines, ""]))


def test_clips_count_by_their_content_and_captions(tmp_path: Path) -> None:
    folder, cache = tmp_path / "clips", tmp_path / "cache"
    folder.mkdir()
    rows = {f"{index}.mp4": f"clip number {index}" for index in range(4)}
    for index, name in enumerate(rows):
        write_clip(folder / name, 10 + index, fps=8)
    write_table(folder, rows)
    whole = clip_facts(folder, cache)
    assert whole["clips"].startswith("4 clips, ")

    moved = Path(shutil.copytree(folder, tmp_path / "moved"))  # other dates too
    for name in rows:
        (moved / name).touch()
    shutil.copytree(cache, tmp_path / "moved cache")
    assert clip_facts(moved, tmp_path / "moved cache") == whole
    (moved / "0.mp4").rename(moved / "first.mp4")
    write_table(moved, {"first.mp4": "clip number 0"} | {name: rows[name] for name in list(rows)[1:]})
    assert clip_facts(moved, tmp_path / "moved cache") == whole

    write_table(moved, dict(list(rows.items())[2:]))  # half of the table
    half = clip_facts(moved, cache)
    assert half["clips"].startswith("2 clips, ")
    assert {name for name in whole if half[name] != whole[name]} == {"clips", "latents"}
    write_table(folder, rows | {"3.mp4": "another caption"})
    assert clip_facts(folder, cache)["clips"] != whole["clips"]
    write_table(folder, rows)
    write_clip(folder / "3.mp4", 14, fps=8)  # another film under the same name
    assert clip_facts(folder, cache)["clips"] != whole["clips"]
    write_clip(folder / "3.mp4", 13, fps=8)
    assert clip_facts(folder, cache) == whole

    class OtherVae(PoolingFamily):
        latent_revision = "pool-5"

    other = clip_facts(folder, cache, OtherVae())
    assert {name for name in whole if other[name] != whole[name]} == {"latents"}


def test_a_fact_is_content_and_no_place() -> None:
    facts = run_facts(configured())
    assert facts == run_facts(configured())
    assert {name.partition(".")[0] for name in facts} == {"code", "model", "data", "prompts", "machine"}
    assert not any("/" in value for value in facts.values())
    calibrated = run_facts(configured("init=gptq"))
    assert calibrated.keys() - facts.keys() == {"prompts.calibration"}
    assert all(calibrated[name] == facts[name] for name in facts)
