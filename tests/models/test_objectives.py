"""Flow matching against diffusers' own scheduler: the noise that training adds is the one that sampling takes away."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from qvgen.models.objectives import FlowMatching


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_and_noise_equal_the_schedulers(shift: float) -> None:
    objective = FlowMatching(shift=shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    clean, noise = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    for index in (0, 500, 999):
        # The scheduler's table: u = 1, 0.999, ..., 0.001, shifted.
        sigma = objective.shifted(torch.tensor(1.0 - index / 1000)).expand(2)
        assert torch.allclose(scheduler.sigmas[index].expand(2), sigma, atol=1e-6)
        assert torch.allclose(scheduler.timesteps[index], objective.timestep(sigma)[0], rtol=1e-6)
        theirs = scheduler.scale_noise(clean, scheduler.timesteps[index].expand(2), noise)
        assert torch.allclose(objective.add_noise(clean, noise, sigma=sigma), theirs, atol=1e-6)


def test_one_euler_step_with_the_target_reaches_the_clean_sample() -> None:
    objective = FlowMatching(shift=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(1)
    clean, noise = torch.randn(1, 3, 2, 4, 4), torch.randn(1, 3, 2, 4, 4)
    target = objective.target(clean, noise, sigma=torch.ones(1))
    start = objective.add_noise(clean, noise, sigma=torch.ones(1))
    end = scheduler.step(target, scheduler.timesteps[0], start, return_dict=False)[0]
    assert torch.allclose(end, clean, atol=1e-6)


def test_ends_are_exact_and_levels_are_per_sample() -> None:
    objective = FlowMatching()
    clean, noise = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    mixed = objective.add_noise(clean, noise, sigma=torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], clean[0])
    assert torch.equal(mixed[1], noise[1])
    with pytest.raises(ValueError, match="one noise level per sample"):
        objective.add_noise(clean, noise, sigma=torch.ones(3))


def test_shift_moves_half_of_the_draws_above_three_quarters() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([FlowMatching(shift=3.0).sample_sigma(generator=generator) for _ in range(2000)])
    assert abs(float((draws > 0.75).float().mean()) - 0.5) < 0.05  # 4.5 standard deviations
    with pytest.raises(ValueError, match=r"shift=0\.5"):
        FlowMatching(shift=0.5)
