"""Noise bands: floor(t * bands / 1000) of each sample's own timestep, whatever the batch it travels in."""

import copy

import pytest
import torch
from torch import nn

from qvgen.layers.noise_band import NoiseBand, watch_timestep
from tests.layers.model import BANDS, Model, make_inputs, make_model, prepared_model
from tests.profiles import make_profile


@pytest.mark.parametrize("num_bands", [1, 3, 7, 10, 36, 50, 130, 1000])
def test_bands_are_equal_parts_of_a_thousand(num_bands):
    """All whole timesteps, the first of each band included: integer division is the reference."""
    band = NoiseBand(num_bands)
    timesteps = torch.arange(1000)
    expected = timesteps * num_bands // 1000
    for dtype in (torch.int64, torch.int32, torch.float32, torch.float64):
        band.set_timestep(timesteps.to(dtype))
        assert band.current.dtype == torch.int64
        assert torch.equal(band.current, expected), dtype
    assert band.num_bands == num_bands


def test_golden_bands():
    band = NoiseBand(50)
    band.set_timestep(torch.tensor([0.0, 19.9, 20.0, 500.0, 979.9, 980.0, 999.9]))
    assert band.current.tolist() == [0, 0, 1, 25, 48, 49, 49]


def test_timesteps_outside_go_to_the_nearest_band():
    band = NoiseBand(50)
    band.set_timestep(torch.tensor([-5.0, 1000.0, 1e9]))  # schedulers with sigma = 1 ask for t = 1000
    assert band.current.tolist() == [0, 49, 49]


def test_rows_belong_to_samples_in_order():
    band = NoiseBand(10)
    band.set_timestep(torch.tensor([950, 50, 450]))
    assert band.row_index(torch.zeros(3, 7, 4)).tolist() == [9, 0, 4]
    assert band.row_index(torch.zeros(6, 4)).tolist() == [9, 9, 0, 0, 4, 4]  # two frames of each sample
    assert band.row_index(torch.zeros(0, 4)).tolist() == []
    band.set_timestep(torch.tensor(320))  # one timestep for all
    assert band.row_index(torch.zeros(5, 7, 4)).tolist() == [3] * 5


def test_a_sample_with_a_timestep_per_token_is_in_its_noisiest_tokens_band():
    band = NoiseBand(10)
    band.set_timestep(torch.tensor([[0, 950, 950], [50, 50, 50]]))  # the first sample begins with a clean image
    assert band.current.tolist() == [9, 0]
    assert band.row_index(torch.zeros(6, 4)).tolist() == [9, 9, 9, 0, 0, 0]


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="num_noise_bands=0 is not positive; the paper uses 50"):
        NoiseBand(0)
    band = NoiseBand(10)
    with pytest.raises(RuntimeError, match="called before its model: call the transformer with a timestep"):
        band.row_index(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"timestep has shape \[2, 3, 1\]; one number per sample or token"):
        band.set_timestep(torch.zeros(2, 3, 1))
    band.set_timestep(torch.zeros(3))
    with pytest.raises(ValueError, match="got 4 entries along dimension 0 for 3 samples; exclude this layer"):
        band.row_index(torch.zeros(4, 8))


def test_the_model_tells_its_timestep_however_it_is_called():
    model, band = make_model(), NoiseBand(10)
    watch_timestep(model, band)
    x, condition, timestep = make_inputs()
    with torch.no_grad():
        model(x, condition, timestep)
        assert band.current.tolist() == [0, 9, 4]
        model(x, condition=condition, timestep=timestep.flip(0))
        assert band.current.tolist() == [4, 9, 0]
        for scalar in (731, 731.0, torch.tensor(731)):
            model(x, condition, timestep=scalar)
            assert band.current.tolist() == [7]
    with pytest.raises(ValueError, match="needs its timestep argument: it chooses the noise band"):
        model(x, condition, timestep=None)
    with pytest.raises((TypeError, ValueError), match="timestep"):
        model(x, condition)


def test_models_without_a_timestep_are_refused():
    with pytest.raises(ValueError, match="Linear.forward has no argument named timestep; it is no diffusion"):
        watch_timestep(nn.Linear(2, 2), NoiseBand(10))


def test_a_copied_model_has_bands_of_its_own():
    model = prepared_model(make_profile("paper"))
    clone = copy.deepcopy(model)
    x, condition, timestep = make_inputs()
    with torch.no_grad():
        expected = model(x, condition, timestep)
        clone(x, condition, timestep.flip(0))
        bands = {
            id(module.noise_band): module.noise_band for module in clone.modules() if hasattr(module, "noise_band")
        }
        assert len(bands) == 1
        assert model.output.noise_band.current.tolist() == [0, 4, 2]
        assert clone.output.noise_band.current.tolist() == [2, 4, 0]
        assert torch.equal(clone(x, condition, timestep), expected)
    assert isinstance(model, Model)
    assert model.output.noise_band.num_bands == BANDS
