"""The part that image-to-video families share: a video begins with an image, which its caption brings along.

    training   the clip's own first frame: ``encode_first_frame`` turns it into what the transformer is told, once, in the
               latent cache (:mod:`qvgen.data.latent_cache`). Dropping a caption leaves the image: the pipelines guide by the
               text alone
    sampling   the image of :class:`qvgen.config.prompts.image_prompt.ImagePrompt`, which the family's pipeline resizes and
               encodes itself: a video is the plain pipeline's, bit for bit

The VAE's posterior mode stands for the image in training, as it does for the clip.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from qvgen.config.prompts.image_prompt import image_of
from qvgen.errors import UserError
from qvgen.models.folder.hub_folder import HubFolder
from qvgen.models.given_image import open_image
from qvgen.models.pipeline_family import PipelineFamily

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class ImageFamily(PipelineFamily):
    """A family that makes videos of a caption and an image.

    Its keys are those of :class:`qvgen.models.folder_family.FolderFamily`; ``vae_dtype`` is also the precision of an image
    encoder.
    """

    takes_image: ClassVar[bool] = True
    image_encoder_classes: ClassVar[tuple[str, ...]] = ()
    """Classes of transformers that the folder's image_encoder may have; empty for a model without one."""
    image_processor: ClassVar[tuple[str, str]] = ("image_processor", "CLIPImageProcessor")
    """Folder of what prepares an image for that encoder, and its class of transformers."""
    crops_images: ClassVar[bool] = False
    """Whether the pipeline crops an image of another aspect ratio, in place of changing the ratio."""

    @property
    def latent_channels(self) -> int:
        """Channels of a sample, which the transformer predicts; the image's come besides."""
        return int(self.transformer_config["out_channels"])

    @property
    def encoders(self) -> dict[str, str]:
        """Text encoders, and the image encoder, whose class is the one that the folder names."""
        if not self.image_encoder_classes:
            return super().encoders
        named = self.component_config("image_encoder").get("architectures") or self.image_encoder_classes
        if named[0] not in self.image_encoder_classes:
            wanted = " or ".join(self.image_encoder_classes)
            raise ValueError(f"model.path={self.path}: image_encoder is a {named[0]}, needed is a {wanted}")
        return {**super().encoders, "image_encoder": str(named[0])}

    @property
    @abc.abstractmethod
    def image_condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what :meth:`encode_first_frame` gives, for one clip of the training's size."""

    @property
    def further_condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same, as every family says what its transformer is told; see :func:`qvgen.models.base.example_condition`."""
        of_text: dict[str, tuple[int, ...]] = getattr(super(), "further_condition_shapes", {})
        return {**of_text, **self.image_condition_shapes}

    @abc.abstractmethod
    def encode_first_frame(self, pixels: Float[Tensor, "B 3 F H W"]) -> dict[str, Tensor]:
        """Turn the first frames of clips in [-1, 1] into what the transformer is told of them.

        Args:
            pixels: float [B, 3, F, H, W].

        Returns:
            float32 tensors with B rows each, where :meth:`to` says.
        """

    @property
    def latent_revision(self) -> str:
        """Content key of whatever decides :meth:`encode_video` and :meth:`encode_first_frame`.

        Raises:
            ValueError: there are no weights.
        """
        others = [name for name in self.encoders if name not in self.text_encoders]
        parts = [self.component_revision(name) for name in others]
        parts += [self._require_folder().files_revision(self.image_processor[0]) for _ in others]
        return " ".join([super().latent_revision, "first frame", *parts])

    def _image_arguments(self, caption: str) -> dict[str, Any]:
        """The image of a caption as the pipeline takes it.

        Raises:
            UserError: The caption has none, or one that is no image.
        """
        image = image_of(caption)
        if image is None:
            raise UserError(
                f"model={self.name} makes videos of a caption and an image, and {str(caption)!r} has none; "
                'write image=FILE, or lines like {"prompt": "a cat", "image": "cat.png"} in a prompt file'
            )
        if isinstance(image, Tensor):
            return {"image": Image.fromarray(image.cpu().numpy())}
        picture = open_image(image)
        width, height = picture.size
        if (height, width) != (self.height, self.width):
            is_alike = height * self.width == width * self.height
            log.info(
                "%s: %d x %d pixels are resized%s to %d x %d, as diffusers does%s", image, height, width,
                " and cropped" if self.crops_images and not is_alike else "", self.height, self.width,
                "" if self.crops_images or is_alike else ", in another aspect ratio",
            )  # fmt: skip
        return {"image": picture}

    def _image_processor(self) -> Any:
        """The processor that prepares an image for the image encoder, loaded once."""
        component, class_name = self.image_processor
        if component not in self._loaded:
            self._loaded[component] = load_image_processor(self._require_folder(), component, class_name)
        return self._loaded[component]


def load_image_processor(folder: HubFolder, component: str, class_name: str) -> Any:
    """The image processor of a folder, which resizes with Pillow.

    transformers takes torchvision's resizing where that is installed, whose last bits are others.

    Raises:
        ValueError: it is missing or damaged.
    """
    import transformers

    folder.read_json(f"{component}/preprocessor_config.json")
    kind = getattr(transformers, f"{class_name}Pil", None) or getattr(transformers, class_name)
    return kind.from_pretrained(folder.path / component, local_files_only=True)


def first_frame_of(pixels: Float[Tensor, "B 3 F H W"]) -> list[Image.Image]:
    """First frames of clips as images, of the bytes that the pixels came from."""
    frames = ((pixels[:, :, 0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in frames]


def encoded_images(images: list[Image.Image], *, processor: Any, encoder: Any) -> Float[Tensor, "B T D"]:
    """The last hidden states but one of an image encoder, float32, each image alone, as WanImageToVideoPipeline has them."""
    rows = []
    for image in images:
        given: Mapping[str, Tensor] = processor(images=image, return_tensors="pt").to(encoder.device)
        rows.append(encoder(**given, output_hidden_states=True).hidden_states[-2].float())
    return torch.cat(rows)
