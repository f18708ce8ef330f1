"""What a full-precision model is asked and answers while it samples: every call of the transformer, and the videos.

Kept on the CPU. The calls can be made again, each alone, with something in the model changed: the answers then differ by that
change alone and not by what it did to the samples before. Memory: of one sampling step of a video at 49 x 480 x 720 of
CogVideoX-2b about 40 MB with guidance, in bfloat16 half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.config.prompts.image_prompt import image_checksum, image_of
from qvgen.config.prompts.prompt import Prompts
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.layers.noise_band import NoiseBand
from qvgen.models.base import Encode, VideoDiT


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How videos are sampled; the same arguments give the same videos.

    Attributes:
        family: The model family.
        captions: One video each.
        seeds: Of their noise.
        negatives: What guidance leads each away from; None: the model's own negative prompt.
        num_steps: Sampling steps.
        encode: Captions to conditions.
    """

    family: VideoDiT
    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    negatives: tuple[str | None, ...]
    num_steps: int
    encode: Encode

    def images(self) -> list[str]:
        """Checksums of the captions' images, of those that have one."""
        return [image_checksum(image) for image in map(image_of, self.captions) if image is not None]

    @torch.no_grad()
    def videos(self, model: nn.Module) -> Tensor:
        """Sample with a model; uint8 [B, F, H, W, 3]."""
        return self.family.generate(
            model,
            self.captions,
            self.seeds,
            num_steps=self.num_steps,
            guidance_scale=self.family.guidance_scale,
            negative_prompts=self.negatives,
            encode=self.encode,
        )


def sampling_of(teacher: SampledTeacher, prompts: Prompts, *, videos: int, steps: int, seed_offset: int) -> Sampling:
    """Videos with these prompts, again and again if need be, and seeds of their own, whatever a file says."""
    lines = prompts.lines
    return Sampling(
        family=teacher.family,
        captions=tuple(lines[index % len(lines)].caption for index in range(videos)),
        negatives=tuple(lines[index % len(lines)].negative for index in range(videos)),
        seeds=tuple(teacher.seed + seed_offset + index for index in range(videos)),
        num_steps=steps,
        encode=teacher.encode,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of the transformer.

    Attributes:
        args: Positional arguments, tensors on the CPU.
        kwargs: Named ones.
        output: Of the model, as it came, on the CPU.
        band: Noise band of its samples (the noisiest, should they differ).
        values: Linear's name -> values in its input: what is quantized there.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    band: int
    values: dict[str, int]

    @torch.no_grad()
    def again(self, model: nn.Module) -> Tensor:
        """Ask a model the same; its output, on its device."""
        device = next(model.parameters()).device
        return _first(model(*_moved(self.args, device), **_moved(self.kwargs, device)))


def record(model: nn.Module, band: NoiseBand, sampling: Sampling, *, names: Sequence[str]) -> tuple[list[Call], Tensor]:
    """Sample with a model and keep its calls.

    Args:
        model: Full precision; tells ``band`` its timesteps.
        band: Noise bands.
        sampling: What to sample.
        names: Linears whose inputs are counted.

    Returns:
        The calls in their order, and the videos.
    """
    calls: list[Call] = []
    counted: dict[str, int] = {}

    def count(name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            counted[name] = counted.get(name, 0) + inputs[0].numel()

        return look

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        del module
        assert band.current is not None
        cpu = torch.device("cpu")
        calls.append(
            Call(
                args=_moved(args, cpu),
                kwargs=_moved(kwargs, cpu),
                output=_first(output).cpu(),
                band=int(band.current.max()),
                values=dict(counted),
            )
        )
        counted.clear()

    handles = [model.register_forward_hook(keep, with_kwargs=True)]
    handles += [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in names]
    try:
        videos = sampling.videos(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls, videos


def _first(output: Any) -> Tensor:
    """The prediction, of a tuple or one of diffusers' outputs."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found.detach()


def _moved(value: Any, device: torch.device) -> Any:
    """Copies of tensors on a device, inside tuples, lists and dicts too: a sampler may write into what it passed."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, tuple | list):
        return type(value)(_moved(entry, device) for entry in value)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    return value
