"""Measure the tiles of a layer on the card of this process, and keep the fastest.

Candidates are the rule's tile and its neighbours: outputs and rows from 64 to 256, 4 and 8 warps, 2 to 5 stages, as far as
they fit the card's shared memory. All of them compute the same bits, so that only their times are looked at. A candidate
that the compiler or the card refuses is left out.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from qvgen_kernels.contract import LinearSpec, LinearTensors
from qvgen_kernels.triton.backend import Product
from qvgen_kernels.triton.layout import PackedWeight, layout_of, named_weight
from qvgen_kernels.triton.tiles import Card, fits_card, rule
from qvgen_kernels.triton.tuned import Tile, TunedTile

__all__ = ["TRITON", "Timer", "TunedKernel", "call_ms", "candidates", "card_timer", "fastest", "tune"]

_log = logging.getLogger(__name__)

_CYCLES = 2_000_000
"""About a millisecond of a card's clock."""

Timer = Callable[[str, Callable[[], object]], float]
"""Milliseconds of a call, whose name comes first: that of its tile, or ``bf16``."""


def candidates(spec: LinearSpec, *, rows: int, card: Card, tail: bool) -> list[Tile]:
    """Tiles to be measured, the rule's first."""
    first = rule(spec, rows=rows, card=card, tail=tail)
    found = [first]
    for outputs, wide, warps, stages in itertools.product((64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4, 5)):
        # More sums than registers hold, a warp group with too little to do, tiles wider than the call.
        fits = 16 <= outputs * wide // (32 * warps) <= 128 and wide < 2 * max(rows, 64)
        tile = Tile(outputs, wide, warps, stages, first.band)
        if fits and tile not in found and fits_card(tile, spec, card=card):
            found.append(tile)
    return found


def card_timer(rounds: int) -> Timer:
    """The card's own timer: the median of some calls, after two that do not count."""

    def timer(_: str, call: Callable[[], object]) -> float:
        call()
        call()
        return median(call_ms(call) for _round in range(rounds))

    return timer


def call_ms(call: Callable[[], object]) -> float:
    """Milliseconds that the card takes for a call, by its events.

    The card first waits for about a millisecond, in which the call's launches are prepared: what Python takes for them would
    be measured otherwise, where the card is faster than that.
    """
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_CYCLES)
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


@dataclass(frozen=True, kw_only=True)
class TunedKernel:
    """A kernel whose tiles are measured.

    Attributes:
        name: As in the table.
        candidates: Tiles of a layer, as :func:`candidates` gives them.
        bytewise: Whether weights are a byte each.
        multiply: Fills y with a tile's outputs.
    """

    name: str
    candidates: Callable[..., list[Tile]]
    bytewise: bool
    multiply: Callable[[Product, Tile, Card], None]


def _multiply(product: Product, tile: Tile, _: Card) -> None:
    from qvgen_kernels.triton.gemm import multiply

    multiply(
        product.operands,
        product.weight,
        y=product.y,
        branch=None,
        tensors=product.tensors,
        spec=product.spec,
        tile=tile,
    )


TRITON = TunedKernel(name="triton", candidates=candidates, bytewise=False, multiply=_multiply)


def tune(
    spec: LinearSpec,
    *,
    rows: int,
    tail: bool,
    card: Card,
    device: torch.device,
    timer: Timer,
    kernel: TunedKernel = TRITON,
) -> Iterator[tuple[Tile, float | None]]:
    """Measure a layer.

    Args:
        spec: The layer, without groups, rotation and branch.
        rows: M.
        tail: Whether gate and residual follow.
        card: The card's facts.
        device: Where it is.
        timer: What measures a call.
        kernel: What multiplies.

    Yields:
        A tile and the milliseconds of the whole layer with it, its input's quantization included; None: it does not run.
    """
    from qvgen_kernels.triton.quantize import quantize_rows

    x = torch.randn(rows, spec.in_features, device=device).bfloat16()
    tensors = LinearTensors(bias=torch.zeros(spec.out_features, device=device))
    if tail:
        gate = torch.ones(1, spec.out_features, device=device, dtype=x.dtype)
        residual = torch.zeros(rows, spec.out_features, device=device, dtype=x.dtype)
        tensors = tensors._replace(gate=gate, residual=residual)
    weight = _weight(spec, device, bytewise=kernel.bytewise)
    y = x.new_empty(rows, spec.out_features)

    def call(tile: Tile) -> None:
        operands = quantize_rows(x, spec=spec, tensors=tensors)
        kernel.multiply(Product(operands, weight, y, None, tensors, spec), tile, card)

    for tile in kernel.candidates(spec, rows=rows, card=card, tail=tail):
        try:
            yield tile, timer(_text(tile), partial(call, tile))
        except Exception as error:  # the compiler raises what it likes: too many registers, too much shared memory
            _log.info("%s does not run for %s: %s", tile, spec.to_string(), " ".join(str(error).split())[:200])
            yield tile, None


def fastest(
    spec: LinearSpec,
    *,
    rows: int,
    tail: bool,
    card: Card,
    device: torch.device,
    timer: Timer,
    kernel: TunedKernel = TRITON,
) -> tuple[TunedTile | None, dict[str, float | None]]:
    """The entry of a layer for the table, and the milliseconds of every candidate; arguments as :func:`tune`.

    Returns:
        The entry, None where no tile runs; milliseconds by the tile's text, None of one that does not run.
    """
    found = tune(spec, rows=rows, tail=tail, card=card, device=device, timer=timer, kernel=kernel)
    times = dict(found)
    measured = {tile: ms for tile, ms in times.items() if ms is not None}
    shown = {_text(tile): ms for tile, ms in times.items()}
    if not measured:
        return None, shown
    x = torch.randn(rows, spec.in_features, device=device).bfloat16()
    weight = torch.randn(spec.out_features, spec.in_features, device=device).bfloat16()
    bf16_ms = timer("bf16", lambda: functional.linear(x, weight))
    best = min(measured, key=lambda tile: measured[tile])
    entry = TunedTile(
        kernel=kernel.name,
        card=card.name,
        rows=rows,
        columns=spec.in_features,
        outputs=spec.out_features,
        weight_bits=spec.weight_bits,
        activation_bits=spec.activation_bits,
        tail=tail,
        tile=best,
        ms=measured[best],
        bf16_ms=bf16_ms,
    )
    return entry, shown


def _text(tile: Tile) -> str:
    return f"{tile.outputs}x{tile.rows}, {tile.warps} warps, {tile.stages} stages"


def _weight(spec: LinearSpec, device: torch.device, *, bytewise: bool) -> PackedWeight:
    """A packed weight of zero codes: times do not depend on values."""
    layout = layout_of(spec)
    shape = (spec.out_features, layout.columns if bytewise else layout.chunks * layout.chunk_bytes)
    codes = torch.zeros(shape, dtype=torch.int8, device=device)
    row = torch.ones(1, spec.out_features, device=device)
    tensors: list[Tensor] = [codes, row]
    if spec.weight_zero_point != "none":
        tensors.append(row.to(torch.int32) if spec.weight_zero_point == "integer" else row)
    if spec.activation_bits == 8 and spec.activation_zero_point == "integer":
        tensors.append(row.to(torch.int32))
    return named_weight(tensors, spec=spec, bytewise=bytewise)
