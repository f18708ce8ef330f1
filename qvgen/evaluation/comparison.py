"""Teacher, fake-quantized and packed model side by side: the same captions, the same seeds, the same noise.

The videos that are shown come from the configuration's prompts; the table is measured on as many held-out captions as the
relative error. Differences between fake-quantized and packed are counted, not only bounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qvgen.config.prompt import PromptedVideo, Prompts
from qvgen.config.schema import TrainConfig
from qvgen.data.source import Split
from qvgen.data.video import write_video
from qvgen.deploy.delta_switch import find_switch
from qvgen.deploy.merged_linear import MergedPackedLinear
from qvgen.evaluation.classifier import ATTRIBUTES, VIDEO_SHAPE, load_classifier
from qvgen.evaluation.held_out import MeasuredInputs
from qvgen.evaluation.metrics import FlipCount, count_flips, flicker, psnr_db, ssim
from qvgen.evaluation.placement import placed
from qvgen.evaluation.report_data import Checks, LayerReport, Quality, VariantQuality, VideoComparison
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import packed_layers, quantized_layers
from qvgen.models.base import Encode, VideoDiT

VARIANTS = ("teacher", "fake-quantized", "packed")
STILL = "standing still"
BATCH_SIZE = 32
WATCHED_TOKENS = 256
"""All tokens of all layers of a large model would not fit into memory."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What :func:`compare_models` measured."""

    checks: Checks
    videos: tuple[VideoComparison, ...]
    quality: Quality


def compare_models(
    config: TrainConfig,
    *,
    teacher: nn.Module,
    fake: nn.Module,
    packed: nn.Module,
    held_out: MeasuredInputs,
    run_dir: Path,
) -> Comparison:
    """Generate with all three models, write the shown videos to run_dir/videos, and compare.

    Args:
        config: The run's: prompts, seed, number of videos.
        teacher: Full-precision model.
        fake: Trained model, its Phi gone.
        packed: The same, read back from its packed directory.
        held_out: Inputs on which the outputs of fake and packed are compared; captions of the table's videos.
        run_dir: The run's folder.
    """
    models = dict(zip(VARIANTS, (teacher, fake, packed), strict=True))
    shown = shown_videos(config)
    split = held_out.split
    items = held_out_items(split, config.evaluation.quality_videos)
    captions = [item["caption"] for item in items]
    table_seeds = [config.seed + index for index in range(len(items))]
    sampled, table_videos, activation_bits = {}, {}, {}
    for name, model in models.items():
        sampled[name] = _sample(config.model, model, shown, encode=split.encode)
        switch = find_switch(model)
        if switch is not None:
            switch.history.clear()
        table_videos[name] = generate_videos(config.model, model, captions, table_seeds, encode=split.encode)
        activation_bits[name] = None if switch is None else switch.mean_bits()
    _write_videos(sampled, shown, fps=config.model.fps, directory=run_dir / "videos")
    return Comparison(
        checks=_checks(fake, packed, held_out=held_out, videos=table_videos),
        videos=tuple(
            VideoComparison(
                prompt=video.caption,
                seed=video.seed,
                fps=config.model.fps,
                teacher=sampled["teacher"][index].numpy(),
                fake_quantized=sampled["fake-quantized"][index].numpy(),
                packed=sampled["packed"][index].numpy(),
                negative_prompt=video.negative,
            )
            for index, video in enumerate(shown)
        ),
        quality=Quality(
            variants=tuple(
                replace(_quality(name, table_videos, items), activation_bits=activation_bits[name]) for name in VARIANTS
            ),
            num_videos=len(items),
            num_still_videos=sum(STILL in caption for caption in captions),
            seeds=f"{table_seeds[0]}..{table_seeds[-1]}",
            num_steps=config.model.num_inference_steps,
            guidance_scale=config.model.guidance_scale,
            negative_prompt=None if config.model.guidance_scale == 1 else config.model.negative_prompt,
        ),
    )


def evaluation_prompts(config: TrainConfig) -> Prompts:
    """What is sampled to be looked at: ``evaluation.prompts``, else the model's own captions."""
    return config.evaluation.prompts or Prompts.of(config.model.prompts)


def shown_videos(config: TrainConfig) -> list[PromptedVideo]:
    """The videos that a run shows: the evaluation's prompts in turn, again and again if need be."""
    return evaluation_prompts(config).in_turn(config.evaluation.videos, first_seed=config.seed)


def bf16_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and saved buffers of a model in bfloat16."""
    return 2 * sum(value.numel() for value in model.state_dict().values())


def layer_reports(packed: nn.Module) -> tuple[LayerReport, ...]:
    """One row of the report for every packed layer."""
    return tuple(
        LayerReport(
            name=name,
            shape=(layer.out_features, layer.in_features),
            weight_bits=layer.profile.weight.bits,
            activation_bits=layer.profile.activation.bits,
            num_bytes=layer.nbytes(),
            weight_error=float("nan") if layer.weight_error is None else layer.weight_error,
            output_error=None,
        )
        for name, layer in packed_layers(packed).items()
    )


def codes_equal(fake: nn.Module, packed: nn.Module) -> tuple[bool, int]:
    """Whether every code in the packed layers is the trained one, and how many were compared."""
    trained, stored = quantized_layers(fake), packed_layers(packed)
    equal = list(trained) == list(stored)
    count = 0
    for name in trained.keys() & stored.keys():
        for bits, quantizer in trained[name].weight_quantizers().items():
            codes = quantizer.codes(trained[name].weight).cpu()
            equal = equal and torch.equal(codes, stored[name].weight_of(bits).integer_codes().cpu())
            count += codes.numel()
    return equal, count


@torch.no_grad()
def generate_videos(
    family: VideoDiT,
    model: nn.Module,
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompts: Sequence[str | None] | None = None,
    encode: Encode | None = None,
) -> Tensor:
    """One video per caption and seed, as the family usually samples: uint8 [B, F, H, W, 3]."""
    with placed(model):
        parts = [
            family.generate(
                model,
                captions[start : start + BATCH_SIZE],
                seeds[start : start + BATCH_SIZE],
                num_steps=family.num_inference_steps,
                guidance_scale=family.guidance_scale,
                negative_prompts=None if negative_prompts is None else negative_prompts[start : start + BATCH_SIZE],
                encode=encode,
            )
            for start in range(0, len(captions), BATCH_SIZE)
        ]
    return torch.cat(parts) if parts else torch.empty(0, 1, 1, 1, 3, dtype=torch.uint8)


def held_out_items(split: Split, count: int) -> list[Mapping[str, Any]]:
    """The first items of a split, from its beginning again where it has fewer."""
    return [split.samples[index % len(split)] for index in range(count)]


def _sample(family: VideoDiT, model: nn.Module, videos: Sequence[PromptedVideo], *, encode: Encode) -> Tensor:
    return generate_videos(
        family,
        model,
        [video.caption for video in videos],
        [video.seed for video in videos],
        negative_prompts=[video.negative for video in videos],
        encode=encode,
    )


def _write_videos(sampled: Mapping[str, Tensor], shown: Sequence[PromptedVideo], *, fps: int, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    for name, batch in sampled.items():
        for index, video in enumerate(shown):
            path = directory / video_name(index, video.caption, seed=video.seed, variant=name)
            write_video(path, batch[index].numpy(), fps=fps)


def video_name(index: int, prompt: str, *, seed: int, variant: str) -> str:
    """File name of a video: safe characters of the prompt only; where they do not say all of it, its checksum too.

    >>> video_name(0, "a red boat", seed=1, variant="packed")
    '00-a-red-boat-seed1-packed.mp4'
    >>> video_name(0, "A red boat, at sea", seed=1, variant="packed")
    '00-a-red-boat--at-sea-c14f0adb-seed1-packed.mp4'
    """
    words = "".join(letter if letter.isalnum() else "-" for letter in prompt.lower())[:60]
    words = words.encode()[:180].decode(errors="ignore").strip("-")  # a name has room for 255 bytes in all
    if words.replace("-", " ") != prompt:  # another prompt could give the same words
        words = f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return f"{index:02d}-{words}-seed{seed}-{variant}.mp4"


def _checks(fake: nn.Module, packed: nn.Module, *, held_out: MeasuredInputs, videos: Mapping[str, Tensor]) -> Checks:
    equal, count = codes_equal(fake, packed)
    largest = 0.0
    for ours, theirs in zip(held_out.predictions(packed), held_out.predictions(fake), strict=True):
        largest = max(largest, float((ours - theirs).abs().max()))
    ranks = [layer.phi.rank for layer in quantized_layers(fake).values() if layer.phi is not None]
    return Checks(
        packed_codes_equal=equal,
        num_codes=count,
        packed_vs_fake_max_abs=largest,
        trajectory_psnr_db=psnr_db(videos["packed"], videos["fake-quantized"], max_value=255),
        flipped_pixels=count_flips(videos["packed"], videos["fake-quantized"]),
        flipped_codes=_flipped_activation_codes(fake, packed, held_out=held_out),
        phi_rank_final=max(ranks, default=0),
    )


@torch.no_grad()
def _flipped_activation_codes(fake: nn.Module, packed: nn.Module, *, held_out: MeasuredInputs) -> FlipCount:
    """How many input codes of all layers differ between the two models on the first held-out batch."""
    trained = _input_codes(fake, quantized_layers(fake), held_out=held_out)
    stored = _input_codes(packed, packed_layers(packed), held_out=held_out)
    counts = [count_flips(trained[name], stored[name]) for name in trained]
    return FlipCount(
        num_flipped=sum(count.num_flipped for count in counts), num_values=sum(count.num_values for count in counts)
    )


def _input_codes(
    model: nn.Module, layers: Mapping[str, FakeQuantLinear] | Mapping[str, PackedLinear], *, held_out: MeasuredInputs
) -> dict[str, Tensor]:
    """Codes of each layer's input on the first held-out batch, of ``WATCHED_TOKENS`` tokens per sample."""
    codes: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(module: nn.Module, name: str) -> RemovableHandle:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x, found = inputs[0], codes[name]
            # A packed feed-forward comes by blocks of tokens.
            left = WATCHED_TOKENS - sum(part.shape[1] for part in found) if x.ndim > 2 else 1 - len(found)
            if left > 0:
                tokens = x[:, :left] if x.ndim > 2 else x
                found.append(layers[name].input_codes(tokens).reshape(tokens.shape).cpu())

        return module.register_forward_pre_hook(keep)

    handles = [watch(layer, name) for name, layer in layers.items()]
    places = {id(layer): name for name, layer in layers.items()}
    for module in model.modules():
        if isinstance(module, MergedPackedLinear):  # its parts are not called themselves
            handles += [watch(module, places[id(part)]) for part in module.parts]
    try:
        next(held_out.predictions(model))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts, 1) if parts[0].ndim > 2 else parts[0] for name, parts in codes.items()}


def _quality(name: str, videos: Mapping[str, Tensor], items: Sequence[Mapping[str, Any]]) -> VariantQuality:
    # SSIM of a large video takes minutes on a CPU core.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, teacher = videos[name].to(device), videos["teacher"].to(device)
    still = [index for index, item in enumerate(items) if STILL in item["caption"]]
    return VariantQuality(
        name=name,
        psnr_db=None if name == "teacher" else psnr_db(found, teacher, max_value=255),
        ssim=None if name == "teacher" else ssim(found, teacher, max_value=255),
        flicker=flicker(found[still]) if still else None,
        accuracy=_accuracy(videos[name], items),
    )


def _accuracy(videos: Tensor, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of the videos that show what was asked for; empty for data without labels, or of another size."""
    if not all(name in items[0] for name in ATTRIBUTES) or tuple(videos.shape[1:]) != VIDEO_SHAPE:
        return {}
    return load_classifier().accuracy(videos, attribute_labels(items))


def attribute_labels(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What the captions ask for, int64 [B] by attribute."""
    return {name: torch.tensor([int(item[name]) for item in items]) for name in ATTRIBUTES}
