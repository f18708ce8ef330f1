"""Tiny video DiTs in pixel space that CPU cores can train: diffusers' Wan transformer on moving digits.

    input    [B, 3 + 6, F, S, S]: the noisy RGB video, and where each pixel is, as sine and cosine of t, y and x. Wan's
             rotary embedding says only how far apart two tokens are; where the digit is has to be told.
    tokens   patches of 1 x 4 x 4
    caption  "a COLOR DIGIT MOTION" -> three tokens, rows of a fixed random table; the empty caption -> its null row, thrice
    output   [B, 3, F, S, S]: the flow's velocity, noise - video

It is the same class, with the same names of layers, as Wan 2.1 (arXiv 2503.20314), only narrow. No VAE and no text encoder:
everything that a model needs is this file and some megabytes of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from qvgen.config.schema.may_differ import MayDiffer
from qvgen.layers.smoothing_fold import SmoothingFold
from qvgen.models.base import Encode, TensorReader
from qvgen.models.few_step import check_guidance, check_sampler, drawn_objective
from qvgen.models.folder.transformer_build import build_transformer
from qvgen.models.guidance import GUIDANCE, NUM_STEPS, SHIFT, check_negative_prompt, negative_texts, require_number
from qvgen.models.objectives import FlowMatching
from qvgen.models.original.names import WAN_ORIGINAL_NAMES, OriginalNames
from qvgen.models.tiny_caption import NUM_TOKENS, embedding_table, token_ids
from qvgen.models.tiny_sampling import TinySampler, checked_frames
from qvgen.models.wan_fold import WAN_SHARED_INPUTS, wan_folds
from qvgen.models.weight_file import ASSETS_DIRECTORY, check_state, load_weights, read_card, save_weights

RGB_CHANNELS = 3
PATCH_SIZE = (1, 4, 4)
COORDINATE_SCALE = 2.0
"""Coordinates are constant over a patch and must be heard beside noise of variance 1."""

_GATE_ROWS = [2, 5]
"""Rows of a Wan block's modulation that gate its self-attention and its feed-forward layers."""
_MAX_POSITIONS = 64


class TinyFamily:
    """The family of tiny models. It implements :class:`qvgen.models.base.VideoDiT`.

    Args:
        image_size: Side S of a frame in pixels, a multiple of 4.
        num_frames: Frames F of a video.
        width: Channels of a token; a multiple of 2 num_heads.
        num_layers: Number of transformer blocks.
        num_heads: Attention heads of a block.
        feed_forward_size: Hidden channels of a block's feed-forward layers.
        text_size: Channels of a caption token.
        frequency_size: Channels of the timestep's sinusoidal embedding.
        shift: Shift of the noise levels towards noise, in training and sampling; 1 is none.
        include: Name patterns (fnmatch) of the Linears that are quantized.
        exclude: Name patterns (fnmatch) of Linears that stay as they are.
        prompts: Captions that a report samples videos of.
        fps: Frames per second.
        num_inference_steps: Sampling steps of a video.
        guidance_scale: Factor of classifier-free guidance; 1 is none.
        timesteps: A few-step model's own (:mod:`qvgen.models.few_step`): a falling list of numbers in (0, 1000], one for each
            sampling step, which no shift moves; or ``scheduler``, for those that its scheduler visits. None: it is called at
            any timestep.
        sampler: A few-step model's: ``lcm`` predicts the clean sample in each step and adds new noise; None: Euler steps.
        guidance_distilled: The weights hold guidance: ``guidance_scale`` is 1, and training drops no caption.
        negative_prompt: The caption that guidance leads away from; "" is the empty one.
        weights: The teacher's safetensors file; None: the one that comes with the package.

    Attributes:
        teacher_file: Name of the file of weights that pretraining writes and the package ships.
        teacher_dtype: Type in which that file holds them.

    Raises:
        ValueError: for sizes that don't divide, and prompts that the model does not understand.
    """

    name: ClassVar[str]
    teacher_file: ClassVar[str]
    teacher_dtype: ClassVar[torch.dtype]
    transformer_class = "WanTransformer3DModel"
    layer_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "self_attention": ("blocks.*.attn1.*",),
        "cross_attention": ("blocks.*.attn2.*",),
        "ffn": ("blocks.*.ffn.*",),
    }
    shared_inputs: ClassVar[Sequence[Sequence[str]]] = WAN_SHARED_INPUTS
    original_names: ClassVar[OriginalNames] = WAN_ORIGINAL_NAMES

    def __init__(
        self,
        *,
        image_size: int,
        num_frames: int,
        width: int,
        num_layers: int,
        num_heads: int,
        feed_forward_size: int,
        text_size: int,
        frequency_size: int,
        shift: Annotated[float, SHIFT],
        include: Sequence[str],
        exclude: Sequence[str],
        prompts: Sequence[str],
        fps: int,
        num_inference_steps: Annotated[int, NUM_STEPS],
        guidance_scale: Annotated[float, GUIDANCE],
        negative_prompt: str = "",
        timesteps: Any = None,
        sampler: str | None = None,
        guidance_distilled: bool = False,
        weights: Annotated[str | None, MayDiffer.FREE] = None,
    ) -> None:
        for name, value, divisor in (("image_size", image_size, PATCH_SIZE[1]), ("width", width, 2 * num_heads)):
            if value % divisor:
                raise ValueError(f"{name}={value} is no multiple of {divisor}; use {(value // divisor + 1) * divisor}")
        check_negative_prompt(negative_prompt)
        require_number("num_inference_steps", num_inference_steps, NUM_STEPS, whole=True)
        require_number("guidance_scale", guidance_scale, GUIDANCE)
        require_number("shift", shift, SHIFT)
        self.image_size, self.num_frames, self.fps = image_size, num_frames, fps
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.guidance_distilled, self.sampler = guidance_distilled, sampler
        check_guidance(self)
        check_sampler(self, timesteps=timesteps)
        self._sampler = TinySampler(
            shift=shift, timesteps=timesteps, sampler=sampler, num_inference_steps=num_inference_steps
        )
        self.own_timesteps = self._sampler.own_timesteps
        self.objective = drawn_objective(FlowMatching(shift=shift), self)
        self.negative_prompt = negative_prompt
        self.include, self.exclude, self.prompts = list(include), list(exclude), list(prompts)
        self.weights = Path(weights) if weights is not None else ASSETS_DIRECTORY / self.teacher_file
        self.transformer_config: dict[str, Any] = {
            "patch_size": list(PATCH_SIZE),
            "num_attention_heads": num_heads,
            "attention_head_dim": width // num_heads,
            "in_channels": RGB_CHANNELS + 6,
            "out_channels": RGB_CHANNELS,
            "text_dim": text_size,
            "freq_dim": frequency_size,
            "ffn_dim": feed_forward_size,
            "num_layers": num_layers,
            "cross_attn_norm": True,
            "rope_max_seq_len": _MAX_POSITIONS,
        }
        self._embeddings = embedding_table(text_size)
        self._coordinates = _coordinates(num_frames, image_size)
        self.encode([*self.prompts, negative_prompt])

    @property
    def revision(self) -> str:
        """sha256 of the teacher's weights."""
        return str(read_card(self.weights)["sha256"])

    def identity(self, *, transformer_only: bool = False) -> dict[str, str]:
        """The teacher's weights, whose sha256 is verified when they are loaded; nothing where there are none."""
        del transformer_only  # there is nothing else
        return {"transformer": self.revision} if self.weights.is_file() else {}

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """(3, F, S, S)."""
        return (RGB_CHANNELS, self.num_frames, self.image_size, self.image_size)

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(3, text_size): one token per word that counts."""
        return (NUM_TOKENS, int(self.transformer_config["text_dim"]))

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build a float32 transformer from its diffusers config, with PyTorch's random weights.

        Raises:
            ValueError: for a key that the transformer does not have.
        """
        return build_transformer(self.transformer_class, config)

    def initial_transformer(self, seed: int) -> nn.Module:
        """Build an untrained transformer, the start of pretraining.

        Wan's modulation starts near 0, which all but closes the residual branches; their gates start at 1 here.

        Args:
            seed: Seed of the random weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer = self.build(self.transformer_config)
        for block in transformer.blocks:
            with torch.no_grad():
                block.scale_shift_table[:, _GATE_ROWS] = 1.0
        return transformer

    def load_teacher(self, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Load the trained transformer: float32 unless asked otherwise, in eval mode, its weights' sha256 verified.

        Raises:
            ValueError: when weights or card are missing, damaged, or of other sizes than the configuration's.
        """
        tensors = load_weights(self.weights)
        transformer = self.build(self.transformer_config)
        check_state(transformer, tensors, path=self.weights)
        transformer.load_state_dict(tensors, strict=True)
        if dtype not in (None, torch.float32):
            transformer.to(dtype)
        return transformer.requires_grad_(False).eval()

    def tensor_reader(self) -> TensorReader:
        """Give a reader of single tensors of the trained transformer; its small file is read at once."""
        tensors = load_weights(self.weights)
        return lambda name: tensors[name].float()

    @torch.no_grad()
    def round_to_stored(self, transformer: nn.Module) -> None:
        """Round a transformer's weights, in place, to what the file of weights will hold."""
        for parameter in transformer.parameters():
            parameter.copy_(parameter.to(self.teacher_dtype))

    def save_teacher(self, transformer: nn.Module, directory: Path, *, card: Mapping[str, Any]) -> Path:
        """Write the weights and a card that says how they were made (:mod:`qvgen.models.weight_file`); gives their path."""
        path = directory / self.teacher_file
        return save_weights(transformer.state_dict(), path, card=card, dtype=self.teacher_dtype)

    def smoothing_folds(self, transformer: nn.Module) -> list[SmoothingFold]:
        """The places where smoothing vectors can be folded, which are those of Wan's class."""
        return wan_folds(transformer)

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Look up the three words of each caption; the empty caption is the null row, three times.

        Returns:
            ``encoder_hidden_states`` float32 [B, 3, text_size].

        Raises:
            ValueError: for a caption that is no "a COLOR DIGIT MOTION".
        """
        return {"encoder_hidden_states": self._embeddings[token_ids(captions)]}

    def predict(
        self,
        transformer: nn.Module,
        noisy: Float[Tensor, "B 3 F S S"],
        timestep: Float[Tensor, " B"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, "B 3 F S S"]:
        """Predict the velocity of noisy videos; see :meth:`qvgen.models.base.VideoDiT.predict`."""
        place = self._coordinates.to(noisy).expand(noisy.shape[0], -1, -1, -1, -1)
        output: Tensor = transformer(
            torch.cat((noisy, place), dim=1),
            timestep=timestep,
            encoder_hidden_states=condition["encoder_hidden_states"],
            return_dict=False,
        )[0]
        return output

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
    ) -> UInt8[Tensor, "B F S S 3"]:
        """Sample one video per caption; see :meth:`qvgen.models.base.VideoDiT.generate`.

        Raises:
            ValueError: a video that is not finite or of one colour; see :mod:`qvgen.models.sampled_video`.
        """
        if len(captions) != len(seeds):
            raise ValueError(f"{len(captions)} captions and {len(seeds)} seeds; give one seed for each caption")
        device = next(transformer.parameters()).device
        negatives = negative_texts(self.negative_prompt, negative_prompts, count=len(captions))
        texts = [*captions, *negatives] if guidance_scale != 1.0 else list(captions)
        condition = {key: value.to(device) for key, value in (encode or self.encode)(texts).items()}

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.predict(transformer, noisy, timestep, condition)

        how = {"num_steps": num_steps, "guidance_scale": guidance_scale, "device": device}
        video = self._sampler.sample(predict, seeds, shape=self.sample_shape, **how)
        return checked_frames(video, transformer=transformer, captions=captions, seeds=seeds)


def _coordinates(num_frames: int, image_size: int) -> Tensor:
    """Scaled sine and cosine of each pixel's place on the torus, float32 [1, 6, F, S, S]."""
    turns = [torch.arange(size) * (2 * math.pi / size) for size in (num_frames, image_size, image_size)]
    angles = torch.stack(torch.meshgrid(*turns, indexing="ij"))
    return COORDINATE_SCALE * torch.cat((angles.sin(), angles.cos()))[None]
