"""The files of a checkpoint of QVGen's own release: which tensors they hold, told from headers, and reading them one by one.

    FILE.safetensors, or DIR or DIR/transformer with one file or shards and their index, as diffusers names them
    NAME.w, NAME.b                          a quantized Linear's weight [N, K] and bias [N]
    NAME.wquantizer.scale, .zero_point      [N, 1] each, in units of the weight and of codes
    NAME.aquantizer.lower, .upper           logits [50] of the factors on a token's minimum and maximum
    NAME.loraA, .loraB                      [r, K] and [N, r], where a LoRA was trained and is not merged: w + B A is meant
    everything else                         as diffusers names it

Nothing is unpickled, and nothing is read but what the names of the base model ask for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qvgen.checksum import file_checksum, files_checksum
from qvgen.models.folder.safetensors_header import read_header
from qvgen.models.folder.weight_set import PICKLES, MissingWeightsError, find_weights
from qvgen.quant.finite import check_finite

NUM_GROUPS = 50
"""Entries of a layer's tables of clips."""

_FLOATS = ("F32", "BF16", "F16")
_LAYER = ("w", "wquantizer.scale", "wquantizer.zero_point", "aquantizer.lower", "aquantizer.upper")
_LORA = ("loraA", "loraB")


@dataclass(frozen=True, kw_only=True, eq=False)
class ReleaseFile:
    """A checkpoint that is open, and whose tensors are those of a base model.

    Attributes:
        source: The file or folder that was given.
        files: Its safetensors files, in order of name.
        shapes: Shape of each tensor, by name.
        layers: Names of the quantized Linears, in the base model's order.
        loras: Names among them with a LoRA that is not merged.
        config: The arguments in config.json beside the files; None where there is none.
    """

    source: Path
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    layers: tuple[str, ...]
    loras: frozenset[str]
    config: Mapping[str, Any] | None
    _where: Mapping[str, Path]
    _open: dict[Path, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def open(cls, source: Path, base: nn.Module, *, name: str) -> Self:
        """Find the files and hold their headers to the base model: every tensor of it is there, and no other one.

        Args:
            source: A file or folder.
            base: The base model's transformer; its weights may lie on the meta device.
            name: The base model's name, for messages.

        Raises:
            ValueError: There is no such checkpoint, or it does not fit; the message names the file and the tensor.
        """
        files, folder = _find_files(source)
        where, shapes = _read_headers(files)
        linears = {key: module for key, module in base.named_modules() if isinstance(module, nn.Linear)}
        layers = tuple(key for key in linears if f"{key}.w" in shapes)
        _refuse_other_forms(shapes, layers, source=source)
        loras = frozenset(key for key in layers if any(f"{key}.{end}" in shapes for end in _LORA))
        expected = _expected(base, linears, layers, loras, shapes)
        _compare(shapes, expected, source=source, name=name)
        config = _read_config(folder / "config.json")
        return cls(source=source, files=files, shapes=shapes, layers=layers, loras=loras, config=config, _where=where)

    @property
    def sha256(self) -> str:
        """Checksum of the file; of several, of their names and checksums in order of name."""
        return file_checksum(self.files[0]) if len(self.files) == 1 else files_checksum(self.files)

    def tensor(self, name: str) -> Tensor:
        """A tensor as the file has it.

        Raises:
            ValueError: It is not finite, or the file is damaged.
        """
        path = self._where[name]
        try:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            value: Tensor = self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no safetensors file: {' '.join(str(error).split())}") from error
        check_finite([(name, value)], source=str(path), remedy="get the checkpoint again")
        return value

    def close(self) -> None:
        """Close the files."""
        self._stack.close()
        self._open.clear()


def _find_files(source: Path) -> tuple[tuple[Path, ...], Path]:
    """The checkpoint's files, and the folder in which its config.json would lie."""
    source = source.expanduser()
    if source.is_file():
        if source.suffix in PICKLES:
            raise ValueError(
                f"source={source} is a pickle, which runs code when it is read and never is; save the checkpoint as "
                "safetensors where you trust it"
            )
        if source.suffix != ".safetensors":
            raise ValueError(f"source={source} is no .safetensors file; give the checkpoint's file or its folder")
        return (source,), source.parent
    if not source.is_dir():
        raise ValueError(f"source={source} is not there; give the checkpoint's .safetensors file or its folder")
    inner = source / "transformer"
    folder = inner if not any(source.glob("*.safetensors*")) and inner.is_dir() else source
    try:
        return find_weights(folder).files, folder
    except MissingWeightsError as error:
        raise ValueError(f"source={folder} {error}; give the checkpoint's .safetensors file or its folder") from error
    except ValueError as error:
        raise ValueError(f"source={folder} {error}") from error


def _read_headers(files: tuple[Path, ...]) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            _, entries = read_header(path)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
        for name, entry in entries.items():
            if name in where:
                raise ValueError(f"{path} holds {name!r}, which {where[name].name} holds too; get the checkpoint again")
            if entry["dtype"] not in _FLOATS:
                raise ValueError(
                    f"{path}: {name!r} is {entry['dtype']}; a checkpoint of the release has {', '.join(_FLOATS)}"
                )
            where[name], shapes[name] = path, tuple(entry["shape"])
    return where, shapes


def _refuse_other_forms(shapes: Mapping[str, object], layers: tuple[str, ...], *, source: Path) -> None:
    """Raise ValueError for a checkpoint of another kind, or one that is not finished."""
    for name in shapes:
        end = name.rpartition(".")[2]
        if end in ("L", "R"):
            raise ValueError(
                f"source={source} is of an unfinished training: {name!r} is part of its low-rank helper; train it to the "
                "end, where the helper is gone, and import that"
            )
        if end == "ps":
            raise ValueError(
                f"source={source} has {name!r}: its weights are rounded in a learned direction, which the packed format "
                "does not hold; import a checkpoint that rounds to the nearest code"
            )
    if not layers:
        held = next(iter(shapes), "nothing")
        raise ValueError(
            f"source={source} holds no layer of QVGen's release (NAME.w with NAME.wquantizer.scale of a Linear of the model; "
            f"the first tensor is {held!r}); full-precision weights are given as model.transformer={source}"
        )


def _expected(
    base: nn.Module,
    linears: Mapping[str, nn.Linear],
    layers: tuple[str, ...],
    loras: frozenset[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors that a checkpoint with these layers has."""
    expected = {key: tuple(value.shape) for key, value in base.state_dict().items()}
    for name in layers:
        rows, columns = linears[name].out_features, linears[name].in_features
        del expected[f"{name}.weight"]
        if (bias := expected.pop(f"{name}.bias", None)) is not None:
            expected[f"{name}.b"] = bias
        forms = ((rows, columns), (rows, 1), (rows, 1), (NUM_GROUPS,), (NUM_GROUPS,))
        expected |= {f"{name}.{end}": form for end, form in zip(_LAYER, forms, strict=True)}
        if name in loras:
            rank = (shapes.get(f"{name}.loraA") or (0,))[0]
            expected |= {f"{name}.loraA": (rank, columns), f"{name}.loraB": (rows, rank)}
    return expected


def _compare(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, source: Path, name: str
) -> None:
    """Raise ValueError for the first tensor that one side alone has, or that has another shape."""
    for key, shape in expected.items():
        if key not in shapes:
            raise ValueError(f"source={source} lacks {key!r} of model={name}; it is cut short, or of another model")
        if shapes[key] != shape:
            raise ValueError(
                f"source={source}: {key!r} has shape {list(shapes[key])}, model={name} needs {list(shape)}; choose the "
                "model that it was made from"
            )
    if extra := [key for key in shapes if key not in expected]:
        raise ValueError(
            f"source={source} holds {extra[0]!r} and {len(extra) - 1} other tensors that model={name} does not have; choose "
            "the model that it was made from"
        )


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({' '.join(str(error).split())[:100]}); get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping; get it again")
    return content


def num_values(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Values of all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())
