"""Files of an export, each written whole or not at all, and their checksums."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qvgen.deploy.exporters.base import ExportFile
from qvgen.deploy.manifest import file_sha256
from qvgen.deploy.tensor_spool import SMALL_BYTES
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
        content = file.content
        if isinstance(content, bytes):
            atomic_write(path, content)
        elif isinstance(content, Path):
            atomic_write(path, partial(shutil.copyfile, content))
        else:
            atomic_write(path, partial(_save, _separate(content), dict(file.metadata or {})))
        written[file.path] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    return written


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, which safetensors refuses: a format may hold two names of one tensor.

    Large ones are copied only where they have to be, for they may lie in mapped memory.
    """
    seen: dict[int, list[tuple[int, int]]] = {}
    separate = {}
    for key, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        places = seen.setdefault(whole.untyped_storage().data_ptr(), [])
        begin, end = whole.data_ptr(), whole.data_ptr() + whole.nbytes
        is_shared = any(begin < other_end and other < end for other, other_end in places)
        places.append((begin, end))
        separate[key] = whole.clone() if is_shared or whole.nbytes < SMALL_BYTES else whole
    return separate


def _save(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    save_file(tensors, path, metadata=metadata)
