"""init=static from the command line: tables for one sampler, other step counts refused or interpolated, training from it.

Latte's, of spatial and temporal blocks, are held to ranges that hooks find here while the full-precision model samples.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LatteTransformer3DModel
from safetensors.torch import load_file

from qvgen.cli import main
from qvgen.config.leaves import load_leaf
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import read_manifest
from qvgen.initializers.static import SHARES
from qvgen.layers.swap import packed_layers
from tests.models.ltx_folders import LATTE_TRANSFORMER, make_latte_folder
from tests.runs import SHORT, UNSEEN, copy_until, packed_bytes, shallow, train
from tests.verbs.test_hub_models import FEW, tiny_keys

STEPS = 4
STATIC = ("init=static", "init.alpha=0.5", "bits=8", f"model.num_inference_steps={STEPS}", "calibration.videos=1")


def ptq(run_dir: Path, cache: Path, *overrides: str) -> int:
    keys = [key for key in SHORT if not key.startswith(("steps", "phi", "model.num"))]
    return main(
        ["ptq", *keys, *STATIC, *UNSEEN, *shallow(1), f"calibration.cache={cache}", f"run_dir={run_dir}", *overrides]
    )


def test_other_step_counts_are_refused_or_interpolated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    for kind in ("refuse", "interpolate"):
        assert ptq(tmp_path / kind, cache, f"init.other_steps={kind}", "evaluation.samples=0") == 0
        packed = tmp_path / kind / "packed"
        manifest = read_manifest(packed)
        assert manifest.timesteps is not None
        assert len(manifest.timesteps) == STEPS
        entry = json.loads((packed / "manifest.json").read_text())["layers"][0]
        assert (entry["activation"]["range"], entry["activation"]["clip_table"]) == ("static", STEPS)
        tensors = load_file(packed / "model.safetensors")
        assert tensors["proj_out.static_scale"].shape == (STEPS,)
        assert not any("clip" in name for name in tensors)

        def generate(num_steps: int, packed: Path = packed) -> int:
            return main(
                [
                    "generate",
                    f"packed={packed}",
                    "prompt=a red three standing still",
                    f"num_steps={num_steps}",
                    f"out={tmp_path / f'{packed.parent.name}-{num_steps}'}",
                ]
            )

        assert generate(STEPS) == 0
        capsys.readouterr()
        assert generate(STEPS + 3) == (2 if kind == "refuse" else 0)
        refused = "that the static scales were calibrated for" in capsys.readouterr().err
        assert refused == (kind == "refuse")


def test_training_starts_from_the_tables_and_learns_them(tmp_path: Path) -> None:
    keys = (*STATIC, f"calibration.cache={tmp_path / 'cache'}", "steps=4", "phi.ranks=[2]", "checkpoint.every_steps=2")
    keys += shallow(1)
    first, again = tmp_path / "first", tmp_path / "again"
    assert train(first, *keys, *UNSEEN) == 0
    copy_until(first, again, step=2)
    assert train(again, *keys, *UNSEEN, "resume=true") == 0
    assert packed_bytes(again) == packed_bytes(first)
    report = json.loads((first / "report.json").read_text())
    assert report["packed_vs_fake_max_abs"] == 0.0
    start = load_file(first / "start.safetensors")["proj_out.activation_quantizer.scale"]
    trained = load_packed(first / "packed").get_submodule("proj_out").static_scale
    assert start.shape == trained.shape == (STEPS,)
    assert not start.equal(trained)


def test_spatial_and_temporal_blocks_have_tables_by_the_steps(tmp_path: Path) -> None:
    """Scale x 255 is one share of the range of a layer's smoothed inputs at every step, conditional calls and others."""
    folder, run = make_latte_folder(tmp_path / "model"), tmp_path / "run"
    torch.manual_seed(0)  # one block of each kind
    LatteTransformer3DModel(**{**LATTE_TRANSFORMER, "num_layers": 1}).save_pretrained(folder / "transformer")
    keys = [*tiny_keys("latte", folder), *FEW, f"calibration.cache={tmp_path / 'cache'}", "init=static", "bits=w4a8"]
    keys += ["model.num_inference_steps=3", "init.alpha=0.5", "init.fold_smoothing=false"]
    assert main(["ptq", *keys, f"run_dir={run}"]) == 0
    report = json.loads((run / "report.json").read_text())
    assert float(report["trajectory_psnr_db"]) >= 50
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(3)
    steps = sorted(map(float, scheduler.timesteps))
    assert list(read_manifest(run / "packed").timesteps or ()) == steps
    layers = packed_layers(load_packed(run / "packed"))
    found = _ranges_while_sampling(folder, {name: layer.input_scale for name, layer in layers.items()})
    assert sum(name.startswith("temporal_transformer_blocks") for name in layers) == 6
    for name, layer in layers.items():
        low, high = (torch.stack([found[name, step][side] for step in steps]) for side in (0, 1))
        shares = layer.static_scale.double() * 255 / (high.clamp(min=0) - low.clamp(max=0))
        assert (shares - shares[0]).abs().max() < 1e-4 * shares[0], name  # float32 sums of another batch size
        assert min(abs(float(shares[0]) - share) for share in SHARES) < 1e-4, name


def _ranges_while_sampling(
    folder: Path, factors: dict[str, torch.Tensor | None]
) -> dict[tuple[str, float], tuple[torch.Tensor, torch.Tensor]]:
    """Layer and timestep -> smallest and largest input in float64, of the video that the run calibrates with."""
    sizes = {"height": 32, "width": 48, "num_frames": 9, "sampling_frames": 9, "num_inference_steps": 3}
    types = {"dtype": "float32", "text_encoder_dtype": "float32"}
    family = load_leaf("model", "latte", path=str(folder), **sizes, **types)
    teacher, found, now = family.load_teacher(), {}, []
    teacher.register_forward_pre_hook(
        lambda module, args, kwargs: now.append(float(kwargs["timestep"].flatten()[0])), with_kwargs=True
    )

    def watch(name: str) -> None:
        def look(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].double() * (1 if factors[name] is None else factors[name].double())
            low, high = found.get((name, now[-1]), (x.amin(), x.amax()))
            found[name, now[-1]] = (torch.minimum(low, x.amin()), torch.maximum(high, x.amax()))

        teacher.get_submodule(name).register_forward_pre_hook(look)

    for name in factors:
        watch(name)
    options = {"num_steps": 3, "guidance_scale": family.guidance_scale}
    family.generate(teacher, ["a red boat"], [42 + 10_000], **options)  # other noise than that of compared videos
    return found
