"""Files of an export: the bytes that safetensors itself writes, from tensors that lie on the disk and not in memory."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvgen.deploy.export_files import write_files
from qvgen.deploy.exported_model import convert, open_packed
from qvgen.deploy.exporters.base import ExportFile
from qvgen.deploy.exporters.bf16 import Bf16
from qvgen.deploy.exporters.cache_dit import CacheDit
from qvgen.deploy.manifest import file_sha256
from qvgen.deploy.tensor_spool import TensorSpool
from qvgen.layers.packed_linear import PackedLinear
from tests.deploy.exporters.packed_models import save, tiny_wan


def mapped_file(tensor: Tensor) -> str:
    """The file whose pages a tensor lies in; empty where it lies in ordinary memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.partition("/")[1] + line.partition("/")[2]
    return ""


def test_large_tensors_wait_on_the_disk(tmp_path: Path) -> None:
    spool = TensorSpool(tmp_path / "spool")
    small, large = torch.arange(3.0), torch.arange(2.0**18)
    kept = [spool.keep({"w": large + number, "b": small}) for number in range(3)]
    files = [mapped_file(tensors["w"]) for tensors in kept]
    assert files == [str(spool.folder / f"{number}.safetensors") for number in range(3)]
    assert mapped_file(large) == ""
    assert all(torch.equal(tensors["w"], large + number) for number, tensors in enumerate(kept))
    assert kept[0]["b"] is small


def test_a_conversion_keeps_its_layers_on_the_disk(tmp_path: Path) -> None:
    packed = save(tiny_wan(), tmp_path / "packed", profile="convrot", bits="w4a4")
    source = open_packed(packed, names=None)
    spool = TensorSpool(tmp_path / "spool", small_bytes=0)
    model = convert(source, Bf16(dtype="bfloat16", layout="diffusers"), spool=spool)
    kept = [load_file(file)[""] for file in spool.folder.iterdir()]
    wanted = sum(tensor.double().sum() for tensor in model.all_tensors.values())
    assert len(kept) == len(model.all_tensors)
    assert float(sum(tensor.double().sum() for tensor in kept)) == pytest.approx(float(wanted), rel=1e-9)


@dataclass(frozen=True, kw_only=True)
class WatchedCacheDit(CacheDit):
    """The target that makes most of a layer; it notes what is left of earlier layers when it is asked for the next one."""

    made: list[weakref.ref[Tensor]]
    left: list[int]

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """See the target."""
        self.left.append(sum(tensor() is not None for tensor in self.made))
        tensors = super().tensors(layer)
        self.made.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors


def test_a_conversion_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    packed = save(tiny_wan(), tmp_path / "packed", profile="svdq_g64", bits="w4a4")
    target = WatchedCacheDit(dtype="bfloat16", rank=16, made=[], left=[])
    model = convert(open_packed(packed, names=None), target, spool=TensorSpool(tmp_path / "spool", small_bytes=0))
    assert target.left == [0] * len(model.layers)
    assert len(target.made) == 8 * len(model.layers)


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    shared = torch.arange(2.0**17)
    tensors = {
        "b.weight": torch.arange(12.0).reshape(3, 4).t(),  # not contiguous
        "a.codes": torch.arange(9, dtype=torch.uint8).reshape(3, 3),
        "c.scale": torch.ones(2, dtype=torch.bfloat16),
        "d": shared,
        "e": shared,  # two names of one tensor
        "f": shared[5:],  # and a part of it
        "g": torch.zeros(0),
    }
    file = ExportFile(path="below/x.safetensors", content=tensors, metadata={"format": "pt"})
    written = write_files(tmp_path, [file, ExportFile(path="copy", content=tmp_path / "below" / "x.safetensors")])
    alone = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(alone, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "below" / "x.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert written["copy"] == written["below/x.safetensors"]
    assert written["copy"]["sha256"] == file_sha256(tmp_path / "theirs")
    assert torch.equal(load_file(tmp_path / "copy")["f"], shared[5:])
