"""``benchmark kernels tune=true``: the tile that is fastest on this machine's GPU, for every shape, width and kind of tail.

What is found goes into the user's table at once (qvgen_kernels.triton.tuned), which every later call on this card reads. A
feed-forward MxK-H-N stands for its two layers, which a function or gate and residual follow; a linear is measured with and
without such a tail.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from qvgen.config.schema.verbs import BenchmarkConfig
from qvgen.errors import UserError
from qvgen.verbs.benchmarks.base import Shape, shapes_of
from qvgen_kernels import LinearSpec, get_backend
from qvgen_kernels.gluon import tile as gluon_tile
from qvgen_kernels.gluon.tune import GLUON
from qvgen_kernels.triton import tiles
from qvgen_kernels.triton.backend import device_card
from qvgen_kernels.triton.tiles import Card
from qvgen_kernels.triton.tune import TRITON, Timer, TunedKernel, card_timer, fastest
from qvgen_kernels.triton.tuned import save_tiles

Row = Mapping[str, Any]


def tile_rows(config: BenchmarkConfig, *, done: Container[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One row for every layer, width and tail, as soon as it is measured and in the table.

    Raises:
        UserError: There is no GPU that the Triton kernels run on.
    """
    device = torch.device("cuda", 0)
    probe = LinearSpec(in_features=64, out_features=64, weight_bits=4, activation_bits=4)
    if (reason := get_backend("triton").refusal(probe, device=device)) is not None:
        raise UserError(f"tune=true times tiles of GPU kernels, and there is no card for them: {reason}")
    timer = card_timer(config.timed_steps)
    with_gluon = get_backend("gluon").refusal(probe, device=device) is None
    kernels = (TRITON, GLUON) if with_gluon else (TRITON,)
    card = device_card(device)
    yield from measured_rows(config, done=done, device=device, card=card, timer=timer, kernels=kernels)


def measured_rows(
    config: BenchmarkConfig,
    *,
    done: Container[tuple[Any, ...]],
    device: torch.device,
    card: Card,
    timer: Timer,
    kernels: Sequence[TunedKernel] = (TRITON,),
) -> Iterator[dict[str, Any]]:
    """The rows of :func:`tile_rows` on a device.

    Args:
        config: The benchmark's.
        done: Shapes that are not measured again, ``(text,)`` each.
        device: Where tensors live.
        card: The card's facts.
        timer: What measures a call.
        kernels: Whose tiles are measured.
    """
    for shape in map(Shape.parse, shapes_of(config)):
        if (shape.text,) in done:
            continue
        pairs = list(zip(shape.widths, shape.widths[1:], strict=False))
        for columns, outputs in pairs:
            for width in config.widths:
                spec = LinearSpec(
                    in_features=columns,
                    out_features=outputs,
                    weight_bits=width.weight,
                    activation_bits=width.activation,
                )
                for tail, kernel in product((False, True) if len(pairs) == 1 else (True,), kernels):
                    entry, times = fastest(
                        spec, rows=shape.rows, tail=tail, card=card, device=device, timer=timer, kernel=kernel
                    )
                    row = {"shape": shape.text, "layer": f"{shape.rows}x{columns}-{outputs}", "bits": width.label}
                    if entry is not None:
                        save_tiles([entry])
                        tiles.forget()
                        gluon_tile.forget()
                        row |= asdict(entry)
                    yield {**row, "card": card.name, "kernel": kernel.name, "tail": tail, "times": times}


def tile_table(run: Row, rows: Sequence[Row]) -> list[str]:
    """The Markdown page."""
    lines = [
        f"# Tiles of the GPU kernels on {rows[0]['card']}",
        "",
        f"torch {run['versions']['torch']}; medians of {run['timed_steps']} calls, in milliseconds, with the input's "
        "quantization. Tail: a function, gate or residual in the same kernel, which bfloat16's time is without. Where "
        "bfloat16 is faster the log says so at the first call.",
        "",
        f"    {run['command']}",
        "",
        "| M x K - N | bits | tail | kernel | tile | ms | of | slowest | bf16 ms | times bf16 |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        known = [ms for ms in row["times"].values() if ms is not None]
        head = f"| {row['layer']} | {row['bits']} | {'yes' if row['tail'] else 'no'} | {row['kernel']} |"
        if not known:
            lines.append(f"{head} none runs | | {len(row['times'])} | | | |")
            continue
        tile = row["tile"]
        text = f"{tile['outputs']} x {tile['rows']}, {tile['warps']} warps, {tile['stages']} stages"
        lines.append(
            f"{head} {text} | {row['ms']:.3f} | {len(row['times'])} | {max(known):.3f} | {row['bf16_ms']:.3f} | "
            f"{row['bf16_ms'] / row['ms']:.2f} |"
        )
    return lines
