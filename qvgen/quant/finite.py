"""Whether tensors are finite: one check for every border that they pass, from a file or into one.

A NaN spreads to whatever it is multiplied with, and an infinity soon becomes one. Where they come from can only be said
where they come in, so a model's weights, a checkpoint, what a fold makes, a packed file and the samples of a video are all
checked by :func:`check_finite`, which names the tensor.

Minimum and maximum of a tensor tell it in one pass without a copy: either is NaN where a value is, and infinite where a
value is and none is NaN. Reading 1 GB of float32, bfloat16 or float16 takes 0.15 s on one core at 2.8 GHz, and float8 0.2 s,
about what it costs to read memory; values are counted only in a tensor that is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from qvgen.errors import UserError

_CHUNK = 1 << 20
"""Values that are looked at in one go; a tensor that is not contiguous is copied in pieces of so many values."""

_FLOAT8_NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""Lowest byte without its sign that is no number, for dtypes of 8 bits that have no minimum on a processor."""


def check_finite(tensors: Iterable[tuple[str, Tensor]], *, source: str, remedy: str = "") -> None:
    """Raise for the first tensor that holds a NaN or an infinity.

    Args:
        tensors: pairs of name and tensor, any shape, device and layout; read one after the other, so that a generator
            may load them as it goes. Integers are finite; a tensor on the meta device or a fake one has no values.
        source: where they come from: a file, a checkpoint, a layer.
        remedy: what a user can do about it, put behind a semicolon; empty for nothing.

    Raises:
        UserError: names the source and the tensor and counts its NaNs and infinities.

    Example:
        >>> import torch
        >>> bad = torch.tensor([1.0, float("nan"), float("inf")])
        >>> check_finite([("weight", torch.ones(2)), ("bias", bad)], source="model.safetensors")
        Traceback (most recent call last):
        qvgen.errors.UserError: model.safetensors: 'bias', float32 [3], holds 1 NaN and 1 infinity among 3 values
    """
    for name, tensor in tensors:
        if is_finite(tensor):
            continue
        counts = [sum(int(test(part).sum()) for part in _wide_chunks(tensor)) for test in (torch.isnan, torch.isinf)]
        counted = " and ".join(
            filter(None, (_counted(counts[0], "NaN", "NaNs"), _counted(counts[1], "infinity", "infinities")))
        )
        raise UserError(
            f"{source}: {name!r}, {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, holds {counted} among "
            f"{tensor.numel()} values{f'; {remedy}' if remedy else ''}"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor [...] holds neither NaN nor infinity; True for what has no values that could be looked at.

    Args:
        tensor: any dtype and device; of a sharded one, this process's part is looked at.
    """
    tensor = _local(tensor)
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel() or not _has_values(tensor):
        return True
    return all(_chunk_finite(chunk) for chunk in _chunks(tensor))


def _chunk_finite(chunk: Tensor) -> bool:
    limit = _FLOAT8_NOT_FINITE.get(chunk.dtype)
    if limit is not None:
        return int(chunk.view(torch.uint8).bitwise_and(0x7F).amax()) < limit
    if chunk.itemsize == 1:
        chunk = chunk.float()
    return all(math.isfinite(float(bound)) for bound in torch.aminmax(chunk))


def _wide_chunks(tensor: Tensor) -> Iterator[Tensor]:
    return (chunk.float() if chunk.itemsize == 1 else chunk for chunk in _chunks(_local(tensor)))


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in flat pieces, views of it where it is contiguous and copies of one piece at a time elsewhere."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(_CHUNK)
        return
    if tensor.numel() <= _CHUNK:
        yield tensor.reshape(-1)
        return
    for part in tensor.unbind():
        yield from _chunks(part)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or hasattr(tensor, "fake_mode"))


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}" if count else ""
