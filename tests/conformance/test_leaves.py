"""What every leaf owes the rest, ours and those of installed plug-ins: what its group's class or protocol lists.

Values are those of its file. Models are built on the meta device, with one block.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qvgen.config.leaf_class import check_made
from qvgen.config.leaf_file import leaf_target
from qvgen.config.leaves import LEAF_GROUPS, leaf_names, load_leaf
from qvgen.layers.layer_group import layer_units
from qvgen.layers.swap import select_linears
from tests.models.any_folders import make_any_folder

GROUPS = sorted(set(LEAF_GROUPS) - {"profile"})  # whose files ask for bits; tests/conformance builds every one of them
Given = dict[tuple[str, str], dict[str, Any]]
SIZES = {"height": 32, "width": 48, "num_frames": 9, "sampling_frames": 9}
LEAVES = [(group, name) for group in GROUPS for name in leaf_names(group)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Arguments of leaves that are nothing without one: a model that is whatever its folder holds."""
    return {("model", "diffusers"): {"path": str(make_any_folder(tmp_path_factory.mktemp("hub") / "model")), **SIZES}}


@pytest.mark.parametrize(("group", "name"), LEAVES, ids="=".join)
def test_a_leaf_is_what_its_group_asks_for(group: str, name: str, given: Given) -> None:
    check_made(
        load_leaf(group, name, **given.get((group, name), {})),
        kind=LEAF_GROUPS[group],
        key=group,
        target=str(leaf_target(group, name)),
    )


@pytest.mark.parametrize("name", leaf_names("model"))
def test_a_family_builds_the_transformer_that_it_describes(name: str, given: Given) -> None:
    family = load_leaf("model", name, **given.get(("model", name), {}))
    with torch.device("meta"):
        transformer = family.build({**family.transformer_config, "num_layers": 1})
    assert type(transformer).__name__ == family.transformer_class
    chosen = select_linears(transformer, include=family.include, exclude=family.exclude).quantized
    assert chosen
    units = layer_units(chosen, family.layer_groups)
    assert sorted(key for unit in units for key in unit.layers) == sorted(chosen)
