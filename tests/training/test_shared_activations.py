"""Runs whose layers of one input share activation quantizers, and runs whose layers do not.

That one process, DDP, FSDP2, resumed and folded runs have the same bits is tested where it is for all runs: sharing is the
default.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from qvgen.cli import DONE, main
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.merged_linear import MergedPackedLinear
from qvgen.evaluation.held_out import HeldOut
from qvgen.layers.shared_input import activation_sharing
from qvgen.layers.swap import quantized_layers
from qvgen.methods.parameter_group import parameter_groups
from qvgen.training.design.layer_setup import input_sets
from qvgen.training.optimizer_module import total_norm
from qvgen.training.session import load_trained
from qvgen.training.start.file import load_start
from tests.models.hub_folders import make_cogvideox_folder
from tests.parts import planned_student, prepared, training_module
from tests.runs import (
    UNSEEN,
    load_state,
    method_schedule,
    one_block,
    packed_bytes,
    read_metrics,
    shallow,
    train,
    train_config,
)
from tests.training.test_module import make_batch
from tests.verbs.test_hub_models import train_keys, write_clips

FEWEST = ("steps=2", "evaluation.samples=1", "model.num_frames=5", "model.sampling_frames=5")
APART = "method.share_activations=false"
SETS = 2
"""q, k, v and k, v of the text, in one block."""


def merged_layers(model: nn.Module) -> int:
    return sum(len(module.parts) for module in model.modules() if isinstance(module, MergedPackedLinear))


def shared_of(run_dir: Path) -> int:
    return len(json.loads((run_dir / "layers.json").read_text())["shared_activations"])


@pytest.fixture(scope="module")
def apart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the fixture ``block_run``, but for the option."""
    run_dir = tmp_path_factory.mktemp("apart") / "run"
    assert train(run_dir, *one_block(), APART) == DONE
    return run_dir


def test_a_trained_model_quantizes_a_shared_input_once(block_run: Path) -> None:
    assert shared_of(block_run) == SETS
    packed = load_packed(block_run / "packed")
    assert merged_layers(packed) == 3 + 2
    config = train_config(*one_block())
    fake, _ = prepared(config)
    load_trained(fake, block_run, schedule=method_schedule(config))
    assert len(activation_sharing(quantized_layers(fake))) == SETS
    held_out = HeldOut(config.model, config.data.open(config.model, split="held_out"), num_samples=4, batch_size=2)
    outputs = [list(held_out.predictions(model)) for model in (fake, packed)]
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    tables = packed.get_submodule("blocks.0.attn2.to_v").clip_high
    assert len(set(tables.tolist())) > 1  # it was trained


def test_without_it_every_layer_learns_its_own(block_run: Path, apart_run: Path) -> None:
    assert shared_of(apart_run) == 0
    packed = load_packed(apart_run / "packed")
    assert merged_layers(packed) == 0
    q, k = (packed.get_submodule(f"blocks.0.attn1.to_{name}").clip_high for name in "qk")
    assert not torch.equal(q, k)
    rows = [read_metrics(run_dir) for run_dir in (block_run, apart_run)]
    assert rows[0][0]["train/loss"] == rows[1][0]["train/loss"]  # they start from the same bits
    assert rows[0][-1]["train/loss"] != rows[1][-1]["train/loss"]
    starts = [(run_dir / "start.safetensors").read_bytes() for run_dir in (block_run, apart_run)]
    assert starts[0] == starts[1]
    assert packed_bytes(block_run) != packed_bytes(apart_run)


def test_checkpoints_name_every_layer(block_run: Path, apart_run: Path) -> None:
    shared, apart = (load_state(run_dir / "checkpoints" / "step-00000012.ckpt") for run_dir in (block_run, apart_run))
    assert list(shared) == list(apart)
    values = [shared[f"student.blocks.0.attn1.to_{name}.activation_quantizer.clip_low"] for name in "qkv"]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


@pytest.mark.parametrize(("keys", "tensors"), [((), 2 * (16 - 3)), ((APART,), 2 * 16)])
def test_the_optimizer_and_the_plan_have_each_parameter_once(keys: tuple[str, ...], tensors: int) -> None:
    config = train_config(*shallow(1), *keys)
    for student, _ in (prepared(config), planned_student(config)):
        groups = {group["name"]: group["params"] for group in parameter_groups(student, config.optim)}
        assert len(groups["clips"]) == tensors
        assert sum(p.numel() for group in groups.values() for p in group) == sum(
            p.numel() for p in student.parameters()
        )


def test_the_norm_counts_a_shared_gradient_once() -> None:
    """|sum of the layers' gradients|^2 stands in place of the sum of |gradient|^2; all other gradients are the same bits."""
    gradients = []
    for keys in ((), (APART,)):
        config = train_config(*shallow(1), *keys)
        module = training_module(
            config,
            student=prepared(config)[0].train(),
            teacher=config.model.load_teacher(),
            encode=config.model.encode,
        )
        module.loss(module.draw(make_batch(0, 1, 2), step=0)).backward()
        gradients.append({name: p.grad for name, p in module.student.named_parameters() if p.grad is not None})
    shared, apart = gradients
    squares = {name: gradient.double().square().sum() for name, gradient in apart.items()}
    config = train_config(*shallow(1))
    for names in input_sets(prepared(config)[0], config.model):
        for table in ("clip_low", "clip_high"):
            parts = [f"{name}.activation_quantizer.{table}" for name in names]
            assert [name in shared for name in parts] == [True] + [False] * (len(parts) - 1)
            total = torch.stack([apart[name].double() for name in parts]).sum(0)
            torch.testing.assert_close(shared[parts[0]].double(), total, rtol=1e-5, atol=1e-9)
            for name in parts[1:]:
                squares.pop(name)
            squares[parts[0]] = total.square().sum()
    clips = [name for name in shared if ".activation_quantizer." in name]
    assert all(torch.equal(shared[name], apart[name]) for name in shared if name not in clips)
    wanted = float(torch.stack(list(squares.values())).sum().sqrt())
    assert float(total_norm(list(shared.values()))) == pytest.approx(wanted, rel=1e-6)


def test_the_start_is_read_as_it_was_written(block_run: Path, apart_run: Path) -> None:
    """Whatever a student was prepared as: who shares is in the run's folder."""
    for keys in ((), (APART,)):
        student, _ = prepared(train_config(*one_block(), *keys))
        for run_dir, sets in ((block_run, SETS), (apart_run, 0)):
            load_start(student, run_dir)
            assert len(activation_sharing(quantized_layers(student))) == sets


def test_smoothing_that_goes_into_a_norm_leaves_layers_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """CogVideoX's q, k and v have one smoothing vector, and it is in norm1; the output's stays with the output."""
    caplog.set_level("INFO")
    folder = make_cogvideox_folder(tmp_path / "model", "2b")
    clips = write_clips(tmp_path / "clips", fps=8)
    calibration = ("calibration.videos=1", "calibration.steps=2", f"calibration.cache={tmp_path / 'calibration'}")
    keys = [
        *train_keys("cogvideox", folder, clips, tmp_path),
        "init=vidit_q",
        *calibration,
        "evaluation.videos=0",
        *FEWEST,
    ]
    assert main(["train", *keys]) == DONE
    assert any(message.startswith("2 of 2 sets of layers") for message in caplog.messages)
    assert shared_of(tmp_path / "run") == 2
    packed = load_packed(tmp_path / "run" / "packed")
    assert merged_layers(packed) == 2 * 3
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["packed_codes_equal"] is True
    assert report["packed_vs_fake_max_abs"] == 0.0


def test_smoothing_that_stays_a_multiplication_keeps_layers_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In Wan each of q, k and v has a vector of its own."""
    caplog.set_level("INFO")
    calibration = ("calibration.videos=1", "calibration.steps=2", f"calibration.cache={tmp_path / 'calibration'}")
    keys = (*shallow(1), "init=smoothquant", *calibration, "steps=2", "phi.ranks=[2]", "phi.tail_share=0", *UNSEEN)
    assert train(tmp_path / "run", *keys) == DONE
    (line,) = [message for message in caplog.messages if "sets of layers" in message]
    assert line.startswith("0 of 2 sets")
    assert line.endswith("the others differ in grid, smoothing or ranges")
    assert merged_layers(load_packed(tmp_path / "run" / "packed")) == 0
