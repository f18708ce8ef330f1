"""The objectives against diffusers' own schedulers: the noise that training adds is the one that sampling takes away."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from qvgen.models.objectives import EpsilonPrediction, FlowMatching, VPrediction


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


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_sigmas_equal_those_that_wan_is_sampled_with(shift: float) -> None:
    objective = FlowMatching(shift=shift)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    scheduler.set_timesteps(50)
    expected = objective.shifted(torch.linspace(1, 1 / 1000, 51)[:-1])
    # The first is 1 - 1e-6 there, so that its logarithm of alpha is finite.
    assert torch.allclose(scheduler.sigmas[:50], expected, rtol=0, atol=1.1e-6)
    # The scheduler tells the transformer whole numbers: at most 1 off.
    assert (scheduler.timesteps - objective.timestep(expected)).abs().max() <= 1
    clean, noise = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    for index in (0, 25, 49):
        sigma = scheduler.sigmas[index].expand(2)
        theirs = scheduler.add_noise(clean, noise, scheduler.timesteps[index].expand(2))
        assert torch.allclose(objective.add_noise(clean, noise, sigma=sigma), theirs, atol=1e-6)


def test_draws_of_a_part_are_the_shifted_density_cut() -> None:
    """Against rejection: draws of the whole range that fall into the part."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.stack([FlowMatching(shift=3.0).sample_sigma(generator=generator) for _ in range(8000)])
    for lowest, highest in ((0.875, 1.0), (0.0, 0.875)):
        part = FlowMatching(shift=3.0, lowest=lowest, highest=highest)
        draws = torch.stack([part.sample_sigma(generator=generator) for _ in range(2000)])
        kept = whole[(whole >= lowest) & (whole < highest)]
        spread = kept.std() * (1 / len(kept) + 1 / 2000) ** 0.5
        assert abs(float(draws.mean() - kept.mean())) < 5 * spread  # 5 standard deviations
    with pytest.raises(ValueError, match=r"lowest=0\.9 and highest=0\.5 are no range"):
        FlowMatching(lowest=0.9, highest=0.5)


def _cogvideox(snr_shift_scale: float, zero: bool) -> tuple[VPrediction, CogVideoXDDIMScheduler]:
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        rescale_betas_zero_snr=zero,
        snr_shift_scale=snr_shift_scale,
    )
    return VPrediction(snr_shift_scale=snr_shift_scale, zero_terminal_snr=zero), scheduler


@pytest.mark.parametrize(("snr_shift_scale", "zero"), [(3.0, True), (1.0, True), (3.0, False)])
def test_v_prediction_equals_the_schedulers(snr_shift_scale: float, zero: bool) -> None:
    """Noise and velocity at every timestep, each sample with another one."""
    objective, scheduler = _cogvideox(snr_shift_scale, zero)
    clean, noise = torch.randn(1000, 2, 1, 2, 2), torch.randn(1000, 2, 1, 2, 2)
    timesteps = torch.arange(1000)
    sigma = timesteps / 1000
    assert torch.equal(objective.timestep(sigma), timesteps.float())
    theirs = scheduler.add_noise(clean, noise, timesteps)
    assert torch.allclose(objective.add_noise(clean, noise, sigma=sigma), theirs, rtol=0, atol=1e-6)
    velocity = scheduler.get_velocity(clean, noise, timesteps)
    assert torch.allclose(objective.target(clean, noise, sigma=sigma), velocity, rtol=0, atol=1e-6)
    if zero:
        assert torch.equal(objective.add_noise(clean, noise, sigma=sigma)[-1], noise[-1])


def test_one_ddim_step_with_the_velocity_reaches_the_clean_sample() -> None:
    objective, scheduler = _cogvideox(3.0, True)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    clean, noise = torch.randn(1, 2, 2, 4, 4), torch.randn(1, 2, 2, 4, 4)
    sigma = torch.tensor([0.999])
    start, target = objective.add_noise(clean, noise, sigma=sigma), objective.target(clean, noise, sigma=sigma)
    found = scheduler.step(target, scheduler.timesteps[0], start, return_dict=False)[1]
    assert torch.allclose(found, clean, atol=1e-6)


def test_epsilon_prediction_equals_the_scheduler() -> None:
    """Noise at every timestep, each sample with another one; and one DDIM step with the target reaches the clean sample."""
    objective, scheduler = EpsilonPrediction(), DDIMScheduler(clip_sample=False)
    assert torch.equal(objective.alphas_cumprod, scheduler.alphas_cumprod)
    clean, noise = torch.randn(1000, 2, 1, 2, 2), torch.randn(1000, 2, 1, 2, 2)
    timesteps = torch.arange(1000)
    noisy = objective.add_noise(clean, noise, sigma=timesteps / 1000)
    assert torch.allclose(noisy, scheduler.add_noise(clean, noise, timesteps), rtol=0, atol=1e-6)
    assert torch.equal(objective.target(clean, noise, sigma=timesteps / 1000), noise)
    assert torch.equal(objective.noise(noise, noisy=noisy, timestep=timesteps.float()), noise)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [500, 0]
    found = scheduler.step(noise[500:501], scheduler.timesteps[0], noisy[500:501], return_dict=False)[1]
    assert torch.allclose(found, clean[500:501], atol=1e-5)  # noise is 3.5 times the signal there
    low, high = objective.log_ratio_ends
    assert (low, high) == pytest.approx((-4.605, 5.0588), abs=1e-3)  # log(b / a) of abar = 0.9999 and 4.036e-5
    assert float(objective.sigma_at(torch.tensor(high))) == pytest.approx(0.999)
    with pytest.raises(ValueError, match=r"beta_start=0\.5 and beta_end=0\.1 .*; Latte uses 0.0001 and 0.02"):
        EpsilonPrediction(beta_start=0.5, beta_end=0.1)


def test_v_prediction_draws_whole_timesteps_uniformly() -> None:
    generator = torch.Generator().manual_seed(0)
    objective = VPrediction()
    draws = torch.stack([objective.sample_sigma(generator=generator) for _ in range(4000)])
    times = objective.timestep(draws)
    assert torch.allclose(times, draws * 1000, atol=1e-3)
    assert times.min() < 10
    assert times.max() > 989
    assert times.max() <= 999
    assert abs(float(times.mean()) - 499.5) < 5 * 289 / 4000**0.5  # 5 standard deviations


def test_v_prediction_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="snr_shift_scale=0"):
        VPrediction(snr_shift_scale=0)
    with pytest.raises(ValueError, match=r"beta_start=0\.5 and beta_end=0\.1"):
        VPrediction(beta_start=0.5, beta_end=0.1)
    clean = torch.randn(2, 3, 2, 4, 4)
    with pytest.raises(ValueError, match="one noise level per sample"):
        VPrediction().add_noise(clean, clean, sigma=torch.zeros(3))
