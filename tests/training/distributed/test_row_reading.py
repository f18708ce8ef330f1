"""Shares of a model that come from a file: the file's values, and no memory of rank 0's model any more.

Two processes that read their rows train the bits of one in test_whole_runs.py and test_launched_runs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from qvgen.models.tensor_reader import tensor_reader_of
from qvgen.training.design.meta_model import build_teacher
from qvgen.training.distributed.file_shares import computed_buffers, share_teacher_
from qvgen.training.distributed.gathering import Gathering
from qvgen.training.distributed.sharding import share_out_
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder
from tests.runs import train_config
from tests.verbs.test_hub_models import tiny_keys


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 5) for _ in range(2))
        self.register_buffer("positions", torch.arange(4.0), persistent=False)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("from_file", [True, False])
def test_parameters_are_those_of_the_file_and_the_source_gives_its_memory_back(tmp_path: Path, from_file: bool) -> None:
    source, other = Blocks(), Blocks()
    wanted = {name: value.clone() for name, value in (other if from_file else source).named_parameters()}
    save_file(dict(other.state_dict()), tmp_path / "start.safetensors")
    with torch.device("meta"):
        model = Blocks()
    file = tmp_path / "start.safetensors" if from_file else None
    mesh = init_device_mesh("cpu", (1,))
    share_out_(model, source=source, mesh=mesh, device=torch.device("cpu"), file=file)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.to_local(), wanted[name])
    assert torch.equal(model.positions, torch.arange(4.0))
    assert all(parameter.is_meta == from_file for parameter in source.parameters())


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("model", ["wan", "cogvideox"])
def test_a_teacher_read_from_its_files_is_the_one_that_is_loaded(tmp_path: Path, model: str) -> None:
    folder = make_wan_folder(tmp_path) if model == "wan" else make_cogvideox_folder(tmp_path, "2b")
    family = train_config(*tiny_keys(model, folder), f"data.path={tmp_path}", "model.dtype=bfloat16").model
    teacher, read = build_teacher(family, dtype=torch.bfloat16), tensor_reader_of(family)
    assert read is not None
    place = {"mesh": init_device_mesh("cpu", (1,)), "device": torch.device("cpu"), "how": Gathering()}
    share_teacher_(teacher, read=read, computed=computed_buffers(family), **place)
    loaded = family.load_teacher()
    wanted = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    found = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        mine = found[name]
        mine = mine.to_local() if isinstance(mine, DTensor) else mine
        assert (mine.dtype, mine.device) == (value.dtype, value.device), name
        assert torch.equal(mine, value), name
