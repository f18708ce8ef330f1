"""Phi: its start, its gate, and that dropping what the gate has closed changes nothing (QVGen, Sec. 3.2 and 3.3)."""

import pytest
import torch

from qvgen.lowrank.decay import DecaySchedule
from qvgen.lowrank.phi import Phi
from tests import oracles

ROWS, COLUMNS, RANK = 48, 64, 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_phi(seed=0):
    phi = Phi(out_features=ROWS, in_features=COLUMNS, rank=RANK)
    phi.start_from_(draw(ROWS, COLUMNS, seed=seed), generator=torch.Generator().manual_seed(seed))
    return phi


def disturb_(phi, seed):
    """What an optimizer step does: every allocated column moves along its gradient, gated ones too."""
    with torch.no_grad():
        phi.left.add_(draw(*phi.left.shape, seed=seed) * 0.05 * (phi.rank_gate > 0))
        phi.right.add_(draw(*phi.right.shape, seed=seed + 1) * 0.05 * (phi.rank_gate > 0).unsqueeze(-1))


def exact_weight(phi):
    return (phi.left.detach().double() * phi.rank_gate.double()) @ phi.right.detach().double()


def test_it_starts_as_the_best_approximation():
    residual = draw(ROWS, COLUMNS)
    phi = make_phi()
    error = (residual.double() - exact_weight(phi)).square().sum().item()
    assert error <= 1.01 * oracles.best_rank_error(residual.double().numpy(), RANK)  # truncated_svd's bound
    assert (phi.rank, phi.capacity, phi.active) == (RANK, RANK, True)
    assert (phi.rank_gate == 1).all()
    assert {name for name, _ in phi.named_parameters()} == {"left", "right"}
    assert set(phi.state_dict()) == {"left", "right", "rank_gate", "active_rank"}
    assert repr(phi) == f"Phi(rank={RANK}/{RANK}, out={ROWS}, in={COLUMNS})"


@pytest.mark.parametrize("drop", ["smallest", "largest", "random"])
@pytest.mark.parametrize("anneal", ["cosine", "step"])
def test_dropping_closed_columns_keeps_the_weight(drop, anneal):
    """Through every boundary: the gate is exactly 0 first, W_phi moves by at most 1e-6, storage stays the same."""
    plan = DecaySchedule(ranks=(8, 4, 2, 1), num_steps=40, tail_share=0.1, anneal=anneal, drop=drop)
    phi = make_phi()
    parameters = {name: (id(value), value.data_ptr(), value.shape) for name, value in phi.named_parameters()}
    boundaries = 0
    for step in range(45):
        state, before, old_rank = plan.at(step), exact_weight(phi), phi.rank
        old_gate = phi.rank_gate.clone()
        rewritten = phi.advance_(state)
        assert rewritten == (state.rank < old_rank)
        assert phi.rank == state.rank == int(phi.active_rank)
        assert phi.rank_gate[: state.rank].tolist() == pytest.approx(state.gate, rel=1e-7)  # cast to float32
        assert (phi.rank_gate[state.rank :] == 0).all()
        if rewritten:
            boundaries += 1
            closed = old_gate[:old_rank] == 0
            assert int(closed.sum()) == old_rank - state.rank
            assert (phi.left[:, state.rank :] == 0).all()
            assert (phi.right[state.rank :] == 0).all()
            # Columns of the next phase open at 1: compare before it closes any of them.
            size = before.norm().item()
            after = phi.left.detach().double() @ phi.right.detach().double()
            assert (after - before).norm().item() <= 1e-6 * size
            sizes = phi.left[:, : state.rank].detach().double().norm(dim=0)
            assert (sizes.diff() <= 1e-6 * size).all()  # sorted again
        again = {name: value.clone() for name, value in phi.state_dict().items()}
        assert not phi.advance_(state)  # safe to call again
        assert all(torch.equal(value, again[name]) for name, value in phi.state_dict().items())
        disturb_(phi, seed=step)
    assert boundaries == 4
    assert not phi.active
    assert {name: (id(v), v.data_ptr(), v.shape) for name, v in phi.named_parameters()} == parameters
    assert (phi.weight() == 0).all()


def test_the_gate_scales_columns_and_their_gradients():
    phi = make_phi()
    phi.advance_(DecaySchedule(ranks=(8, 2), num_steps=20, anneal="linear", tail_share=0.0).at(3))
    expected_gate = [1.0, 1.0] + [2 / 3] * 6  # the fourth of ten steps
    assert phi.rank_gate.tolist() == pytest.approx(expected_gate, rel=1e-7)
    grad = draw(ROWS, COLUMNS, seed=3)
    phi.weight().backward(grad)
    gate = phi.rank_gate.double()
    torch.testing.assert_close(phi.weight().double(), exact_weight(phi), rtol=0, atol=1e-5)  # 8 products of ~1
    expected = (grad.double() @ phi.right.detach().double().T) * gate
    torch.testing.assert_close(phi.left.grad.double(), expected, rtol=0, atol=1e-4)  # sums of 64 terms of ~1
    expected = (phi.left.detach().double() * gate).T @ grad.double()
    torch.testing.assert_close(phi.right.grad.double(), expected, rtol=0, atol=1e-4)


def test_rank_comes_back_from_a_state_dict():
    """Resume: rank, gate and factors, and every later step, bitwise."""
    plan = DecaySchedule(ranks=(8, 4, 2), num_steps=30, tail_share=0.1)
    for stop in (0, 8, 9, 10, 17, 18, 29):  # before, at and after boundaries, and the tail
        phi = make_phi()
        for step in range(stop + 1):
            phi.advance_(plan.at(step))
            disturb_(phi, seed=step)
        resumed = Phi(out_features=ROWS, in_features=COLUMNS, rank=RANK)
        resumed.load_state_dict({name: value.clone() for name, value in phi.state_dict().items()}, strict=True)
        assert (resumed.rank, resumed.active) == (phi.rank, phi.active) == (plan.at(stop).rank, plan.at(stop).rank > 0)
        for step in range(stop + 1, 30):
            for module in (phi, resumed):
                module.advance_(plan.at(step))
                disturb_(module, seed=step)
        for name, value in phi.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name])


def test_a_suspended_phi_is_left_out_and_not_saved():
    phi = make_phi()
    phi.suspended = True
    assert not phi.active
    assert phi.rank == RANK
    assert set(phi.state_dict()) == {"left", "right", "rank_gate", "active_rank"}


def test_starting_again_opens_everything():
    phi = make_phi()
    phi.advance_(DecaySchedule(ranks=(8,), num_steps=10, tail_share=0.1).at(9))
    assert phi.rank == 0
    phi.start_from_(draw(ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    fresh = make_phi()
    assert phi.rank == RANK
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in phi.state_dict().items())


@pytest.mark.parametrize("rank", [0, -1, 49])
def test_ranks_that_do_not_fit_are_refused(rank):
    with pytest.raises(ValueError, match=f"phi.rank={rank} is outside 1..48 for a Linear 64 -> 48"):
        Phi(out_features=ROWS, in_features=COLUMNS, rank=rank)
    assert [Phi(out_features=ROWS, in_features=COLUMNS, rank=rank).capacity for rank in (1, 48)] == [1, 48]


def started(start):
    phi = Phi(out_features=ROWS, in_features=COLUMNS, rank=RANK)
    phi.start = start
    phi.start_from_(draw(ROWS, COLUMNS), generator=torch.Generator().manual_seed(3))
    return phi


def test_a_random_start_is_as_large_as_the_best_one_and_points_elsewhere():
    best, phi = exact_weight(make_phi()), started("random")
    found = exact_weight(phi)
    assert found.norm().item() == pytest.approx(best.norm().item(), rel=1e-5)  # randomized SVD
    angle = (found * best).sum() / best.norm() / found.norm()
    assert abs(angle) < 0.1  # of random directions in 3072 dimensions: about 0.02
    singular = torch.linalg.svdvals(found)[:RANK]
    sizes = phi.left.detach().double().norm(dim=0) * phi.right.detach().double().norm(dim=1)
    torch.testing.assert_close(sizes, singular, rtol=1e-5, atol=0)  # sorted, and split into columns that are orthogonal
    assert all(torch.equal(a, b) for a, b in zip(phi.parameters(), started("random").parameters(), strict=True))


def test_a_start_of_zero_changes_nothing_and_has_a_gradient():
    phi, drawn = started("zero"), started("random")
    assert (phi.weight() == 0).all()
    assert torch.equal(phi.right, drawn.right)
    assert (phi.rank, int(phi.active_rank)) == (RANK, RANK)
    phi.weight().backward(draw(ROWS, COLUMNS, seed=3))
    assert phi.left.grad.abs().min() > 0
