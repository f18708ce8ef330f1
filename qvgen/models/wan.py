"""Wan: Wan2.1 1.3B and 14B (arXiv 2503.20314), Wan2.2 TI2V-5B and A14B; all but 1.3B from an image too.

    transformer   WanTransformer3DModel; latents as [B, C, F, H, W], text by cross-attention
    objective     flow matching with the shift that the model is sampled with (qvgen.models.objectives)
    latents       (z - latents_mean) / latents_std per channel, of the VAE's configuration
    TI2V-5B       its pipeline gives every token a timestep of its own (an image's tokens have t = 0); in text to video
                  all of a sample's are equal, so that training passes one number per sample: the same function

    A14B          two transformers: transformer/ for timesteps from 1000 boundary_ratio (875) on, transformer_2/ for those
                  below. Each is trained and packed on its own, on noise levels of its own part alone; the pipeline
                  calls the other one beside it

An image is :mod:`qvgen.models.wan_image`'s.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

from qvgen.config.schema.may_differ import MayDiffer
from qvgen.models.discrete_schedule import NUM_TRAIN_TIMESTEPS
from qvgen.models.lora.merge import Lora, read_loras
from qvgen.models.wan_family import WanFamily
from qvgen.models.wan_image import WanEmbeddedImage, WanFirstFrame, WanLatentImage

log = logging.getLogger(__name__)

EXPERT_FOLDERS = {"high": "transformer", "low": "transformer_2"}
"""Expert -> the part of the pipeline that holds it."""


@dataclass(kw_only=True, eq=False)
class Wan(WanFamily):
    """The Wan family; its keys are those of :class:`qvgen.models.wan_family.WanFamily`."""

    text_encoder_class: ClassVar[str] = "UMT5EncoderModel"
    max_text_tokens: ClassVar[int] = 512


@dataclass(kw_only=True, eq=False)
class WanExpert(Wan):
    """One of the two experts.

    Attributes:
        expert: The expert that is trained: ``high`` or ``low``, by its noise levels.
        guidance_scale_low: Factor of classifier-free guidance at the low-noise expert's steps; ``guidance_scale`` is
            the other expert's.
        lora_high: LoRAs of the high-noise expert, written as ``lora`` is; ``lora`` itself is for files whose keys name
            both experts, and for the expert that is trained.
        lora_low: LoRAs of the low-noise expert, written as ``lora`` is.

    The other keys are those of :class:`Wan`.

    Raises:
        ValueError: another expert, or a folder without experts.
    """

    expert: str
    guidance_scale_low: float
    lora_high: Annotated[Any, MayDiffer.FREE] = None
    lora_low: Annotated[Any, MayDiffer.FREE] = None

    transformer_folders: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")

    def __post_init__(self) -> None:
        if self.expert not in EXPERT_FOLDERS:
            raise ValueError(f"model.expert={self.expert} is not among {', '.join(EXPERT_FOLDERS)}")
        super().__post_init__()
        boundary = self.component_config("model_index").get("boundary_ratio")
        if not isinstance(boundary, float):
            raise ValueError(
                f"model.path={self.path} has boundary_ratio {boundary} in model_index.json; a float is needed"
            )
        self._boundary = boundary
        if self.guidance_distilled and self.guidance_scale_low != 1:
            raise ValueError(
                f"model.guidance_scale_low={self.guidance_scale_low:g} with model.guidance_distilled=true: the weights hold "
                "guidance, and a second one would be applied to it; write model.guidance_scale_low=1"
            )

    def _chosen_loras(self) -> list[Lora]:
        """LoRAs of both experts; a warning where one of them gets none and the other does."""
        loras = super()._chosen_loras()
        for expert, value in (("high", self.lora_high), ("low", self.lora_low)):
            key = f"model.lora_{expert}"
            if value is not None and not isinstance(self.lora_scale, int | float):
                raise ValueError(
                    f"model.lora_scale={self.lora_scale} is a list for model.lora; give {key} {{path, scale}}"
                )
            loras += read_loras(
                value,
                scale=self.lora_scale,
                components=self.transformer_folders,
                trained=self.transformer_folder,
                component=EXPERT_FOLDERS[expert],
                key=key,
            )
        given = {component for lora in loras for component in lora.keys}
        for expert, folder in EXPERT_FOLDERS.items():
            if given and folder not in given:
                log.warning(
                    "the %s-noise expert gets no LoRA, and the other one does; write model.lora_%s=FILE for its own",
                    expert,
                    expert,
                )
        return loras

    @property
    def transformer_folder(self) -> str:
        """Folder of the expert that is trained."""
        return EXPERT_FOLDERS[self.expert]

    def use_partner(self, transformer: nn.Module) -> None:
        """Sample with this transformer as the other expert, until :meth:`release`; it must be on the same device."""
        self._loaded["partner"] = transformer

    def partner_lora_is_missing(self, record: object) -> bool:
        """Whether the partner was sampled with a LoRA, when a packed model was made, that this family does not give it.

        Args:
            record: the manifest's ``lora_record``; anything else says nothing.
        """
        (partner,) = set(self.transformer_folders) - {self.transformer_folder}
        own = [entry for entry in self.lora_record if partner in entry["transformers"]]
        entries = [entry for entry in record if isinstance(entry, dict)] if isinstance(record, list) else []
        return any(partner in (entry.get("transformers") or ()) and entry not in own for entry in entries)

    def _noise_range(self) -> tuple[float, float]:
        return (self._boundary, 1.0) if self.expert == "high" else (0.0, self._boundary)

    def _is_called_at(self, timestep: float) -> bool:
        return (timestep >= NUM_TRAIN_TIMESTEPS * self._boundary) == (self.expert == "high")  # as the pipeline chooses

    def _pipeline(self, **components: Any) -> Any:
        if (transformer := components.get("transformer")) is not None:
            pair = (transformer, self.partner(transformer))
            components["transformer"], components["transformer_2"] = pair if self.expert == "high" else pair[::-1]
        return super()._pipeline(**components)

    def partner(self, like: nn.Module) -> nn.Module:
        """The other expert, with its own part of the LoRA, in the dtype and on the device of the one that is sampled."""
        if "partner" not in self._loaded:
            (folder,) = set(EXPERT_FOLDERS.values()) - {self.transformer_folder}
            self._loaded["partner"] = self._load_transformer(folder, dtype=like.dtype)
        partner: nn.Module = self._loaded["partner"].to(next(like.parameters()).device)
        return partner

    def _pipeline_options(self) -> dict[str, Any]:
        return {**super()._pipeline_options(), "boundary_ratio": self._boundary}

    def _call_options(self, guidance_scale: float) -> dict[str, Any]:
        return {**super()._call_options(guidance_scale), "guidance_scale_2": self.guidance_scale_low}


@dataclass(kw_only=True, eq=False)
class WanImage(WanEmbeddedImage, Wan):
    """Wan2.1 for images; its keys are those of :class:`Wan`."""


@dataclass(kw_only=True, eq=False)
class WanImageExpert(WanLatentImage, WanExpert):
    """One of the two experts of Wan2.2 for images; its keys are those of :class:`WanExpert`."""


@dataclass(kw_only=True, eq=False)
class WanImageFrame(WanFirstFrame, Wan):
    """TI2V-5B of Wan2.2 for images; its keys are those of :class:`Wan`."""
