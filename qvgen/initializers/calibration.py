"""One pass of calibration for all PTQ methods: statistics of every layer's inputs while the full-precision model samples.

    abs_max        all tokens of all calls, per noise band, for every method     [bands, K] float32 per layer
    second_moment  ``ROWS_PER_CALL`` tokens of each sample in a call, evenly spread   [K, K] float32 per layer
    ranges         all tokens of all calls, per timestep                          2 [steps, K] float32 per layer
    inputs         a uniform sample of those tokens                                 [MAX_INPUTS, K] float32 per layer

Memory is bounded by the model alone, not by how long it samples. Second moments are what is large: 8.9 GiB for all 245
layers of CogVideoX-2b, 64.5 GiB for the 406 of Wan 14B; a caller that has less collects some layers at a time
(:func:`passes`), and one that shares videos out joins its parts (:mod:`qvgen.initializers.layer_part`). The maxima of all
layers take 0.1 and 0.5 GiB, with a sample of inputs 1.2 and 5.1 GiB (50 bands).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qvgen.initializers.base import LayerStatistics, Need
from qvgen.initializers.layer_part import MAX_INPUTS, LayerPart, kept_rows, widen_
from qvgen.layers.noise_band import NoiseBand, step_bands, watch_timestep

ROWS_PER_CALL = 256
RANGE_STEPS = 50
"""Sampling steps that the estimate of memory counts on; ranges are small beside the rest."""


class Calibration:
    """Collects the statistics of a full-precision model's Linears while the context lasts.

    Args:
        model: Its forward takes a ``timestep``; it is not changed.
        names: Linears to watch.
        needs: Kinds of statistics.
        num_bands: Noise bands.
        seed: Seed of the sample of inputs.
        timesteps: A few-step model's own, each of which is a band, ``num_bands`` of them; None: equal bands.
        part: Number of the part of the calibration that is seen: rows of another part have other random numbers.

    Example:
        >>> from torch import nn
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(2, 1)
        ...
        ...     def forward(self, x, timestep):
        ...         return self.layer(x)
        >>> model = Model()
        >>> with Calibration(model, names=["layer"], needs={"abs_max"}, num_bands=2, seed=0) as calibration:
        ...     _ = model(torch.tensor([[[1.0, -3.0]]]), timestep=torch.tensor([0.0]))
        >>> calibration.statistics("layer").abs_max.tolist()
        [[1.0, 3.0], [0.0, 0.0]]
    """

    def __init__(
        self, model: nn.Module, *, names: Sequence[str], needs: Iterable[Need], num_bands: int, seed: int,
        timesteps: Sequence[float] | None = None, part: int = 0,
    ) -> None:  # fmt: skip
        self._model = model
        self._needs = frozenset(needs)
        self._band = step_bands(num_bands, timesteps)
        self._watched = {
            name: _Watched(self._linear(name), needs=self._needs, num_bands=num_bands, key=f"{seed}/{name}/{part}")
            for name in names
        }
        self._handles: list[RemovableHandle] = []

    def _linear(self, name: str) -> nn.Linear:
        linear = self._model.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}"
        return linear

    def __enter__(self) -> Self:
        self._handles = [watch_timestep(self._model, self._band)]
        for name, watched in self._watched.items():
            self._handles.append(self._linear(name).register_forward_pre_hook(self._hook(watched)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, watched: _Watched) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            with torch.no_grad():
                watched.add(inputs[0].detach(), self._band)

        return look

    def statistics(self, name: str) -> LayerStatistics:
        """The statistics of a layer's inputs.

        Raises:
            ValueError: It was never called, or its inputs were not finite.
        """
        return self.part(name).statistics(name)

    def part(self, name: str) -> LayerPart:
        """The same as a part, to be joined with others."""
        return self._watched[name].part()


class _Watched:
    """The running statistics of one layer, on the device of its inputs."""

    def __init__(self, linear: nn.Linear, *, needs: frozenset[Need], num_bands: int, key: str) -> None:
        size = linear.in_features
        digest = hashlib.blake2b(f"calibration/{key}".encode(), digest_size=8).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        self._abs_max = torch.zeros(num_bands, size)
        self._moment = torch.zeros(size, size) if "second_moment" in needs else None
        self._inputs = torch.zeros(0, size) if "inputs" in needs else None
        self._draws = torch.zeros(0, dtype=torch.float64)
        self._ranges: dict[float, tuple[Tensor, Tensor]] | None = {} if "ranges" in needs else None
        self.num_rows = 0

    def add(self, x: Tensor, band: NoiseBand) -> None:
        """Take in an input [B * n, ..., K] of the samples whose timesteps ``band`` holds."""
        bands = band.row_index(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self._ranges is not None:
            self._widen(x, band)
        self._abs_max = self._abs_max.to(x.device)
        largest = x.abs().amax(1).float()
        index = bands.to(x.device).unsqueeze(-1).expand_as(largest)
        self._abs_max.scatter_reduce_(0, index, largest, reduce="amax")
        if self._moment is None and self._inputs is None:
            return
        count = min(ROWS_PER_CALL, x.shape[1])
        spread = torch.linspace(0, x.shape[1] - 1, count, device=x.device).round().long()
        rows = x[:, spread].reshape(-1, x.shape[-1]).float()
        if self._moment is not None:
            self._moment = self._moment.to(x.device).addmm_(rows.mT, rows)
        if self._inputs is not None:
            self._keep(rows)
        self.num_rows += len(rows)

    def _widen(self, x: Tensor, band: NoiseBand) -> None:
        """Let the ranges of the samples' timesteps include x [B * n, tokens, K]."""
        assert self._ranges is not None
        assert band.timestep is not None  # row_index has raised otherwise
        timesteps = band.timestep.tolist()
        repeat = len(x) // len(timesteps)
        for index, timestep in enumerate(timesteps):
            rows = x[index * repeat : (index + 1) * repeat].flatten(0, 1)
            widen_(self._ranges, timestep, rows.amin(0).float().cpu(), rows.amax(0).float().cpu())

    def _keep(self, rows: Tensor) -> None:
        """Give each row a random number; keep those with the smallest ones of all so far."""
        assert self._inputs is not None
        draws = torch.cat((self._draws, torch.rand(len(rows), generator=self._generator, dtype=torch.float64)))
        kept, before = kept_rows(draws), len(self._draws)
        new = rows[(kept[kept >= before] - before).to(rows.device)].cpu()
        self._inputs, self._draws = torch.cat((self._inputs[kept[kept < before]], new)), draws[kept]

    def part(self) -> LayerPart:
        return LayerPart(
            abs_max=self._abs_max.cpu(),
            moment=None if self._moment is None else self._moment.cpu(),
            inputs=self._inputs,
            draws=None if self._inputs is None else self._draws,
            num_rows=self.num_rows,
            ranges=self._ranges,
        )


def statistics_bytes(in_features: int, *, needs: frozenset[Need], num_bands: int) -> int:
    """Bytes of a layer's statistics while they are collected: float32 [bands + rows of a matrix + inputs, K].

    Example:
        >>> statistics_bytes(1920, needs=frozenset({"abs_max", "second_moment"}), num_bands=50)
        15129600
    """
    rows = num_bands
    rows += in_features if "second_moment" in needs else 0
    rows += MAX_INPUTS if "inputs" in needs else 0
    rows += 2 * RANGE_STEPS if "ranges" in needs else 0
    return 4 * in_features * rows


def passes(
    sizes: Sequence[tuple[str, int]], *, needs: frozenset[Need], num_bands: int, budget_bytes: int
) -> list[list[str]]:
    """Cut layers into passes whose statistics fit into memory.

    Args:
        sizes: (name, in_features) of each layer, in the model's order.
        needs: Kinds of statistics.
        num_bands: Noise bands.
        budget_bytes: Memory that the statistics of one pass may take, in bytes.

    Returns:
        Names of the layers of each pass.

    Raises:
        ValueError: A layer needs more by itself.

    Example:
        >>> needs = frozenset({"second_moment"})
        >>> passes([("a", 1024), ("b", 1024), ("c", 64)], needs=needs, num_bands=1, budget_bytes=5 << 20)
        [['a'], ['b', 'c']]
    """
    result: list[list[str]] = []
    used = 0
    for name, size in sizes:
        need = statistics_bytes(size, needs=needs, num_bands=num_bands)
        if need > budget_bytes:
            raise ValueError(
                f"calibration.memory_gib={budget_bytes / 2**30:.3g} is too little for the statistics of {name} alone; "
                f"it needs {need / 2**30:.3g}"
            )
        if not result or used + need > budget_bytes:
            result.append([])
            used = 0
        result[-1].append(name)
        used += need
    return result
