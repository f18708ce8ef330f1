"""The part that families over a diffusers model share: the ordinary diffusers pipeline around a transformer.

    captions --text encoder--> embeddings          pixels --VAE--> latents --transformer--> prediction in latents

Text encoder and VAE are :mod:`qvgen.models.encoder_family`'s.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from qvgen.config.prompts.image_prompt import image_of
from qvgen.models.base import Encode, Objective
from qvgen.models.encoder_family import EncoderFamily
from qvgen.models.few_step import check_guidance, check_sampler, read_timesteps
from qvgen.models.few_step_scheduler import OF_SCHEDULER, draw_from, shown_timesteps, visited_timesteps, visiting
from qvgen.models.guidance import negative_texts
from qvgen.models.sampled_video import SampledVideo


@dataclass(kw_only=True, eq=False)
class PipelineFamily(EncoderFamily):
    """A family that is sampled by a diffusers pipeline; :class:`qvgen.models.base.LatentVideoDiT` but for ``predict``.

    Attributes:
        timesteps: A few-step model's own (:mod:`qvgen.models.few_step`): a falling list of 1000 times the noise level of each
            sampling step, in (0, 1000], which no shift moves; or ``scheduler``, for those that its scheduler visits. None: it
            is called at any timestep.
        sampler: A few-step model's: ``lcm`` predicts the clean sample in each step and adds new noise, as students of DMD and
            consistency models are sampled. None: the folder's scheduler.
        guidance_distilled: The weights hold guidance: ``guidance_scale`` is 1, and training drops no caption.

    The other keys are those of :class:`qvgen.models.folder_family.FolderFamily`.

    Raises:
        ValueError: Timesteps that do not fall, are outside of the schedule, or more or fewer than the steps; guidance of a
            model that holds it; timesteps that its scheduler can't visit, or that are one number for its transformer.
    """

    timesteps: Any = None
    sampler: str | None = None
    guidance_distilled: bool = False

    pipeline_class: ClassVar[str]
    scheduler_classes: ClassVar[tuple[str, ...]]
    samples_apart: ClassVar[bool] = True
    frames_argument: ClassVar[str] = "num_frames"
    """Name of the pipeline's argument that says how many frames a video has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_guidance(self)
        self._given_timesteps = read_timesteps(self.timesteps, num_steps=self.num_inference_steps)
        check_sampler(self, timesteps=self.timesteps)
        if self._given_timesteps is not None:
            visiting(self.scheduler(), self._given_timesteps, sampler=self.sampler)  # whether it can is known now
            self._all_told(self._given_timesteps)

    @cached_property
    def _sampled_timesteps(self) -> tuple[float, ...] | None:
        """1000 times the noise levels of a few-step model's sampling, those of another transformer too; None: any."""
        if self.timesteps != OF_SCHEDULER:
            return self._given_timesteps
        scheduler = self.scheduler()
        self._lay_out(scheduler, self.num_inference_steps)
        return visited_timesteps(scheduler, self.num_inference_steps)

    def _lay_out(self, scheduler: Any, num_steps: int) -> None:
        """Have a scheduler of the folder's lay out its steps as the pipeline has it do."""
        scheduler.set_timesteps(num_steps)

    @cached_property
    def own_levels(self) -> tuple[float, ...] | None:
        """1000 times the noise levels that this transformer of a few-step model is called at, falling; None: any.

        Raises:
            ValueError: It is called at none of them.
        """
        if (steps := self._sampled_timesteps) is None:
            return None
        found = tuple(t for t in steps if self._is_called_at(t))
        if not found:
            raise ValueError(
                f"model.timesteps={list(steps)}: the transformer that is trained is called at none of them"
            )
        return found

    @cached_property
    def own_timesteps(self) -> tuple[float, ...] | None:
        """The timesteps that this transformer of a few-step model is told, in the order of sampling; None: any.

        Raises:
            ValueError: Two of them are one number for it, or it is called at none of them.
        """
        return None if self.own_levels is None else self._all_told(self.own_levels)

    def _all_told(self, levels: Sequence[float]) -> tuple[float, ...]:
        """The numbers that the transformer is told; raises ValueError where two of them are one."""
        told = tuple(map(self._told, levels))
        for (high, low), (first, second) in zip(pairwise(levels), pairwise(told), strict=True):
            if first == second:
                raise ValueError(
                    f"{shown_timesteps(levels)}: {high:g} and {low:g} are one timestep for the transformer of model="
                    f"{self.name}, which is told them in {self.dtype}; write others"
                )
        return told

    def _told(self, timestep: float) -> float:
        """The number that the transformer is told at 1000 times a noise level."""
        return timestep

    def _is_called_at(self, timestep: float) -> bool:
        """Whether the transformer that is trained is the one that the pipeline calls at a timestep."""
        del timestep
        return True

    @property
    @abc.abstractmethod
    def objective(self) -> Objective:
        """The formula that the folder's scheduler undoes."""

    @torch.no_grad()
    def generate(
        self,
        transformer: nn.Module,
        captions: Sequence[str],
        seeds: Sequence[int],
        *,
        num_steps: int,
        guidance_scale: float,
        negative_prompts: Sequence[str | None] | None = None,
        encode: Encode | None = None,
    ) -> UInt8[Tensor, "B F H W 3"]:
        """Sample one video per caption by the ordinary pipeline, one after another.

        See :meth:`qvgen.models.base.VideoDiT.generate`.

        Raises:
            ValueError: a video that is not finite or of one colour; see :mod:`qvgen.models.sampled_video`.
        """
        if len(captions) != len(seeds):
            raise ValueError(f"{len(captions)} captions and {len(seeds)} seeds; give one seed for each caption")
        images = [self._image_arguments(caption) for caption in captions]
        like = {"device": next(transformer.parameters()).device, "dtype": transformer.dtype}
        negatives = negative_texts(self.negative_prompt, negative_prompts, count=len(captions))
        is_guided = guidance_scale > 1  # the pipelines' own condition
        texts = list(dict.fromkeys([*captions, *(negatives if is_guided else ())]))
        encoded = (encode or self.encode)(texts)
        rows = {
            text: {key: value[row : row + 1].to(**like) for key, value in encoded.items()}
            for row, text in enumerate(texts)
        }
        pipeline = self._pipeline(transformer=transformer, **self._sampling_parts(like["device"], guidance_scale))
        videos = []
        for caption, negative, seed, image in zip(captions, negatives, seeds, images, strict=True):
            sampled = SampledVideo(transformer=transformer, caption=caption, seed=seed)
            arguments = {
                **self._prompt_arguments(rows[caption], rows[negative] if is_guided else None),
                **self._sizes(),
                "num_inference_steps": num_steps,
                **self._call_options(guidance_scale),
                **image,
            }
            generator = torch.Generator().manual_seed(seed)
            draw_from(pipeline.scheduler, generator)
            videos.append(self._sample(pipeline, arguments, sampled, generator=generator))
            sampled.check_frames(videos[-1])
        return torch.stack(videos)

    def _sizes(self) -> dict[str, int]:
        """Arguments of a call of the pipeline that say the size of a video."""
        return {self.frames_argument: self.sampling_frames, "height": self.height, "width": self.width}

    def _sample(
        self, pipeline: Any, arguments: Mapping[str, Any], sampled: SampledVideo, *, generator: torch.Generator
    ) -> UInt8[Tensor, "F H W 3"]:
        """Sample one video; raises UnusableVideoError where its latents or pixels are not finite."""
        from diffusers.video_processor import VideoProcessor  # seconds that a plan does without

        latents = pipeline(**arguments, generator=generator, output_type="latent").frames
        sampled.check_finite(latents, name="latents")
        pixels = self._decode_sampled(self._from_pipeline(latents), generator=generator)
        sampled.check_finite(pixels, name="pixels")
        video = VideoProcessor().postprocess_video(pixels, output_type="np")[0]
        return torch.from_numpy((video * 255).round().astype("uint8"))

    def scheduler(self) -> Any:
        """The folder's scheduler, new.

        Raises:
            ValueError: it is of a class that the family is not sampled with.
        """
        import diffusers

        config = self.component_config("scheduler")
        if (name := config.get("_class_name")) not in self.scheduler_classes:
            raise ValueError(
                f"{self.name} has the scheduler {name}; one of {', '.join(self.scheduler_classes)} is needed"
            )
        return getattr(diffusers, name).from_config(config)

    def _from_pipeline(self, latents: Tensor) -> Tensor:
        """From the pipeline's order of dimensions to [B, C, f, h, w]; most pipelines have it."""
        return latents

    def _pipeline(self, **components: Any) -> Any:
        """The diffusers pipeline with the components that a call needs."""
        none = dict.fromkeys((*self._tokenizers, *self.text_encoders, "vae", "transformer"))
        scheduler = self._sampling_scheduler()
        parts = {**none, **components, "scheduler": scheduler}
        pipeline = self._pipeline_type()(**parts, **self._pipeline_options())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _sampling_scheduler(self) -> Any:
        """The scheduler that videos are sampled with, new: the folder's, or one of a few-step model's own timesteps."""
        scheduler = self.scheduler()
        steps = self._given_timesteps if self.sampler is None else self._sampled_timesteps
        return scheduler if steps is None else visiting(scheduler, steps, sampler=self.sampler)

    def _pipeline_type(self) -> Any:
        """Class of the pipeline."""
        import diffusers

        return getattr(diffusers, self.pipeline_class)

    def _sampling_parts(self, device: torch.device, guidance_scale: float) -> dict[str, Any]:
        """The parts besides the transformer that run while a video is sampled, on its device."""
        del guidance_scale
        return {"vae": self._module("vae", device=device)}

    def _image_arguments(self, caption: str) -> dict[str, Any]:
        """Arguments of a call of the pipeline that say the image of a caption; none in a family that takes none."""
        if image_of(caption) is not None:
            raise ValueError(f"model={self.name} takes captions alone, and {str(caption)!r} has an image; leave it out")
        return {}

    def _pipeline_options(self) -> dict[str, Any]:
        """Arguments of the pipeline that are no components."""
        return {}

    def _call_options(self, guidance_scale: float) -> dict[str, Any]:
        """Arguments of a call of the pipeline that say its guidance."""
        return {"guidance_scale": guidance_scale}

    def _prompt_arguments(
        self, condition: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, Any]:
        """Arguments of a call of the pipeline that say its prompt, from rows [1, ...] of :meth:`encode`."""
        given = {argument: condition[key] for key, argument in self.condition_arguments.items()}
        if negative is not None:
            given |= {f"negative_{argument}": negative[key] for key, argument in self.condition_arguments.items()}
        return given

    def _decode_sampled(self, latents: Tensor, *, generator: torch.Generator) -> Tensor:
        """Turn what the pipeline sampled into pixels; ``generator`` is the one that the pipeline drew its noise from."""
        del generator
        return self.decode(latents, num_frames=self.sampling_frames)
