"""`qvgen import`, against the release's modules written down anew (tests/deploy/importers/release.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.deploy.checkpoint import load_packed
from qvgen.layers.swap import packed_layers
from tests.deploy.importers.release import make_release, release_layers, save_release, set_group
from tests.models.family_checks import tiny_family
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder

MAKE = {"wan": make_wan_folder, "cogvideox": make_cogvideox_folder}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name) for name, make in MAKE.items()}


def do_import(source: Path, folder: Path, out: Path, *words: str, name: str = "wan") -> int:
    size = ["model.height=32", "model.width=48", "model.num_frames=9", "model.sampling_frames=9"]
    command = [f"source={source}", f"model={name}", f"model.path={folder}", f"out={out}", *size]
    return main(["import", *command, *({"bits=w4a4"} if not any(w.startswith("bits") for w in words) else ()), *words])


def inputs(name: str, timestep: float, *, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 4, 3, 4, 6) if name == "wan" else (1, 3, 4, 4, 6)
    text = 16 if name == "wan" else 226
    return {
        "hidden_states": torch.randn(*shape, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, 16, generator=generator),
        "timestep": torch.tensor([timestep]),
    }


@torch.no_grad()
def call(model: Any, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
    output: torch.Tensor = model(**arguments, return_dict=False)[0]
    return output


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_codes_and_every_sampling_step_are_the_release_s(
    name: str, dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = make_release(name, dtype=dtype)
    source = save_release(release, tmp_path / "release", dtype=dtype)
    assert do_import(source, folders[name], tmp_path / "out", name=name) == DONE
    print(capsys.readouterr().out)
    packed: Any = load_packed(tmp_path / "out", kernel="reference")
    layers = packed_layers(packed)
    assert list(layers) == list(release_layers(release))
    for key, theirs in release_layers(release).items():
        codes, scale, zero_point = theirs.weight_codes()
        assert torch.equal(layers[key].integer_codes(), codes.to(torch.uint8)), key
        assert torch.equal(layers[key].weight_scale, scale.float().flatten())
        assert torch.equal(layers[key].weight_zero_point, zero_point.float().flatten())
    family = tiny_family(name, folders[name])
    scheduler = family.scheduler()
    scheduler.set_timesteps(50)
    errors = []
    for step, timestep in enumerate(scheduler.timesteps.tolist()):
        set_group(release, max(0, 49 - step * (2 if name == "wan" else 1)))
        arguments = inputs(name, timestep, seed=step)
        wanted = call(release, arguments)
        errors.append(float((call(packed, arguments) - wanted).norm() / wanted.norm()))
    print(sorted(errors))
    assert sorted(errors)[45] <= 1e-6
