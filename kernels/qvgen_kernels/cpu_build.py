"""Builds the CPU kernels (csrc/cpu) with the system's C++ compiler, once per source, flags and machine type.

    library = library_path()            the built library, made now if it is not there yet
    python cpu_build.py DIRECTORY       the same at install time (QVGEN_BUILD_KERNELS=1 pip install ... does it)

The library is looked for beside this file first (``prebuilt/``, made at install time) and then in the cache:
$QVGEN_KERNEL_CACHE, else $XDG_CACHE_HOME/qvgen/kernels, else ~/.cache/qvgen/kernels. Its name holds a hash of all sources,
flags and the machine's type, so a changed source is never run stale and a folder can be shared. Processes that build
at the same time each write a file of their own and move it into place in one step.

Imports nothing but the standard library: it also runs in a build environment that has no torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["BuildError", "build", "library_path"]

SOURCE = Path(__file__).parent / "csrc" / "cpu"
PREBUILT = Path(__file__).parent / "prebuilt"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
    # Every float32 operation of the contract is one rounding: no a * b + c in one.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
INSTALL_HINT = (
    "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install; "
    "conda: conda install gxx) or name it in CXX"
)


class BuildError(RuntimeError):
    """No compiler, or it failed; the text says what to do."""


def library_path() -> Path:
    """Path of the library, built now if neither the install nor the cache has it.

    Raises:
        BuildError: no compiler was found, it failed, or no folder can be written.
    """
    name = library_name()
    for folder in (PREBUILT, cache_folder()):
        if (folder / name).is_file():
            return folder / name
    return build(cache_folder())


def library_name() -> str:
    """File name with the hash of what it was built from and for."""
    digest = hashlib.sha256()
    machine = (platform.system(), platform.machine(), *platform.libc_ver())
    for part in (*FLAGS, *machine):
        digest.update(part.encode() + b"\0")
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"qvgen_cpu-{digest.hexdigest()[:24]}.so"


def cache_folder() -> Path:
    """Where built libraries are kept."""
    if folder := os.environ.get("QVGEN_KERNEL_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qvgen" / "kernels"


def find_compiler() -> list[str]:
    """The command of the first C++ compiler there is: $CXX, c++, g++, clang++.

    Raises:
        BuildError: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"CXX={os.environ['CXX']!r} is not there; name a C++ compiler or unset it")
        return chosen
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError(f"no C++ compiler (c++, g++ or clang++) was found; {INSTALL_HINT}")


def build(folder: Path, *, extra_flags: Sequence[str] = (), name: str | None = None) -> Path:
    """Compile all sources and link them into ``folder``.

    Args:
        folder: Made if it is missing.
        extra_flags: Added to the flags (a sanitizer, for tests); give a name of its own then.
        name: File name; None: :func:`library_name`.

    Returns:
        The library's path.

    Raises:
        BuildError: no compiler was found, it failed, or the folder can't be written.
    """
    compiler = find_compiler()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    except OSError as error:
        raise BuildError(f"{folder} can't be written ({error}); set QVGEN_KERNEL_CACHE to a folder of yours") from error
    try:
        sources = sorted(SOURCE.glob("*.cpp"))
        objects = [work / f"{path.stem}.o" for path in sources]
        flags = [*(flag for flag in FLAGS if flag != "-shared"), *extra_flags]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            commands = [
                [*compiler, *flags, "-c", str(path), "-o", str(made)]
                for path, made in zip(sources, objects, strict=True)
            ]
            list(pool.map(_run, commands))
        made = work / "library.so"
        _run([*compiler, *FLAGS, *extra_flags, *map(str, objects), "-o", str(made)])
        target = folder / (name or library_name())
        os.replace(made, target)  # atomic: another process sees the old file, none, or the whole new one
        return target
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise BuildError(f"{shlex.join(command)} failed with {done.returncode}:\n{tail}")


if __name__ == "__main__":
    sys.stdout.write(f"{build(Path(sys.argv[1]))}\n")
