"""The tiny family on a small random transformer, and the weights that travel with the package."""

import json
from pathlib import Path

import pytest
import torch

from qvgen.config.leaves import load_leaf
from qvgen.models.base import VideoDiT
from qvgen.models.tiny import TinyVideoDiT
from qvgen.models.tiny_family import TinyFamily
from qvgen.models.tiny_wide import TinyWideVideoDiT
from qvgen.models.weight_file import ASSETS_DIRECTORY, load_weights, save_weights


def _family(*, kind: type[TinyFamily] = TinyVideoDiT, **changes: object) -> TinyFamily:
    options = {
        "image_size": 8, "num_frames": 2, "width": 32, "num_layers": 1, "num_heads": 2, "feed_forward_size": 32,
        "text_size": 32, "frequency_size": 32, "shift": 3.0, "include": ["*"], "exclude": [],
        "prompts": ["a red three moving up"], "fps": 4, "num_inference_steps": 2, "guidance_scale": 2.0,
    }  # fmt: skip
    return kind(**(options | changes))


@pytest.fixture(scope="module")
def transformer() -> torch.nn.Module:
    return _family().initial_transformer(0).eval()


def test_it_is_a_family() -> None:
    assert isinstance(_family(), VideoDiT)
    assert isinstance(load_leaf("model", "tiny"), VideoDiT)


def test_a_video_depends_on_its_own_seed_and_caption_alone(transformer: torch.nn.Module) -> None:
    family = _family()
    captions, seeds = ["a red three moving up", "a blue nine standing still", "a cyan one moving left"], [5, 6, 7]
    together = family.generate(transformer, captions, seeds, num_steps=2, guidance_scale=2.0)
    assert together.shape == (3, 2, 8, 8, 3)
    assert together.dtype == torch.uint8
    for index in range(3):
        alone = family.generate(
            transformer, captions[index : index + 1], seeds[index : index + 1], num_steps=2, guidance_scale=2.0
        )
        # A matrix product of another height may round differently: at most one level of 255.
        assert (alone[0].int() - together[index].int()).abs().max() <= 1
    other = family.generate(transformer, captions, [5, 6, 8], num_steps=2, guidance_scale=2.0)
    assert not torch.equal(other[2], together[2])


def test_guidance_one_is_no_guidance(transformer: torch.nn.Module) -> None:
    family = _family()
    arguments = (transformer, ["a red three moving up"], [1])
    plain = family.generate(*arguments, num_steps=2, guidance_scale=1.0)
    assert not torch.equal(plain, family.generate(*arguments, num_steps=2, guidance_scale=9.0))
    near = family.generate(*arguments, num_steps=2, guidance_scale=1.0 + 1e-7)
    assert (plain.int() - near.int()).abs().max() <= 1


def test_prediction_hears_caption_timestep_and_place(transformer: torch.nn.Module) -> None:
    family = _family()
    noisy, time = torch.randn(1, *family.sample_shape), torch.tensor([500.0])

    def predict(caption: str, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return family.predict(transformer, video, timestep, family.encode([caption]))

    base = predict("a red three moving up", noisy, time)
    assert base.shape == noisy.shape
    assert not torch.allclose(base, predict("", noisy, time))
    assert not torch.allclose(base, predict("a red three moving up", noisy, time + 100))
    # Without coordinates a torus-shifted input would give the shifted output; with them it must not.
    shifted = predict("a red three moving up", noisy.roll(4, -1), time)
    assert not torch.allclose(base.roll(4, -1), shifted, atol=1e-3)


@pytest.mark.parametrize(
    "caption", ["a purple three moving up", "a red eleven moving up", "a red three", "red three up"]
)
def test_caption_that_is_not_understood_is_named(caption: str) -> None:
    with pytest.raises(ValueError, match=caption.split()[1] if "a " in caption else caption):
        _family().encode([caption])


def test_initial_weights_depend_on_the_seed_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (_family().initial_transformer(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_weights_round_trip_and_damage_is_found(tmp_path: Path, transformer: torch.nn.Module) -> None:
    path = save_weights(transformer.state_dict(), tmp_path / "w.safetensors", card={"seed": 0})
    family = _family(weights=str(path))
    loaded = family.load_teacher()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in transformer.state_dict().items())
    assert family.revision == json.loads(path.with_suffix(".json").read_text())["sha256"]
    with pytest.raises(ValueError, match="are of another model"):
        _family(weights=str(path), width=64).load_teacher()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.safetensors are corrupted: sha256 is"):
        family.load_teacher()
    path.unlink()
    with pytest.raises(ValueError, match=r"w\.safetensors can't be read"):
        family.load_teacher()


@pytest.mark.parametrize(
    ("name", "parameters", "dtype"),
    [
        ("tiny", 206_000, torch.float32),
        ("tiny_fewstep", 206_000, torch.float32),
        ("tiny_wide", 4_829_488, torch.bfloat16),
    ],
)
def test_the_shipped_teacher_is_the_one_its_card_describes(name: str, parameters: int, dtype: torch.dtype) -> None:
    family = load_leaf("model", name)
    assert family.name == name
    teacher = family.load_teacher()
    path = ASSETS_DIRECTORY / f"{name}_teacher.safetensors"
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert sum(p.numel() for p in teacher.parameters()) == parameters
    assert {value.dtype for value in teacher.parameters()} == {torch.float32}
    assert {value.dtype for value in load_weights(path).values()} == {dtype}
    assert path.stat().st_size < 12e6
    assert {"command", "seed", "steps", "seconds", "quality"} <= card.keys()
    assert card["quality"]["digit_accuracy"] > 0.9
    # One frame-by-frame look at what it makes: the digit that stands still does, and has the colour that was asked for.
    usual = {"num_steps": family.num_inference_steps, "guidance_scale": family.guidance_scale}
    wanted = (
        {"num_steps": 4, "guidance_scale": 1.0} if name == "tiny_fewstep" else {"num_steps": 20, "guidance_scale": 2.0}
    )
    assert usual == wanted
    video = family.generate(teacher, ["a red zero standing still"], [0], **usual)[0].float()
    assert (video - video.mean(0)).abs().mean() < 8  # levels of 255; a moving digit has about 40
    assert video[..., 0].mean() > 4 * video[..., 1:].mean()


def test_what_is_measured_after_pretraining_is_what_is_stored(tmp_path: Path) -> None:
    family = _family(kind=TinyWideVideoDiT)
    transformer = family.initial_transformer(0)
    family.round_to_stored(transformer)
    path = family.save_teacher(transformer, tmp_path, card={"seed": 0})
    assert path == tmp_path / "tiny_wide_teacher.safetensors"
    loaded = _family(kind=TinyWideVideoDiT, weights=str(path)).load_teacher().state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in transformer.state_dict().items())


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size=10"):
        _family(image_size=10)
    with pytest.raises(ValueError, match="unknown key 'widht'"):
        _family().build({"widht": 3})
