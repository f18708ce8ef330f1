"""Which layers read the same input, by every family's declaration: what real transformers of tiny size hand their Linears.

Two Linears of one block read the same input if they are called with the same memory.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from qvgen.config.leaves import conf_directory, load_leaf
from qvgen.layers.layer_group import block_of
from qvgen.layers.shared_input import shared_input_sets
from qvgen.layers.swap import select_linears
from tests.models.test_smoothing_fold import VARIANTS, make, run

NAMES = sorted({path.stem for path in (conf_directory() / "model").glob("*.yaml")} - {"diffusers"})  # it declares none


def called_alike(model, call):
    """Names of the Linears of one block that one tensor goes to, in sets of two or more."""
    readers, alive = {}, []

    def hook(name):
        def note(_, args):
            alive.append(args[0])  # no address is used again
            readers.setdefault((block_of(name), args[0].data_ptr(), args[0].shape), []).append(name)

        return note

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    run(model, call)
    return {frozenset(names) for names in readers.values() if len(names) > 1}


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's transformer turns it off, in its own way
@pytest.mark.parametrize("name", VARIANTS)
def test_a_declared_set_is_called_with_one_tensor_and_nothing_else_is(name):
    family, model, call = make(name)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    sets = shared_input_sets(names, family.shared_inputs)
    assert len({layer for names in sets for layer in names}) == sum(len(names) for names in sets)
    # The two modulations of a CogVideoX block read silu(t), one row for each sample: nothing to gain there.
    found = {names for names in called_alike(model, call) if not any(".norm" in name for name in names)}
    assert found == {frozenset(names) for names in sets}
    if name == "wan with an image":
        assert ("blocks.1.attn2.add_k_proj", "blocks.1.attn2.add_v_proj") in sets


@pytest.mark.parametrize("model", NAMES)
def test_every_block_of_the_published_models_has_its_sets(model):
    family = load_leaf("model", model)
    with torch.device("meta"):
        transformer = family.build(family.transformer_config)
    names = select_linears(transformer, include=["*"], exclude=[]).quantized
    sets = shared_input_sets(names, family.shared_inputs)
    blocks = family.transformer_config["num_layers"]
    sides = {
        "hunyuanvideo": 2 * blocks + 40 + 2,
        "hunyuanvideo1.5": 2 * blocks + 2,
        "hunyuanvideo1.5-i2v": 2 * blocks + 2,
        "mochi": 2 * blocks,
    }  # the text's too; single blocks, the refiner's
    pairs = {
        "WanTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "LatteTransformer3DModel",
    }  # keys and values of the text
    sides |= {"latte": 2 * blocks}  # a spatial and a temporal block each
    images = 2 if model == "wan-i2v-14b" else 1  # keys and values of the image besides
    counts = {3: sides.get(model, blocks)} | ({2: images * blocks} if family.transformer_class in pairs else {})
    if model == "opensora":  # one Linear makes queries, keys and values
        counts = {}
    assert Counter(map(len, sets)) == counts
    places = [names.index(entry[0]) for entry in sets]
    assert places == sorted(places)
