"""Builds the CPU kernels (csrc/cpu) with the system's C++ compiler, once per source, flags and machine type.

    library = library_path()            the built library, made now if it is not there yet
    python cpu_build.py DIRECTORY       the same at install time (QVGEN_BUILD_KERNELS=1 pip install ... does it)

The library is looked for beside this file first (``prebuilt/``, made at install time) and then in the cache:
$QVGEN_KERNEL_CACHE, else $XDG_CACHE_HOME/qvgen/kernels, else ~/.cache/qvgen/kernels. Its name holds a hash of all sources,
flags and the machine's type, so a changed source is never run stale and a folder can be shared. Processes that build
at the same time each write files of their own and move them into place in one step each.

A library is code that is run, so what lies in a cache is not believed by its name:

    NAME.so          loaded only if this user or root owns it and nobody else may write it
    NAME.so.sha256   the checksum that it was built with; one that differs, or none, and the library is built anew

A library of somebody else's in a shared folder is left alone; this user's goes to ``user-UID`` below it.

Imports nothing but the standard library: it also runs in a build environment that has no torch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["BuildError", "build", "checksum_path", "library_path"]

_log = logging.getLogger(__name__)

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
    if (PREBUILT / name).is_file():  # whose owner is that of this module beside it
        if (reason := damage(PREBUILT / name)) is None:
            return PREBUILT / name
        _log.warning("%s is not used: %s; install qvgen again", PREBUILT / name, reason)
    path, is_whole = cached(name)
    return path if is_whole else build(path.parent)


def cached(name: str) -> tuple[Path, bool]:
    """The place of a built file in the cache, and whether it lies there, whole and from nobody else; warns if not so.

    Args:
        name: The file's, which holds the hash of what it was built from.
    """
    folder = cache_folder()
    if (folder / name).exists() and (reason := distrust(folder / name)) is not None:
        own = folder / f"user-{os.getuid()}"
        _log.warning("%s is not used: %s; using %s in its place", folder / name, reason, own)
        folder = own
    path = folder / name
    if not path.exists():
        return path, False
    reason = distrust(path) or damage(path)
    if reason is not None:
        _log.warning("%s is built anew: %s", path, reason)
    return path, reason is None


def distrust(path: Path) -> str | None:
    """Why a library in a cache may be somebody else's code; None where this user or root alone could have written it.

    Args:
        path: The library; a link counts with what it points to.
    """
    for state in (path.lstat(), path.stat()):
        if state.st_uid not in (0, os.getuid()):
            return f"user {state.st_uid} owns it, and this is user {os.getuid()}"
        if stat.S_ISREG(state.st_mode) and state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others than its owner may write it (mode {stat.S_IMODE(state.st_mode):o})"
    return None


def damage(path: Path) -> str | None:
    """Why a library is not the one that was built; None where it is, by the checksum beside it."""
    try:
        wanted = checksum_path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return f"{checksum_path(path).name} is missing or can't be read"
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    return None if checksum == wanted else f"its checksum is {checksum[:16]}..., and it was built with {wanted[:16]}..."


def checksum_path(path: Path) -> Path:
    """The file that holds a library's checksum."""
    return path.with_name(f"{path.name}.sha256")


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
        checksum = checksum_path(made)
        checksum.write_text(hashlib.sha256(made.read_bytes()).hexdigest() + "\n", encoding="ascii")
        for file, mode in ((made, 0o755), (checksum, 0o644)):
            file.chmod(mode)  # whatever the umask: nobody else may write what others' processes run
        # Each step is atomic. A process that meets the new library with the old checksum builds it once more.
        os.replace(made, target)
        os.replace(checksum, checksum_path(target))
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
