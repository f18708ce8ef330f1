"""The files of a run's validation videos, written by any number of processes that never wait for each other.

    run_dir/validation/
        teacher/00-a-red-three-seed42-teacher.mp4          one per prompt, once in the run
        teacher/00-a-red-three-seed42-teacher.npy          its frames without loss, so that a resumed run measures the same
        teacher/00-a-red-three-seed42-teacher.json         its record
        step-000500/00-a-red-three-seed42-student.mp4      the student after 500 optimizer steps
        step-000500/00-a-red-three-seed42-side-by-side.mp4 teacher and student
        step-000500/00-a-red-three-seed42-student.json     its record: prompt, seed, PSNR, SSIM, suite
        metrics.csv                                        all records as a table

A record is written after the videos and holds their sha256: where it is, they are complete; where a sum differs,
they were damaged afterwards. Every file is there whole or not at all, and belongs to one prompt, so that processes
with different prompts share nothing. A prompt's PSNR is of the frames as they were sampled, not of the mp4.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qvgen.data.video import Frames, side_by_side, write_video
from qvgen.deploy.manifest import file_sha256
from qvgen.evaluation.comparison import video_name
from qvgen.evaluation.json_number import json_number
from qvgen.evaluation.report_data import ValidationVideo
from qvgen.models.guidance import negative_texts
from qvgen.run_directory import atomic_write

log = logging.getLogger(__name__)

DIRECTORY = "validation"
"""The folder in the run's own."""
TABLE_FILE = "metrics.csv"
_FIELDS = {"prompt_index": int, "prompt": str, "seed": int, "fps": int | float, "sha256": dict}
"""The keys of every record, and their types."""
_NUMBERS = int | float | str | None
"""Types of a measured value: JSON has no infinity, which is written as text."""
TABLE_COLUMNS = ("step", "prompt_index", "seed", "psnr_db", "ssim")
"""Columns of every table; one for each metric of evaluation.suite follows."""
SUITE = "suite/"
"""Begins the names of values of the metrics of evaluation.suite."""


class ValidationFiles:
    """Where the videos of fixed prompts and seeds lie.

    Args:
        directory: ``run_dir/validation``; it is made with the first file.
        prompts: The captions.
        seeds: One per caption.
        negatives: The negative prompt of each; None: empty ones.
        fps: Frames per second.

    Raises:
        ValueError: Another number of seeds than of prompts.
    """

    def __init__(
        self,
        directory: Path,
        *,
        prompts: Sequence[str],
        seeds: Sequence[int],
        fps: int,
        negatives: Sequence[str | None] | None = None,
    ) -> None:
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} validation prompts and {len(seeds)} seeds; give one seed for each")
        self.negatives = negative_texts("", negatives, count=len(prompts))
        self.directory, self.fps = directory, fps
        self.prompts, self.seeds = list(prompts), list(seeds)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    def path(self, index: int, *, step: int | None, variant: str) -> Path:
        """A prompt's mp4 of ``student`` or ``side-by-side`` at a step, or of ``teacher`` at None."""
        folder = "teacher" if step is None else f"step-{step:06d}"
        name = video_name(index, self.prompts[index], seed=self.seeds[index], variant=variant)
        return self.directory / folder / name

    def load_teacher(self, index: int) -> Frames | None:
        """The teacher's frames as they were sampled, uint8 [F, H, W, 3]; None if they are not there whole."""
        path = self.path(index, step=None, variant="teacher")
        if not _is_whole(path.with_suffix(".json")):
            return None
        frames: Frames = np.load(path.with_suffix(".npy"), allow_pickle=False)
        return frames

    def write_teacher(self, index: int, frames: Frames) -> None:
        """Keep the teacher's video, uint8 [F, H, W, 3]."""
        path = self.path(index, step=None, variant="teacher")
        write_video(path, frames, fps=self.fps)
        atomic_write(path.with_suffix(".npy"), lambda temporary: _save_frames(temporary, frames))
        _write_record(self._identity(index), path, path.with_suffix(".npy"))

    def has_student(self, index: int, *, step: int) -> bool:
        """Whether a prompt's videos of a step are there whole."""
        return _is_whole(self.path(index, step=step, variant="student").with_suffix(".json"))

    def write_student(
        self,
        index: int,
        frames: Frames,
        *,
        step: int,
        teacher: Frames | None,
        measured: Mapping[str, float],
    ) -> None:
        """Keep the student's video after ``step`` steps, uint8 [F, H, W, 3], and how far it is from the teacher's.

        Args:
            index: Number of the prompt.
            frames: The student's.
            step: Optimizer steps.
            teacher: The teacher's; None: there is none.
            measured: ``psnr_db`` and ``ssim`` where there is a teacher, and ``suite/NAME`` for each metric of a suite.
        """
        path = self.path(index, step=step, variant="student")
        written = [write_video(path, frames, fps=self.fps)]
        if teacher is not None:
            both = side_by_side([teacher, frames], ["teacher", f"student, step {step}"])
            target = self.path(index, step=step, variant="side-by-side")
            written.append(write_video(target, both, fps=self.fps, scale=1))
        values = {name: json_number(value) for name, value in measured.items()}
        _write_record({**self._identity(index), "step": step, "psnr_db": None, "ssim": None, **values}, *written)

    def leave_out(self, index: int, *, step: int, reason: str) -> None:
        """Say that a prompt has no video after ``step`` steps, and why; nobody waits for it or samples it again."""
        path = self.path(index, step=step, variant="student")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**self._identity(index), "step": step, "psnr_db": None, "ssim": None, "left_out": reason}
        _write_record(content, path)

    def missing(self, step: int) -> list[Path]:
        """Videos of a step that are not there (yet); does not look into those that are."""
        paths = [self.path(index, step=step, variant="student") for index in range(len(self))]
        return [path for path in paths if not path.with_suffix(".json").exists()]

    def write_table(self) -> None:
        """Bring metrics.csv up to date with all records that are there, in order of step and prompt."""
        text = io.StringIO()
        videos = read_validation(self.directory, verify=False)
        suite = list(dict.fromkeys(name for video in videos for name in video.suite))
        writer = csv.DictWriter(text, [*TABLE_COLUMNS, *(f"{SUITE}{name}" for name in suite)], lineterminator="\n")
        writer.writeheader()
        for video in videos:
            own = {name: getattr(video, name) for name in TABLE_COLUMNS}
            writer.writerow({**own, **{f"{SUITE}{name}": value for name, value in video.suite.items()}})
        path, content = self.directory / TABLE_FILE, text.getvalue().encode()
        if not path.exists() or path.read_bytes() != content:
            self.directory.mkdir(parents=True, exist_ok=True)
            atomic_write(path, content)

    def _identity(self, index: int) -> dict[str, Any]:
        return {
            "prompt_index": index,
            "prompt": self.prompts[index],
            "negative_prompt": self.negatives[index],
            "seed": self.seeds[index],
            "fps": self.fps,
        }


def read_validation(directory: Path, *, verify: bool) -> tuple[ValidationVideo, ...]:
    """The students' videos of a run, in order of step and prompt.

    Args:
        directory: ``run_dir/validation``; one that does not exist holds none.
        verify: Read every video to see that it is as it was written; what is not is left out with a warning.
    """
    is_whole = cache(_is_whole) if verify else Path.exists
    videos = []
    for path in directory.glob("step-*/*-student.json"):
        content = _read_record(path)
        if content is None or not is_whole(path):
            log.warning("%s or a video that it names is damaged; it is left out", path)
            continue
        if "left_out" in content:
            continue
        measured = content["psnr_db"] is not None
        name = video_name(content["prompt_index"], content["prompt"], seed=content["seed"], variant="teacher")
        teacher = directory / "teacher" / name
        videos.append(
            ValidationVideo(
                step=content["step"],
                prompt_index=content["prompt_index"],
                prompt=content["prompt"],
                seed=content["seed"],
                fps=content["fps"],
                psnr_db=float(content["psnr_db"]) if measured else None,
                ssim=float(content["ssim"]) if measured else None,
                student=path.with_suffix(".mp4"),
                teacher=teacher if measured and is_whole(teacher.with_suffix(".json")) else None,
                suite={name.removeprefix(SUITE): float(content[name]) for name in content if name.startswith(SUITE)},
            )
        )
    return tuple(sorted(videos, key=lambda video: (video.step, video.prompt_index)))


def _write_record(content: Mapping[str, Any], first: Path, *others: Path) -> None:
    """Write the record beside ``first``, which says that the files are complete; a prompt that is left out has no files."""
    sums = {path.name: file_sha256(path) for path in (first, *others) if "left_out" not in content}
    text = json.dumps({**content, "sha256": sums}, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(first.with_suffix(".json"), text.encode())


def _read_record(path: Path) -> dict[str, Any] | None:
    """A record of the expected form; None where there is none or it is damaged."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or any(not isinstance(content.get(name), kind) for name, kind in _FIELDS.items()):
        return None
    sums = content["sha256"]
    if any("/" in name or not isinstance(wanted, str) for name, wanted in sums.items()):
        return None
    is_student = path.name.endswith("-student.json")
    suite = [name for name in content if name.startswith(SUITE)]
    if any(not isinstance(content[name], int | float) for name in suite):
        return None
    if is_student and any(not isinstance(content.get(name, []), _NUMBERS) for name in ("step", "psnr_db", "ssim")):
        return None  # a list stands for a name that is missing
    return content


def _is_whole(record: Path) -> bool:
    """Whether a record and all files that it names are as they were written."""
    content = _read_record(record)
    if content is None:
        return False
    files = {record.with_name(name): wanted for name, wanted in content["sha256"].items()}
    return all(path.is_file() and file_sha256(path) == wanted for path, wanted in files.items())


def _save_frames(path: Path, frames: Frames) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to the name of a temporary file
        np.save(file, frames, allow_pickle=False)
