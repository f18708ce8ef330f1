"""Files of an export, each written whole or not at all, and their checksums."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from qvgen.deploy.exporters.base import ExportFile
from qvgen.deploy.manifest import file_sha256
from qvgen.run_directory import atomic_write


def write_files(folder: Path, files: Iterable[ExportFile]) -> dict[str, dict[str, str | int]]:
    """Write them one after another; a file that is there already is replaced.

    Returns:
        Path below the folder -> {"sha256", "bytes"} of what lies on the disk.
    """
    written: dict[str, dict[str, str | int]] = {}
    for file in files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file.content, bytes):
            atomic_write(path, file.content)
        else:
            # Each tensor on its own memory: a format may hold two names of one tensor, which safetensors refuses.
            tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in file.content.items()}
            atomic_write(path, partial(_save, tensors, dict(file.metadata or {})))
        written[file.path] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    return written


def _save(tensors: dict[str, object], metadata: dict[str, str], path: Path) -> None:
    save_file(tensors, path, metadata=metadata)  # type: ignore[arg-type]
