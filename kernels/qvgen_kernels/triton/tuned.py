"""Tiles that were measured: a table in the package for cards that were measured, and one in the user's cache.

A file is JSON, ``{"format": "qvgen-tiles", "version": 1, "triton": "3.9.0", "tiles": [...]}``, each entry an object with the
fields of :class:`TunedTile`. Every value is checked; a file of another version, of another Triton than this one or with
one impossible value is left out as a whole, with a warning. A tile decides speed alone, never a result.

A call takes the nearest entry of its card and kernel, of the same bits and with the same kind of tail: the smallest

    |log2(M / M')| + |log2(K / K')| + |log2(N / N')|

and none that is further than :data:`FARTHEST`; of two as near the one with more rows. Layers with groups are never tuned.
The user's table stands before the package's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from qvgen_kernels.contract import MAX_BITS, MIN_BITS, LinearSpec
from qvgen_kernels.cpu_build import cache_folder

__all__ = [
    "Tile",
    "TunedTile",
    "forget",
    "is_faster",
    "nearest",
    "read_tiles",
    "save_tiles",
    "tuned_tiles",
    "user_table",
]

_log = logging.getLogger(__name__)

FORMAT, VERSION = "qvgen-tiles", 1
PACKAGED = Path(__file__).with_name("tuned_tiles.json")
FARTHEST = 2.0
"""A shape four times as large in one direction, or twice in two, has still the same tile."""

KERNELS = ("triton", "gluon")
_LARGEST_FILE = 1 << 22
_POWERS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Tile:
    """Launch parameters of the product.

    Attributes:
        outputs: Outputs of a program, a power of two from 64.
        rows: Rows of a program, a power of two from 16.
        warps: Warps of a program.
        stages: Chunks of columns in flight and in use.
        band: Tiles of outputs that neighbouring programs share.
    """

    outputs: int
    rows: int
    warps: int
    stages: int
    band: int = 8


@dataclass(frozen=True, kw_only=True)
class TunedTile:
    """The fastest tile of a shape on a card.

    Attributes:
        kernel: Whose tile it is: ``triton`` or ``gluon``.
        card: The card's name, as its driver says it.
        rows: M.
        columns: K.
        outputs: N.
        weight_bits: Width of a weight code.
        activation_bits: Width of an input code.
        tail: Whether a function, gate or residual follows.
        tile: Launch parameters.
        ms: Milliseconds of the whole packed layer with it.
        bf16_ms: Milliseconds of the same layer in bfloat16, without what follows it.
    """

    kernel: str
    card: str
    rows: int
    columns: int
    outputs: int
    weight_bits: int
    activation_bits: int
    tail: bool
    tile: Tile
    ms: float
    bf16_ms: float

    def __post_init__(self) -> None:
        whole = {name: getattr(self, name) for name in ("rows", "columns", "outputs", "weight_bits", "activation_bits")}
        whole |= {f"tile.{name}": value for name, value in asdict(self.tile).items()}
        for name, value in whole.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                raise ValueError(f"{name}={value!r} must be a whole number above 0")
        for name in ("weight_bits", "activation_bits"):
            if not MIN_BITS <= whole[name] <= MAX_BITS:
                raise ValueError(f"{name}={whole[name]} must be from {MIN_BITS} to {MAX_BITS}")
        allowed = {
            "outputs": _POWERS[2:],
            "rows": _POWERS,
            "warps": (4, 8),
            "stages": range(2, 9),
            "band": range(1, 65),
        }
        for name, values in allowed.items():
            if getattr(self.tile, name) not in values:
                raise ValueError(f"tile.{name}={getattr(self.tile, name)} must be one of {', '.join(map(str, values))}")
        for name in ("ms", "bf16_ms"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be a time above 0")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel={self.kernel!r} must be one of {', '.join(KERNELS)}")
        if not isinstance(self.tail, bool) or not isinstance(self.card, str) or not self.card:
            raise ValueError(f"tail={self.tail!r} must be true or false, card={self.card!r} a name")

    @property
    def key(self) -> tuple[object, ...]:
        """The values that the tile was measured for."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name not in ("tile", "ms", "bf16_ms"))


def user_table() -> Path:
    """The user's own table, beside the kernels that are built on this machine."""
    return cache_folder() / f"tiles-v{VERSION}.json"


def read_tiles(path: Path, *, triton: str | None) -> list[TunedTile]:
    """The entries of a file.

    Args:
        path: The file.
        triton: The version of Triton that must have been measured; None: any.

    Raises:
        ValueError: It is damaged or of another version.
        OSError: It can't be read.
    """
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"it has {path.stat().st_size} bytes, and no table has more than {_LARGEST_FILE}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"it is no JSON ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"it is no {FORMAT} file of version {VERSION}")
    if triton is not None and found.get("triton") != triton:
        raise ValueError(f"it was measured with Triton {found.get('triton')!r}, and this is {triton}")
    if not isinstance(found.get("tiles"), list):
        raise ValueError("it has no list of tiles")
    return [_entry(values, index) for index, values in enumerate(found["tiles"])]


def _entry(values: object, index: int) -> TunedTile:
    names = {field.name for field in fields(TunedTile)}
    if not isinstance(values, Mapping) or set(values) != names:
        raise ValueError(f"entry {index} must have exactly the keys {', '.join(sorted(names))}")
    tile = values["tile"]
    if not isinstance(tile, Mapping) or set(tile) != {field.name for field in fields(Tile)}:
        raise ValueError(f"the tile of entry {index} must have exactly the keys of a tile")
    try:
        return TunedTile(**{**values, "tile": Tile(**tile)})
    except ValueError as error:
        raise ValueError(f"entry {index}: {error}") from error


@cache
def tuned_tiles(card: str) -> tuple[TunedTile, ...]:
    """All entries of a card, the user's first; a file that is no good is left out with one warning."""
    from triton import __version__ as triton

    found: dict[tuple[object, ...], TunedTile] = {}
    for path, version in ((user_table(), triton), (PACKAGED, None)):
        for entry in _usable(path, version):
            if entry.card == card:
                found.setdefault(entry.key, entry)
    return tuple(found.values())


def _usable(path: Path, triton: str | None) -> list[TunedTile]:
    try:
        return read_tiles(path, triton=triton)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        again = "measure again with qvgen benchmark kernels tune=true"
        _log.warning("tiles of %s are not used: %s; %s", path, error, again)
        return []


def nearest(
    entries: Sequence[TunedTile], spec: LinearSpec, *, rows: int, tail: bool, kernel: str = "triton"
) -> TunedTile | None:
    """The entry that a call takes by the rule above; None where there is none near.

    Args:
        entries: Entries of the call's card.
        spec: The layer.
        rows: M > 0.
        tail: Whether a function, gate or residual follows.
        kernel: Whose tile.
    """
    if spec.num_groups > 1:
        return None
    kind = (kernel, spec.weight_bits, spec.activation_bits, tail)

    def distance(entry: TunedTile) -> float:
        pairs = ((rows, entry.rows), (spec.in_features, entry.columns), (spec.out_features, entry.outputs))
        return sum(abs(math.log2(ours / theirs)) for ours, theirs in pairs)

    near = [entry for entry in entries if (entry.kernel, *_bits(entry), entry.tail) == kind]
    best = min(near, key=lambda entry: (distance(entry), -entry.rows), default=None)
    return None if best is None or distance(best) > FARTHEST else best


def _bits(entry: TunedTile) -> tuple[int, int]:
    return entry.weight_bits, entry.activation_bits


def is_faster(kernel: str, other: str, entries: Sequence[TunedTile], spec: LinearSpec) -> bool:
    """Whether one kernel took less time than another over all that both were measured with for a layer's K, N and bits.

    Args:
        kernel: The one.
        other: The other.
        entries: Entries of the card.
        spec: The layer; with groups nothing was measured.
    """
    own = (spec.in_features, spec.out_features, spec.weight_bits, spec.activation_bits)
    times: dict[str, dict[tuple[object, ...], float]] = {kernel: {}, other: {}}
    for entry in entries:
        if entry.kernel in times and (entry.columns, entry.outputs, *_bits(entry)) == own and spec.num_groups == 1:
            times[entry.kernel][entry.rows, entry.tail] = entry.ms
    shared = times[kernel].keys() & times[other].keys()
    return bool(shared) and sum(times[kernel][key] for key in shared) < sum(times[other][key] for key in shared)


@cache
def say_where_bf16_wins(entry: TunedTile) -> None:
    """Warn, once for each entry, that bfloat16 was faster where its tile was measured."""
    if entry.bf16_ms < entry.ms:
        _log.warning(
            "bfloat16 is faster than %s on %s for %d x %d -> %d at w%da%d: %.3g ms packed, %.3g ms in bfloat16",
            entry.kernel,
            entry.card, entry.rows, entry.columns, entry.outputs, entry.weight_bits, entry.activation_bits,
            entry.ms, entry.bf16_ms,
        )  # fmt: skip


def save_tiles(entries: Sequence[TunedTile], *, path: Path | None = None) -> Path:
    """Add entries to the user's table, in place of those for the same; a table that is no good is replaced.

    Args:
        entries: What was measured, with the Triton of this process.
        path: The table; None: the user's own.
    """
    from triton import __version__ as triton

    path = path or user_table()
    merged = {entry.key: entry for entry in [*_usable(path, triton), *entries]}
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "triton": triton,
        "tiles": [asdict(entry) for entry in merged.values()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(name, path)
    forget()
    return path


def forget() -> None:
    """Read the tables anew at the next call."""
    tuned_tiles.cache_clear()
    say_where_bf16_wins.cache_clear()
