"""LoRAs in a run without a whole model (``strategy.low_host_memory``): the bits of a model that is loaded whole with them.

The start that is made layer by layer against the ordinary one, file against file, and the rows of a teacher that are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from qvgen.cli import BAD_INPUT
from qvgen.config import TrainConfig
from qvgen.layers.swap import phi_suspended
from qvgen.models.tensor_reader import tensor_reader_of
from qvgen.training.design.meta_model import build_teacher
from qvgen.training.distributed.file_shares import computed_buffers, share_teacher_
from qvgen.training.distributed.gathering import Gathering
from qvgen.training.start.file import LAYERS_FILE, START_FILE, save_start
from qvgen.training.start.shared import StartHelpers
from qvgen.training.start.streamed import make_streamed_start
from qvgen.training.start.student import prepare_student, set_up_student_
from qvgen.verbs._parts import ptq_method, sampled_teacher, student_design
from tests.models.lora_files import Model, make_model, save_diffusers
from tests.runs import train, train_config
from tests.verbs.test_hub_models import tiny_keys


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model("wan", tmp_path_factory.mktemp("wan") / "hub")


@pytest.fixture(scope="module")
def chosen(wan: Model) -> dict[str, list[str]]:
    """Keys of one LoRA, and of two with scales of their own."""
    one, two = (save_diffusers(wan, wan.folder.parent / str(seed), seed=seed).path for seed in (0, 1))
    return {
        "none": [],
        "one": [f"model.lora={one}", "model.lora_scale=0.5"],
        "two": [f"model.lora=[{one},{two}]", "model.lora_scale=[0.5,-0.25]"],
    }


def asked(wan: Model, *keys: str) -> TrainConfig:
    return train_config(*tiny_keys("wan", wan.folder), f"data.path={wan.folder}", "bits=4", "init=mse", *keys)


def whole_start(config: TrainConfig, run_dir: Path) -> tuple[bytes, bytes]:
    """Files of the start that a process makes of a model that it has loaded."""
    run_dir.mkdir()
    student, _ = prepare_student(config.model, student_design(config), seed=None)
    teacher = sampled_teacher(config, config.model.load_teacher(), encode=config.model.encode)
    with phi_suspended(student):
        set_up_student_(student, design=student_design(config), ptq=ptq_method(config), teacher=teacher)
    save_start(student, run_dir)
    return files(run_dir)


def streamed_start(config: TrainConfig, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, bytes]:
    """Those of the start that is made layer by layer."""
    run_dir.mkdir()
    helpers = StartHelpers(world_size=1, neighbours=1, run_dir=run_dir, ask=lambda: None, check=lambda: None)
    design = student_design(config)
    with monkeypatch.context() as patched:
        patched.setattr(type(config.model), "load_teacher", refuse)
        make_streamed_start(
            run_dir, family=config.model, design=design, init=config.init, seed=config.seed, helpers=helpers
        )
    return files(run_dir)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a whole model is loaded")


def files(run_dir: Path) -> tuple[bytes, bytes]:
    return (run_dir / START_FILE).read_bytes(), (run_dir / LAYERS_FILE).read_bytes()


def test_a_start_made_layer_by_layer_is_the_file_of_a_whole_model(
    wan: Model, chosen: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for name in ("one", "two"):
        config = asked(wan, *chosen[name])
        found[name] = streamed_start(config, tmp_path / f"{name}-streamed", monkeypatch)
        assert found[name] == whole_start(asked(wan, *chosen[name]), tmp_path / f"{name}-whole")
    assert len({found["one"], found["two"], streamed_start(asked(wan), tmp_path / "none", monkeypatch)}) == 3


@pytest.fixture
def place(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Where a process alone has its shares."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield {"mesh": init_device_mesh("cpu", (1,)), "device": torch.device("cpu"), "how": Gathering()}
    distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_whose_rows_are_read_is_the_one_that_is_loaded(
    wan: Model, chosen: dict[str, list[str]], place: dict[str, Any], dtype: str
) -> None:
    """Its files are float32, so that bfloat16 rounds before the LoRAs are added and behind that."""
    family = asked(wan, *chosen["two"], f"model.dtype={dtype}").model
    teacher, read = build_teacher(family, dtype=getattr(torch, dtype)), tensor_reader_of(family)
    assert read is not None
    share_teacher_(teacher, read=read, computed=computed_buffers(family), **place)
    found = dict(teacher.named_parameters())
    for name, wanted in family.load_teacher().named_parameters():
        mine = found[name]
        assert isinstance(mine, DTensor)
        assert mine.dtype == wanted.dtype
        assert torch.equal(mine.to_local(), wanted), name


def test_a_finetune_is_refused_with_what_to_do(wan: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low = ("strategy=fsdp", "devices=2", "strategy.low_host_memory=true", "evaluation.every_steps=null", "init=mse")
    own = ("bits=4", f"data.path={wan.folder}", f"model.transformer={wan.folder / 'transformer'}")
    assert train(tmp_path / "run", *tiny_keys("wan", wan.folder), *own, *low) == BAD_INPUT
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "qvgen train" in line]
    assert "strategy.low_host_memory=true reads model=wan tensor by tensor" in line
    assert line.endswith("leave the key out")
