"""delta-GBS of DVD-Quant (arXiv 2505.18663): activations switch between two widths while a video is sampled.

    D_t = |F_t - F_(t-1)|_1 / |F_(t-1)|_1        F_t: the model's output at sampling step t
    S  <- S + D_t                                of the two steps before the one that comes
    S < delta: the next step runs at the low width; else at the high one, and S starts again from 0

Outputs that hardly change forgive coarse activations; once the change since the last careful step adds up, one step is taken
at the high width. The first two steps, of which there is no D yet, are careful ones.

Every sample of a batch has its own S, and so has each of the calls of classifier-free guidance, in one batch or one after the
other: what a video gets does not depend on its batch mates. A step is a new value of the timestep; one that grows begins
another video. The policy acts where the model samples: not in training, and not while held-out errors are measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor, nn

from qvgen.config.plain_json import items, number, whole
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_linear import PackedLinear
from qvgen.quant.grid import MAX_BITS, MIN_BITS


@dataclass(frozen=True, kw_only=True)
class DeltaSwitchConfig:
    """The rule that decides in which sampling steps activations are coarse.

    Attributes:
        widths: Low and high activation bits.
        delta: Sum of relative changes from which a step runs at the high width; >= 0. The paper's range is 0.06 to 0.18, for
            about 6 bits on average.

    Raises:
        ValueError: A value outside of what is said here.
    """

    widths: tuple[int, int]
    delta: float

    def __post_init__(self) -> None:
        if len(self.widths) != 2 or not MIN_BITS <= self.widths[0] < self.widths[1] <= MAX_BITS:
            raise ValueError(
                f"activation_switch.widths={list(self.widths)} must be two rising widths in {MIN_BITS}..{MAX_BITS}, "
                "for example [4,8]"
            )
        if not self.delta >= 0:
            raise ValueError(f"activation_switch.delta={self.delta} must be 0 or more; the paper uses 0.06 to 0.18")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for manifests."""
        return {**asdict(self), "widths": list(self.widths)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; raises KeyError, TypeError or ValueError for anything malformed."""
        low, high = (whole(width, "a width of activation_switch") for width in items(data["widths"], "widths"))
        return cls(widths=(low, high), delta=number(data["delta"], "activation_switch.delta"))


class DeltaSwitch:
    """The policy of one model: two hooks on it, around each call.

    Attributes:
        config: The rule that says when activations are coarse; it may be changed between videos.
        history: Width of every sample in every call so far, of all videos.
    """

    def __init__(self, band: NoiseBand, config: DeltaSwitchConfig) -> None:
        self.band, self.config = band, config
        self.history: list[int] = []
        self._streams: list[_Stream] = []
        self._timestep: float | None = None
        self._call = 0

    def mean_bits(self) -> float | None:
        """Mean activation bits of the sampling steps so far; None before the first."""
        return sum(self.history) / len(self.history) if self.history else None

    def before_call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook: choose the widths, after the hook that has read the timesteps."""
        del args
        if module.training or not self.band.sampling:
            return
        assert self.band.timestep is not None, "the hook that reads timesteps comes first"
        timestep = float(self.band.timestep.max())
        if timestep == self._timestep:
            self._call += 1
        else:
            if self._timestep is not None and timestep > self._timestep:
                self._streams = []
            self._timestep, self._call = timestep, 0
        if self._call == len(self._streams):
            self._streams.append(_Stream())
        widths = self._streams[self._call].choose(self.band.timestep.numel(), config=self.config)
        self.band.policy_bits = widths
        self.history += widths

    def after_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: keep the output for the choice of later steps."""
        del args
        if not module.training and self.band.sampling:
            value = output if isinstance(output, Tensor) else output[0]
            self._streams[self._call].add(value.detach())


class _Stream:
    """The outputs of one call of each step, of which guidance may make two."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._sums: list[float] = []

    def choose(self, samples: int, *, config: DeltaSwitchConfig) -> tuple[int, ...]:
        """The width of each sample in the call that comes."""
        low, high = config.widths
        if len(self._outputs) < 2 or len(self._outputs[-1]) != samples:
            self._sums = [0.0] * samples
            return (high,) * samples
        before, last = (output.float().flatten(1) for output in self._outputs)
        changed, size = (last - before).abs().sum(1), before.abs().sum(1)
        changes = (changed / size).nan_to_num(nan=float("inf")).tolist()
        sums = [total + change for total, change in zip(self._sums, changes, strict=True)]
        careful = [not total < config.delta for total in sums]
        self._sums = [0.0 if reset else total for total, reset in zip(sums, careful, strict=True)]
        return tuple(high if reset else low for reset in careful)

    def add(self, output: Tensor) -> None:
        """Keep an output [B, ...], and the one before it."""
        self._outputs = [*self._outputs[-1:], output]
        if len(self._outputs) == 2 and self._outputs[0].shape != output.shape:
            self._outputs = [output]


def add_switch(model: nn.Module, config: DeltaSwitchConfig) -> DeltaSwitch:
    """Let a policy choose the activation widths of a quantized model from now on, where its layers' plans have a switch."""
    layers = [module for module in model.modules() if isinstance(module, FakeQuantLinear | PackedLinear)]
    switch = DeltaSwitch(layers[0].noise_band, config)
    model.register_forward_pre_hook(switch.before_call)
    model.register_forward_hook(switch.after_call)
    return switch


def find_switch(model: nn.Module) -> DeltaSwitch | None:
    """The policy of a model; None: it has none."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, DeltaSwitch):
            return owner
    return None


def check_switch(model: nn.Module) -> None:
    """Raise ValueError where a model has a policy and layers without the widths that it asks for."""
    switch = find_switch(model)
    if switch is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            have = () if module.form.width_table is None else module.form.width_table.switch
            if tuple(switch.config.widths) != tuple(have):
                raise ValueError(
                    f"activation_switch.widths={list(switch.config.widths)} and the layer {name} has {list(have)}"
                )
