"""What holds for every family whose models are folders, as functions that the families' tests call."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

import qvgen
from qvgen.config.leaves import build_leaf, conf_directory, load_leaf
from qvgen.data.noise import add_noise
from qvgen.initializers.prepare import PrepareConfig
from qvgen.layers.swap import packed_layers, quantized_layers
from qvgen.quant.grid import Profile
from tests.models.hub_folders import CAPTIONS
from tests.profiles import make_profile

TINY_SIZES = {
    "height": 32, "width": 48, "num_frames": 9, "sampling_frames": 9, "dtype": "float32", "text_encoder_dtype": "float32",
}  # fmt: skip


def tiny_family(name: str, path: Path | None, **changes: Any) -> Any:
    """The family of ``conf/model/NAME.yaml`` with a tiny folder and clips of its size."""
    spec = yaml.safe_load((conf_directory() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    del spec["recipe"]
    return build_leaf({**spec, **TINY_SIZES, "path": None if path is None else str(path), **changes}, key="model")


def draw(family: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Noisy latents, timesteps and condition of two samples at two noise levels."""
    latents = torch.randn(2, *family.sample_shape, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    batch = add_noise(latents, CAPTIONS, objective=family.objective, generators=generators)
    assert batch.timestep[0] != batch.timestep[1]
    return batch.noisy, batch.timestep, family.encode(batch.captions)


def check_prediction_is_per_sample(family: Any, teacher: nn.Module) -> None:
    """Samples of one batch have timesteps, noise and captions of their own."""
    noisy, timestep, condition = draw(family)
    with torch.no_grad():
        together = family.predict(teacher, noisy, timestep, condition)
        assert together.shape == noisy.shape
        for i in range(2):
            alone = {key: value[i : i + 1] for key, value in condition.items()}
            single = family.predict(teacher, noisy[i : i + 1], timestep[i : i + 1], alone)
            assert torch.allclose(single[0], together[i], atol=1e-5)  # a product of another height rounds differently
        other = family.predict(teacher, noisy, timestep.flip(0), condition)
        assert not torch.allclose(other, together, atol=1e-4)


def check_one_training_step(family: Any, teacher: nn.Module) -> None:
    """Finite loss; first and last block, clips, scales and Phi have gradients."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    initializer = load_leaf("init", "rtn")
    report = qvgen.prepare(student, PrepareConfig(profile=profile, initializer=initializer, phi_rank=4))
    assert not report.skipped
    noisy, timestep, condition = draw(family)
    with torch.no_grad():
        target = family.predict(teacher, noisy, timestep, condition)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    def loss() -> torch.Tensor:
        return (family.predict(student, noisy, timestep, condition) - target).square().mean()

    before = loss()
    before.backward()
    layers = quantized_layers(student)
    blocks = sorted({int(part) for name in layers for part in name.split(".") if part.isdigit() and "blocks" in name})
    for layer in (name for name in layers if f"blocks.{blocks[0]}." in name or f"blocks.{blocks[-1]}." in name):
        for name, parameter in layers[layer].named_parameters():
            assert parameter.grad is not None, f"{layer}.{name}"
            assert torch.isfinite(parameter.grad).all(), f"{layer}.{name}"
        assert layers[layer].weight.grad.abs().max() > 0, layer
    optimizer.step()
    assert torch.isfinite(before)
    assert torch.isfinite(loss())


def check_packed_equals_fake_quantized(
    family: Any, teacher: nn.Module, directory: Path, *, profile: Profile | None = None
) -> None:
    """Prepare, fold, save, load: the packed pipeline's video is the fake-quantized one's, PSNR >= 50 dB.

    Args:
        family: The family.
        teacher: Its full-precision model.
        directory: Where the packed model is written.
        profile: None: W4A4 of the paper.
    """
    fake = copy.deepcopy(teacher)
    profile = profile or make_profile("paper", weight_bits=4, activation_bits=4)
    chosen = {"include": family.include, "exclude": family.exclude}
    qvgen.prepare(fake, PrepareConfig(profile=profile, initializer=load_leaf("init", "rtn"), **chosen))
    folded = copy.deepcopy(fake)
    assert qvgen.fold(folded) == len(quantized_layers(fake))
    qvgen.save_packed(folded, directory, base_name=family.name, base_revision=family.revision)
    packed = qvgen.load_packed(directory)
    assert type(packed).__name__ == family.transformer_class
    assert len(packed_layers(packed)) == len(quantized_layers(fake))
    arguments = {"num_steps": 2, "guidance_scale": 3.0}
    videos = [family.generate(model, CAPTIONS[:1], [3], **arguments) for model in (fake, packed, teacher)]
    assert psnr_db(videos[0], videos[1]) >= 50
    assert not torch.equal(videos[0], videos[2])  # quantization is heard at all


def check_generation_equals_the_pipeline(family: Any, teacher: nn.Module, pipeline: Any, **options: Any) -> None:
    """Bitwise the plain diffusers pipeline's video, for each caption and seed, whatever else is sampled beside it."""
    videos = family.generate(teacher, CAPTIONS, [7, 8], num_steps=3, guidance_scale=4.0)
    assert videos.dtype == torch.uint8
    for i, caption in enumerate(CAPTIONS):
        frames = pipeline(
            prompt=caption,
            height=family.height,
            width=family.width,
            num_frames=family.sampling_frames,
            num_inference_steps=3,
            guidance_scale=4.0,
            negative_prompt=family.negative_prompt,
            generator=torch.Generator().manual_seed(7 + i),
            output_type="pil",
            **options,
        ).frames[0]
        plain = np.stack([np.asarray(frame) for frame in frames])
        assert np.array_equal(videos[i].numpy(), plain)
    assert not torch.equal(videos[0], videos[1])
    check_guidance_leads_away_from_the_negative_prompt(family, teacher, videos[:1])


def check_guidance_leads_away_from_the_negative_prompt(family: Any, teacher: nn.Module, guided: torch.Tensor) -> None:
    """Another negative prompt is another video, the same one the same; without guidance none is encoded.

    Args:
        family: The family.
        teacher: Its transformer.
        guided: The video of the first caption and seed 7 with 3 steps and guidance 4, with the family's negative prompt.
    """

    def video(guidance: float = 4.0, negative: str | None = None, encode: Any = None) -> torch.Tensor:
        found: torch.Tensor = family.generate(
            teacher, CAPTIONS[:1], [7], num_steps=3, guidance_scale=guidance, negative_prompts=[negative], encode=encode
        )
        return found

    assert torch.equal(video(), guided)
    assert torch.equal(video(negative=family.negative_prompt), guided)
    assert not torch.equal(video(negative="two dogs"), guided)
    read: list[str] = []

    def encode(texts: Any) -> Any:
        read.extend(texts)
        return family.encode(texts)

    unguided = video(guidance=1.0, encode=encode)
    assert read == CAPTIONS[:1]
    assert torch.equal(unguided, video(guidance=1.0, negative="two dogs"))
    assert not torch.equal(unguided, guided)


def psnr_db(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of uint8 videos; 99 where they are equal."""
    error = (first.double() - second.double()).square().mean()
    return 99.0 if error == 0 else float(10 * torch.log10(255**2 / error))


def check_flow_objective(family: Any, *, shift: float) -> None:
    """Noise levels, timesteps, noised samples and the way back are those of diffusers' Euler scheduler, from levels i/N."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 9)[:-1])
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(8, 4, 3, 4, 6, generator=generator) for _ in range(2))
    objective = family.objective
    sigma = objective.shifted(torch.linspace(1, 0, 9)[:-1])
    assert torch.allclose(sigma, scheduler.sigmas[:-1], atol=1e-6)
    assert torch.allclose(objective.timestep(sigma), scheduler.timesteps, atol=1e-3)
    noisy = objective.add_noise(clean, noise, sigma=sigma)
    assert torch.allclose(noisy, scheduler.scale_noise(clean, scheduler.timesteps, noise), atol=1e-6)
    scheduler.set_begin_index(0)
    sample = noise[0].double()
    for t in scheduler.timesteps:
        sample = scheduler.step((noise[0] - clean[0]).double(), t, sample, return_dict=False)[0]
    assert torch.allclose(sample, clean[0].double(), atol=1e-5)  # eight steps in float32
    assert torch.equal(objective.target(clean, noise, sigma=sigma), noise - clean)
