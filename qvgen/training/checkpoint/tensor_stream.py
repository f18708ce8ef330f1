"""A safetensors file that is written tensor by tensor, so that whoever writes it holds one of them at a time.

``safetensors.torch.save_file`` takes all tensors at once. The format is the same: eight bytes with the length of the header,
the header (JSON: name, type, shape and place of each tensor), and the tensors' bytes
(https://github.com/huggingface/safetensors#format). Wide types stand first, so that each tensor begins at a multiple of its
width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, like: Mapping[str, Tensor], value_of: Callable[[str], Tensor]) -> None:
    """Write a file of tensors, asking for one after another.

    Args:
        path: The file; an earlier one is replaced.
        like: Name -> a tensor of the same type and shape; the meta device is enough.
        value_of: Gives a tensor's values, on the host, once for each name.

    Raises:
        ValueError: A value is of another type or shape than was said.
        OSError: The disk is full.
    """
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        begin, end = end, end + like[name].numel() * like[name].element_size()
        shape = list(like[name].shape)
        header[name] = {"dtype": _TYPES[like[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for name in names:
            value = value_of(name).detach().contiguous()
            if (value.dtype, value.shape) != (like[name].dtype, like[name].shape):
                raise ValueError(
                    f"{name} is {value.dtype} {list(value.shape)}, and was to be {like[name].dtype} {list(like[name].shape)}"
                )
            file.write(memoryview(value.flatten().view(torch.uint8).numpy()))
