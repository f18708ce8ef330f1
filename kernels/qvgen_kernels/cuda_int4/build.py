"""Builds the CUDA kernels with nvcc, once per source and flags, into the cache that the CPU library lies in too.

The result is a fatbin: machine code of all cards that the backend knows, loaded by the driver. It needs no header of torch or
Python, so one build serves every version of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from qvgen_kernels.cpu_build import BuildError, cached, checksum_path

__all__ = ["ARCHITECTURES", "FLAGS", "SOURCE", "compile_command", "fatbin_path", "find_nvcc"]

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHITECTURES = (75, 80, 86, 89)
"""Cards with 4-bit integer tensor cores: Turing, Ampere, Ada. Code of 80 runs on 87 too."""

FLAGS = ("-std=c++17", "-O3", "-fmad=false")
"""Without contraction: every float32 operation of the contract is one rounding. Division is IEEE's by default."""

_PLACES = ("CUDA_HOME", "CUDA_PATH")


def find_nvcc() -> str:
    """The compiler: $NVCC, nvcc on the path, or of the toolkit that CUDA_HOME, CUDA_PATH or /usr/local/cuda holds.

    Raises:
        BuildError: there is none.
    """
    if (chosen := os.environ.get("NVCC")) is not None:
        if shutil.which(chosen) is None:
            raise BuildError(f"NVCC={chosen!r} is not there; name CUDA's compiler or unset it")
        return chosen
    folders = [os.environ[name] for name in _PLACES if os.environ.get(name)] + ["/usr/local/cuda"]
    for found in (shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{folder}/bin") for folder in folders)):
        if found is not None:
            return found
    raise BuildError("CUDA's compiler nvcc was not found; install the CUDA toolkit, or name the compiler in NVCC")


def compile_command(nvcc: str, target: Path) -> list[str]:
    """The command that makes the fatbin."""
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    return [nvcc, *FLAGS, "--threads=0", "-fatbin", *codes, str(SOURCE / "int4.cu"), "-o", str(target)]


def fatbin_name() -> str:
    """File name with the hash of what it is built from."""
    digest = hashlib.sha256()
    for part in (*FLAGS, *map(str, ARCHITECTURES)):
        digest.update(part.encode() + b"\0")
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"qvgen_int4-{digest.hexdigest()[:24]}.fatbin"


def fatbin_path() -> Path:
    """Path of the fatbin, built now if the cache does not have it; what others could have written there is not taken.

    Raises:
        BuildError: no compiler was found, it failed, or the folder can't be written.
    """
    path, is_whole = cached(fatbin_name())
    return path if is_whole else _build(path)


def _build(path: Path) -> Path:
    nvcc = find_nvcc()
    _log.info("building the 4-bit kernels of CUDA with %s, once: about a minute", nvcc)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="build-", dir=path.parent))
    except OSError as error:
        raise BuildError(
            f"{path.parent} can't be written ({error}); set QVGEN_KERNEL_CACHE to a folder of yours"
        ) from error
    try:
        made = work / path.name
        command = compile_command(nvcc, made)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
            raise BuildError(f"{shlex.join(command)} failed with {done.returncode}:\n{tail}")
        checksum = checksum_path(made)
        checksum.write_text(hashlib.sha256(made.read_bytes()).hexdigest() + "\n", encoding="ascii")
        for file in (made, checksum):
            file.chmod(0o644)
        os.replace(made, path)
        os.replace(checksum, checksum_path(path))
        return path
    finally:
        shutil.rmtree(work, ignore_errors=True)
