"""A Phi that stays as a branch: its product and gradients in float64, the packed layer to the bit, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qvgen.initializers.svdquant import SvdQuant
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.packed_linear import PackedLinear
from qvgen.lowrank.decay import DecaySchedule, DecayState
from tests.hadamard_oracle import rotation_matrix
from tests.initializers.test_svdquant import COLUMNS, make_inputs
from tests.initializers.test_svdquant import make_layer as svdquant_layer
from tests.layers.model import TIMESTEPS, make_layer, make_rows

KEPT = DecaySchedule(ranks=(4,), kept=2, num_steps=10, tail_share=0.2)


def kept_layer(name: str = "paper", *, smoothed: bool = False, rotation: int | None = None) -> FakeQuantLinear:
    """Phi of rank 4 in the middle of a phase that leaves 2; its columns are larger than a start would make them."""
    layer = make_layer(name, phi_rank=4, seed=3, rotation=rotation)
    layer.phi.keep = True
    if smoothed:
        layer.move_(profile=layer.profile, input_scale=torch.linspace(0.5, 2, layer.in_features))
    with torch.no_grad():
        layer.phi.left.mul_(5)
    layer.phi.advance_(KEPT.at(3))
    layer.noise_band.set_timestep(TIMESTEPS)
    return layer


def without_phi(layer: FakeQuantLinear, x: torch.Tensor) -> torch.Tensor:
    layer.phi.suspended = True
    with torch.no_grad():
        y = layer(x)
    layer.phi.suspended = False
    return y


def rounded_factors(layer: FakeQuantLinear) -> tuple[np.ndarray, np.ndarray]:
    """D [r, K] and U [N, r] by the equations in float64, rounded to bfloat16."""
    left, right, gate = (
        value.detach().double().numpy() for value in (layer.phi.left, layer.phi.right, layer.phi.rank_gate)
    )
    size = layer.profile.rotation
    matrix = np.asarray(rotation_matrix(layer.in_features, size)) if size else np.eye(layer.in_features)
    smooth = 1.0 if layer.input_scale is None else layer.input_scale.double().numpy()
    down, up = right @ matrix.T * smooth, left * gate
    return tuple(torch.from_numpy(value).to(torch.bfloat16).double().numpy() for value in (down, up))


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("rotation", [0, 16])
def test_it_is_a_branch_on_the_input_as_it_comes(smoothed: bool, rotation: int) -> None:
    layer, x = kept_layer(smoothed=smoothed, rotation=rotation), make_rows()
    with torch.no_grad():
        added = (layer(x) - without_phi(layer, x)).double().numpy()
    down, up = rounded_factors(layer)
    wanted = x.double().numpy() @ down.T @ up.T
    # A factor near a tie may be rounded to the other neighbour where the float32 rotation differs in its last bit.
    assert np.abs(added - wanted).max() < 2e-3 * np.abs(wanted).max()
    assert np.abs(wanted).max() > 0.05


def test_its_gradients_are_those_of_the_product() -> None:
    layer, x = kept_layer(smoothed=True, rotation=16), make_rows().requires_grad_()
    grad = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(5))
    layer(x).backward(grad)
    down, up = rounded_factors(layer)
    rows, grads = x.detach().double().numpy().reshape(-1, layer.in_features), grad.double().numpy().reshape(-1, 6)
    grad_up, grad_down = grads.T @ (rows @ down.T), (grads @ up).T @ rows
    matrix = np.asarray(rotation_matrix(layer.in_features, 16))
    wanted_left = grad_up * layer.phi.rank_gate.double().numpy()
    wanted_right = grad_down * layer.input_scale.double().numpy() @ matrix
    for found, wanted in ((layer.phi.left.grad, wanted_left), (layer.phi.right.grad, wanted_right)):
        assert np.abs(found.double().numpy() - wanted).max() < 5e-3 * np.abs(wanted).max()
    ours = x.grad.clone()
    x.grad = None
    layer.phi.suspended = True
    layer(x).backward(grad)
    wanted_x = (grads @ up @ down).reshape(x.shape)
    assert np.abs((ours - x.grad).double().numpy() - wanted_x).max() < 5e-3 * np.abs(wanted_x).max()


def test_dropped_columns_take_no_part_and_get_no_gradient() -> None:
    layer, x = kept_layer(), make_rows()
    layer.phi.advance_(KEPT.at(9))
    assert layer.phi.rank == 2
    layer(x).sum().backward()
    assert not layer.phi.left.grad[:, 2:].any()
    assert not layer.phi.right.grad[2:].any()
    assert layer.phi.left.grad[:, :2].abs().min() > 0


@pytest.mark.parametrize("step", [3, 9])
@pytest.mark.parametrize("name", ["paper", "convrot", "int8"])
def test_the_packed_layer_is_equal(name: str, step: int) -> None:
    """In the middle of a phase as after it, on the reference kernel and on the processor's own."""
    layer, x = kept_layer(name, smoothed=name == "paper"), make_rows()
    layer.phi.advance_(KEPT.at(step))
    rank = 4 if step == 3 else 2
    for kernel in ("reference", "auto"):
        packed = PackedLinear.from_fake_quant(layer, kernel=kernel)
        assert packed.form.branch_rank == packed.branch_down.shape[0] == rank
        assert packed.form.label.endswith(f"+r{rank}")
        with torch.no_grad():
            assert torch.equal(packed(x), layer(x))
    assert LayerForm.of(layer).branch_rank == 0  # in training it is no part of the form


def test_the_master_weight_is_not_touched_by_folding() -> None:
    layer = kept_layer()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    PackedLinear.from_fake_quant(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def both_branches() -> FakeQuantLinear:
    layer = svdquant_layer(SvdQuant(alpha=0.5, rank=4, seed=0, fold_smoothing=False))
    helped = FakeQuantLinear(
        torch.nn.Linear(COLUMNS, layer.out_features), profile=layer.profile, noise_band=layer.noise_band, phi_rank=3,
        phi_keep=True,
    )  # fmt: skip
    LayerForm.of(layer).declare_(helped)
    helped.load_state_dict(layer.state_dict(), strict=False)
    helped.start_phi_(generator=torch.Generator().manual_seed(0))
    return helped


def test_ranks_of_both_branches_add() -> None:
    layer, x = both_branches(), make_inputs()
    packed = PackedLinear.from_fake_quant(layer, kernel="reference")
    assert packed.form.branch_rank == 7
    assert torch.equal(packed.branch_down[:4], layer.branch_down)
    assert torch.equal(packed.branch_up[:, :4], layer.branch_up)
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))


def test_more_rank_than_a_layer_has_is_refused() -> None:
    layer = both_branches()
    helped = FakeQuantLinear(
        torch.nn.Linear(COLUMNS, 40), profile=layer.profile, noise_band=layer.noise_band, phi_rank=37, phi_keep=True
    )
    helped.set_branch_(layer.branch_down, layer.branch_up)
    with pytest.raises(
        ValueError, match=r"rank 4 and phi\.rank=37.*more than the rank 40.*lower phi\.rank or init\.rank"
    ):
        helped.start_phi_(generator=torch.Generator().manual_seed(0))


def test_a_phi_that_is_not_kept_is_refused_and_told_of_it() -> None:
    layer = kept_layer()
    layer.phi.keep = False
    with pytest.raises(ValueError, match=r"Phi still has rank 4; train until its decay is over.*phi\.keep=true"):
        PackedLinear.from_fake_quant(layer)


def test_bfloat16_stays_near() -> None:
    layer, x = kept_layer(), make_rows()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x).float()
    with torch.no_grad():
        wanted = layer(x)
    assert (half - wanted).norm() < 0.02 * wanted.norm()


def test_the_tail_keeps_the_rank() -> None:
    states = [KEPT.at(step) for step in range(12)]
    assert [state.rank for state in states] == [4] * 8 + [2] * 4
    assert states[7].gate == (1.0, 1.0, 0.0, 0.0)
    assert states[8] == states[11] == DecayState(rank=2, gate=(1.0, 1.0), annealed=0.0)
    constant = DecaySchedule(ranks=(), kept=4, num_steps=1, tail_share=0.1)
    assert [constant.at(step).gate for step in (0, 5)] == [(1.0,) * 4] * 2
    with pytest.raises(ValueError, match=r"phi.keep_rank=4 must be in 0..3, below the last of phi.ranks=\[4\]"):
        replace(KEPT, kept=4)


def test_a_phi_on_the_input_is_the_same_product_and_goes_away() -> None:
    """``phi.input=full`` without ``keep``: the branch's forward and backward pass while it has rank; no branch after that."""
    kept, layer = (kept_layer(smoothed=True, rotation=16) for _ in range(2))
    layer.phi.keep, layer.phi.on_input = False, True
    x, grad = make_rows(), torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(5))
    outputs = [one(x) for one in (kept, layer)]
    assert torch.equal(*outputs)
    published = kept_layer(smoothed=True, rotation=16)
    published.phi.keep = False
    with torch.no_grad():
        assert not torch.equal(published(x), outputs[0])  # on Q(X) it is another product
    for y in outputs:
        y.backward(grad)
    for (name, one), other in zip(kept.named_parameters(), layer.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    with pytest.raises(ValueError, match="Phi still has rank 4"):
        PackedLinear.from_fake_quant(layer)
    layer.phi.advance_(DecayState(rank=0, gate=(), annealed=0.0))
    packed = PackedLinear.from_fake_quant(layer, kernel="reference")
    assert packed.form.branch_rank == 0
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))
