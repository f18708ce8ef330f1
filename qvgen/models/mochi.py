"""Mochi 1, text to video (Genmo; github.com/genmoai/mochi): 48 blocks with a wide stream for video and a narrow one for text.

    transformer   MochiTransformer3DModel; latents as [B, C, F, H, W]. Attention of each sample reads its own caption's tokens
                  and no padding, so that no batch mate changes it
    text          T5, 256 tokens and their mask
    objective     a flow whose time is reversed: :class:`ReversedFlow`; teacher and student are told timesteps rounded in
                  ``dtype``, as the pipeline rounds them
    latents       (z - latents_mean) / latents_std times scaling_factor, per channel, of the VAE's configuration

Where a smoothing vector m disappears: norms are RMS norms without an affine part, whose modulation has a scale and no shift.
A Linear of each block's own makes it: its rows take m, and its bias m - 1 (:mod:`qvgen.layers.smoothing_fold`).

    attn1.to_q, to_k, to_v; ff.net.0.proj           <- norm1: scale of attention; of the feed-forward net
    attn1.add_q_proj, ...; ff_context.net.0.proj    <- norm1_context, likewise
    ff.net.2, ff_context.net.2                      <- the rows of net.0.proj that are not the gate's (SwiGLU)
    proj_out                                        <- norm_out, which has a shift too

Where it stays a multiplication: behind a SiLU (modulations, embedders), the text's own Linears (``time_embed``), and
attn1.to_out.0 and to_add_out, which read tokens of the video and of the text of one attention: one m for both would have to
be chosen from the tokens of one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgen.layers.smoothing_fold import Producer, SmoothingFold
from qvgen.models.base import Objective
from qvgen.models.few_step import drawn_objective
from qvgen.models.flow_scheduler import FLOW_SCHEDULER, check_plain_flow
from qvgen.models.linear_quadratic import THRESHOLD, linear_quadratic_level
from qvgen.models.objectives import NUM_TRAIN_TIMESTEPS, FlowMatching
from qvgen.models.pipeline_family import PipelineFamily

_VIDEO = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_TEXT = ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj")


@dataclass(frozen=True, kw_only=True)
class ReversedFlow:
    """Flow matching as Mochi has it: time runs from noise to video.

        x_sigma = (1 - sigma) x_0 + sigma noise       sigma in [0, 1], 1 is pure noise, as in FlowMatching
        t       = 1000 (1 - sigma)                    the transformer is told how much of it is video
        v       = x_0 - noise                         the target

    Noise levels are drawn as MochiPipeline's steps lie (:mod:`qvgen.models.linear_quadratic`).
    """

    def sample_sigma(self, *, generator: torch.Generator) -> Float[Tensor, ""]:
        """Draw one noise level, float32 [] in (0, 1]; half of the draws are above 0.975, as half of the steps are."""
        return linear_quadratic_level(torch.rand((), generator=generator))

    def timestep(self, sigma: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Convert noise levels in [0, 1] to timesteps in [0, 1000], float32 [...]; noise is 0."""
        return (1 - sigma) * NUM_TRAIN_TIMESTEPS

    def add_noise(
        self, clean: Float[Tensor, "B C F H W"], noise: Float[Tensor, "B C F H W"], *, sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C F H W"]:
        """Mix clean samples with noise at noise levels [B]; see :class:`qvgen.models.objectives.FlowMatching`."""
        return FlowMatching().add_noise(clean, noise, sigma=sigma)

    def target(
        self, clean: Float[Tensor, "B C F H W"], noise: Float[Tensor, "B C F H W"], *, sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C F H W"]:
        """Return what a perfect model predicts on average, v = clean - noise; it does not depend on sigma."""
        return -FlowMatching().target(clean, noise, sigma=sigma)

    def noise(
        self,
        prediction: Float[Tensor, "B C F H W"],
        *,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
    ) -> Float[Tensor, "B C F H W"]:
        """Return the noise that a prediction for noisy samples implies, x_sigma - (1 - sigma) v."""
        return FlowMatching().noise(-prediction, noisy=noisy, timestep=NUM_TRAIN_TIMESTEPS - timestep)

    def signal_and_noise(self, timestep: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return what clean samples and noise are multiplied with at timesteps: 1 - sigma and sigma."""
        return FlowMatching().signal_and_noise(NUM_TRAIN_TIMESTEPS - timestep)


@dataclass(kw_only=True, eq=False)
class Mochi(PipelineFamily):
    """The Mochi family; its keys are those of :class:`qvgen.models.folder_family.FolderFamily`."""

    transformer_class: ClassVar[str] = "MochiTransformer3DModel"
    pipeline_class: ClassVar[str] = "MochiPipeline"
    vae_class: ClassVar[str] = "AutoencoderKLMochi"
    text_encoder_class: ClassVar[str] = "T5EncoderModel"
    scheduler_classes: ClassVar[tuple[str, ...]] = (FLOW_SCHEDULER,)
    max_text_tokens: ClassVar[int] = 256
    condition_arguments: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
    }
    layer_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "self_attention": ("transformer_blocks.*.attn1.*",),  # over text, space and time at once
        "ffn": ("transformer_blocks.*.ff.*", "transformer_blocks.*.ff_context.*"),
    }
    shared_inputs: ClassVar[Sequence[Sequence[str]]] = (_VIDEO, _TEXT)

    def _lay_out(self, scheduler: Any, num_steps: int) -> None:
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        scheduler.set_timesteps(sigmas=np.array(linear_quadratic_schedule(num_steps, THRESHOLD)))

    def _told(self, timestep: float) -> float:
        return float(self._rounded(torch.tensor(NUM_TRAIN_TIMESTEPS - timestep)))

    def _rounded(self, timestep: Tensor) -> Tensor:
        """Timesteps as the pipeline tells them to a transformer of the teacher's dtype."""
        return timestep.to(getattr(torch, self.dtype))

    @cached_property
    def objective(self) -> Objective:
        """The flow that the scheduler samples, or at a few-step model's timesteps.

        Raises:
            ValueError: the scheduler is of another kind.
        """
        check_plain_flow(self.scheduler(), name=self.name, invert_sigmas=True, shift=1.0)
        return drawn_objective(ReversedFlow(), self)

    @property
    def compression(self) -> tuple[int, int]:
        """Frames per latent frame (but the first) and pixels per latent pixel of the VAE."""
        return 6, 8  # MochiPipeline's own, whatever the VAE's configuration says

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of a token."""
        return int(self.transformer_config.get("patch_size", 2))  # the class's default, as that below

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(256, text_embed_dim): tokens and channels of a caption's embedding."""
        return (self.max_text_tokens, int(self.transformer_config.get("text_embed_dim", 4096)))

    @property
    def further_condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the mask of a caption's tokens, 1 where one is."""
        return {"encoder_attention_mask": (self.max_text_tokens,)}

    @property
    def text_revision(self) -> str:
        """Content key of whatever decides :meth:`encode`; see the base class."""
        return " ".join([super().text_revision, *(key for key, value in self._pipeline_options().items() if value)])

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """The places behind modulations and gates; see the head of this file."""
        model: Any = transformer
        folds: list[SmoothingFold] = []
        for index, block in enumerate(model.transformer_blocks):
            folds += _block_folds(block, f"transformer_blocks.{index}")
        shift = model.norm_out.linear.out_features // 2
        rows = (Producer(module="norm_out.linear", start=shift), _scale("norm_out.linear", 0))
        return [*folds, SmoothingFold(consumers=("proj_out",), producers=rows)]

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Predict the flow's velocity; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        output: Tensor = transformer(
            hidden_states=noisy.to(transformer.dtype),
            timestep=self._rounded(timestep).to(transformer.dtype),
            **{name: condition[name].to(transformer.dtype) for name in self.condition_arguments},
            return_dict=False,
        )[0]
        return output

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, [1, C, 1, 1, 1] in the dtype of ``like``."""
        config = self._module("vae", device=like.device).config
        values = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        mean, deviation = (value.to(like) for value in values)
        return mean, deviation

    def _normalize(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (latents - mean) / deviation * self._vae_config.get("scaling_factor", 1.0)

    def _denormalize(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents * deviation / self._vae_config.get("scaling_factor", 1.0) + mean  # the pipeline's order

    def _pipeline_options(self) -> dict[str, Any]:
        key = "force_zeros_for_empty_prompt"
        return {key: bool(self.component_config("model_index").get(key, False))}


def _scale(linear: str, start: int) -> Producer:
    return Producer(module=linear, start=start, is_added_to_one=True)


def _block_folds(block: Any, name: str) -> Iterator[SmoothingFold]:
    """A block's folds; the last one has no feed-forward net of the text, whose norm there makes a scale alone.

    A modulation's Linear makes scale and gate of attention, then of the feed-forward net.
    """
    for norm, attention, net in (("norm1", _VIDEO, "ff"), ("norm1_context", _TEXT, "ff_context")):
        readers = tuple(f"{name}.{part}" for part in attention)
        if getattr(block, net) is None:
            yield SmoothingFold(consumers=readers, producers=(_scale(f"{name}.{norm}.linear_1", 0),))
            continue
        half = getattr(block, norm).linear.out_features // 2
        first, second = f"{name}.{net}.net.0.proj", f"{name}.{net}.net.2"
        yield SmoothingFold(consumers=(second,), producers=(Producer(module=first),))  # before first is scaled down
        yield SmoothingFold(consumers=(first,), producers=(_scale(f"{name}.{norm}.linear", half),))
        yield SmoothingFold(consumers=readers, producers=(_scale(f"{name}.{norm}.linear", 0),))
