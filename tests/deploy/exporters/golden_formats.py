"""One layer in the bytes of every export format, made with whole numbers and loops alone: nothing of qvgen, and no torch.

The layer has N rows and K columns of weights of b bits,

    code q[n][k] = (3 n + 5 k + n k) mod 2^b, or ((3 n + 5 k + n k) mod (2^b - 1)) - qmax where both sides of 0 have as many
    scale s[n] = 2^-(2 + n mod 3), zero point z[n] = n mod 2^b, bias[n] = n / 4 - 1

all of which bfloat16 holds exactly. ``golden/FORMAT.json`` holds, by tensor, type, shape, the bytes (of a tensor of more than
512 the first 512, and the sha256 of all). Layouts are those of the packages that qvgen/deploy/exporters names.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

Entry = tuple[str, list[int], bytes]
"""Type, shape, bytes."""
SHOWN = 512


def signed(bits: int, rows: int, columns: int) -> list[list[int]]:
    """Codes of a grid without a zero point."""
    return [
        [(3 * n + 5 * k + n * k) % (2**bits - 1) - (2 ** (bits - 1) - 1) for k in range(columns)] for n in range(rows)
    ]


def unsigned(bits: int, rows: int, columns: int) -> list[list[int]]:
    """Codes of a grid with a zero point."""
    return [[(3 * n + 5 * k + n * k) % 2**bits for k in range(columns)] for n in range(rows)]


def scale(row: int) -> float:
    """The row's scale."""
    return 2.0 ** -(2 + row % 3)


def bias(row: int) -> float:
    """The row's bias."""
    return row / 4 - 1


def float32(values: Sequence[float], shape: Sequence[int]) -> Entry:
    """Little-endian IEEE numbers."""
    return "float32", list(shape), struct.pack(f"<{len(values)}f", *values)


def bfloat16(values: Sequence[float], shape: Sequence[int]) -> Entry:
    """The upper halves of float32 numbers; only values that lose nothing come here."""
    words = [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]
    assert all(word & 0xFFFF == 0 for word in words)
    return "bfloat16", list(shape), struct.pack(f"<{len(words)}H", *(word >> 16 for word in words))


def byte(values: Sequence[int], shape: Sequence[int], *, kind: str = "uint8") -> Entry:
    """Whole numbers of a byte, negative ones as their complement."""
    return kind, list(shape), bytes(value & 255 for value in values)


def flat(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """Row by row."""
    return [value for row in rows for value in row]


def nibbles(values: Sequence[int]) -> list[int]:
    """Two codes to a byte, the first one in the low half."""
    return [(low & 15) | (high & 15) << 4 for low, high in zip(values[::2], values[1::2], strict=True)]


def dense(values: Sequence[int], bits: int) -> list[int]:
    """Codes one behind the other without gaps, the first one lowest, as one whole number of little-endian bytes."""
    number = sum(value << (bits * place) for place, value in enumerate(values))
    return list(number.to_bytes(len(values) * bits // 8, "little"))


def marker(text: str) -> Entry:
    """A layer's JSON."""
    return byte(list(text.encode()), [len(text)])


def comfy() -> dict[str, Entry]:
    """convrot_w4a4: codes of rotated rows by halves of bytes, float32 scales, JSON."""
    codes = signed(4, 6, 64)
    return {
        "weight": byte(nibbles(flat(codes)), [6, 32], kind="int8"),
        "weight_scale": float32([scale(n) for n in range(6)], [6]),
        "comfy_quant": marker('{"format": "convrot_w4a4", "convrot_groupsize": 64, "linear_dtype": "int4"}'),
        "bias": bfloat16([bias(n) for n in range(6)], [6]),
    }


def int8() -> dict[str, Entry]:
    """int8_tensorwise: a code in a byte, one float32 scale for each row as a column, JSON."""
    return {
        "weight": byte(flat(signed(8, 6, 40)), [6, 40], kind="int8"),
        "weight_scale": float32([scale(n) for n in range(6)], [6, 1]),
        "comfy_quant": marker('{"format": "int8_tensorwise"}'),
        "bias": bfloat16([bias(n) for n in range(6)], [6]),
    }


def humming() -> dict[str, Entry]:
    """3-bit codes, 4 added to each, in words of 32 bits without gaps: three words for 32 columns."""
    words = flat([dense([code + 4 for code in row], 3) for row in signed(3, 8, 64)])
    return {
        "weight": ("int32", [8, 6], bytes(words)),
        "weight_scale": bfloat16([scale(n) for n in range(8)], [8, 1]),
        "bias": bfloat16([bias(n) for n in range(8)], [8]),
    }


def sdnq() -> dict[str, Entry]:
    """3-bit codes of eight in three bytes: six whole ones in pairs, of the last two a bit here and a bit there."""
    codes, stored = flat(unsigned(3, 8, 64)), []
    for start in range(0, len(codes), 8):
        a, b, c, d, e, f, g, h = codes[start : start + 8]
        stored += [
            a | d << 3 | (g & 3) << 6,
            b | e << 3 | (h & 3) << 6,
            c | f << 3 | (g >> 2) << 6 | (h >> 2) << 7,
        ]
    return {
        "weight": byte(stored, [64, 3]),
        "scale": float32([scale(n) for n in range(8)], [8, 1]),
        "zero_point": float32([-(scale(n) * (n % 8)) for n in range(8)], [8, 1]),
        "bias": bfloat16([bias(n) for n in range(8)], [8]),
    }


def torchao() -> dict[str, Entry]:
    """4-bit codes and zero points, 8 taken from each, in bytes."""
    return {
        "_weight_qdata": byte([code - 8 for code in flat(unsigned(4, 6, 48))], [6, 48], kind="int8"),
        "_weight_scale": float32([scale(n) for n in range(6)], [6, 1]),
        "_weight_zero_point": byte([n % 16 - 8 for n in range(6)], [6, 1], kind="int8"),
        "bias": float32([bias(n) for n in range(6)], [6]),
    }


def bf16() -> dict[str, Entry]:
    """The weight s (q - z) itself: five binary places at most, exact in bfloat16."""
    weight = [[scale(n) * (code - n % 8) for code in row] for n, row in enumerate(unsigned(3, 6, 40))]
    return {"weight": bfloat16(flat(weight), [6, 40]), "bias": bfloat16([bias(n) for n in range(6)], [6])}


def diffusers() -> dict[str, Entry]:
    """Our own packed layer, 3 bits: the lower two bits of four codes in a byte, the third ones of eight; rows apart."""
    codes = unsigned(3, 12, 40)
    return {
        "codes": byte(flat([dense([code & 3 for code in row], 2) for row in codes]), [12, 10]),
        "codes_high": byte(flat([dense([code >> 2 for code in row], 1) for row in codes]), [12, 5]),
        "weight_scale": float32([scale(n) for n in range(12)], [12]),
        "weight_zero_point": byte([n % 8 for n in range(12)], [12]),
        "clip_low": float32([0.5], [1]),
        "clip_high": float32([0.75], [1]),
        "bias": float32([bias(n) for n in range(12)], [12]),
    }


def _svdq() -> dict[str, Entry]:
    """128 x 128, two groups of columns; a lane of a warp reads four registers of eight codes, two of rows, two of columns."""
    codes, size = signed(4, 128, 128), 128
    tiles = [
        codes[16 * p + 8 * a + i][64 * tile + 32 * b + 8 * j + c]
        for tile in range(2)
        for p in range(8) for i in range(8) for j in range(4) for a in range(2) for b in range(2) for c in range(8)
    ]  # fmt: skip
    order = [16 * t + 8 * u + 2 * v + w for t in range(8) for v in range(4) for u in range(2) for w in range(2)]
    return {
        "qweight": byte(nibbles(tiles), [128, 64], kind="int8"),
        "wscales": bfloat16([scale(n + group) for group in range(2) for n in order], [2, 128]),
        "smooth_factor": bfloat16([1.0] * size, [128]),
        "proj_down": bfloat16([0.0] * (16 * size), [128, 16]),
        "proj_up": bfloat16([0.0] * (16 * size), [128, 16]),
        "bias": bfloat16([bias(n) for n in order], [128]),
    }


def nunchaku_lite() -> dict[str, Entry]:
    """The kernels of diffusers' own, with a branch of 16 zeros."""
    return _svdq()


def cache_dit() -> dict[str, Entry]:
    """The same without a branch, the smoothing twice, and the dequantized weight for the folder of the transformer."""
    made, codes = _svdq(), signed(4, 128, 128)
    made |= {"proj_down": bfloat16([], [128, 0]), "proj_up": bfloat16([], [128, 0])}
    plain = [[scale(n + k // 64) * codes[n][k] for k in range(128)] for n in range(128)]
    return {**made, "smooth_factor_orig": made["smooth_factor"], "folded_weight": bfloat16(flat(plain), [128, 128])}


FORMATS: dict[str, Callable[[], dict[str, Entry]]] = {
    "bf16": bf16,
    "cache_dit": cache_dit,
    "comfy": comfy,
    "diffusers": diffusers,
    "humming": humming,
    "int8": int8,
    "nunchaku_lite": nunchaku_lite,
    "sdnq": sdnq,
    "torchao": torchao,
}


def golden_text(entries: dict[str, Entry]) -> str:
    """The content of a golden file."""
    content = {
        name: {
            "dtype": kind,
            "shape": shape,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "hex": data[:SHOWN].hex(),
        }
        for name, (kind, shape, data) in entries.items()
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
