"""Fixtures of all tests."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before the hub's client is imported: no test finds what was downloaded to this machine.
os.environ["HF_HUB_CACHE"] = str(Path(tempfile.gettempdir()) / "qvgen-tests-without-hub-cache")
# Plans are found out anew, and nothing is kept in the user's folder; tests of the records choose folders of their own.
os.environ["QVGEN_PLANS"] = "off"

from qvgen.config.processes import launched_world
from tests.warm_python import WarmPopen, fork_template

if "PYTEST_XDIST_WORKER" in os.environ:
    fork_template()  # before anything has run here

subprocess.Popen = WarmPopen  # a process of its own need not import all libraries again

settings.register_profile("any machine", deadline=None)  # no test may fail because the machine is busy
settings.load_profile("any machine")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of all processes that run tests makes, and the others find.

    Args:
        factory: Of the session; its processes have neighbouring folders.
        name: Of the folder.
        make: Fills the folder, which is not there before. Where it fails, the next process tries again.
    """
    own = factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run, W3A3 with Phi and two micro-batches per step; read it, or change a copy."""
    from tests import runs  # not above: the process that only hands out the tests has no use for torch

    def make(run_dir: Path) -> None:
        assert runs.train(run_dir, "accumulate=2", "checkpoint.every_steps=3", "checkpoint.keep=9") == 0

    return made_once(tmp_path_factory, "short-run", make)


@pytest.fixture(scope="session")
def block_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of the first block alone, for what is started, stopped and continued; read it, or copy it."""
    from tests import runs

    def make(run_dir: Path) -> None:
        assert runs.train(run_dir, *runs.one_block()) == 0

    return made_once(tmp_path_factory, "block-run", make)


@pytest.fixture(scope="session")
def packed_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed folder of the first block of the small model, for what is tried on many damaged copies; copy it."""
    from qvgen.training.start.student import fold_student
    from qvgen.verbs._parts import named_family
    from tests import parts, runs

    def make(folder: Path) -> None:
        config = runs.train_config(*runs.shallow(1), "method=lsq")
        student, _ = parts.prepared(config)
        fold_student(student.eval(), folder, model=named_family(config), training={"steps": 2, "method": "lsq"})

    return made_once(tmp_path_factory, "packed-block", make)


LONGEST_FIRST = (
    "test_hub_models.py", "test_fsdp.py", "test_train.py", "test_ptq.py", "test_other_device.py", "test_world_changes.py",
    "test_demo.py", "test_weight_exports.py", "test_new_process.py", "test_gpu_script.py", "test_resume.py",
    "test_activation_switch.py", "test_training_plan.py", "test_cuda_int4.py", "test_live_bytes.py",
    "test_ptq_without_clips.py", "test_deletion.py", "test_context.py", "test_benchmark.py", "test_triton_code.py",
    "test_whole_runs.py", "test_stopped_verbs.py", "test_ddp.py", "test_shared_activations.py",
    "test_compiled_blocks.py", "test_hsdp.py", "test_layer_types.py", "test_extending.py", "test_config.py",
    "test_paper_experiments.py", "test_sensitivity.py", "test_stored_state.py", "test_mixed_precision.py",
    "test_ptq_exports.py", "test_identity.py", "test_validation.py", "test_allocation.py", "test_streamed_adamw.py",
    "test_exports.py", "test_package.py", "test_step_traffic.py", "test_methods.py",
    "test_autoencoder.py", "test_faults.py", "test_import.py", "test_profiles.py", "test_further_models.py",
    "test_evaluate.py", "test_own_classes.py", "test_static.py", "test_kernels.py", "test_own_method.py",
    "test_launcher.py", "test_ptq_encoder.py", "test_plugin.py", "test_side_files.py",
    "test_efficientdm.py", "test_block_checkpoint.py", "test_packed_fusion.py", "test_validation_run.py", "test_wan.py",
    "test_manifest_fuzz.py", "test_gluon.py", "test_export_publish.py", "test_triton_blocks.py",
    "test_triton_fake_quantize.py", "test_fake_cuda.py", "test_command_line.py", "test_trainer_options.py",
    "test_triton.py", "test_cpu_sanitizers.py", "test_classifier.py", "test_dimensions.py", "test_host_memory.py",
    "test_gathering.py", "test_stop.py", "test_kept_phi.py", "test_packed_attention.py", "test_evaluate_killed.py",
    "test_wandb_run.py", "test_attention.py", "test_diffusers.py", "test_docs.py", "test_i3d.py", "test_damage.py",
    "test_latent_cache.py", "test_devices.py", "test_initializers.py", "test_own_callbacks.py", "test_smoothing_fold.py",
)  # fmt: skip
"""Files of a few seconds and more, which two processes begin with: one that comes last would leave the other idle."""


def pytest_configure(config: pytest.Config) -> None:
    """Settle products as a command does, before anything is computed: tests that call the library alone compare bits too."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        from qvgen.cpu_threads import settle_products  # not above: the process that hands out the tests needs no torch

        settle_products()


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later garbage collection: it is a million objects that stay.

    And collect less often than after 700 new objects: to compose a configuration alone makes many times as many.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


ONLY_WHEN_ASKED = (
    "test_launched_runs.py", "test_average.py", "test_train_gpu_script.py", "test_hsdp_resume.py",
    "test_two_hosts.py", "test_launched_again.py", "test_sweep_of_devices.py", "test_attention_recall.py",
    "test_further_runs.py", "test_ltx_runs.py", "test_image_runs.py", "test_attention_runs.py", "test_any_diffusers_runs.py",
    "test_world_changes.py", "test_adamw_8bit.py", "test_failed_rank.py",
    "test_lost_tasks.py", "test_shared_videos.py::test_two_groups_of_two_make_the_videos_of_one_process",
    "test_hub_models.py::test_two_processes_share_the_clips_and_train_the_same",
    "test_hub_models.py::test_from_mp4_files_to_videos_of_the_packed_model[wan2.2-ti2v]",
    "test_small_model.py::test_both_trainings_and_a_quantized_student",
    "test_shared_passes.py::test_processes_of_torchrun_share_the_passes_of_a_sharded_run",
    "test_export_cells.py::test_a_family_and_its_targets[mochi]",
    "test_gpu_script.py::test_the_script_measures_tiles_into_a_table_that_the_package_could_have",
    "test_kernels.py::test_without_peers_the_table_says_so",
    "test_hunyuan_video15.py::test_training_step",
    *(f"test_few_step_families.py::test_a_flow_is_sampled_trained_and_told_at_its_own_timesteps[{name}]"
      for name in ("hunyuanvideo", "ltx", "opensora", "diffusers")),
    "test_few_step_families.py::test_noise_and_v_are_sampled_as_diffusers_lcm_scheduler_does[cogvideox]",
    "test_hunyuan_image.py::test_packed_video_equals_the_fake_quantized_one",
    "test_attention_triton_gradient.py::test_what_is_not_finite_stays_in_its_head",
    "test_attention_triton_gradient.py::test_gradients_are_those_of_the_oracle"
    "[(1, 2, 66, 5, 64)-int8-torch.float16-(1, 2, 66, 5)-False]",
    "test_attention_triton_gradient.py::"
    "test_a_query_that_sees_nothing_and_blocks_without_keys_give_the_reference_s[int8_qk]",
    "test_activation_switch.py::test_processes_that_share_a_calibrated_model_train_the_same_bits[static]",
)  # fmt: skip
"""Files, and single tests of files, that QVGEN_LONG_TESTS=1 asks for: with them all together take too long on two busy cores.
Most are whole runs, of a kind that another file still goes through."""


def _is_long(item: pytest.Item) -> bool:
    """Whether a test, or its file, is among those that have to be asked for."""
    return item.path.name in ONLY_WHEN_ASKED or f"{item.path.name}::{item.name}" in ONLY_WHEN_ASKED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file, and of all others, stays. Leave out what nobody asked for."""
    if os.environ.get("QVGEN_LONG_TESTS") != "1" and not any(".py" in argument for argument in config.args):
        left_out = [item for item in items if _is_long(item)]
        items[:] = [item for item in items if not _is_long(item)]
        config.hook.pytest_deselected(items=left_out)
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def _no_world_of_a_launcher() -> Iterator[None]:
    """Forget the tasks of a launcher that a test's command took part with: the next command in this process has none."""
    yield
    launched_world.enter(None)
