"""The quality of generated videos as plain values of a report: how good they are, and what sampling them took.

A number that was not measured is None. Left out: how any of it is computed (:mod:`qvgen.evaluation.video_quality`,
:mod:`qvgen.evaluation.sampling_cost`) and what is thought of it (:mod:`qvgen.evaluation.report.verdict`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VariantQuality:
    """Quality of one variant's generated videos.

    Attributes:
        name: "teacher", "ptq-start", "fake-quantized" or "packed".
        compared: the metrics of suite=fast beside the teacher's videos of the same captions and seeds, the mean over videos,
            by the names that :class:`Quality` explains, e.g. ``psnr_db``; empty for the teacher.
        flicker: mean |frame difference| in levels of 255 over the captions that ask for standing still.
        accuracy: share in [0, 1] of the videos in which a classifier finds what the caption asks for, by
            attribute ("digit", "color", "motion"); empty where there is no classifier. All variants have the same keys.
        activation_bits: mean over the calls that made the videos, where a policy switches widths; None: it does not.
    """

    name: str
    compared: Mapping[str, float]
    flicker: float | None
    accuracy: Mapping[str, float | None]
    activation_bits: float | None = None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The quality table and what it was measured on.

    Attributes:
        variants: one row each.
        num_videos: videos per variant.
        num_still_videos: videos whose caption asks for standing still; flicker is measured on these alone.
        seeds: which seeds, in words, e.g. "0..63".
        num_steps: sampling steps.
        guidance_scale: classifier-free guidance.
        negative_prompt: the model's own negative prompt, which guidance led away from; None: there was no guidance.
        metrics: title of each metric of suite=fast that compares single videos, by its name in ``compared``, in its order.
        left_out: why one of ``metrics`` was not measured, by its name.
        start_absent: why the PTQ start made no videos; None where it did.
    """

    variants: tuple[VariantQuality, ...]
    num_videos: int
    num_still_videos: int
    seeds: str
    num_steps: int
    guidance_scale: float
    metrics: Mapping[str, str]
    left_out: Mapping[str, str]
    start_absent: str | None
    negative_prompt: str | None = None

    @property
    def measured(self) -> dict[str, str]:
        """Name -> title of the metrics that were measured."""
        return {name: title for name, title in self.metrics.items() if name not in self.left_out}


@dataclass(frozen=True, kw_only=True)
class SamplingCost:
    """The cost of sampling the table's videos with one variant.

    Attributes:
        name: Name of the variant, as in :class:`VariantQuality`.
        dtype: Type of its unquantized weights, for example "bfloat16".
        kernels: backends that ran its packed layers; empty where it has none.
        seconds_per_video: wall clock over all videos of the table, divided by their number; text encoding is left out.
        weight_bytes: all tensors that the model holds in memory, a kernel's own copies of the weights among them.
        working_bytes: largest memory that sampling took besides the weights; None where it cannot be measured.
    """

    name: str
    dtype: str
    kernels: tuple[str, ...]
    seconds_per_video: float
    weight_bytes: int
    working_bytes: int | None

    @property
    def peak_bytes(self) -> int | None:
        """Weights and what sampling took besides them."""
        return None if self.working_bytes is None else self.weight_bytes + self.working_bytes


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How fast, and in how much memory, videos were sampled.

    Attributes:
        costs: one row per variant.
        device: where, in words.
        conditions: what was measured and how, in words.
    """

    costs: tuple[SamplingCost, ...]
    device: str
    conditions: str
