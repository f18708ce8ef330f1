"""Images that a user gives an image-to-video model: whether they are there, and their pixels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qvgen.config.prompts.image_prompt import image_of
from qvgen.errors import UserError
from qvgen.models.folder.published import known_models

_LINE = '{"prompt": "a cat runs", "image": "cat.png"}'


def open_image(path: str | Path) -> Any:
    """Read an image file: a PIL image, RGB, turned as its EXIF data says.

    Raises:
        UserError: It can't be read or is no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(Path(path).expanduser()) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"image={path} can't be read as an image ({reason}); give a PNG or JPEG file") from error


def check_images(family: Any, captions: Iterable[str], *, key: str) -> None:
    """Find out before anything is loaded whether captions have the images that a family takes, and no others.

    Args:
        family: The family that samples; one that takes images has an attribute ``takes_image = True``.
        captions: Captions, with images or without.
        key: Where they stand, for messages.

    Raises:
        UserError: One lacks its image, has one that is of no use, or one that can't be read.
    """
    takes = getattr(family, "takes_image", False)
    for caption in captions:
        image = image_of(caption)
        if takes and image is None:
            raise UserError(
                f"model={family.name} makes a video of a caption and an image, and {str(caption)!r} has none; write "
                f"{key}=FILE.jsonl with lines like {_LINE}{' or image=FILE' if key == 'prompts' else ''}"
            )
        if image is not None and not takes:
            raise UserError(
                f"model={family.name} makes a video of a caption alone, and {str(caption)!r} has image={image}; leave the "
                f"image out, or use {_image_model(family)}"
            )
        if image is not None:
            open_image(image)


def _image_model(family: Any) -> str:
    """The model of the same weights that takes images, or the name of any that does."""
    repository = getattr(family, "repository", None)
    same = [model.name for model in known_models() if model.takes_image and model.repository == repository]
    return f"model={same[0]}" if same else "an image-to-video model such as model=wan-i2v-14b"
