"""Files that are read and written by parts have the library's bytes and values, and say what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvgen.deploy import tensor_file
from qvgen.deploy.tensor_file import TYPES, TensorFile, TensorWriter, bytes_of, write_tensors


def tensors() -> dict[str, Tensor]:
    """One of each type, of 3 rows; names are out of order, one of them is not ASCII; one is empty, and one a number."""
    made = torch.arange(12).reshape(3, 4) % 2
    found = {f"{'zyx'[place % 3]}.{name}": made.to(dtype) for place, (dtype, name) in enumerate(TYPES.items())}
    return {**found, "gr\u00f6\u00dfe": torch.tensor(2.5), "empty": torch.empty(0, 4)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that the library wrote."""
    save_file(tensors(), tmp_path / "theirs.safetensors")
    return tmp_path / "theirs.safetensors"


def test_the_bytes_are_the_librarys_in_whatever_order_tensors_come(file: Path, tmp_path: Path) -> None:
    values, mine = tensors(), tmp_path / "mine.safetensors"
    with TensorWriter(mine, {name: value.to("meta") for name, value in values.items()}) as writer:
        for name in sorted(values, reverse=True):
            writer.put(name, values[name])
    assert mine.read_bytes() == file.read_bytes()
    write_tensors(mine, values, values.__getitem__)
    assert mine.read_bytes() == file.read_bytes()


def test_parts_are_those_of_the_whole(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 40)
    opened, wanted = TensorFile(file), load_file(file)
    assert set(opened.names) == set(wanted)
    for name, value in wanted.items():
        assert (opened.shape(name), opened.dtype(name)) == (value.shape, value.dtype)
        chunks = list(opened.chunks(name))
        parts = [(opened.whole(name), value), (torch.cat(chunks) if chunks else value.flatten(), value.flatten())]
        parts += [(opened.rows(name, 1, 3), value[1:3])] if len(value.shape) and len(value) else []
        for found, right in parts:
            assert (found.shape, bytes_of(found)) == (right.shape, bytes_of(right.contiguous()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda whole: whole + b"x", "longer than its header"),
        (lambda whole: whole[:-1], "is cut off: it has"),
        (
            lambda whole: whole.replace(b'"F64","shape":[3,4]', b'"F64","shape":[3,5]'),
            "another type or size of 'y.F64'",
        ),
    ],
)
def test_a_damaged_file_is_refused(spoil: Callable[[bytes], bytes], message: str, file: Path) -> None:
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        TensorFile(file)


def test_what_is_not_as_it_was_said_is_refused(tmp_path: Path) -> None:
    like = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    writer = TensorWriter(tmp_path / "file", like)
    with pytest.raises(ValueError, match=r"a is torch.float32 \[3, 2\], and was to be torch.float32 \[2, 3\]"):
        writer.put("a", torch.zeros(3, 2))
    writer.put("a", torch.zeros(2, 3))
    for name in ("a", "c"):
        with pytest.raises(ValueError, match="was written before, or is no tensor of the file"):
            writer.put(name, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="b and 0 other tensors were not written"), writer:
        pass
