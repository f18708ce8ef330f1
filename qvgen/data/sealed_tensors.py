"""Tensors on the disk that know what they are: a safetensors file with a key and a checksum in its header.

    {"__metadata__": {"seal": "KEY SEAL"}, "latents": {"dtype": "BF16", "shape": [16, 13, 60, 90], ...}}

(one entry: the library writes several in an order that changes, and equal contents shall be equal files). KEY says what
the tensors were made from and SEAL is the SHA-256 of names, dtypes, shapes and bytes. So a file that was cut, overwritten
by another program, renamed, or whose bits a disk has changed is told from the right one.

Reading the seal alone (:func:`read_seal`) costs one small read and finds all but changed values. Reading the tensors
(:func:`read_sealed`) checks those too, in one to two and a half seconds per GB of one core (SHA-256), and copies them to
memory: of a mapped file, what another program cuts off would end the process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from qvgen.errors import UserError
from qvgen.quant.finite import check_finite
from qvgen.run_directory import atomic_write


class DamagedFileError(UserError):
    """A file is not what it was when it was written."""


def seal_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes; the order of the mapping does not matter.

    Example:
        >>> one, other = torch.zeros(2, 3), torch.zeros(3, 2)
        >>> seal_of({"x": one}) == seal_of({"x": one.clone()}), seal_of({"x": one}) == seal_of({"x": other})
        (True, False)
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_sealed(path: Path, tensors: Mapping[str, Tensor], *, key: str) -> str:
    """Write tensors atomically, with their key and seal; the folder is made.

    Returns:
        The seal.

    Raises:
        ValueError: A value is not finite.
        OSError: The file can't be written.
    """
    check_finite(tensors.items(), source=f"what would be written to {path}")
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seal = seal_of(kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temporary: save_file(kept, temporary, metadata={"seal": f"{key} {seal}"}))
    return seal


def read_seal(path: Path, *, key: str) -> str:
    """A file's seal, from its header; the values are not read.

    Raises:
        FileNotFoundError: It is not there.
        DamagedFileError: It is no whole file of tensors, has no seal, or another key.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from error
    its_key, _, seal = metadata.get("seal", "").partition(" ")
    if not seal:
        raise DamagedFileError(f"{path} was not written by qvgen: it has no checksum")
    if its_key != key:
        raise DamagedFileError(f"{path} holds what belongs to another file ({its_key[:16]}...): it was renamed")
    return seal


def read_sealed(path: Path, *, key: str, seal: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, checked against its seal.

    Args:
        path: The file.
        key: Content key of what the tensors were made from.
        seal: The seal that is known of them; None: only the file's own.

    Raises:
        FileNotFoundError: It is not there.
        DamagedFileError: See :func:`read_seal`; or the values are not those that were written.
    """
    written = read_seal(path, key=key)
    if seal is not None and written != seal:
        raise DamagedFileError(f"{path} has the checksum {written[:16]}..., and {seal[:16]}... is known of it")
    try:
        tensors = load(path.read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from error
    if (now := seal_of(tensors)) != written:
        raise DamagedFileError(f"{path} is damaged: its values have the checksum {now[:16]}..., not {written[:16]}...")
    return tensors
