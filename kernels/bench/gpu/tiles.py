"""The fastest tiles of this card, with the time that is left: CogVideoX-2b's layers at 4 bits and 3, as far as it goes.

What is found is also written as OUT/tiles.json, in the form of the package's own table (qvgen_kernels/triton/tuned.py).
`qvgen benchmark kernels tune=true` measures any other shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from gpu.models import Layer
from gpu.setting import Case, Row, Setting
from qvgen_kernels import LinearSpec
from qvgen_kernels.gluon.tune import GLUON
from qvgen_kernels.triton.backend import device_card
from qvgen_kernels.triton.tiles import Card
from qvgen_kernels.triton.tune import TRITON, Timer, TunedKernel, card_timer, fastest
from qvgen_kernels.triton.tuned import Tile, TunedTile, save_tiles

__all__ = ["cases", "write_table"]

BITS = (4, 3)
ROUNDS = 5
KERNELS = {kernel.name: kernel for kernel in (TRITON, GLUON)}


def cases(setting: Setting, *, warm: bool = False) -> Iterator[Case]:
    """One case for every layer, width and kernel; of a warm run one for every tile, so that all processes have some."""
    card = _card(setting)
    layers = setting.models()[0].layers
    for bits, layer in itertools.product(
        BITS[: 1 if setting.rehearse else None], layers[:1] if setting.rehearse else layers
    ):
        spec = LinearSpec(in_features=layer.columns, out_features=layer.outputs, weight_bits=bits, activation_bits=bits)
        for name in setting.kernels(spec):
            if name not in KERNELS:
                continue
            label = f"{layer.name} {name} w{bits}a{bits}"
            tiles = KERNELS[name].candidates(spec, rows=layer.rows, card=card, tail=bool(layer.tail))
            if not warm:
                few = tiles[:2] if setting.rehearse else tiles
                yield label, partial(_rows, setting, spec, layer, _with_tiles(KERNELS[name], few))
                continue
            for tile in tiles:
                yield f"{label} {tile}", partial(_rows, setting, spec, layer, _with_tiles(KERNELS[name], [tile]), _once)


def _with_tiles(kernel: TunedKernel, tiles: list[Tile]) -> TunedKernel:
    return replace(kernel, candidates=lambda *_, **__: tiles)


def _once(_: str, call: Callable[[], object]) -> float:
    """A timer that compiles and measures nothing."""
    call()
    return 1.0


def _rows(
    setting: Setting, spec: LinearSpec, layer: Layer, kernel: TunedKernel, timer: Timer | None = None
) -> Iterator[Row]:
    if timer is None:
        timer = _once if setting.rehearse else card_timer(ROUNDS)
    entry, times = fastest(
        spec, rows=layer.rows, tail=bool(layer.tail), card=_card(setting), device=setting.device, timer=timer,
        kernel=kernel,
    )  # fmt: skip
    yield {
        "layer": layer.name,
        "kernel": kernel.name,
        "times": times,
        "entry": None if entry is None else asdict(entry),
    }


def _card(setting: Setting) -> Card:
    return Card((0, 0), 1, "rehearsal on the CPU") if setting.rehearse else device_card(setting.device)


def write_table(rows: list[Row], path: Path) -> None:
    """Write the entries of rows as a table of tiles."""
    entries = [row["entry"] for row in rows if row.get("entry")]
    if entries:
        path.unlink(missing_ok=True)
        save_tiles([TunedTile(**{**entry, "tile": Tile(**entry["tile"])}) for entry in entries], path=path)
