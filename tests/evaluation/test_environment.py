"""What is said about versions, revision and machine: checked against git itself and the running process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from qvgen.evaluation.environment import collect_environment, collect_versions, git_revision


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.com", "-c", "init.defaultBranch=main"]
    # Inside a git hook these would name the outer repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init")
    (tmp_path / "source.py").write_text("x = 1\n")
    git(tmp_path, "add", "source.py")
    git(tmp_path, "commit", "-m", "Begin")
    return tmp_path


def test_revision_of_a_tracked_file(repository: Path) -> None:
    sha = git(repository, "rev-parse", "HEAD")
    assert git_revision(repository / "source.py") == (sha, False)
    (repository / "source.py").write_text("x = 2\n")
    assert git_revision(repository / "source.py") == (sha, True)


def test_a_file_that_git_does_not_track_has_no_revision(repository: Path) -> None:
    """A package in a virtual environment may lie inside anybody's repository."""
    installed = repository / ".venv" / "package.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert git_revision(installed) == (None, None)


def test_hooks_do_not_mislead(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(repository / "elsewhere"))
    assert git_revision(repository / "source.py")[1] is False


def test_no_commit_no_repository_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source.py").write_text("")
    assert git_revision(tmp_path / "source.py") == (None, None)
    git(tmp_path, "init")
    git(tmp_path, "add", "source.py")
    assert git_revision(tmp_path / "source.py") == (None, None)
    monkeypatch.setenv("PATH", "")
    assert git_revision(tmp_path / "source.py") == (None, None)


def test_versions_are_those_of_the_running_process() -> None:
    versions = collect_versions(["torch", "no-such-distribution"])
    assert versions["python"] == platform.python_version()
    # The metadata may leave out the local part, as in 2.13.0+cpu.
    assert torch.__version__.startswith(versions["torch"].split("+")[0])
    assert versions["no-such-distribution"] == "not installed"


def test_machine_is_plain_and_sensible() -> None:
    machine = collect_environment().machine
    assert machine.cpu
    assert 1 <= machine.num_cores <= (os.cpu_count() or 1)
    assert machine.num_threads == torch.get_num_threads()
    assert json.loads(json.dumps(machine.to_json_dict()))["gpus"] == list(machine.gpus)
    assert platform.node() not in json.dumps(machine.to_json_dict()) or len(platform.node()) < 4
