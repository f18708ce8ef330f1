"""Which files of a component's folder are its weights, as diffusers and transformers name them.

    diffusion_pytorch_model.safetensors                 one file (diffusers); model.safetensors (transformers)
    NAME.safetensors.index.json, NAME-00001-of-00002.safetensors, ...    shards and their index
    NAME.fp16.safetensors, NAME.safetensors.index.fp16.json, ...         a variant, used where there is nothing else

Whatever else lies there in their place (an unfinished download, pickles, GGUF, weights that are quantized already) is said
by name.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from qvgen.models.folder.safetensors_header import read_header

STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"^(.+)-\d{5}-of-\d{5}(\.\w+)?\.safetensors$")
_FLOATS = ("F64", "F32", "F16", "BF16")
_RELEASE_KEY = re.compile(r"\.[wa]quantizer\.")


class MissingWeightsError(ValueError):
    """Weights that are not there, or not whole: what another download mends."""


@dataclass(frozen=True, kw_only=True)
class WeightSet:
    """The weights of a component.

    Attributes:
        files: safetensors files in order of name.
        variant: what stands between name and suffix, such as fp16; None for the full weights.
    """

    files: tuple[Path, ...]
    variant: str | None


def find_weights(folder: Path) -> WeightSet:
    """Find the weights of a component.

    Args:
        folder: such as FOLDER/transformer.

    Returns:
        The files that will be loaded: the full weights, or where there are none a variant.

    Raises:
        MissingWeightsError: there are none, or some are missing; the message is a clause that follows on the folder's name.
        ValueError: there are two sets, or something else in their place; likewise.
    """
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    found = [chosen for stem in STEMS for variant in _variants(stem, names) if (chosen := _set(folder, stem, variant))]
    full = [chosen for chosen in found if chosen.variant is None]
    chosen = full or found
    if len(chosen) > 1:
        both = " and ".join(sorted(chosen[i].files[0].name for i in (0, 1)))
        raise ValueError(f"holds two sets of weights, {both}; keep one")
    if not chosen:
        raise _why_none(folder, names)
    for file in chosen[0].files:
        if not file.is_file():
            raise MissingWeightsError(_why_missing(folder, file.name))
    return chosen[0]


def check_headers(weights: WeightSet) -> None:
    """Find out without reading tensors whether they are whole, and numbers in floating point.

    Raises:
        MissingWeightsError: a file is cut off or damaged; the message names it.
        ValueError: it holds weights that are quantized already.
    """
    for file in weights.files:
        try:
            _, entries = read_header(file)
        except ValueError as error:
            raise MissingWeightsError(f"{file} {error}") from error
        if reason := quantized_already(entries):
            raise ValueError(f"{file} {reason}")


def quantized_already(entries: dict[str, dict[str, object]]) -> str | None:
    """Say of a header's entries that they are no full-precision weights; None where they are.

    The message is a clause that follows on the file's name.
    """
    for name in entries:
        if _RELEASE_KEY.search(name):
            return (
                f"is a checkpoint of QVGen's own release ({name}): its layers are quantized already; `qvgen import "
                "source=...` makes a packed model of it, and training starts from full-precision weights"
            )
    for name, entry in entries.items():
        dtype = str(entry.get("dtype"))
        if name.endswith(("weight", "weight_packed", "qweight")) and dtype not in _FLOATS:
            return (
                f"holds weights that are quantized already ({name} is {dtype}): what they lost is not to be had back, and "
                "they would be quantized a second time; take the full-precision ones, in bf16, fp16 or fp32"
            )
    return None


def _variants(stem: str, names: set[str]) -> list[str | None]:
    """Variants of a stem that there are files of; None is the full weights."""
    found: set[str] = set()
    for name in names:
        match = re.fullmatch(re.escape(stem) + r"(?:\.(\w+)\.safetensors|\.safetensors\.index\.(\w+)\.json)", name)
        if match:
            found.add(match[1] or match[2])
    return [None, *sorted(found)]


def _set(folder: Path, stem: str, variant: str | None) -> WeightSet | None:
    """A stem's files of a variant, whether they are there or not; None where nothing names them."""
    middle = f".{variant}" if variant else ""
    single, index = folder / f"{stem}{middle}.safetensors", folder / f"{stem}.safetensors.index{middle}.json"
    if os.path.lexists(single) and os.path.lexists(index):
        raise ValueError(f"holds two sets of weights, {single.name} and {index.name}; keep one")
    if os.path.lexists(single):
        return WeightSet(files=(single,), variant=variant)
    if not os.path.lexists(index):
        return None
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not shards or any(Path(str(shard)).name != shard for shard in shards):
            raise ValueError("it names no files of its folder")
    except OSError as error:
        raise MissingWeightsError(_why_missing(folder, index.name)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MissingWeightsError(
            f"holds a damaged index, {index.name} ({' '.join(str(error).split())[:100]})"
        ) from error
    return WeightSet(files=tuple(folder / shard for shard in sorted(shards)), variant=variant)


def _why_missing(folder: Path, name: str) -> str:
    """One file is named and not there."""
    unfinished = f"; its download was not finished ({found})" if (found := _unfinished(folder)) else ""
    return f"lacks {name}{unfinished}"


def _why_none(folder: Path, names: set[str]) -> ValueError:
    """A phrase that says what lies there instead of weights."""
    if not folder.is_dir():
        return MissingWeightsError("is missing")
    for name in sorted(names):
        if match := _SHARD.match(name):
            return MissingWeightsError(f"holds shards ({name}) without their index {match[1]}.safetensors.index.json")
    if found := _unfinished(folder):
        return MissingWeightsError(f"holds no weights: their download was not finished ({found})")
    names_of_weights = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    for suffixes, what in (
        (
            PICKLES,
            "holds pickles alone ({}), which run code when they are read and never are; convert them to safetensors",
        ),
        ((".gguf",), "holds GGUF ({}), whose weights are quantized already; take the full-precision ones"),
        ((".safetensors",), f"holds {{}}, and weights are called {names_of_weights}; rename it"),
    ):
        if given := sorted(name for name in names if name.endswith(suffixes)):
            return ValueError(what.format(given[0]))
    return MissingWeightsError("holds no weights")


def _unfinished(folder: Path) -> str | None:
    """A trace of a download that stopped: a link to nothing, or the part of a file that the hub's client keeps."""
    links = sorted(path.name for path in folder.iterdir() if path.is_symlink() and not path.exists())
    if links:
        return f"{links[0]} is a link to nothing"
    for place in (folder, folder.parent / ".cache" / "huggingface" / "download" / folder.name):
        if parts := sorted(place.glob("*.incomplete")):
            return parts[0].name
    return None
