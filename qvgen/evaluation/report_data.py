"""Everything a report shows about one run, as plain values: the ``train`` verb fills it, report.py writes it.

A number that was not measured is None and is shown as a dash; nothing has a default that could pass for a measurement.

Left out: the training curves (they are read from metrics.csv) and how any number is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from qvgen.evaluation.distance import FlipCount
from qvgen.evaluation.environment import Environment
from qvgen.evaluation.held_out import too_few_held_out
from qvgen.evaluation.quality_data import Quality, Sampling

Frames = UInt8[np.ndarray, "frames height width 3"]

STAGES: tuple[str, ...] = ("init", "train", "fold", "generate")
"""Stages whose time every report holds; more may follow."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The request: how the run was configured.

    Attributes:
        model: name of the model family's config, e.g. "tiny".
        bits: The bit-widths as the user wrote them, for example "3" or "w4a8".
        weight_bits: bits of a weight code, 2..8.
        activation_bits: bits of an activation code, 2..8.
        profile: name of the deployment profile.
        method: name of the training method.
        init: name of the PTQ method that the training started from.
        seed: the run's seed.
        steps: optimizer steps that were done.
        command: the exact command that runs it again, into a folder of its own.
        config_yaml: the resolved configuration, as config.yaml holds it.
    """

    model: str
    bits: str
    weight_bits: int
    activation_bits: int
    profile: str
    method: str
    init: str
    seed: int
    steps: int
    command: str
    config_yaml: str


@dataclass(frozen=True, kw_only=True)
class HeldOutError:
    """Relative error |y - y_teacher|^2 / |y_teacher|^2 of the transformer's output on held-out data.

    Attributes:
        rtn: round-to-nearest PTQ, the floor that anybody gets for nothing.
        ptq: the run's own PTQ start (``init``), before any training.
        qat: the trained, fake-quantized model, without Phi unless it is kept.
        packed: the packed model on the integer kernel.
        num_samples: how many (clip, noise, timestep) triples each number is measured on, the same for all four.
        split: name of the split, no clip of which was trained on; or what stands in its place, in words.
        seed: seed of the noise and the timesteps.
        num_clips: how many different held-out clips the samples are of; None where they are of something else.
    """

    rtn: float
    ptq: float
    qat: float
    packed: float
    num_samples: int
    split: str
    seed: int
    num_clips: int | None = None

    @property
    def caution(self) -> str:
        """A warning where there are too few clips; empty otherwise."""
        return "" if self.num_clips is None else too_few_held_out(self.num_clips)


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Bytes of the whole transformer, the layers that stay unquantized included.

    Attributes:
        bf16: all its parameters and buffers in bfloat16.
        packed: the size of packed/model.safetensors.
    """

    bf16: int
    packed: int


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Whether what runs is what was trained.

    Attributes:
        packed_codes_equal: the codes in the packed file equal the trained codes, every one.
        num_codes: how many codes were compared.
        packed_vs_fake_max_abs: largest |packed - fake-quantized| of the transformer's output on the same inputs.
        trajectory_psnr_db: PSNR of the packed model's videos to the fake-quantized model's after the whole sampling
            trajectory, over all videos of the report; inf when they are equal.
        flipped_pixels: uint8 values (each channel of each pixel by itself) that differ between those videos.
        flipped_codes: activation codes that differ on the same inputs; None if they were not counted.
        phi_rank_final: Phi's rank when the model was folded; 0, or the fold was refused, unless ``phi_kept``.
        phi_kept: whether Phi was to stay, as a branch of the packed layers (``phi.keep=true``).
    """

    packed_codes_equal: bool
    num_codes: int
    packed_vs_fake_max_abs: float
    trajectory_psnr_db: float
    flipped_pixels: FlipCount
    flipped_codes: FlipCount | None
    phi_rank_final: int
    phi_kept: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoComparison:
    """One prompt's videos from one seed, so that they differ by the quantization alone.

    Attributes:
        prompt: the caption.
        seed: seed of the starting noise, shared by all of them.
        fps: frames per second.
        teacher: uint8 [F, H, W, 3], the full-precision model.
        start: the same shape, the PTQ start before training; None where it was not sampled.
        fake_quantized: the same shape, the trained model with simulated quantization.
        packed: the same shape, the packed model on the integer kernel.
        negative_prompt: what guidance led away from; None: the model's own negative prompt.
    """

    prompt: str
    seed: int
    fps: float
    teacher: Frames
    start: Frames | None
    fake_quantized: Frames
    packed: Frames
    negative_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class ValidationVideo:
    """One prompt's video that the student made while it was trained, read from the run's folder.

    Attributes:
        step: optimizer steps that the student had behind it.
        prompt_index: place of the prompt among the run's validation prompts.
        prompt: the caption.
        seed: seed of the starting noise.
        fps: frames per second.
        psnr_db: PSNR to the teacher's video from the same seed; None if there was no teacher.
        ssim: SSIM to the same video.
        student: the student's mp4.
        teacher: the teacher's mp4, None if there is none.
        suite: values of the metrics of evaluation.suite, by their names in conf/metric.
    """

    step: int
    prompt_index: int
    prompt: str
    seed: int
    fps: float
    psnr_db: float | None
    ssim: float | None
    student: Path
    teacher: Path | None
    suite: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name: its dotted name in the transformer.
        shape: (out_features, in_features).
        weight_bits: bits of a weight code.
        activation_bits: bits of an activation code.
        num_bytes: everything of this layer in the packed file: codes, scales, zero points, clips and bias.
        weight_error: |W_q - W|^2 / |W|^2 of the dequantized codes W_q against the trained weight W.
        output_error: the same for the layer's output on held-out inputs; None if it was not measured.
    """

    name: str
    shape: tuple[int, int]
    weight_bits: int
    activation_bits: int
    num_bytes: int
    weight_error: float
    output_error: float | None


@dataclass(frozen=True, kw_only=True)
class SkippedLayer:
    """A Linear that stayed in full precision.

    Attributes:
        name: its dotted name in the transformer.
        reason: why, e.g. the pattern that excluded it.
    """

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that a report of one run shows.

    Attributes:
        run: what was asked for.
        relative_error: held-out error of PTQ, QAT and packed.
        size: bytes in bf16 and packed.
        checks: whether what runs is what was trained.
        videos: compared videos, in the order in which they are shown.
        quality: metrics of the generated videos.
        sampling: seconds and memory of each variant; None where nothing was sampled.
        layers: the quantized layers, in the model's order.
        skipped: the Linears that were not quantized.
        attentions: names of the quantized attentions, in the model's order.
        attention_words: what of them is quantized; empty where there is none.
        seconds: wall-clock seconds by stage, in order; holds at least init, train, fold and generate.
        environment: versions, git revision, machine.

    Raises:
        ValueError: a stage's time is missing, no layer is quantized, or the quality rows' attributes differ.
    """

    run: RunInfo
    relative_error: HeldOutError
    size: ModelSize
    checks: Checks
    videos: tuple[VideoComparison, ...]
    quality: Quality
    sampling: Sampling | None
    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    seconds: Mapping[str, float]
    environment: Environment
    attentions: tuple[str, ...] = ()
    attention_words: str = ""

    def __post_init__(self) -> None:
        missing = [stage for stage in STAGES if stage not in self.seconds]
        if missing:
            raise ValueError(
                f"seconds={dict(self.seconds)} lacks {', '.join(missing)}; a report times {', '.join(STAGES)}"
            )
        if not self.layers:
            raise ValueError("layers=() : a report describes a model with at least one quantized layer; list them")
        attributes = {tuple(variant.accuracy) for variant in self.quality.variants}
        if len(attributes) > 1:
            raise ValueError(
                f"accuracy has the attributes {sorted(attributes)} in different variants; give all the same"
            )
