"""The held-out inputs of every run are the same, whatever its seed: errors of methods and seeds can be compared in pairs."""

from __future__ import annotations

import torch

from qvgen.data.noise import add_noise, sample_generator
from qvgen.evaluation.held_out import HELD_OUT_SEED, MeasuredInputs
from qvgen.evaluation.prompts import evaluation_prompts
from qvgen.evaluation.sampled_inputs import SampledInputs
from qvgen.verbs._inputs import open_inputs
from qvgen.verbs._parts import sampled_teacher
from tests.runs import train_config


def inputs_of(*overrides: str) -> MeasuredInputs:
    config = train_config("evaluation.samples=4", *overrides)
    return open_inputs(config)(config.model.load_teacher())


def test_clips_get_the_noise_of_seed_42_in_every_run() -> None:
    config = train_config("evaluation.samples=4")
    split = config.data.open(config.model, split="held_out")
    items = [split.samples[index] for index in range(4)]
    expected = add_noise(
        torch.stack([item["video"] for item in items]),
        [item["caption"] for item in items],
        objective=config.model.objective,
        generators=[sample_generator("held_out", 42, index) for index in range(4)],
    )
    for seed in (42, 1, 2):
        found = inputs_of(f"seed={seed}")
        assert found.seed == HELD_OUT_SEED == 42
        batches = found._batches
        assert torch.equal(torch.cat([batch.noisy for batch in batches]), expected.noisy)
        assert torch.equal(torch.cat([batch.timestep for batch in batches]), expected.timestep)
        assert [caption for batch in batches for caption in batch.captions] == expected.captions


def test_without_clips_the_recorded_inputs_are_the_same_too() -> None:
    found = []
    for seed in (42, 7):
        config = train_config(f"seed={seed}")
        teacher = sampled_teacher(config, config.model.load_teacher(), encode=config.model.encode)
        prompts = evaluation_prompts(config.evaluation, config.model)
        recorded = SampledInputs(teacher, prompts=prompts, num_samples=2, num_steps=2)
        assert recorded.seed == HELD_OUT_SEED
        found.append([arguments[0] for arguments, _ in recorded._calls])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
