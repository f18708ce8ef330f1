"""The file of a packed checkpoint: its header, its hash, its tensors as views of mapped pages, and the time of a load.

A thread hashes the file while the transformer is built, which needs the manifest and the names, types and shapes of the
header. No value of the file is used, and no model of a caller is touched, before the hash is known to be the manifest's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from qvgen.deploy.manifest import WEIGHTS_FILE, Manifest, file_sha256


@dataclass(frozen=True, kw_only=True)
class LoadSeconds:
    """Where the time of one load went.

    Attributes:
        hash: CPU seconds of hashing the file.
        build: CPU seconds of building the transformer without weights; the same for a file of any size.
        map: CPU seconds of mapping the file and finding its tensors; pages are read when they are used.
        prepack: CPU seconds of making the backends' copies of the weights, on all threads, finding memory included.
        other: CPU seconds of the rest: packed layers, checks of names and shapes.
        wall: Seconds from begin to end by the clock; hash and build go on at the same time.
    """

    hash: float
    build: float
    map: float
    prepack: float
    other: float
    wall: float

    @property
    def cpu(self) -> float:
        """CPU seconds of all threads."""
        return self.hash + self.build + self.map + self.prepack + self.other


class StageClock:
    """Measures one load from its construction on. Other work of the process at the same time counts as ``other``."""

    def __init__(self) -> None:
        self._began = time.process_time(), time.perf_counter()
        self._stages = dict.fromkeys(("hash", "build", "map", "prepack"), 0.0)

    @contextmanager
    def stage(self, name: str, *, all_threads: bool = False) -> Iterator[None]:
        """Count the CPU time of the calling thread, or of all, as that of a stage."""
        clock = time.process_time if all_threads else time.thread_time
        began = clock()
        try:
            yield
        finally:
            self._stages[name] += clock() - began

    def seconds(self) -> LoadSeconds:
        """The times that were measured until now."""
        cpu, wall = time.process_time() - self._began[0], time.perf_counter() - self._began[1]
        return LoadSeconds(**self._stages, other=cpu - sum(self._stages.values()), wall=wall)


@contextmanager
def file_checked(directory: Path, manifest: Manifest, clock: StageClock) -> Iterator[None]:
    """Hash the weights' file in a thread while the caller's block, which must need no value of it, runs.

    Raises:
        ValueError: The file is missing or has another sha256 than the manifest says, whatever the block raised.
    """
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the whole packed directory")

    def digest() -> str:
        with clock.stage("hash"):
            return file_sha256(path)

    def check(sha256: str) -> None:
        if sha256 != manifest.sha256:
            raise ValueError(f"{path} has sha256 {sha256}, the manifest says {manifest.sha256}; the copy is damaged")

    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(digest)
        try:
            yield
        except Exception:
            check(hashing.result())
            raise
        check(hashing.result())


@dataclass(frozen=True, kw_only=True)
class TensorForm:
    """Type and shape of a tensor, as a file's header gives them.

    Attributes:
        dtype: Name of the type in safetensors: F32, BF16, U8.
        shape: Sizes of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorForm]:
    """Names, types and shapes of a file's tensors; their values are not read.

    Raises:
        ValueError: It is missing, or no safetensors file: cut off, too long, tensors that overlap or leave gaps.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the whole packed directory")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {name: TensorForm(dtype=s.get_dtype(), shape=tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def map_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a checked file, by name; they share its mapped pages.

    Raises:
        ValueError: It is no safetensors file.
    """
    path = directory / WEIGHTS_FILE
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
