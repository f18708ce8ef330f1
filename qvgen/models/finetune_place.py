"""A finetune as its owner has it: the transformer alone, in the place of the base model's own.

    FOLDER with config.json and safetensors     as save_pretrained of a transformer leaves it; its config.json counts
    FILE.safetensors, diffusers' names          the base model's configuration counts
    FILE.safetensors, names of Wan's, LTX-Video's
      or HunyuanVideo's own code                likewise; its tensors get diffusers' names (qvgen.models.original_names)

Names may have a prefix (``model.diffusion_model.``), and a file may hold a VAE and text encoders beside it, which are not
read. Everything else comes from the base model's folder. Nothing is unpickled and no configuration names code.

CogVideoX's original layout (SAT) is refused: diffusers has no converter of a file of it, but a script that writes a folder.
"""

from __future__ import annotations

from pathlib import Path

from qvgen.models.finetune import Finetune
from qvgen.models.finetune_file import FinetuneFile
from qvgen.models.finetune_folder import FinetuneFolder, LoneFolder


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
