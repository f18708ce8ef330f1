"""The environment that a result was measured in: versions, the source's git revision, the machine.

Versions come from the installed distributions' metadata, so nothing is imported to ask for them.

Left out: anything that names a person, a host or a path.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

DISTRIBUTIONS: tuple[str, ...] = (
    "qvgen",
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "hydra-core",
    "safetensors",
    "numpy",
    "av",
)
"""Distributions whose version can change a result."""

_SOURCE = Path(__file__).resolve()


def fast_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 with this CPU's own instructions; without AVX-512 it takes 8 times float32's time."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine.

    Attributes:
        cpu: model name.
        num_cores: logical cores that this process may use.
        num_threads: threads torch uses inside one operator.
        memory_gib: physical memory; None where the system does not say.
        gpus: names of the visible GPUs.
        system: operating system and architecture.
    """

    cpu: str
    num_cores: int
    num_threads: int
    memory_gib: float | None
    gpus: tuple[str, ...]
    system: str

    def to_json_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**asdict(self), "gpus": list(self.gpus)}


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Versions, revision and machine.

    Attributes:
        versions: version by distribution, "python" included; "not installed" where there is none.
        git_sha: 40 hex digits of the commit that the running source was checked out from; None outside git.
        git_dirty: whether tracked files differ from that commit; None outside git.
        machine: the machine.
    """

    versions: Mapping[str, str]
    git_sha: str | None
    git_dirty: bool | None
    machine: Machine


def collect_environment() -> Environment:
    """Look at the running process, its source and its machine."""
    sha, dirty = git_revision(_SOURCE)
    return Environment(
        versions=collect_versions(DISTRIBUTIONS), git_sha=sha, git_dirty=dirty, machine=collect_machine()
    )


def collect_versions(distributions: Sequence[str]) -> dict[str, str]:
    """Return the version of Python and of each distribution, "not installed" where there is none."""
    versions = {"python": platform.python_version()}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_revision(source: Path) -> tuple[str | None, bool | None]:
    """Commit that a source file belongs to, and whether tracked files were changed since.

    A package installed in a virtual environment may lie inside somebody else's repository, so only a file that git
    tracks counts.

    Args:
        source: a file.

    Returns:
        (40 hex digits, dirty), or (None, None) where git is missing, there is no commit, or it does not track the file.
    """
    if _git(source.parent, "ls-files", "--error-unmatch", "--", source.name) is None:
        return None, None
    sha = _git(source.parent, "rev-parse", "HEAD")
    status = _git(source.parent, "status", "--porcelain", "--untracked-files=no")
    return (None, None) if sha is None or status is None else (sha, bool(status))


def _git(directory: Path, *arguments: str) -> str | None:
    """Return the output of one git command, None if it cannot be run or fails."""
    # git sets these inside its hooks, where they would point at another repository than the source's.
    misleading = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {name: value for name, value in os.environ.items() if name not in misleading}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def collect_machine() -> Machine:
    """Describe the machine that this process runs on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}) else None
    return Machine(
        cpu=_cpu_model(),
        num_cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        memory_gib=None if pages is None else round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        system=f"{platform.system()} {platform.machine()}",
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
