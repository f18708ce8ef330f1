"""Stored forms of layers with a nasty value in every place: restored, or refused without the memory that they ask for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.swap import forms, quantized_layers, restore_forms_
from qvgen.quant.width_table import WidthTable
from tests.layers.model import Model
from tests.profiles import make_profile

NASTY: list[Any] = [
    None, True, -1, 1, 7, 2**31, 2**62, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", [], [[]], [0, -1],
    ["a", "b"], {}, {"a": 1},
]  # fmt: skip


def stored_forms() -> tuple[Model, dict[str, Any]]:
    """A model with a table of widths and a branch in its first layer, and its forms."""
    model = Model()
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    prepare(model, PrepareConfig(profile=profile, initializer=RoundToNearest(), num_noise_bands=5))
    first = next(iter(quantized_layers(model).values()))
    first.set_width_table_(WidthTable(switch=(4, 8)))
    first.set_branch_(torch.zeros(2, first.in_features), torch.zeros(first.out_features, 2))
    return model, forms(model)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands; of the layers the first."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in list(value)[:1] if path == ("layers",) else value:
            yield from places(value[key], (*path, key))


def test_forms_with_anything_in_any_place_are_restored_or_refused() -> None:
    model, stored = stored_forms()
    restore_forms_(model, stored)
    refused = tried = 0
    for path in places(stored):
        for value in NASTY:
            changed: Any = copy.deepcopy(stored)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
            tried += 1
            try:
                restore_forms_(model, changed)
            except (ValueError, KeyError, TypeError):
                refused += 1
            restore_forms_(model, stored)
    assert tried > 300
    assert refused > 0.8 * tried
    for layer in quantized_layers(model).values():
        assert layer.branch_down is None or layer.branch_down.shape[0] == 2
