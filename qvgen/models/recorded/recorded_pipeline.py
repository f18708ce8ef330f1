"""The pipeline of a folder, asked by running it without weights: what its captions become, how it calls, what it decodes.

Everything that a family needs to know is here; weights are not. See :mod:`qvgen.models.recorded.outline`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.models.folder.hub_folder import HubFolder
from qvgen.models.folder.transformer_build import build_empty
from qvgen.models.recorded.measured import Measured
from qvgen.models.recorded.outline import Outline, Recording
from qvgen.models.recorded.signature import PipelineSignature, present_class, present_config

TEXT = "encoder_hidden_states"
"""Name of the condition that is a caption's embedding [B, T, D]."""

_CAPTIONS = ("a red boat", " ".join(["two dogs run along a river in the evening"] * 5))
_LATENT_FRAMES = 11
"""Latent frames of a second size, by which the number of frames of one latent frame is checked."""

_FIXED = {"clean_caption": False, "use_resolution_binning": False, "complex_human_instruction": None}
_PLAIN = {"prompt": None, "negative_prompt": None, "output_type": "np", "return_dict": False}


class RecordedPipeline:
    """A pipeline at one size of videos.

    Args:
        signature: What its classes say.
        folder: Where its configurations and tokenizers are.
        parts: Makes its scheduler and tokenizers: name -> part.
        size: Frames, height and width of a video that it samples.
        given: How the user named the folder, for messages.
    """

    def __init__(
        self,
        signature: PipelineSignature,
        folder: HubFolder,
        *,
        parts: Callable[[str], Any],
        size: tuple[int, int, int],
        given: str,
    ) -> None:
        self.signature, self._folder, self._parts, self.size, self._given = signature, folder, parts, size, given
        self._outlines: dict[Any, Outline] = {}

    @cached_property
    def measured(self) -> Measured:
        """Facts about its latents and its calls.

        Raises:
            ValueError: Something that is not supported.
        """
        recording = self.record({"prompt": _CAPTIONS[0], "num_inference_steps": 2}, self.size, until="decode")
        try:
            measured = Measured.of(recording)
        except ValueError as error:
            raise self._refusal(str(error)) from error
        frames, height, width = self.size
        latent_frames, rows, columns = measured.shape[1:]
        if latent_frames > 1 and not self._is_one_more(frames, latent_frames):
            raise self._refusal(
                f"makes {latent_frames} latent frames of {frames}; model=diffusers needs a VAE that makes n + 1 of T n + 1 "
                "frames, and a model.sampling_frames of this form"
            )
        if height % rows or width % columns or height // rows != width // columns:
            raise self._refusal(
                f"makes latents of {rows} x {columns} of model.height={height} and model.width={width}; write sizes that its "
                "VAE and patches divide"
            )
        return measured

    def _is_one_more(self, frames: int, latent_frames: int) -> bool:
        """Whether a number of frames is T n + 1 for n + 1 latent frames, and another one too."""
        if (frames - 1) % (latent_frames - 1):
            return False
        longer = (frames - 1) // (latent_frames - 1) * (_LATENT_FRAMES - 1) + 1
        recording = self.record({"prompt": _CAPTIONS[0]}, (longer, *self.size[1:]), until="decode")
        return Measured.of(recording).shape[1] == _LATENT_FRAMES

    @cached_property
    def encoded(self) -> dict[str, Tensor]:
        """The conditions that one caption becomes, from text encoders without weights: name -> tensor [1, ...].

        Raises:
            ValueError: Captions are encoded in a way that is not supported.
        """
        first, second = (self.record({"prompt": caption}, self.size, until="texts") for caption in _CAPTIONS)
        found, other = self.conditions(first), self.conditions(second)
        if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in other.items()}:
            shown = ", ".join(f"{name} {list(value.shape)}" for name, value in found.items())
            raise self._refusal(
                f"encodes captions of different lengths to different sizes ({shown} of a short one); model=diffusers needs "
                "padded ones"
            )
        guided = {"prompt": _CAPTIONS[0], "negative_prompt": _CAPTIONS[0], "guidance_scale": 2.0}
        both = dict(zip(self.signature.texts, self.record(guided, self.size, until="texts").texts, strict=True))
        for name in self.arguments_of(found).values():
            negative = both.get(f"negative_{name}")
            if not isinstance(negative, Tensor) or not torch.equal(negative, both[name]):
                raise self._refusal("encodes a negative prompt otherwise than a caption")
        return found

    def visited(self, num_steps: int) -> Tensor:
        """The timesteps of a call of so many steps, [steps], as the scheduler is given them."""
        recording = self.record({"prompt": _CAPTIONS[0], "num_inference_steps": num_steps}, self.size, until="decode")
        return torch.stack([torch.as_tensor(timestep) for _, timestep, _ in recording.steps])

    def arguments_of(self, conditions: Mapping[str, Tensor]) -> dict[str, str]:
        """Name of a condition -> argument of the pipeline's call."""
        main = next(name for name in self.signature.texts if self._is_caption(name) and name not in conditions)
        return {name: main if name == TEXT else name for name in conditions}

    def conditions(self, recording: Recording) -> dict[str, Tensor]:
        """The tensors of a caption by the names of conditions: the first one of tokens is ``encoder_hidden_states``.

        Raises:
            ValueError: There is none of tokens.
        """
        named = zip(self.signature.texts, recording.texts, strict=True)
        found = {name: value for name, value in named if self._is_caption(name) and isinstance(value, Tensor)}
        main = next((name for name, value in found.items() if value.ndim == 3), None)
        if main is None:
            raise self._refusal("encodes a caption to nothing of tokens and channels [B, T, D]")
        return {TEXT: found.pop(main), **found}

    @staticmethod
    def _is_caption(name: str) -> bool:
        return not name.startswith("negative_")

    def record(
        self, arguments: Mapping[str, Any], size: tuple[int, int, int], *, until: str, outline: Outline | None = None
    ) -> Recording:
        """Run it without weights and without guidance, unless the arguments say another one.

        Args:
            arguments: Arguments of its call that are not always the same.
            size: Frames, height and width.
            until: See :meth:`qvgen.models.recorded.outline.Outline.record`.
            outline: The pipeline; None: one in float32 on the CPU.

        Raises:
            ValueError: The pipeline can't be run so.
        """
        outline = outline or self.outline(torch.float32, torch.device("cpu"), encoders="empty")
        plain = {"guidance_scale": 1.0, "num_inference_steps": 1, "generator": torch.Generator()}
        try:
            return outline.record({**plain, **self.fixed, **self.sizes(size), **arguments}, until=until)
        except Exception as error:  # whatever a pipeline of diffusers raises
            if "meta tensor" in str(error):
                raise self._refusal("computes with numbers out of the weights of its VAE or transformer") from error
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise self._refusal(f"can't be followed: {reason}") from error

    @property
    def fixed(self) -> dict[str, Any]:
        """Arguments of its call that are always the same: no text but embeddings, and nothing that depends on packages."""
        return {name: value for name, value in {**_PLAIN, **_FIXED}.items() if name in self.signature.call}

    def sizes(self, size: tuple[int, int, int]) -> dict[str, int]:
        """Arguments of its call that say frames, height and width."""
        frames, height, width = size
        argument = self.signature.frames_argument
        sizes = {"height": height, "width": width}
        return sizes if argument is None else {argument: frames, **sizes}

    def outline(
        self, dtype: torch.dtype, device: torch.device, *, encoders: Mapping[str, nn.Module] | str | None = None
    ) -> Outline:
        """The pipeline without weights of transformer and VAE; kept until :meth:`forget`.

        Args:
            dtype: Type that its transformer has.
            device: Where it makes its tensors.
            encoders: Its text encoders by name; ``empty`` for ones without weights; None where embeddings are given.

        Raises:
            ValueError: A part can't be built from its configuration.
        """
        key = (dtype, str(device), encoders if isinstance(encoders, str) else encoders is None)
        if key not in self._outlines:
            made = {name: self._empty(name) for name in ("transformer", "vae")}
            if encoders == "empty":
                encoders = {name: self._empty_encoder(name) for name in self.signature.text_encoders}
            texts = dict.fromkeys(self.signature.text_encoders) if encoders is None else encoders
            real = {name: self._parts(name) for name in ("scheduler", *self.signature.tokenizers)}
            try:
                self._outlines[key] = Outline(self.signature, {**made, **texts, **real}, device=device, dtype=dtype)
            except Exception as error:  # a pipeline's constructor
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise self._refusal(f"can't be built: {reason}") from error
        return self._outlines[key]

    def forget(self) -> None:
        """Let go of text encoders and tokenizers."""
        self._outlines.clear()

    def _empty(self, name: str) -> nn.Module:
        """The transformer or the VAE on the meta device."""
        kind, config = self.signature.vae, self._folder.read_json(f"{name}/config.json")
        if name == "transformer":
            named = self.signature.transformer
            kind, config = present_class(named, config), present_config(named, config)
        try:
            return build_empty(kind, config).eval()
        except ValueError as error:
            raise ValueError(f"{self._folder.path / name} {error}") from error

    def _empty_encoder(self, name: str) -> nn.Module:
        """A text encoder on the meta device."""
        import transformers

        kind = getattr(transformers, self.signature.text_encoders[name])
        self._folder.read_json(f"{name}/config.json")
        try:
            with torch.device("meta"):
                encoder: nn.Module = kind(
                    kind.config_class.from_pretrained(self._folder.path / name, local_files_only=True)
                )
        except Exception as error:  # whatever a class of transformers raises for its configuration
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{self._folder.path / name} builds no {kind.__name__}: {reason}") from error
        return encoder.eval()

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"{self._given} holds a {self.signature.name}, which {reason}")
