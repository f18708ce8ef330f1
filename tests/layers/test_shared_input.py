"""One activation quantizer for layers of one input: who shares, what a state says of it, and the gradient.

The shared gradient is checked against the sum of those of layers apart.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from qvgen.initializers.prepare import PrepareConfig, prepare
from qvgen.initializers.rtn import RoundToNearest
from qvgen.layers.shared_input import activation_sharing, share_activations_, shared_input_sets, unshare_activations_
from qvgen.layers.swap import add_switch_widths_, forms, quantized_layers, restore_forms_
from qvgen.quant.width_table import WidthTable
from tests.layers.model import BANDS, TIMESTEPS, make_rows
from tests.profiles import COLUMNS, make_profile

QUERIES = ("to_q", "to_k", "to_v")
SETS = tuple(tuple(f"blocks.{block}.{name}" for name in QUERIES) for block in (0, 1))


class Attention(nn.Module):
    """q, k and v of one input, and an output that reads something else."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(COLUMNS, COLUMNS) for _ in range(4))

    def forward(self, x):
        return x + self.to_out(torch.tanh(self.to_q(x) * self.to_k(x)) + self.to_v(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x, timestep):
        for block in self.blocks:
            x = block(x)
        return x


def make_model(*, switch=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model()
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    prepare(model, PrepareConfig(profile=profile, initializer=RoundToNearest(), num_noise_bands=BANDS))
    if switch:
        add_switch_widths_(model, (4, 8))
    return model


def share(model, sets=SETS):
    return share_activations_(quantized_layers(model), sets)


def test_sets_are_found_by_the_ends_of_names():
    names = [
        "to_q",
        "to_k",
        "to_v",
        "a.to_q",
        "a.to_k",
        "a.to_v",
        "b.to_q",
        "b.to_k",
        "b.my_to_v",
        "c.x.to_q",
        "c.y.to_k",
    ]
    found = shared_input_sets(names, [QUERIES, ("x.to_q", "y.to_k"), ("nowhere", "to_k")])
    assert found == (("to_q", "to_k", "to_v"), ("a.to_q", "a.to_k", "a.to_v"), ("c.x.to_q", "c.y.to_k"))


def test_a_set_has_one_quantizer_and_every_name_stays():
    model, apart = make_model(switch=True), make_model(switch=True)
    assert share(model) == SETS
    assert activation_sharing(quantized_layers(model)) == SETS
    assert list(model.state_dict()) == list(apart.state_dict())
    first, second = model.blocks[0].to_q, model.blocks[0].to_v
    for bits in (4, 8):
        assert first.activation_quantizers()[bits] is second.activation_quantizers()[bits]
        assert first.activation_quantizers()[bits] is not model.blocks[0].to_out.activation_quantizers()[bits]
        assert first.activation_quantizers()[bits] is not model.blocks[1].to_q.activation_quantizers()[bits]
    # 2 blocks, 2 layers that have none of their own, 2 widths, 2 tables
    assert len(list(apart.parameters())) - len(list(model.parameters())) == 2 * 2 * 2 * 2
    x = make_rows()
    with torch.no_grad():
        assert torch.equal(model(x, timestep=TIMESTEPS), apart(x, timestep=TIMESTEPS))


@pytest.mark.parametrize("switch", [False, True])
def test_the_gradient_is_the_sum_of_the_layers(switch):
    model, apart = make_model(switch=switch), make_model(switch=switch)
    share(model)
    for made in (model, apart):
        made(make_rows(), timestep=TIMESTEPS).square().sum().backward()
    for block, other in zip(model.blocks, apart.blocks, strict=True):
        for name, parameter in block.to_q.activation_quantizer.named_parameters():
            parts = [getattr(other, query).activation_quantizer.get_parameter(name).grad.double() for query in QUERIES]
            assert sum(float(part.abs().sum()) > 0 for part in parts) == 3
            wanted, size = sum(parts), sum(part.abs() for part in parts)
            assert ((parameter.grad.double() - wanted).abs() <= 4 * 2.0**-24 * size).all()  # two sums in float32
        for query in QUERIES:
            assert torch.equal(getattr(block, query).weight.grad, getattr(other, query).weight.grad)


def change(model, how):
    layer = quantized_layers(model)["blocks.0.to_k"]
    if how == "ranges":
        layer.activation_quantizer.clip_low.data[2] += 1e-6
    elif how == "smoothing":
        layer.move_(profile=layer.profile, input_scale=torch.full((COLUMNS,), 2.0))
    elif how == "smoothing alike but for one value":
        for name in QUERIES:
            scale = torch.full((COLUMNS,), 2.0)
            scale[0] += 1e-6 * (name == "to_k")
            other = quantized_layers(model)[f"blocks.0.{name}"]
            other.move_(profile=other.profile, input_scale=scale)
    elif how == "plan":
        layer.set_width_table_(WidthTable(switch=(4, 8)))
    elif how == "width":
        profile = make_profile("paper", weight_bits=4, activation_bits=8)
        layer.move_(profile=profile)
    else:
        model.blocks[0].to_k = nn.Linear(COLUMNS, COLUMNS)


@pytest.mark.parametrize(
    "how", ["ranges", "smoothing", "smoothing alike but for one value", "plan", "width", "not quantized"]
)
def test_layers_that_are_not_alike_stay_apart(how):
    model = make_model()
    change(model, how)
    assert share(model) == SETS[1:]
    assert activation_sharing(quantized_layers(model)) == SETS[1:]


def test_sharing_again_takes_apart_what_no_longer_fits():
    model = make_model(switch=True)
    share(model)
    layers = quantized_layers(model)
    layers["blocks.1.to_v"].set_width_table_(None)
    layers["blocks.1.to_v"].move_(profile=make_profile("paper", weight_bits=8, activation_bits=8))
    assert share(model) == SETS[:1]
    one, other = layers["blocks.1.to_q"], layers["blocks.1.to_k"]
    assert one.activation_quantizer is not other.activation_quantizer
    assert one.activation_quantizers()[8] is not other.activation_quantizers()[8]
    unshare_activations_(layers)
    assert activation_sharing(layers) == ()
    assert len({id(p) for layer in layers.values() for p in layer.activation_quantizer.parameters()}) == 2 * 8


def test_forms_say_who_shares():
    model = make_model(switch=True)
    share(model, SETS[:1])
    stored = json.loads(json.dumps(forms(model)))
    for made in (make_model(), make_model(switch=True), model):
        share(made)  # all of them, before
        restore_forms_(made, stored)
        made.load_state_dict(model.state_dict(), strict=True)
        assert activation_sharing(quantized_layers(made)) == SETS[:1]
        assert forms(made) == forms(model)
    restore_forms_(model, {key: value for key, value in stored.items() if key != "shared_activations"})
    assert activation_sharing(quantized_layers(model)) == ()
    stored["shared_activations"] = [["blocks.0.to_q", "nowhere"]]
    with pytest.raises(KeyError, match="nowhere"):
        restore_forms_(make_model(), stored)


def test_copies_and_moves_keep_it():
    model, skeleton = make_model(switch=True), make_model(switch=True).to("meta")
    share(model)
    assert share(skeleton) == SETS  # by their forms: there are no values
    for made in (copy.deepcopy(model), skeleton):
        made.to(torch.float64).to("meta").to_empty(device="cpu")
        assert activation_sharing(quantized_layers(made)) == SETS
        assert len(list(made.parameters())) == len(list(model.parameters()))
