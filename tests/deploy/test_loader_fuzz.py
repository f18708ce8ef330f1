"""Damaged packed files: whatever a file holds, loading it gives a model or a ValueError of one line, and nothing else.

Every case is written with the sha256 that fits it, so that it gets past the first check, as a file of somebody else would.
Some are given to diffusers' from_pretrained too, which must refuse and accept the same.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanTransformer3DModel

from qvgen.deploy.checkpoint import load_packed

CASES, BY_DIFFUSERS = 40, 8
"""How many damages of a kind are tried, and how many of them by from_pretrained too."""
Change = Callable[[random.Random, dict[str, Any], bytes], tuple[bytes, bytes]]
"""Of (source of randomness, header, data): the header's new bytes and the new data."""


def dumped(header: dict[str, Any]) -> bytes:
    return json.dumps(header).encode()


def entry_of(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = header[rng.choice([key for key in header if key != "__metadata__"])]
    return entry


def flip_header_bytes(rng: random.Random, header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    text = bytearray(dumped(header))
    for _ in range(rng.randint(1, 4)):
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text), data


def flip_data_bytes(rng: random.Random, header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 2000)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return dumped(header), bytes(changed)


def cut(rng: random.Random, header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    return dumped(header), data[: rng.randrange(len(data))]


def append(rng: random.Random, header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    return dumped(header), data + rng.randbytes(rng.randint(1, 100))


def move_offsets(rng: random.Random, header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    entry = entry_of(rng, header)
    values = [-1, 0, 1, len(data), len(data) + 1, 2**31, 2**63 - 1, 2**64 - 1, 2**70, entry["data_offsets"][0]]
    entry["data_offsets"][rng.randrange(2)] = rng.choice(values)
    return dumped(header), data


def other_dtype(rng: random.Random, header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    kinds = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "I8", "BOOL", "F8_E4M3", "U64", "", "X", None, 3]
    entry = entry_of(rng, header)
    entry["dtype"] = rng.choice([kind for kind in kinds if kind != entry["dtype"]])
    return dumped(header), data


def other_shape(rng: random.Random, header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    entry = entry_of(rng, header)
    shape = list(entry["shape"])
    choices: list[Any] = [
        shape[::-1], [*shape, 1], shape[:-1], [], [0, *shape[1:]], [2**32, 2**32], [-1], [2**63], None, "ab", [1.5]
    ]  # fmt: skip
    entry["shape"] = rng.choice([choice for choice in choices if choice != shape])
    return dumped(header), data


def other_names(rng: random.Random, header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    name = rng.choice(list(header))
    entry = header.pop(name)
    if rng.random() < 0.7:
        header[rng.choice([name + "x", "", "../" + name, "__class__", name.upper()])] = entry
    return dumped(header), data


def other_length(rng: random.Random, header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    text = dumped(header)
    return text[: rng.randrange(len(text))], data  # the first eight bytes say the new length


CHANGES: list[Change] = [
    flip_header_bytes, flip_data_bytes, cut, append, move_offsets, other_dtype, other_shape, other_names, other_length
]  # fmt: skip


@pytest.fixture
def beside(packed_block: Path, tmp_path: Path) -> Path:
    """A folder with the other files that from_pretrained reads."""
    for name in ("config.json", "diffusion_pytorch_model.safetensors.index.json"):
        shutil.copy(packed_block / name, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def original(packed_block: Path) -> tuple[dict[str, Any], bytes, dict[str, Any]]:
    """Header and data of a packed file, and its manifest."""
    content = (packed_block / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    manifest = json.loads((packed_block / "manifest.json").read_text())
    return json.loads(content[8 : 8 + length]), content[8 + length :], manifest


def load(folder: Path, content: bytes, manifest: dict[str, Any], *, by_diffusers: bool = False) -> bool:
    """Whether it loads; anything but a model or a ValueError of one line is an error of the test."""
    (folder / "model.safetensors").write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": hashlib.sha256(content).hexdigest()}))
    try:
        if by_diffusers:
            WanTransformer3DModel.from_pretrained(folder)
        else:
            load_packed(folder, kernel="reference")
    except ValueError as error:
        message = str(error)
    else:
        return True
    assert len(message.splitlines()) == 1, message
    assert str(folder) in message or "weight" in message or "zero_point" in message, message
    return False


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_damaged_files_are_refused(
    change: Change, original: tuple[dict[str, Any], bytes, dict[str, Any]], beside: Path
) -> None:
    header, data, manifest = original
    loaded = 0
    for seed in range(CASES):
        text, changed = change(random.Random(seed), json.loads(json.dumps(header)), data)
        content = struct.pack("<Q", len(text)) + text + changed
        loads = load(beside, content, manifest)
        if seed < BY_DIFFUSERS:
            assert load(beside, content, manifest, by_diffusers=True) == loads, seed
        loaded += loads
    harmless = {"flip_data_bytes", "flip_header_bytes", "move_offsets"}  # a flipped weight is a weight
    assert loaded == 0 or change.__name__ in harmless
    if change is flip_data_bytes:
        assert loaded < CASES


def test_lengths_that_lie_are_refused(original: tuple[dict[str, Any], bytes, dict[str, Any]], beside: Path) -> None:
    header, data, manifest = original
    text = dumped(header)
    for length in (0, 1, len(text) - 1, len(text) + 1, len(text) + len(data), 2**31, 2**40, 2**63, 2**64 - 1):
        for by_diffusers in (False, True):
            assert not load(beside, struct.pack("<Q", length) + text + data, manifest, by_diffusers=by_diffusers)
    for content in (b"", b"\0" * 7, struct.pack("<Q", 2) + b"{}", b"PK\x03\x04" + data[:100]):
        assert not load(beside, content, manifest)
    assert load(beside, struct.pack("<Q", len(text)) + text + data, manifest)
