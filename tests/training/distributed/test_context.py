"""Processes that share the tokens of each sample out, against one process with all of them.

context_program.py trains a model of Wan's class: two groups of two processes (fsdp, codes gathered) in float32, and two
processes with one sample (ddp) under autocast. They compute every token as one process does. What differs is the order in
which gradients of tokens are added: in float32 at most 2e-6 of a loss, 2e-5 of a norm and 5e-6 of a weight are allowed for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from qvgen.errors import UserError
from qvgen.models.context_parallel import check_context
from qvgen.training.distributed.context import check_run_context
from qvgen.verbs._parts import training_run
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder
from tests.parts import planned
from tests.runs import load_state, read_metrics, train_config
from tests.verbs.test_hub_models import tiny_keys

STEPS = 2
TWO = ("devices=2", "strategy=ddp", "strategy.context_parallel=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process and by several."""
    folder = tmp_path_factory.mktemp("context")
    command = [sys.executable, str(Path(__file__).with_name("context_program.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_losses_and_norms_are_those_of_one_process(runs: Path) -> None:
    one, shared = (read_metrics(runs / name) for name in ("one", "fsdp"))
    assert len(shared) == STEPS
    for row, wanted in zip(shared, one, strict=True):
        assert row["phi/rank"] == wanted["phi/rank"]
        assert float(row["train/loss"]) == pytest.approx(float(wanted["train/loss"]), rel=2e-6)
        for name in ("train/gradient_norm", "train/gradient_norm_weights", "train/gradient_norm_phi"):
            assert float(row[name]) == pytest.approx(float(wanted[name]), rel=2e-5), name


def test_weights_are_those_of_one_process(runs: Path) -> None:
    """But where a gradient is nothing but the last bits of a sum: Adam takes a whole step in the direction of its sign."""
    rates = [float(row["train/learning_rate"]) for row in read_metrics(runs / "one")]
    for step in range(1, STEPS + 1):
        one, shared = (load_state(runs / name / "checkpoints" / f"step-{step:08d}.ckpt") for name in ("one", "fsdp"))
        assert one.keys() == shared.keys()
        for name, value in one.items():
            off = (shared[name].double() - value.double()).abs()
            assert float((off > 5e-6).double().mean()) < (0.01 if step > 1 else 1e-9), f"{name}, step {step}"
            assert float(off.max()) <= 2 * sum(rates[:step]), f"{name}, step {step}"


def test_errors_and_videos_on_the_way_are_those_of_one_process(runs: Path) -> None:
    """Videos lie as mp4 files, whose pixels are compared behind a lossy coder: equal files, or a level of 255 on average."""
    one, shared = (
        [float(row["val/relative_error"]) for row in read_metrics(runs / name) if row["val/relative_error"]]
        for name in ("one", "fsdp")
    )
    assert len(one) == len(shared) == 1
    assert shared == pytest.approx(one, rel=1e-4)
    videos = [sorted((runs / name / "validation").rglob("*-student.mp4")) for name in ("one", "fsdp")]
    assert len(videos[0]) == len(videos[1]) == 2  # before training, and behind it
    for mine, wanted in zip(*videos, strict=True):
        assert mine.name == wanted.name
        found, expected = (torch.stack(read_frames(path)) for path in (mine, wanted))
        assert float((found - expected).abs().mean()) < 1


def test_an_image_to_video_model_computes_what_it_does_in_one_process(runs: Path) -> None:
    """In float32, whose sums of tokens are in another order."""
    for rank in range(2):
        prediction, gradients = json.loads((runs / f"image{rank}.json").read_text())
        assert prediction < 1e-5
        assert gradients < 1e-5


def read_frames(path: Path) -> list[torch.Tensor]:
    with av.open(str(path)) as video:
        return [torch.from_numpy(frame.to_ndarray(format="rgb24")).float() for frame in video.decode(video=0)]


def test_autocast_trains_what_it_does_in_one_process(runs: Path) -> None:
    """At its first step: a bfloat16 gradient that is added in parts moves codes of the steps that follow."""
    one, shared = (read_metrics(runs / f"{name}-half") for name in ("one", "ddp"))
    assert len(shared) == STEPS
    assert float(shared[0]["train/loss"]) == pytest.approx(float(one[0]["train/loss"]), rel=1e-3)
    assert float(shared[0]["train/gradient_norm"]) == pytest.approx(float(one[0]["train/gradient_norm"]), rel=2e-2)


def test_models_and_sizes_that_cannot_are_refused(tmp_path: Path) -> None:
    cogvideox = tiny_keys("cogvideox", make_cogvideox_folder(tmp_path / "cogvideox", "2b"))
    with pytest.raises(
        UserError,
        match=r"context_parallel=2 and model=cogvideox: a CogVideoXTransformer3DModel can't .* WanTransformer3DModel \(",
    ):
        check_run_context(training_run(train_config(*cogvideox, f"data.path={tmp_path}", *TWO)), samples=False)
    keys = [*tiny_keys("wan", make_wan_folder(tmp_path / "wan")), f"data.path={tmp_path}", *TWO]
    check_run_context(training_run(train_config(*keys)), samples=True)
    odd = [*keys, "model.num_frames=5", "model.sampling_frames=1", "model.height=16", "model.width=16"]
    check_run_context(training_run(train_config(*odd)), samples=False)
    with pytest.raises(
        UserError, match=r"are 1 tokens, .* another model\.sampling_frames than 1, or evaluation\.video_e"
    ):
        check_run_context(training_run(train_config(*odd)), samples=True)
    by_token = [*tiny_keys("wan2.2-ti2v", make_wan_folder(tmp_path / "ti2v", "ti2v")), f"data.path={tmp_path}", *TWO]
    with pytest.raises(UserError, match=r"model=wan2\.2-ti2v is sampled with a timestep for each token"):
        check_run_context(training_run(train_config(*by_token)), samples=True)
    by_token = [*tiny_keys("wan2.2-i2v-5b", tmp_path / "ti2v"), f"data.path={tmp_path}", *TWO]
    with pytest.raises(
        UserError, match=r"model=wan2\.2-i2v-5b is told a timestep for each token, .*context_parallel=1$"
    ):
        check_run_context(training_run(train_config(*by_token)), samples=False)
    small = ["model.num_frames=1", "model.height=16", "model.width=16"]
    with pytest.raises(UserError, match=r"latents of 1 x 2 x 2 are 1 tokens, which 2 does not divide"):
        check_run_context(training_run(train_config(*keys, *small)), samples=False)
    with pytest.raises(UserError, match=r"context_parallel=2 and loss\.feature_weight=0\.5: a process has a part"):
        check_run_context(training_run(train_config(*keys, "loss.feature_weight=0.5")), samples=False)
    numbers = {"num_attention_heads": 40, "patch_size": (1, 2, 2)}
    with pytest.raises(
        UserError, match=r"40 attention heads can't be divided by 3; write strategy\.context_parallel=2"
    ):
        check_context("WanTransformer3DModel", numbers=numbers, shapes=[], processes=3, name="wan-14b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["devices=3", "batch_size=3", "strategy.context_parallel=2"],
            r"=2 does not divide the 3 processes .* devices=2",
        ),
        (["strategy.context_parallel=2"], r"context_parallel=2 does not divide the 1 processes of devices=1"),
        (["devices=2", "strategy.context_parallel=0"], r"strategy\.context_parallel=0 must be greater than 0"),
        (
            ["devices=2", "strategy.context_parallel=2", "strategy.compile=true"],
            r"context_parallel=2 and strategy\.compile",
        ),
        (
            ["devices=4", "strategy.context_parallel=2", "batch_size=3"],
            r"by devices=4 / context_parallel=2 x accumulate",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        train_config(*words)


def test_the_plan_shares_activations_and_samples(tmp_path: Path) -> None:
    keys = [*tiny_keys("wan", make_wan_folder(tmp_path / "wan")), f"data.path={tmp_path}", "batch_size=4"]
    one, two = (planned(train_config(*keys, *further, "accumulate=4")) for further in ((), TWO))
    assert (two.schedule.micro_batches, two.schedule.micro_batch) == (
        one.schedule.micro_batches,
        one.schedule.micro_batch,
    )
    kept, shared = (
        [part.nbytes for part in plan.memory if part.name.startswith("activations: kept")] for plan in (one, two)
    )
    assert shared == [-(-nbytes // 2) for nbytes in kept]
