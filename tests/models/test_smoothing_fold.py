"""Smoothing vectors inside of what stands before a layer, on the real diffusers classes of every family, tiny.

Checked against the model that was not touched, in float32, and against the same method with explicit multiplications.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from torch import nn

import qvgen
from qvgen.config.leaves import load_leaf
from qvgen.initializers.calibration import Calibration
from qvgen.initializers.prepare import PrepareConfig
from qvgen.layers.smoothing_fold import SmoothingFold, fold_input_scale_
from qvgen.layers.swap import packed_layers, quantized_layers, select_linears
from qvgen.models.base import VideoDiT
from qvgen.models.stdit3.transformer import STDiT3
from tests.models.further_folders import HUNYUAN, HUNYUAN15, MOCHI
from tests.models.hub_folders import COGVIDEOX_VARIANTS
from tests.models.ltx_folders import LATTE_TRANSFORMER, LTX_TRANSFORMER
from tests.models.opensora_folders import OPENSORA_TRANSFORMER
from tests.profiles import make_profile

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's transformer turns it off, in its own way
ROUNDING = 1e-5
"""Relative, of outputs in float32 after two or three blocks whose weights were multiplied and divided."""

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32,
    "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16,
    "text_embed_dim": 16, "num_layers": 2,
}  # fmt: skip

WAN_FOLDS = {("attn1.to_out.0",), ("attn2.to_out.0",), ("attn2.to_q",)}
COGVIDEOX_FOLDS = {("attn1.to_out.0",), ("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("ff.net.0.proj",), ("proj_out",)}
VIDEO = ("to_q", "to_k", "to_v")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj")
REFINER_FOLDS = {
    tuple(f"refiner_blocks.0.{name}" for name in names)
    for names in (("attn.to_out.0",), ("attn.to_q", "attn.to_k", "attn.to_v"), ("ff.net.0.proj",))
}
HUNYUAN_FOLDS = REFINER_FOLDS | {
    tuple(f"attn.{name}" for name in VIDEO), tuple(f"attn.{name}" for name in TEXT), ("ff.net.0.proj",),
    ("ff_context.net.0.proj",), (*(f"attn.{name}" for name in VIDEO), "proj_mlp"), ("proj_out",),
}  # fmt: skip
EMBEDDER_FOLDS = {("context_embedder_2.linear_1",), ("image_embedder.linear_1",)}
HUNYUAN15_FOLDS = EMBEDDER_FOLDS | {fold for fold in HUNYUAN_FOLDS if "proj_mlp" not in fold}
MOCHI_TEXT_FOLDS = {("ff_context.net.0.proj",), ("ff_context.net.2",)}
MOCHI_FOLDS = MOCHI_TEXT_FOLDS | {
    tuple(f"attn1.{name}" for name in VIDEO), tuple(f"attn1.{name}" for name in TEXT), ("ff.net.0.proj",), ("ff.net.2",),
    ("proj_out",),
}  # fmt: skip
ONCE = {
    "hunyuanvideo": REFINER_FOLDS | {("proj_out",)},
    "hunyuanvideo1.5": REFINER_FOLDS | EMBEDDER_FOLDS | {("proj_out",)},
    "mochi": MOCHI_TEXT_FOLDS | {("proj_out",)},
}
"""Folds that are not in every block: HunyuanVideo's refiner has one, and Mochi's last block no net for the text."""
OPENSORA_FOLDS = {(f"{kind}{name}.proj",) for kind in ("", "temporal.") for name in ("attn", "cross_attn")}
VALUES_ALONE = {("attn1.to_out.0",), ("attn2.to_out.0",)}

# variant: family, changes of the class's tiny configuration, what is folded (names without their block's)
VARIANTS: dict[str, tuple[str, dict[str, Any], set[tuple[str, ...]]]] = {
    "tiny": ("tiny", {}, WAN_FOLDS),
    "small": ("small", {"num_layers": 2}, WAN_FOLDS),
    "wan": ("wan", {}, WAN_FOLDS),
    "wan without the norm of cross-attention": ("wan", {"cross_attn_norm": False}, VALUES_ALONE),
    "wan with an image": ("wan", {"image_dim": 24, "added_kv_proj_dim": 32}, WAN_FOLDS),
    "cogvideox": ("cogvideox", COGVIDEOX_VARIANTS["2b"], COGVIDEOX_FOLDS),
    "cogvideox-5b": ("cogvideox-5b", COGVIDEOX_VARIANTS["5b"], COGVIDEOX_FOLDS),
    "cogvideox1.5": ("cogvideox1.5", COGVIDEOX_VARIANTS["1.5"], COGVIDEOX_FOLDS),
    "cogvideox without affine norms": (
        "cogvideox", {**COGVIDEOX_VARIANTS["2b"], "norm_elementwise_affine": False}, {("attn1.to_out.0",)},
    ),
    "ltx": ("ltx", LTX_TRANSFORMER, VALUES_ALONE),
    "latte": ("latte", LATTE_TRANSFORMER, {*VALUES_ALONE, ("temporal.attn1.to_out.0",)}),
    "opensora": ("opensora", OPENSORA_TRANSFORMER, OPENSORA_FOLDS),
    "hunyuanvideo": ("hunyuanvideo", HUNYUAN, HUNYUAN_FOLDS),
    "hunyuanvideo1.5": ("hunyuanvideo1.5", HUNYUAN15, HUNYUAN15_FOLDS),
    "mochi": ("mochi", MOCHI, MOCHI_FOLDS),
}  # fmt: skip


def make(name: str) -> tuple[VideoDiT, nn.Module, dict[str, Any]]:
    """Family, transformer whose every parameter is random (norms and modulations too), and arguments of a call."""
    family_name, changes, _ = VARIANTS[name]
    family: Any = load_leaf("model", family_name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family_name == "tiny":
            model: Any = family.load_teacher()
        elif family_name == "small":
            model = family.build({**family.transformer_config, **changes})
        elif family.transformer_class == "WanTransformer3DModel":
            model = WanTransformer3DModel(**WAN, **changes)
        elif family.transformer_class == "CogVideoXTransformer3DModel":
            model = CogVideoXTransformer3DModel(**COGVIDEOX, **changes)
        else:
            model = family.build(changes)
        for parameter in model.parameters():
            if parameter.ndim < 2 or parameter.ndim == 3:
                parameter.data += 0.3 * torch.randn(parameter.shape)
        return family, model.eval().requires_grad_(False), call_of(model)


def call_of(model: Any) -> dict[str, Any]:
    config = model.config
    if "caption_channels" in config:
        return call_with_mask(model)
    frames = 2 if config.get("patch_size_t") else 3
    if isinstance(model, HunyuanVideoTransformer3DModel | MochiTransformer3DModel):
        call = {
            "hidden_states": torch.randn(2, config.in_channels, frames, 4, 6),
            "encoder_hidden_states": torch.randn(2, 5, config.text_embed_dim)
            * torch.logspace(-1, 1, config.text_embed_dim),
            "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 1], [1.0, 1, 1, 0, 0]]),
        }
        if isinstance(model, HunyuanVideoTransformer3DModel):
            call["pooled_projections"] = torch.randn(2, config.pooled_projection_dim)
            call["guidance"] = torch.tensor([6000.0, 6000.0])
    elif isinstance(model, HunyuanVideo15Transformer3DModel):
        call = {
            "hidden_states": torch.randn(2, config.in_channels, frames, 4, 6),
            "image_embeds": torch.randn(2, 3, config.image_embed_dim),
            "encoder_hidden_states": torch.randn(2, 5, config.text_embed_dim)
            * torch.logspace(-1, 1, config.text_embed_dim),
            "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 1], [1.0, 1, 1, 0, 0]]),
            "encoder_hidden_states_2": torch.randn(2, 4, config.text_embed_2_dim),
            "encoder_attention_mask_2": torch.tensor([[1.0, 1, 1, 1], [1.0, 1, 0, 0]]),
        }
    elif isinstance(model, WanTransformer3DModel):
        text = torch.randn(2, 512 if config.image_dim else 5, config.text_dim)
        call = {
            "hidden_states": torch.randn(2, config.in_channels, frames, 8, 8),
            "encoder_hidden_states": text * torch.logspace(-1, 1, config.text_dim),
        }
        if config.image_dim:
            call["encoder_hidden_states_image"] = torch.randn(2, 3, config.image_dim)
    else:
        text = torch.randn(2, 226, config.text_embed_dim)
        call = {"hidden_states": torch.randn(2, frames, 4, 4, 6), "encoder_hidden_states": text}
        if config.use_rotary_positional_embeddings:
            tokens = (frames // (config.patch_size_t or 1)) * 2 * 3
            angles = torch.rand(tokens, config.attention_head_dim // 2).repeat_interleave(2, 1)
            call["image_rotary_emb"] = (angles.cos(), angles.sin())
    return {**call, "timestep": torch.tensor([900.0, 100.0]), "return_dict": False}


def call_with_mask(model: Any) -> dict[str, Any]:
    """A call of LTX, Latte or Open-Sora: the second caption has two tokens fewer."""
    config, own = model.config, torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])
    call = {
        "encoder_hidden_states": torch.randn(2, 5, config.caption_channels) * torch.logspace(-1, 1, config.caption_channels),
        "timestep": torch.tensor([900.0, 100.0]), "return_dict": False,
    }  # fmt: skip
    if isinstance(model, LTXVideoTransformer3DModel):
        tokens = {"hidden_states": torch.randn(2, 12, config.in_channels), "encoder_attention_mask": own}
        return {**call, **tokens, "num_frames": 3, "height": 2, "width": 2, "rope_interpolation_scale": (0.3, 32, 32)}
    if isinstance(model, STDiT3):
        rate = torch.tensor([24.0, 8.0])
        latents = torch.randn(2, config.in_channels, 3, 4, 6)
        return {**call, "hidden_states": latents, "encoder_attention_mask": own, "fps": rate}
    frames = config.video_length
    mask = ((1 - own) * -1e4).unsqueeze(1).repeat_interleave(frames, dim=0)
    return {**call, "hidden_states": torch.randn(2, config.in_channels, frames, 4, 6), "encoder_attention_mask": mask}


def run(model: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**call)[0]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def random_factor(size: int, seed: int) -> torch.Tensor:
    """Between 0.1 and 10, with both signs."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return signs * 10 ** (2 * torch.rand(size, generator=generator) - 1)


def short(fold: SmoothingFold) -> tuple[str, ...]:
    short = [".".join(name.split(".")[2:]) if "blocks." in name else name for name in fold.consumers]
    return tuple(f"temporal.{end}" if fold.consumers[0].startswith("temporal") else end for end in short)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fold_changes_no_output(name: str) -> None:
    family, model, call = make(name)
    exact = run(model, call)
    folds = family.smoothing_folds(model)
    assert {short(fold) for fold in folds} == VARIANTS[name][2]
    num_blocks = model.config.num_layers
    once = ONCE.get(name, {("proj_out",)})
    assert len(folds) == sum(1 if fold in once else num_blocks for fold in VARIANTS[name][2])
    folded = copy.deepcopy(model)
    for index, fold in enumerate(folds):
        factor = random_factor(model.get_submodule(fold.consumers[0]).in_features, index)
        alone = copy.deepcopy(model)
        fold_input_scale_(alone, fold, factor)
        assert distance(run(alone, call), exact) <= ROUNDING, fold
        fold_input_scale_(folded, fold, factor)
        if "blocks.1" in fold.consumers[0] or "blocks.2" in fold.consumers[0]:
            continue  # what the last block makes of the text tokens is read by nobody
        for left_out in range(len(fold.producers)):  # every part of it counts
            kept = tuple(part for place, part in enumerate(fold.producers) if place != left_out)
            broken = copy.deepcopy(model)
            fold_input_scale_(broken, replace(fold, producers=kept), factor)
            assert distance(run(broken, call), exact) > 10 * ROUNDING, (fold, left_out)
    assert distance(run(folded, call), exact) <= ROUNDING


@pytest.mark.parametrize(
    ("name", "init"),
    [*((name, "smoothquant") for name in VARIANTS), *((name, "vidit_q") for name in ("tiny", "wan", "cogvideox"))],
)
def test_a_method_folds_what_it_can_and_is_no_worse(name: str, init: str, tmp_path) -> None:
    family, teacher, call = make(name)
    exact = run(teacher, call)
    folds = family.smoothing_folds(teacher)
    at_folds = {consumer for fold in folds for consumer in fold.consumers}
    profile = make_profile("paper", weight_bits=4, activation_bits=6)
    names = select_linears(teacher, include=("*",), exclude=()).quantized
    initializers = {folding: load_leaf("init", init, fold_smoothing=folding) for folding in (True, False)}
    with Calibration(teacher, names=names, needs={"abs_max"}, num_bands=50, seed=0) as watch:
        run(teacher, call)
    errors = {}
    for folding, initializer in initializers.items():
        student = copy.deepcopy(teacher)
        config = PrepareConfig(profile=profile, initializer=initializer, statistics=watch.statistics, folds=folds)
        qvgen.prepare(student, config)
        layers = quantized_layers(student)
        smoothed = {key for key, layer in layers.items() if layer.input_scale is not None}
        assert smoothed == set(layers) - (at_folds if folding else set())
        errors[folding] = distance(run(student, call), exact)
        if not folding:
            continue
        # Without its grids the student is the teacher: the fold moved scales and nothing else.
        plain = copy.deepcopy(teacher)
        state = student.state_dict()
        for key, value in plain.state_dict().items():
            if key in state and key.rpartition(".")[0] not in layers:
                value.copy_(state[key])
        for key, layer in layers.items():
            linear = plain.get_submodule(key)
            linear.weight.copy_(layer.original_weight())
            if linear.bias is not None:
                linear.bias.copy_(layer.bias)
        assert distance(run(plain, call), exact) <= 2 * ROUNDING  # and a rotation there and back
        fake = run(student, call)
        qvgen.fold(student)
        qvgen.save_packed(student, tmp_path)
        packed = qvgen.load_packed(tmp_path)
        assert torch.equal(run(packed, call), fake)
        assert {key for key, layer in packed_layers(packed).items() if layer.input_scale is None} == at_folds
    assert errors[True] < 1.15 * errors[False]  # one m for three layers, and other ties: a draw


def test_layers_that_are_not_quantized_are_folded_along_and_never_alone() -> None:
    """Without to_v and proj_out among the quantized, the scales of to_q and to_k serve all three, and proj_out has none."""
    family, teacher, call = make("cogvideox")
    exact = run(teacher, call)
    exclude = ("*.attn1.to_v", "proj_out")
    names = select_linears(teacher, include=("*",), exclude=exclude).quantized
    with Calibration(teacher, names=names, needs={"abs_max"}, num_bands=50, seed=0) as watch:
        run(teacher, call)
    student = copy.deepcopy(teacher)
    profile = make_profile("paper", weight_bits=8, activation_bits=8)
    config = PrepareConfig(
        profile=profile, initializer=load_leaf("init", "smoothquant"), exclude=exclude, statistics=watch.statistics,
        folds=family.smoothing_folds(teacher),
    )  # fmt: skip
    qvgen.prepare(student, config)
    assert distance(run(student, call), exact) < 0.05
    value, query = (f"transformer_blocks.0.attn1.to_{part}" for part in "vq")
    assert not torch.equal(student.get_submodule(value).weight, teacher.get_submodule(value).weight)
    assert quantized_layers(student)[query].input_scale is None
    assert torch.equal(student.proj_out.weight, teacher.proj_out.weight)
    assert torch.equal(student.norm_out.norm.weight, teacher.norm_out.norm.weight)


@pytest.mark.parametrize("factor", [torch.ones(31), torch.zeros(32), torch.full((32,), float("inf"))])
def test_a_factor_that_does_not_fit_is_refused(factor: torch.Tensor) -> None:
    family, model, _ = make("wan")
    fold = family.smoothing_folds(model)[0]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"input_scale of blocks\.0\.attn1\.to_out\.0 must be \['32'\] finite values"):
        fold_input_scale_(model, fold, factor)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("branched", ["blocks.0.attn1.to_v", "blocks.0.attn1.to_out.0"])
def test_a_layer_with_a_branch_is_refused(branched: str) -> None:
    family, model, _ = make("wan")
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    qvgen.prepare(model, PrepareConfig(profile=profile, initializer=load_leaf("init", "rtn")))
    quantized_layers(model)[branched].set_branch_(torch.zeros(2, 32), torch.zeros(32, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{branched} has a low-rank branch already"):
        fold_input_scale_(model, family.smoothing_folds(model)[0], torch.full((32,), 2.0))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
