"""The side of a model family that the rest of the library knows: the protocol that every file of this folder implements.

A family is one object, built from ``conf/model/NAME.yaml``. It owns no weights: transformers are made by it and passed
to it, so that a teacher, a fake-quantized student and a packed model go through the same calls. All randomness comes in as
arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from qvgen.layers.smoothing_fold import SmoothingFold

Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Captions -> what a transformer is conditioned on, one row for each: a family's ``encode``, or embeddings from a cache."""

TensorReader = Callable[[str], Tensor]
"""Name of a parameter of the trained transformer -> its values in float32, on the CPU, read when they are asked for."""


LOCAL_ARGUMENTS = ("_target_", "recipe", "weights", "path", "transformer", "lora", "lora_high", "lora_low")
"""Arguments of families that are of the machine where a run is made; no manifest holds them."""


def local_arguments(family: object) -> frozenset[str]:
    """Names of a family's arguments that only hold on this machine, such as paths: no packed model says them.

    They are :data:`LOCAL_ARGUMENTS` and what a family's class names besides in an attribute ``local_arguments``.
    """
    return frozenset((*LOCAL_ARGUMENTS, *getattr(family, "local_arguments", ())))


def example_condition(family: Any, *, count: int, make: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Make stand-ins of the tensors that a family's ``encode`` returns, without running a text encoder.

    Their shapes are ``condition_shape`` and, where a family's transformer is told more than ``encoder_hidden_states``, those
    of an attribute ``further_condition_shapes``: name -> shape for one caption.

    Args:
        family: The family.
        count: Captions.
        make: Makes a tensor of a size, such as ``torch.randn``; masks of attention are ones of its kind.
    """
    shapes = {"encoder_hidden_states": family.condition_shape, **getattr(family, "further_condition_shapes", {})}
    made = {name: make(count, *shape) for name, shape in shapes.items()}
    return {name: torch.ones_like(value) if "attention_mask" in name else value for name, value in made.items()}


def predicted_part(family: Any, output: Tensor) -> Tensor:
    """The part of a transformer's output that its pipeline samples with.

    It is all of it, unless the family has a ``predicted_part`` of its own: of a model that is given the first latent frame
    nobody uses what it answers for that frame, and no error counts it.
    """
    own = getattr(family, "predicted_part", None)
    return output if own is None else own(output)


class Objective(Protocol):
    """A formula of :mod:`qvgen.models.objectives`."""

    def sample_sigma(self, *, generator: torch.Generator) -> Tensor:
        """Draw one noise level, float32 [] in [0, 1)."""

    def timestep(self, sigma: Tensor) -> Tensor:
        """Convert noise levels to timesteps in [0, 1000], float32 [...]."""

    def add_noise(self, clean: Tensor, noise: Tensor, *, sigma: Tensor) -> Tensor:
        """Mix clean samples [B, C, F, H, W] with noise at levels sigma [B]."""

    def target(self, clean: Tensor, noise: Tensor, *, sigma: Tensor) -> Tensor:
        """Return what a perfect model predicts, [B, C, F, H, W]."""

    def noise(self, prediction: Tensor, *, noisy: Tensor, timestep: Tensor) -> Tensor:
        """Return the noise in ``noisy`` that a prediction [B, C, F, H, W] at timesteps [B] implies."""


@runtime_checkable
class VideoDiT(Protocol):
    """A family of video diffusion transformers.

    A class may also have ``local_arguments``, a tuple of names: see :func:`local_arguments`; ``further_condition_shapes``, of
    what a caption becomes besides ``encoder_hidden_states``: see :func:`example_condition`; ``original_names``, by which
    a checkpoint is written with the names of the model's own code: see :mod:`qvgen.models.original.names`; and
    ``tensor_reader``, which gives a :data:`TensorReader` of the trained transformer, or None where its weights have to be
    loaded whole; ``own_timesteps``, the few timesteps that the transformer is called at, falling, or None, and
    ``guidance_distilled``, whether its weights hold guidance: see :mod:`qvgen.models.few_step`.

    Attributes:
        name: Name as in ``model=NAME`` and in a packed model's manifest.
        revision: Identifier of the teacher's weights, for the manifest.
        objective: what the transformer predicts.
        transformer_class: name of the diffusers class.
        include: fnmatch patterns on the names of the transformer's Linears that are quantized.
        exclude: patterns that take Linears out again; each must match one, as each of ``include``.
        layer_groups: what layers do, by fnmatch patterns of their names; see :mod:`qvgen.layers.layer_group`.
        shared_inputs: Linears of a block that read the same input, by the ends of their names; see
            :mod:`qvgen.layers.shared_input`.
        prompts: captions that a report samples from.
        fps: frames per second of its videos.
        num_inference_steps: sampling steps that the model is usually run with.
        guidance_scale: classifier-free guidance that it is usually run with.
        negative_prompt: what that guidance leads away from; "" is the empty caption.
    """

    name: str
    objective: Objective
    transformer_class: str
    include: list[str]
    exclude: list[str]
    layer_groups: Mapping[str, Sequence[str]]
    shared_inputs: Sequence[Sequence[str]]
    prompts: list[str]
    fps: int
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str

    @property
    def revision(self) -> str:
        """Which weights :meth:`load_teacher` loads."""

    def identity(self, *, transformer_only: bool = False) -> dict[str, str]:
        """Everything that decides the numbers that the family computes: name of a part -> checksum of all its bytes.

        ``revision`` tells one model from another in milliseconds; this tells one bit, and may read all weights once. A
        part that is not there is left out.

        Args:
            transformer_only: only what :meth:`load_teacher` loads, the LoRA as ``lora``.
        """

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of one sample as the transformer's output has it."""

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(T, D) of ``encoder_hidden_states`` of one caption, without running a text encoder."""

    def load_teacher(self, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Load the trained transformer, in eval mode, without gradients, on the CPU.

        Args:
            dtype: Type of its weights; None: the one that a teacher has in this family's configuration.

        Raises:
            ValueError: when the weights are missing or are not the ones that were published.
        """

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build a transformer without trained weights.

        Args:
            config: its diffusers config, as a manifest holds it; plain values only.

        Raises:
            ValueError: for a key that the transformer does not have.
        """

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """Where a smoothing vector of a Linear's inputs can go into what stands before it, without another result.

        Args:
            transformer: A transformer of this family, quantized or not.

        Returns:
            In an order in which a fold that scales a Linear comes before the one in which that Linear is scaled down.
        """

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Turn captions into what the transformer is conditioned on.

        Args:
            captions: B texts; the empty one is the input of caption dropout.

        Returns:
            Tensors with B rows each, at least ``encoder_hidden_states``: float32 [B, T, D].

        Raises:
            ValueError: for a caption that the model does not understand.
        """

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B C F H W"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B C F H W"]:
        """Call a transformer of this family once.

        Args:
            transformer: teacher, student or packed model.
            noisy: float [B, C, F, H, W], samples at their noise levels.
            timestep: float32 [B] in [0, 1000], one per sample.
            condition: what :meth:`encode` returned, on the same device.

        Returns:
            float [B, C, F, H, W], in the objective's terms.
        """

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
        """Sample one video per caption.

        A family that computes one after another says so by an attribute ``samples_apart = True``: the processes of a run then
        share out single videos, in place of batches.

        Args:
            transformer: teacher, student or packed model.
            captions: B texts.
            seeds: B seeds; a video's noise depends on its own seed alone, so that models can be compared in pairs.
            num_steps: sampling steps.
            guidance_scale: classifier-free guidance; 1 is none and costs half.
            negative_prompts: B texts that guidance leads away from, None where it is :attr:`negative_prompt`; None: for all.
                Without guidance none is encoded.
            encode: stands in place of :meth:`encode`, so that no text encoder has to be loaded.

        Returns:
            uint8 [B, F, H, W, 3], RGB in 0..255, on the CPU.
        """


class LatentVideoDiT(VideoDiT, Protocol):
    """A family whose samples are latents of a VAE, and whose text encoder is a network: both are run once, before training.

    Attributes:
        height: Height of a frame in pixels.
        width: Width of a frame in pixels.
        num_frames: frames of a clip.
    """

    height: int
    width: int
    num_frames: int

    @property
    def latent_revision(self) -> str:
        """Content key of whatever decides :meth:`encode_video`."""

    @property
    def text_revision(self) -> str:
        """Content key of whatever decides :meth:`encode`."""

    def check_clip(self, *, frames: int, height: int, width: int) -> None:
        """Raise ValueError for a size that VAE and patches do not divide."""

    def to(self, device: torch.device | str) -> Self:
        """Choose where text encoder and VAE run."""

    def release(self) -> None:
        """Free text encoder and VAE; they are loaded again when needed."""

    def encode_video(self, pixels: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C f h w"]:
        """Turn clips in [-1, 1] into the float32 latents that the transformer is trained on."""

    def decode(
        self, latents: Float[Tensor, "B C f h w"], *, num_frames: int | None = None
    ) -> Float[Tensor, "B 3 F H W"]:
        """Turn latents of clips of ``num_frames`` frames (None: as in training) into pixels about [-1, 1]."""
