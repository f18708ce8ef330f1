"""One process's part in what VBench's own program measures: a dimension of a side at a time, each kept as a file of its own.

    out/measured/vbench/videos/KEY/PROMPT-0.mp4      links to the files of a folder, or sampled videos as mp4
    out/measured/vbench/DIMENSION-SIDE/              the list of prompts that it concerns, and the program's own files
    out/measured/vbench/DIMENSION-SIDE.json          its values; which are there are not measured again

The program looks at up to five videos of a prompt, which it finds by their names.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qvgen import stop_request, work_item
from qvgen.data.claims import Claims
from qvgen.data.video import write_video
from qvgen.errors import UserError
from qvgen.evaluation.metrics.base import Clip, Pair
from qvgen.evaluation.prompt_list import PromptList
from qvgen.evaluation.suite.case import Case
from qvgen.evaluation.suite.clip_store import FolderClips
from qvgen.evaluation.suite.shared_cases import SharedCases
from qvgen.evaluation.suite.value_file import ValueFiles
from qvgen.evaluation.vbench_program.dimension import ProgramDimension
from qvgen.evaluation.vbench_program.program import VBenchProgram
from qvgen.evaluation.vbench_program.result import read_result
from qvgen.run_directory import atomic_write
from qvgen.verbs._evaluated_models import Compared, Side

log = logging.getLogger(__name__)

MAX_VIDEOS = 5
"""Videos of a prompt that the program looks at."""
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class Task:
    """One dimension of one side, ``model`` or ``reference``."""

    dimension: str
    side: str

    @property
    def name(self) -> str:
        """Of its file and folder."""
        return f"{self.dimension}-{self.side}"


class ProgramShare:
    """What the program measures, and where it is kept.

    Args:
        folder: Folder of everything that was measured.
        compared: Both sides.
        metrics: Dimensions that the program measures, by name.
        prompts: The list of prompts.
        program: The program.
        measured_by: Says what measures, as JSON can hold it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        compared: Compared,
        metrics: Mapping[str, ProgramDimension],
        prompts: PromptList,
        program: VBenchProgram,
        measured_by: Any,
    ) -> None:
        self._folder, self._compared, self._metrics = folder / "vbench", compared, metrics
        self._prompts, self._program = prompts, program
        self._files = ValueFiles(self._folder, measured_by)
        self._known: dict[Task, dict[str, Any]] = {}
        self._keys: dict[Task, str] = {}
        sides = {"model": compared.model, "reference": compared.reference}
        self._sides: dict[str, Side] = {name: side for name, side in sides.items() if side is not None}

    def do(self, claims: Claims) -> None:
        """Measure what is missing and is not measured by another process, until all is there."""
        tasks = [Task(name, side) for name in self._metrics for side in self._sides if self._concerned[name]]
        shared = SharedCases(
            tasks,
            claims=claims,
            key=self._key,
            is_there=lambda task: self._files.read(task.name, key=self._key(task)) is not None,
        )
        for task in shared:
            work_item.begin(f"{task.name} by VBench's program")
            self._measure(task, claims)
            log.info("VBench's program: %s, %d of %d", task.name, shared.num_there + 1, len(tasks))
            stop_request.note(f"after {shared.num_there + 1} of {len(tasks)} dimensions by VBench's program")

    def values(self, case: Case, side: str) -> dict[str, float]:
        """The values of a case's video by dimension."""
        return {
            name: row[case.name]
            for name in self._metrics
            if case.name in (row := self._read(Task(name, side))["videos"])
        }

    def scores(self) -> dict[str, float]:
        """The program's own score of the model by dimension: its mean over videos or frames, where ours is over prompts."""
        return {name: self._read(Task(name, "model"))["score"] for name in self._metrics if self._concerned[name]}

    def _read(self, task: Task) -> dict[str, Any]:
        if task.side not in self._sides or not self._concerned[task.dimension]:
            return {"videos": {}}
        if task not in self._known:
            found = self._files.read(task.name, key=self._key(task))
            if found is None:
                raise UserError(
                    f"{self._folder / task.name}.json is gone or of another evaluation since it was measured; let one "
                    "command at a time write to out, or give each of its own"
                )
            self._known[task] = found
        return self._known[task]

    @cached_property
    def _names(self) -> dict[Case, str]:
        """Name of the file that the program is to find, of the cases whose captions are in the list.

        Raises:
            UserError: A caption can't be a file's name, or has more videos than the program looks at.
        """
        counts: dict[str, int] = {}
        found = {}
        for case in self._compared.cases:
            caption = case.caption
            if caption is None or self._prompts.facts(caption) is None:
                continue
            number = counts.setdefault(caption, 0)
            counts[caption] += 1
            name = f"{caption}-{number}.mp4"
            if "/" in caption or len(name.encode()) > _MAX_NAME_BYTES:
                raise UserError(
                    f"vbench.python: {caption!r} can't be the name of a file, by which VBench finds a video"
                )
            if number == MAX_VIDEOS:
                raise UserError(
                    f"vbench.python: VBench looks at {MAX_VIDEOS} videos of a prompt, and {caption!r} has more; write seeds=5"
                )
            found[case] = name
        return found

    @cached_property
    def _concerned(self) -> dict[str, list[Case]]:
        """The cases that each dimension looks at."""
        asking = {case: _asking(case, self._prompts) for case in self._names}
        return {
            name: [case for case, pair in asking.items() if metric.concerns(pair)]
            for name, metric in self._metrics.items()
        }

    def _key(self, task: Task) -> str:
        if task not in self._keys:
            clips, cases = self._sides[task.side].clips, self._concerned[task.dimension]
            asked = [[self._names[case], clips.key(case), self._prompts.content(case.caption)] for case in cases]
            self._keys[task] = self._files.key(task.dimension, task.side, asked)
        return self._keys[task]

    def _measure(self, task: Task, claims: Claims) -> None:
        cases = {self._names[case]: case for case in self._concerned[task.dimension]}
        captions = {case.caption for case in cases.values()}
        folder = self._folder / task.name
        folder.mkdir(parents=True, exist_ok=True)
        entries = [
            {**entry, "dimension": [task.dimension]}
            for entry in self._prompts.entries()
            if entry["prompt_en"] in captions
        ]
        atomic_write(folder / "prompts.json", json.dumps(entries).encode())
        videos = self._videos(self._sides[task.side], claims)
        content = self._program.evaluate(task.dimension, info=folder / "prompts.json", videos=videos, folder=folder)
        score, values = read_result(content, task.dimension, names=cases)
        found = {"score": score, "videos": {cases[name].name: value for name, value in values.items()}}
        self._files.write(task.name, found, key=self._key(task))

    def _videos(self, side: Side, claims: Claims) -> Path:
        """The folder of a side's videos by the program's names; its name says what is in it."""
        parts = [[name, side.clips.key(case), self._compared.fps(case)] for case, name in self._names.items()]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        folder = self._folder / "videos" / key[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with claims.held(key):
            for case, name in self._names.items():
                if not (folder / name).exists():
                    self._make_video(folder / name, case, side)
        return folder

    def _make_video(self, path: Path, case: Case, side: Side) -> None:
        if not isinstance(side.clips, FolderClips):
            write_video(path, side.clips.read(case).numpy(), fps=self._compared.fps(case), scale=1)
            return
        source = side.clips.files[case.name].absolute()
        if source.suffix != ".mp4":
            raise UserError(f"vbench.python: VBench's program reads .mp4, and {source.name} is none; encode it as one")
        path.unlink(missing_ok=True)  # a link to a file that is gone
        path.symlink_to(source)


def _asking(case: Case, prompts: PromptList) -> Pair:
    """The case as a dimension is asked whether it concerns it, without its video."""
    return Pair(
        video=Clip(torch.empty(0, 1, 1, 3, dtype=torch.uint8)),
        reference=None,
        caption=case.caption,
        prompt=prompts.facts(case.caption),
        has_prompt_list=True,
    )
