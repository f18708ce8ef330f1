"""Where the videos of an evaluation come from: sampled ones, kept without loss, or the video files of a folder.

    FOLDER/NAME.safetensors     frames: uint8 [F, H, W, 3], sealed with a key that says what the video was made from

A file that is damaged, or was made from something else, counts as not there: it is sampled again. Frames are kept as they
were sampled because an encoder's loss would be measured too; 81 frames of 480 x 832 are 97 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qvgen.config.prompts.image_prompt import facts_of
from qvgen.data.sealed_tensors import DamagedFileError, read_seal, read_sealed, write_sealed
from qvgen.data.video_reader import VideoInfo, probe_video, read_frames
from qvgen.deploy.manifest import file_sha256
from qvgen.errors import UserError
from qvgen.evaluation.suite.case import Case


class Clips(Protocol):
    """Videos by case."""

    def key(self, case: Case) -> str:
        """Checksum of all that decides the pixels of a case's video."""

    def read(self, case: Case) -> Tensor:
        """The video of a case, uint8 [F, H, W, 3]."""


class SampledClips:
    """Videos that this program samples.

    Args:
        folder: Where they are kept; it need not exist.
        made_from: Says what all of them are made from, as JSON can hold it.
    """

    def __init__(self, folder: Path, made_from: Any) -> None:
        self.folder = folder
        self._made_from = json.dumps(made_from, sort_keys=True)

    def key(self, case: Case) -> str:
        """Checksum of what all are made from, and of caption, seed, negative prompt and image."""
        assert case.asked is not None, "it is sampled"
        return hashlib.sha256(json.dumps([self._made_from, facts_of(case.asked)], sort_keys=True).encode()).hexdigest()

    def path(self, case: Case) -> Path:
        """The file: named by its key, so that lists of prompts in another order share it."""
        return self.folder / f"{self.key(case)[:32]}.safetensors"

    def holds(self, case: Case) -> bool:
        """Whether it is there, by its header alone."""
        try:
            read_seal(self.path(case), key=self.key(case))
        except (FileNotFoundError, DamagedFileError):
            return False
        return True

    def read(self, case: Case) -> Tensor:
        """The frames as they were sampled; a damaged file is deleted and refused, so that the next call samples it again."""
        try:
            return read_sealed(self.path(case), key=self.key(case))["frames"]
        except DamagedFileError as error:
            self.path(case).unlink(missing_ok=True)
            raise UserError(f"{error}; it is deleted: write the same command again, which samples it anew") from error

    def write(self, case: Case, frames: Tensor) -> None:
        """Keep a video."""
        write_sealed(self.path(case), {"frames": frames}, key=self.key(case))


class FolderClips:
    """Video files, by the names of their cases.

    Args:
        files: Name -> file.
    """

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files
        self._sums: dict[str, str] = {}

    def only(self, cases: Iterable[Case]) -> FolderClips:
        """The files of these cases, as far as they are there."""
        return FolderClips({case.name: self.files[case.name] for case in cases if case.name in self.files})

    def key(self, case: Case) -> str:
        """Checksum of the file."""
        if case.name not in self._sums:
            self._sums[case.name] = file_sha256(self.files[case.name])
        return self._sums[case.name]

    def read(self, case: Case) -> Tensor:
        """All its frames."""
        _, frames = read_frames(self.files[case.name], lambda info: range(info.num_frames))
        return torch.from_numpy(frames)

    def probe(self, name: str) -> VideoInfo:
        """Size, frames and rate of a file, from its headers."""
        return probe_video(self.files[name])
