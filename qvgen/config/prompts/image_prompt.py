"""A caption that comes with an image, which image-to-video models begin their videos with.

It goes wherever a caption goes, and is equal to its text: text encoders, file names and reports need not know of the image,
and only the family that samples looks for it. A caption whose image was lost on the way is refused there, by name.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qvgen.errors import UserError


class ImagePrompt(str):
    """A caption and its image.

    Args:
        caption: Text of what the video is to show.
        image: The path of an image file; of a clip's own first frame uint8 [H, W, 3].

    Example:
        >>> ImagePrompt("a boat", "boat.png") == "a boat", image_of(ImagePrompt("a boat", "boat.png")), image_of("a boat")
        (True, 'boat.png', None)
    """

    image: Any

    def __new__(cls, caption: str, image: Any = None) -> ImagePrompt:
        """Make one; an image may be set later, as pickle does."""
        made = super().__new__(cls, caption)
        made.image = image
        return made


def with_image(caption: str, image: Path | None) -> str:
    """A caption with an image file, or as it is where there is none."""
    return caption if image is None else ImagePrompt(caption, str(image))


def image_of(caption: str) -> Any:
    """The image of a caption; None where it has none."""
    return getattr(caption, "image", None)


def facts_of(asked: Any) -> dict[str, Any]:
    """Plain values of all that decides a video: those of a dataclass with a ``caption``, and the checksum of its image.

    Raises:
        UserError: The image can't be read.
    """
    image = image_of(asked.caption)
    return {**asdict(asked), **({} if image is None else {"image": image_checksum(image)})}


def image_checksum(image: str) -> str:
    """SHA-256 of an image file's bytes.

    Raises:
        UserError: It can't be read.
    """
    path = Path(image).expanduser()
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"image={image} can't be read ({error.strerror}); write the path of an image file") from error


def caption_of(item: Any) -> str:
    """The caption of a sample of a data set, with the first frame of its clip where the sample has it as ``image``."""
    caption: str = item["caption"]
    return ImagePrompt(caption, item["image"]) if "image" in item else caption
