"""A transformer of diffusers from its configuration, without weights, and whether a file of weights is its."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qvgen.models.folder.model_class import model_class

MAX_VALUE = 2**20
"""Largest whole number that a configuration may hold: more than any model's width, blocks or positions."""

TABLE_BYTES = 320 * 2**20
"""Bytes that tables which are in no file may take beyond the file's size; CogVideoX-2b's positions take 260 MiB."""


def build_transformer(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a transformer with random weights, on the device that is the default one (``meta`` costs nothing).

    Raises:
        ValueError: for a key that the transformer does not have.
    """
    transformer_class = model_class(class_name)
    known = inspect.signature(transformer_class.__init__).parameters
    plain = {key: value for key, value in config.items() if not key.startswith("_")}  # diffusers' annotations
    for key in plain:
        if key not in known:
            raise ValueError(f"transformer config has the unknown key {key!r}; {class_name} has none such")
    transformer: nn.Module = transformer_class(**plain)
    return transformer


def build_empty(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a transformer on the device ``meta``.

    Raises:
        ValueError: The configuration builds none; the message is a clause that follows on its file's name.
    """
    try:
        with torch.device("meta"):
            return build_transformer(class_name, config)
    except Exception as error:  # whatever a class of diffusers raises for sizes that nobody has tried
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"has a configuration that builds no {class_name}: {reason}") from error


def check_numbers(config: Mapping[str, Any], *, num_tensors: int) -> None:
    """Refuse a configuration that asks for more than its file of weights can hold, before anything is built from it.

    Args:
        config: The configuration.
        num_tensors: Tensors of the file: no model has more blocks.

    Raises:
        ValueError: The message is a clause that follows on the configuration's name.
    """
    for key, value in config.items():
        limit = num_tensors if key.startswith("num_") and key.endswith("layers") else MAX_VALUE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not 0 <= number <= limit:
                raise ValueError(f"says {key}={value}, and its weights are {num_tensors} tensors")


def check_weights(
    class_name: str, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], *, size: int
) -> None:
    """Hold the names and shapes of a file's tensors to the transformer that a configuration builds.

    Args:
        class_name: Class of diffusers.
        config: Its arguments; :func:`check_numbers` took them.
        shapes: Name -> shape.
        size: Bytes of the file.

    Raises:
        ValueError: The message is a clause that follows on the file's name.
    """
    model = build_empty(class_name, config)
    expected = model.state_dict()
    for name, value in expected.items():
        if name not in shapes:
            raise ValueError(f"lacks {name!r}, which the model has")
        if tuple(shapes[name]) != tuple(value.shape):
            raise ValueError(f"holds {name!r} of shape {list(shapes[name])}, and the model's is {list(value.shape)}")
    if extra := [name for name in shapes if name not in expected]:
        raise ValueError(f"holds {extra[0]!r} and {len(extra) - 1} other tensors that the model does not have")
    tables = sum(
        buffer.numel() * buffer.element_size() for name, buffer in model.named_buffers() if name not in expected
    )
    if tables > size + TABLE_BYTES:
        raise ValueError(f"asks for tables of {tables} bytes, which no model of its size has")
