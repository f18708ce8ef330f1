"""A metric by a user's own text-image model (CLIP, SigLIP, ...), which no package registry carries."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from qvgen.evaluation.metrics.base import VideoMetric
from qvgen.evaluation.text_similarity import TextSimilarity


@cache
def load_model(folder: Path) -> TextSimilarity:
    """The model of a folder, loaded once; raises ValueError where it holds none."""
    return TextSimilarity(folder)


class ClipMetric(VideoMetric):
    """Base of the metrics by a text-image model.

    Args:
        folder: Folder of the model as `hf download` leaves it; null: there is none, and the metric is skipped.
    """

    def __init__(self, *, folder: str | None) -> None:
        self.folder = folder

    @property
    def model(self) -> TextSimilarity:
        """The model."""
        assert self.folder is not None, "absent() is asked first"
        return load_model(Path(self.folder).expanduser())

    def absent(self) -> str | None:
        """Why it can't be measured: nobody named a folder, or it holds no model."""
        if self.folder is None:
            return "no folder of a CLIP or SigLIP model was named (docs/evaluation.md)"
        path = Path(self.folder).expanduser() / "config.json"
        return None if path.is_file() else f"{path} is not there"

    def key(self) -> str:
        """The class and the checksum of the model, wherever it lies."""
        return f"{type(self).__qualname__} {self.model.revision}"
