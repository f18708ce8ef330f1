"""A full-precision model that is measured: what quantizing a part of it does to the videos that it samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from qvgen.evaluation.mixed_precision_files import ALL_WINDOWS
from qvgen.layers.layer_group import LayerUnit
from qvgen.training.mixed_precision.group_metric import OUTPUT, GroupMetrics
from qvgen.training.mixed_precision.layer_probe import LayerProbe
from qvgen.training.mixed_precision.trajectory import Call, Sampling


@dataclass(kw_only=True)
class Session:
    """A full-precision model that is measured: what it did while sampling, and hooks to quantize parts of it.

    Attributes:
        model: Full precision, where it computes.
        probe: Hooks on it.
        sampling: What was sampled.
        calls: The transformer's calls.
        call_windows: Window of each.
        videos: uint8 [B, F, H, W, 3].
        metrics: Of the groups.
    """

    model: nn.Module
    probe: LayerProbe
    sampling: Sampling
    calls: Sequence[Call]
    call_windows: Sequence[int]
    videos: Tensor
    metrics: GroupMetrics

    def __post_init__(self) -> None:
        damages = {
            damage.key: damage
            for metrics in self.metrics.of.values()
            for damage in metrics.values()
            if damage is not None
        }
        self._judges = {key: damage.against(self.videos, self.sampling.captions) for key, damage in damages.items()}

    def measure(
        self, unit: LayerUnit, quantized: AbstractContextManager[None], *, window: int
    ) -> tuple[float, dict[str, float]]:
        """Output error and scores of what a context quantizes."""
        with quantized:
            videos = self.sampling.videos(self.model)
            error = float((videos.double() - self.videos.double()).square().mean()) / 255**2
            scores = {}
            for name, damage in self.metrics.of[unit.group].items():
                if damage is not None:
                    scores[name] = self._judges[damage.key](videos)
                else:
                    scores[name] = error if name == OUTPUT else self._attention_change(unit, window)
        return error, scores

    def _attention_change(self, unit: LayerUnit, window: int) -> float:
        """Relative change of the attention's output on the full-precision model's own calls."""
        with self.probe.output_change(unit.module) as change:
            for call, place in zip(self.calls, self.call_windows, strict=True):
                if window in (place, ALL_WINDOWS):
                    call.again(self.model)
        return change.compute()
