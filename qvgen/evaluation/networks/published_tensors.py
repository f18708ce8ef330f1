"""The tensors of a published file of weights, read without running any code that the file names.

    .safetensors        as they are
    .pt, .pth           torch.load(weights_only=True): tensors and plain containers
    a TorchScript file  OpenAI's CLIP: its tensors alone, by an unpickler that builds nothing else

A TorchScript file is a zip archive of a pickle (data.pkl), of one file of bytes for each tensor (data/KEY) and of source
text. Here every class that the pickle names is an empty object that keeps its attributes, which gives each tensor the dotted
name that it has in the module; the text is never looked at. What asks for more than tensors is refused.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool,
}  # fmt: skip
_NAMED = 4


def read_tensors(path: Path, *, inside: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a file, by name, on the CPU.

    Args:
        path: The file.
        inside: Key of the mapping that holds them in a .pth, for example ``"state_dict"``; None: the whole content.

    Raises:
        ValueError: It is damaged, no file of tensors, or asks for more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if _is_torchscript(path):
            return _torchscript_tensors(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
        stored = stored if inside is None else stored[inside]
        if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
            raise ValueError("it holds other things than tensors")
        return {str(name): value for name, value in stored.items()}
    except (
        AttributeError, EOFError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError,
        SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} holds no weights that can be read ({line}); get it again") from error


def fill_(network: nn.Module, tensors: Mapping[str, Tensor], *, path: Path, derived: Sequence[str] = ()) -> None:
    """Give a network all its tensors under the names that they have in the file, in float32.

    Args:
        network: The network, which may have been built on the meta device; it is in eval mode and frozen afterwards.
        tensors: The file's tensors by name.
        path: The file, for error messages.
        derived: Regular expressions of names that hold what the network computes itself; they are passed over.

    Raises:
        ValueError: A tensor is missing, unexpected, of another shape, or not finite; it is named.
    """
    wanted = network.state_dict()
    given = {name: value for name, value in tensors.items() if not any(re.search(rule, name) for rule in derived)}
    both = [name for name in wanted if name in given]
    complaints = {
        "misses": [name for name in wanted if name not in given],
        "has an unexpected": [name for name in given if name not in wanted],
        "has another shape of": [
            f"{name} {list(given[name].shape)} where {list(wanted[name].shape)} belongs"
            for name in both
            if given[name].shape != wanted[name].shape
        ],
        "has values that are not finite in": [name for name in both if not bool(torch.isfinite(given[name]).all())],
    }
    for what, names in complaints.items():
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            kind = type(network).__name__
            raise ValueError(f"{path} {what} {', '.join(names[:_NAMED])}{more}; give the checkpoint of {kind}")
    network.load_state_dict({name: given[name].float().contiguous() for name in wanted}, assign=True)
    network.requires_grad_(False).eval()


def _is_torchscript(path: Path) -> bool:
    """Whether it is a zip archive with source text, which torch.load refuses by itself."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _Module:
    """Stands for every class of a TorchScript archive: its attributes, and nothing that runs."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.attributes = dict(state)


class _TensorsOnly(pickle.Unpickler):
    """Builds tensors, containers and :class:`_Module`."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root = archive, root
        self._read: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The class or function that a pickle names; everything that is not listed here is refused."""
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_doublelist", "build_boollist"):
            return list
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """The values of a storage, one-dimensional."""
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it asks for a {kind}")
        if key not in self._read:
            content = self._archive.read(f"{self._root}/data/{key}")
            self._read[key] = torch.frombuffer(bytearray(content), dtype=dtype)[:count]
        return self._read[key]


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if math.prod(size) > len(storage):  # a stride of 0 would ask for more memory than the file is large
        raise pickle.UnpicklingError(f"it asks for a tensor of {size} of {len(storage)} numbers")
    return torch.as_strided(storage, size, stride, offset).contiguous()


def _torchscript_tensors(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        (root,) = {name.partition("/")[0] for name in archive.namelist()}
        return dict(_named(_TensorsOnly(archive, root).load(), prefix=""))


def _named(module: Any, *, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors below a module, by their dotted names."""
    if not isinstance(module, _Module):
        raise ValueError("it holds no module")
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _named(value, prefix=f"{prefix}{name}.")
