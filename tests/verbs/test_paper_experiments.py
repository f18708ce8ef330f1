"""The papers' settings of conf/experiment: against values written out here, planned at full size, and one of them run.

The values are those of QVGen (arXiv 2505.11497), DVD-Quant (2505.18663), ViDiT-Q (2406.02540) and their authors' code, and of
static quantization (2502.15077).
No weights are needed for a plan; the run has a tiny CogVideoX folder of the hub's layout.
"""

from __future__ import annotations

import json
import re
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from qvgen.cli import main
from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.config.leaves import conf_directory
from qvgen.layers.swap import select_linears
from tests.models.hub_folders import make_cogvideox_folder
from tests.runs import read_metrics
from tests.verbs.test_hub_models import tiny_keys, write_clips

ROOT = Path(__file__).resolve().parents[2]
GRID = {
    "profile.weight.granularity": "per_channel", "profile.weight.group_size": None,
    "profile.activation.granularity": "per_token", "profile.activation.group_size": None, "profile.attention": "none",
}  # fmt: skip
QVGEN = {
    "names.method": "qvgen", "names.init": "mse", "names.data": "clips", "bits": 4, "seed": 42, **GRID,
    "profile.weight_bits": 4, "profile.activation_bits": 4, "profile.weight.zero_point": "real",
    "profile.activation.clip": True, "model.include": ["*"], "model.exclude": [], "model.num_inference_steps": 50,
    "model.num_frames": 49, "method.caption_dropout": 0.05, "method.share_activations": False,
    "phi.rank": 32, "phi.decay": 0.5, "phi.ranks": [32, 16, 8, 4, 2, 1], "phi.anneal": "cosine", "phi.drop": "smallest",
    "phi.start": "svd", "phi.input": "quantized", "phi.keep": False, "phi.tail_share": 0.001,
    "optim.name": "adamw", "optim.learning_rate": 3e-5, "optim.clip_learning_rate": 0.01, "optim.betas": [0.9, 0.95],
    "optim.eps": 1e-8, "optim.weight_decay": 1e-4, "optim.warmup_share": 0.1, "optim.gradient_clip": 1.0,
    "optim.zero_point_gradient": "stop", "loss.levels": "uniform", "loss.weighting": "none",
}  # fmt: skip
PTQ = {"names.method": "ptq", "steps": 0, "model.num_inference_steps": 50, **GRID, "profile.activation.clip": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "qvgen_cogvideox": {
        **QVGEN,
        "names.model": "cogvideox",
        "steps": 2000,
        "batch_size": 64,
        "loss.level_shift": None,
        "model.height": 480,
        "model.width": 720,
        "model.guidance_scale": 6.0,
        "model.fps": 8,
    },
    "qvgen_wan": {
        **QVGEN,
        "names.model": "wan",
        "steps": 2667,
        "batch_size": 48,
        "loss.level_shift": 1.0,
        "model.height": 480,
        "model.width": 832,
        "model.guidance_scale": 5.0,
        "model.fps": 16,
        "model.sampling_frames": 81,
        "model.published.scheduler.flow_shift": 3.0,
    },
    "dvd_quant_hunyuan": {
        **PTQ,
        "names.model": "hunyuanvideo",
        "names.init": "dvd_quant",
        "profile.weight_bits": 4,
        "profile.activation_bits": 4,
        "profile.weight.zero_point": "integer",
        "activation_switch.widths": None,
        "activation_switch.delta": 0.12,
    },
    "vidit_q_latte": {
        **PTQ,
        "names.model": "latte",
        "names.init": "vidit_q",
        "profile.weight_bits": 4,
        "profile.activation_bits": 8,
        "init.alpha": 0.56,
        "calibration.videos": 10,
        "calibration.steps": 10,
    },
}
OPENSORA = {
    **PTQ,
    "names.model": "opensora",
    "model.include": ["*_blocks.*"],
    "model.exclude": [],
    "model.num_inference_steps": 30,
    "model.guidance_scale": 7.0,
    "model.num_frames": 51,
    "model.fps": 24,
    "calibration.videos": 10,
}
SETTINGS |= {
    "vidit_q_opensora": {
        **OPENSORA, "names.init": "vidit_q", "profile.weight_bits": 4, "profile.activation_bits": 8, "init.alpha": 0.56,
        "calibration.steps": 10,
    },
    "static_opensora": {
        **OPENSORA, "names.init": "static", "profile.weight_bits": 8, "profile.activation_bits": 8, "init.alpha": None,
        "init.other_steps": "refuse",
    },
}  # fmt: skip
"""What each experiment has to compose to."""
PLANS = {
    "qvgen_wan": ("quantized: 306 Linears", "steps: 2667 of 48 samples", "1 from step 2220, 0 from step 2664"),
    "dvd_quant_hunyuan": ("init=dvd_quant w4a4", "calibration: none, nothing is sampled"),
    "vidit_q_latte": ("init=vidit_q w4a8", "from 10 videos of 10 steps"),
    "vidit_q_opensora": ("init=vidit_q w4a8", "from 10 videos of 10 steps"),
    "static_opensora": ("init=static w8a8", "abs_max, inputs, ranges from 10 videos of 30 steps"),
}
"""What the plan of each says; qvgen_cogvideox is run below."""


def verb_of(name: str) -> str:
    return "train" if name.startswith("qvgen") else "ptq"


@pytest.mark.parametrize("name", SETTINGS)
def test_the_setting_is_the_papers(name: str) -> None:
    found = OmegaConf.create(compose_plain(verb_of(name), [f"experiment={name}"]))
    missing = object()
    values = {key: OmegaConf.select(found, key, default=missing) for key in SETTINGS[name]}
    plain = {
        key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in values.items()
    }
    assert plain == SETTINGS[name]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_value_names_its_source(name: str) -> None:
    lines = (conf_directory() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if re.match(r"\s*(- override /)?[\w]+: \S", line)]
    assert len(values) > 8
    assert [line for line in values if not re.search(r" # \[(paper|release|recipe|ours)\]", line)] == []


@pytest.mark.parametrize("name", PLANS)
def test_it_is_planned_with_the_published_configuration(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"experiment={name}", "dry_run=true", "device_memory_gib=80", "logger=csv", f"run_dir={tmp_path / 'run'}"]
    assert main([verb_of(name), *words]) == 0
    plan = capsys.readouterr().out
    assert [text for text in PLANS[name] if text not in plan] == []
    assert not (tmp_path / "run").exists()


LEFT = {
    "vidit_q_latte": {
        "proj_out", "caption_projection.linear_1", "caption_projection.linear_2", "adaln_single.linear",
        "adaln_single.emb.timestep_embedder.linear_1", "adaln_single.emb.timestep_embedder.linear_2",
    },
    "vidit_q_opensora": {
        "t_embedder.mlp.0", "t_embedder.mlp.2", "fps_embedder.mlp.0", "fps_embedder.mlp.2", "t_block.1",
        "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "final_layer.linear",
    },
}  # fmt: skip
"""What ViDiT-Q's code leaves in full precision; what it says of Open-Sora 1.0 has no embedder of the rate."""


@pytest.mark.parametrize(("name", "count"), {"vidit_q_latte": 448, "vidit_q_opensora": 392}.items())
def test_vidit_q_leaves_embedders_adaln_and_the_last_layer_alone(name: str, count: int) -> None:
    family = build("ptq", compose_plain("ptq", [f"experiment={name}"])).model
    with torch.device("meta"):
        transformer = family.build(family.transformer_config)
    selected = set(select_linears(transformer, include=family.include, exclude=family.exclude).quantized)
    left = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)} - selected
    assert len(selected) == count
    assert left == LEFT[name]


def test_the_page_has_a_row_and_a_command_for_each() -> None:
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for name in SETTINGS:
        assert any(f"`experiment={name}`" in row for row in rows), name
        assert re.search(rf"^(python train\.py|qvgen ptq) experiment={name} ", page, re.MULTILINE), name


def test_qvgens_own_setting_trains_a_tiny_cogvideox(tmp_path: Path) -> None:
    """Sizes, steps, Phi's rank and what is measured are cut; real zero points, own clips and the rest are the file's."""
    folder = make_cogvideox_folder(tmp_path / "model", "2b")
    clips = write_clips(tmp_path / "clips", fps=8)
    run_dir = tmp_path / "run"
    sizes = [key for key in tiny_keys("cogvideox", folder) if not key.startswith("model=")]
    words = [
        "experiment=qvgen_cogvideox", *sizes, f"data.path={clips}", f"data.cache={tmp_path / 'cache'}", "logger=csv",
        "phi.rank=4", "phi.ranks=[4,2,1]", "steps=6", "batch_size=2", "evaluation.samples=2", "evaluation.videos=0",
        "evaluation.quality_videos=1",
        "evaluation.start_videos=false", "evaluation.video_every_steps=null", f"run_dir={run_dir}",
    ]  # fmt: skip
    assert main(["train", *words]) == 0
    rows = read_metrics(run_dir)
    ranks = [int(float(row["phi/rank"])) for row in rows if row.get("phi/rank")]
    assert list(dict.fromkeys(ranks))[:3] == [4, 2, 1]
    assert all(isfinite(float(row["train/loss"])) for row in rows if row.get("train/loss"))
    report = json.loads((run_dir / "report.json").read_text())
    assert (report["model"], report["bits"], report["method"]) == ("cogvideox", "4", "qvgen")
    assert (report["phi_rank_final"], report["packed_codes_equal"]) == (0, True)
    layers = json.loads((run_dir / "packed" / "manifest.json").read_text())["layers"]
    assert {layer["zero_point"] for layer in layers} == {"real"}
