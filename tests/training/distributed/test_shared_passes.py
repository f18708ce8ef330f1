"""A calibration that the processes of torchrun share out where the model is shared out, too: the start of one process.

What each process does is held in tests/training/calibration/test_shared_calibration.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qvgen.layers.swap import phi_suspended
from qvgen.training.distributed.launched_store import is_shared
from qvgen.training.start.file import LAYERS_FILE, START_FILE, save_start
from qvgen.training.start.student import prepare_student, set_up_student_
from qvgen.verbs._parts import ptq_method, sampled_teacher, student_design
from tests.runs import SHORT, UNSEEN, shallow, train_config
from tests.training.distributed.launchers import codes, said, torchrun

KEYS = (
    *SHORT, *UNSEEN, "steps=1", "phi.ranks=[2]", "phi.tail_share=0", "evaluation.samples=1", "evaluation.every_steps=null",
    "init=gptq", "bits=3", "calibration.videos=1", "calibration.steps=2", "calibration.memory_gib=0.001", *shallow(1),
)  # fmt: skip
"""A calibration of several passes."""


def start_of_one(folder: Path) -> None:
    """Write the files of the start that a process makes alone."""
    config = train_config(*KEYS, f"calibration.cache={folder / 'cache'}")
    student, _ = prepare_student(config.model, student_design(config), seed=None)
    encode = config.data.open(config.model, split="held_out").encode
    teacher = sampled_teacher(config, config.model.load_teacher(), encode=encode)
    with phi_suspended(student):
        set_up_student_(student, design=student_design(config), ptq=ptq_method(config), teacher=teacher)
    save_start(student, folder)


def test_processes_of_torchrun_share_the_passes_of_a_sharded_run(tmp_path: Path) -> None:
    start_of_one(tmp_path)
    run_dir = tmp_path / "run"
    own = (f"run_dir={run_dir}", f"calibration.cache={tmp_path / 'shared'}", "strategy=fsdp")
    assert codes(torchrun(tmp_path, *KEYS, *own)) == [0], said(tmp_path)
    for name in (START_FILE, LAYERS_FILE):
        assert (run_dir / name).read_bytes() == (tmp_path / name).read_bytes()
    log = (run_dir / "logs" / "rank1.log").read_text()
    assert "the calibration is there" in log
    sampled = re.findall(r"calibration: 1 videos of 2 steps for (\d+) of (\d+) layers", said(tmp_path) + log)
    assert len(sampled) > 1
    assert {int(count) for _, count in sampled} == {sum(int(part) for part, _ in sampled)}  # each layer once


@pytest.mark.parametrize(("content", "expected"), [("this", True), ("another", False), (None, False)])
def test_a_folder_is_shared_where_rank_0s_mark_is_seen_in_it(
    tmp_path: Path, content: str | None, expected: bool
) -> None:
    like, folder = tmp_path / "launch.txt", tmp_path / "cache"
    like.write_text("this")
    if content is not None:
        folder.mkdir()
        (folder / like.name).write_text(content)
    assert is_shared(folder, like=like, patience_s=0.0) is expected
