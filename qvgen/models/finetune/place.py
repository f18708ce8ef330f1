"""The finetune that a path is of, whichever of its forms it has."""

from __future__ import annotations

from pathlib import Path

from qvgen.models.finetune.base import Finetune
from qvgen.models.finetune.file import FinetuneFile
from qvgen.models.finetune.folder import FinetuneFolder, LoneFolder


def find_finetune(path: str | Path, *, repository: str, model: str) -> Finetune:
    """Find the finetune that ``model.transformer`` means.

    Args:
        path: Its value.
        repository: ORG/NAME of the base model on the hub, for messages.
        model: Name of the base model's configuration, for messages.

    Raises:
        ValueError: There is no such transformer; the message says what is there instead and what to do.
    """
    place = Path(path).expanduser()
    given = f"model.transformer={path}"
    if place.is_file():
        return FinetuneFile.read(place, given=given)
    if not place.is_dir():
        raise ValueError(f"{given} is not there; give a transformer's folder or its .safetensors file")
    if not (place / "config.json").is_file() and (place / "transformer" / "config.json").is_file():
        place = place / "transformer"
    if not (place / "config.json").is_file():
        lone = sorted(place.glob("*.safetensors"))
        remedy = (
            f"write model.transformer={lone[0]}" if len(lone) == 1 else "give the transformer's own folder, or one file"
        )
        raise ValueError(f"{given} holds no config.json; {remedy}")
    return FinetuneFolder(folder=LoneFolder(path=place, repository=repository, model=model), given=given)
