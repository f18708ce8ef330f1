"""Two processes with shares of one model: bit for bit what one process with the whole model trains.

The sums of a step are the same two numbers, added in the same order (test_ddp.py says the same of DDP), the norm of the
gradients is summed in float64, and AdamW works number by number: no tolerance is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.models.tiny_family import TinyFamily
from qvgen.training.distributed.plain_group import COLLECTIVE_TIMEOUT
from qvgen.training.distributed.sharded_strategy import ShardedStrategy
from qvgen.training.distributed.sharding import blocks_of
from qvgen.training.start.file import LAYERS_FILE, START_FILE
from qvgen.training.trainer import Processes, build_trainer
from qvgen.verbs._inputs import open_held_out
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder
from tests.parts import prepared
from tests.runs import WATCHED, copy_until, load_checkpoint, packed_bytes, read_metrics, shallow, train, train_config
from tests.training.validated import contents
from tests.verbs.test_hub_models import tiny_keys

TWO = ("devices=2", "strategy=fsdp", "strategy.gather=codes", *WATCHED)
STEPS = 5
OPTIONS = (
    f"steps={STEPS}",
    "phi.rank=2",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    "evaluation.every_steps=2",
    "evaluation.quality_videos=1",
    "evaluation.start_videos=false",
    "evaluation.videos=2",
    f"evaluation.video_every_steps={STEPS}",
    *shallow(1),
)
"""Two steps in each phase of Phi: its rank falls before the steps 2 and 4. Of several blocks are the models of CASES."""
AGAIN = "strategy.gradient_checkpointing=true"
KEPT = ("strategy.reshard_after_forward=false", "strategy.prefetch=1")
ON_HOST = ("strategy.cpu_offload=true", "strategy.gather=codes")
CASES = ("wan", "cogvideox")
"""Models that fsdp_program.py shards: tiny sizes of two diffusers classes; the runs above are of a third model."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run on one process, and sharded over two that compute their blocks again, and get codes the first time."""
    folder = tmp_path_factory.mktemp("fsdp")
    assert train(folder / "one", *OPTIONS) == DONE
    assert train(folder / "two", *OPTIONS, *TWO, AGAIN) == DONE
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What fsdp_program.py says of each case: one dict for each rank."""
    run_dir = tmp_path_factory.mktemp("program")
    wan, cogvideox = make_wan_folder(run_dir / "wan"), make_cogvideox_folder(run_dir / "cogvideox", "2b")
    clips = [f"data.path={run_dir}", "phi.rank=4", "model.num_frames=5", "model.sampling_frames=5"]
    cases = {
        # a teacher of two dtypes; the other cases share the quantizers of layers that read one input
        "wan": [*tiny_keys("wan", wan), *clips, "model.dtype=bfloat16", "method.share_activations=false", *KEPT],
        "cogvideox": [*tiny_keys("cogvideox", cogvideox), *clips, "strategy.gradient_checkpointing=true", *ON_HOST],
    }
    assert set(cases) == set(CASES)
    (run_dir / "cases.json").write_text(json.dumps(cases))
    program = Path(__file__).with_name("fsdp_program.py")
    done = subprocess.run([sys.executable, str(program), str(run_dir)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((run_dir / f"rank{rank}.json").read_text()) for rank in range(2)]
    return {case: [rank[case] for rank in ranks] for case in CASES}


def test_losses_norms_and_errors_are_those_of_one_process(both: tuple[Path, Path]) -> None:
    one, two = (read_metrics(run_dir) for run_dir in both)
    assert len(two) == STEPS
    assert two == one
    assert [row["step"] for row in two if row["val/relative_error"]] == ["1", "3", "4"]
    alone, report = (json.loads((run_dir / "report.json").read_text()) for run_dir in both)
    assert report["relative_error"]["qat"] == float(two[-1]["val/relative_error"])
    assert report["relative_error"] == alone["relative_error"]
    assert report["packed_vs_fake_max_abs"] == alone["packed_vs_fake_max_abs"]
    assert report["packed_codes_equal"]


def test_both_processes_compute_what_is_compared_at_the_end(both: tuple[Path, Path]) -> None:
    config = train_config(*OPTIONS, *TWO[:2])
    batches = open_held_out(config).num_batches
    log = (both[1] / "logs" / "rank1.log").read_text()
    assert f"outputs of the trained model: batches {', '.join(map(str, range(1, batches, 2)))} of the held-out" in log
    alone, report = (json.loads((run_dir / "report.json").read_text())["quality"] for run_dir in both)
    assert report["variants"] == alone["variants"]
    assert "by 2 processes at once" in json.loads((both[1] / "report.json").read_text())["sampling"]["conditions"]


def test_weights_and_moments_are_those_of_one_process(both: tuple[Path, Path]) -> None:
    for step in (3, 4, STEPS):  # within a phase, on a boundary, and the last
        one, two = (load_checkpoint(run_dir / "checkpoints" / f"step-{step:08d}.ckpt") for run_dir in both)
        assert one.keys() == two.keys()
        assert list(one["state_dict"]) == list(two["state_dict"])
        assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
        (mine,), (other,) = one["optimizer_states"], two["optimizer_states"]
        assert mine["param_groups"] == other["param_groups"]
        assert mine["state"].keys() == other["state"].keys()
        for index, entry in mine["state"].items():
            assert all(torch.equal(value, other["state"][index][name]) for name, value in entry.items())


def test_the_packed_file_and_the_videos_are_those_of_one_process(both: tuple[Path, Path]) -> None:
    assert packed_bytes(both[0]) == packed_bytes(both[1])
    one, two = (contents(run_dir / "validation") for run_dir in both)
    assert len([name for name in two if name.endswith("student.mp4")]) == 2 * len((0, STEPS))
    assert one == two
    log = (both[1] / "logs" / "rank1.log").read_text()
    assert f"step {STEPS}: sampling the validation prompts 0, 1" in log  # the forward pass needs both
    assert "Traceback" not in log
    assert "Warning" not in log.replace("Warning: Detected no triton", "")  # torchao says so, where diffusers finds it


def test_a_run_continues_over_a_rank_boundary_to_the_same_bytes(both: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = copy_until(both[1], tmp_path / "run", step=3)
    assert train(run_dir, *OPTIONS, *TWO, AGAIN, "resume=true") == DONE
    assert packed_bytes(run_dir) == packed_bytes(both[1])
    assert read_metrics(run_dir) == read_metrics(both[1])
    assert contents(run_dir / "validation") == contents(both[1] / "validation")


def test_a_checkpoint_of_shares_is_folded_by_one_process(both: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "packed"
    assert main(["fold", f"run_dir={both[1]}", f"out={out}"]) == DONE
    assert (out / "model.safetensors").read_bytes() == packed_bytes(both[1])


def test_a_run_without_a_whole_model_on_any_host_trains_the_same_bits(
    both: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, low = tmp_path / "run", ("strategy.low_host_memory=true",)
    with monkeypatch.context() as patched:
        patched.setattr(TinyFamily, "load_teacher", refuse)  # in rank 0
        assert train(run_dir, *OPTIONS, *TWO[:2], *low, "evaluation.video_every_steps=null") == DONE
    assert (run_dir / START_FILE).read_bytes() == (both[0] / START_FILE).read_bytes()
    assert (run_dir / LAYERS_FILE).read_bytes() == (both[0] / LAYERS_FILE).read_bytes()
    assert read_metrics(run_dir) == read_metrics(both[0])
    assert not (run_dir / "packed").exists()
    assert main(["fold", f"run_dir={run_dir}"]) == DONE
    assert packed_bytes(run_dir) == packed_bytes(both[0])


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a whole model is loaded")


def test_what_other_processes_cannot_continue_is_refused(
    both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*OPTIONS, AGAIN, "resume=true")
    assert train(both[1], *options, "devices=3", "strategy=fsdp") == BAD_INPUT
    assert "batch_size=4 cannot be divided by devices=3 x accumulate=1" in capsys.readouterr().err
    assert train(both[1], *options, "strategy=ddp", "devices=4", "seed=43") == BAD_INPUT
    assert "; seed is 42 there and 43 here; choose another" in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_every_process_holds_its_share_alone(facts: dict[str, list[dict[str, Any]]], case: str) -> None:
    ranks = facts[case]
    for name in ("student", "teacher"):
        assert sum(rank[f"{name}_numel"] for rank in ranks) == ranks[0][f"{name}_all"]
        for rank in ranks:
            assert rank[f"{name}_sharded"]
            assert rank[f"{name}_units"] == rank[f"{name}_blocks"] + 1
            assert rank[f"{name}_blocks"] > 1
            assert rank[f"{name}_bytes"] < 0.55 * rank[f"{name}_whole_bytes"]  # what was gathered is given back
            assert rank[f"{name}_same"]
            assert rank[f"{name}_buffers_same"]
    for rank in ranks:
        assert rank["meta_before"]
        assert rank["memory_given_back"]
        assert rank["shares_of_files"]
        assert not rank["teacher_in_state"]
        assert not rank["teacher_is_submodule"]


@pytest.mark.parametrize("case", CASES)
def test_shares_train_and_halve_like_a_whole_model(facts: dict[str, list[dict[str, Any]]], case: str) -> None:
    for rank in facts[case]:
        for name in ("losses", "norms", "trained", "halved", "videos", "gathered"):
            assert rank[f"{name}_same"], name
        assert rank["shares_outside"]
        assert rank["shares_after_sampling"]
        assert rank["parameters_kept"]
        assert rank["ranks"] == [1]
        assert rank["gathered_rank"] == 1
        assert rank["phi_moments"] == 0.0
        assert rank["weight_moments"]


@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_the_larger_share(facts: dict[str, list[dict[str, Any]]], case: str) -> None:
    first, second = facts[case]
    assert first["student_share_bytes"] == second["student_share_bytes"] == 4 * first["student_numel"]
    uneven = first["student_numel"] > second["student_numel"]
    assert uneven is (case == "wan")  # it has a tensor of one row, which lies on rank 0


@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_what_comes_over_the_network(facts: dict[str, list[dict[str, Any]]], case: str) -> None:
    for rank in facts[case]:  # two micro-batches; planned is one
        assert rank["received"] == {kind: 2 * nbytes for kind, nbytes in rank["planned"].items()}
        assert rank["gathered_again"] is (case != "wan")  # whose blocks are kept


def test_blocks_are_the_lists_of_the_transformer() -> None:
    student, _ = prepared(train_config())
    assert blocks_of(student) == list(student.blocks)
    assert blocks_of(torch.nn.Linear(2, 2)) == []


def test_sharded_processes_wait_for_a_slow_one() -> None:
    processes = Processes(rank=0, world_size=2, port=1, shards=2)
    strategy = build_trainer(steps=1, accumulate=1, processes=processes, callbacks=[], loggers=[]).strategy
    assert isinstance(strategy, ShardedStrategy)
    assert strategy._timeout == COLLECTIVE_TIMEOUT
    assert strategy._data_parallel_size == 2
    assert strategy._tensor_parallel_size == 1
