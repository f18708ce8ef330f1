"""A run's folder: checked against real processes, a real limit on file sizes and files that others wrote."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from qvgen.config import UserError
from qvgen.config.run_config import read_config, read_plain
from qvgen.run_directory import RunDirectory, atomic_write, write_plain

PLAIN = {"bits": 3, "phi": {"rank": 32, "ranks": None}, "eps": 1e-8, "resume": False, "run_dir": "a", "debug": False}


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_a_plain_config_comes_back_exactly(tmp_path: Path) -> None:
    plain = {"rate": 0.1 + 0.2, "tiny": 1e-300, "list": [1, 2.0, "x: #y"], "none": None, "text": "3", "flag": True}
    write_plain(tmp_path / "config.yaml", plain)
    assert read_plain(tmp_path / "config.yaml") == plain


def test_claim_writes_the_config_and_the_same_run_needs_resume(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    with RunDirectory.claim(path, PLAIN, resume=False) as run:
        assert not run.resumed
        assert run.load_stage("init") is None
        run.save_stage("init", {"seconds": 1.5})
        run.save_stage("train", {"loss": [1.0, 0.5]})
    assert read_config(path) == PLAIN
    with pytest.raises(UserError, match=r"holds this very run; continue it with resume=true"):
        RunDirectory.claim(path, PLAIN, resume=False)
    with RunDirectory.claim(path, PLAIN | {"resume": True, "run_dir": "b", "debug": True}, resume=True) as run:
        assert run.resumed
        assert run.load_stage("init") == {"seconds": 1.5}
        assert run.load_stage("train") == {"loss": [1.0, 0.5]}
    assert read_config(path) == PLAIN


@pytest.mark.parametrize("resume", [False, True])
def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path: Path, resume: bool) -> None:
    RunDirectory.claim(tmp_path, PLAIN, resume=False).release()
    other = PLAIN | {"bits": 4, "phi": {"rank": 8, "ranks": None}, "new": 1}
    with pytest.raises(UserError, match="bits is 3 there and 4 here; new is null there and 1 here; phi.rank is 32"):
        RunDirectory.claim(tmp_path, other, resume=resume)
    assert read_config(tmp_path) == PLAIN


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"not empty \(thesis.tex\) and holds no run"):
        RunDirectory.claim(tmp_path, PLAIN, resume=False)
    (tmp_path / "thesis.tex").rename(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="config.yaml holds no mapping"):
        RunDirectory.claim(tmp_path, PLAIN, resume=True)


def test_resume_of_an_empty_folder_starts_and_clears_what_a_killed_process_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".config.yaml.123.tmp").write_text("half")
    (tmp_path / ".step-00000003.ckpt.tmp").mkdir()
    (tmp_path / ".step-00000003.ckpt.tmp" / ".index.json.tmp").write_text("half")
    with RunDirectory.claim(tmp_path, PLAIN, resume=True) as run:
        assert not run.resumed
    assert "starting from the first step" in caplog.text
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "config.yaml"]


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\nfrom qvgen.run_directory import RunDirectory\n"
        f"RunDirectory.claim(Path({str(tmp_path)!r}), {PLAIN!r}, resume=True)\n"
    )
    with RunDirectory.claim(tmp_path, PLAIN, resume=False):
        assert "is in use by process" in run_python(program).stderr.splitlines()[-1]
    assert run_python(program).returncode == 0


def test_a_failing_writer_leaves_the_previous_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    atomic_write(file, b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(file, fail)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"old"]
    atomic_write(file, lambda temporary: temporary.write_bytes(b"new"))
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"new"]


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from qvgen.run_directory import atomic_write
path = Path(sys.argv[1])
tensors = {"weight": torch.zeros(100_000)}
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
writers = [bytes(400_000), lambda file: save_file(tensors, file), lambda file: torch.save(tensors, file)]
for writer in writers:
    try:
        atomic_write(path, writer)
    except OSError as error:
        print("refused", str(path) in str(error))
"""


def test_a_full_disk_leaves_the_previous_file_and_no_other(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: every writer of ours meets the same failing write."""
    file = tmp_path / "model.safetensors"
    atomic_write(file, b"old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(file)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["refused True"] * 3, done.stderr
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"old"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"start": 1}', b"[" * 100_000, b"null"])
def test_damaged_progress_is_set_aside_and_its_stages_are_done_again(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with RunDirectory.claim(tmp_path, PLAIN, resume=False) as run:
        run.save_stage("start", {"ptq": 0.5})
        assert run.load_stage("start") == {"ptq": 0.5}
        (tmp_path / "progress.json").write_bytes(content)
        assert run.load_stage("start") is None
        assert "progress.json.damaged-1" in caplog.text
        assert (tmp_path / "progress.json.damaged-1").read_bytes() == content
        run.save_stage("start", {"ptq": 0.25})
        assert run.load_stage("start") == {"ptq": 0.25}


def test_temporary_files_of_processes_of_one_number_do_not_meet(tmp_path: Path) -> None:
    """Two containers on one disk may have the same process number: here one process writes a file twice at once."""
    path = tmp_path / "value.txt"
    seen: list[Path] = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        if len(seen) == 1:
            atomic_write(path, write)  # the other container, in the middle of the first one's writing
            assert path.read_text() == "2"
        temporary.write_text(str(len(seen)) if len(set(seen)) == len(seen) and temporary == seen[-1] else "first")

    atomic_write(path, write)
    assert len(set(seen)) == 2
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.txt"]


def test_a_file_of_the_longest_name_can_be_written(tmp_path: Path) -> None:
    name = "\N{CJK UNIFIED IDEOGRAPH-732B}" * 80 + ".mp4"
    assert len(name.encode()) == 244
    atomic_write(tmp_path / name, b"whole")
    assert (tmp_path / name).read_bytes() == b"whole"
