"""LoRAs that are merged as a model is loaded, against W + scale alpha / rank B A in float64 and diffusers' own loading.

The files are written by diffusers and peft: ``save_lora_weights`` and ``PeftModel.save_pretrained``; those of other trainers
(ComfyUI's and musubi-tuner's keys for Wan) have the same tensors under other names.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from qvgen.models.base import LOCAL_ARGUMENTS
from qvgen.models.lora.file import LoraFile
from qvgen.models.lora.merge import Lora, merge_loras_
from tests.models.family_checks import draw
from tests.models.hub_folders import CAPTIONS, make_wan_folder
from tests.models.lora_files import (
    FILE,
    FORMS,
    LAYERS,
    Model,
    Saved,
    adapted,
    check_merged,
    edit_config,
    exact,
    ignore_peft_of_biases,
    make_model,
    pattern_factor,
    plain_teacher,
    save_diffusers,
    save_peft,
    saved_layers,
    tiny_family,
)

pytestmark = ignore_peft_of_biases
SCALE = 0.7


@pytest.fixture(scope="module", params=LAYERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(request.param, tmp_path_factory.mktemp("hub") / request.param)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model("wan", tmp_path_factory.mktemp("hub") / "wan")


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_formula(model: Model, form: str, tmp_path: Path) -> None:
    saved = FORMS[form](model, tmp_path / "lora")
    family = tiny_family(model.name, model.folder, lora=str(saved.path), lora_scale=SCALE)
    assert len(saved.layers) >= 7
    check_merged(family.load_teacher(), plain_teacher(model), saved, scale=SCALE)


@pytest.mark.parametrize("form", ["file", "no metadata", "bias"])
def test_outputs_are_those_of_the_pipeline_with_the_lora(model: Model, form: str, tmp_path: Path) -> None:
    saved = FORMS[form](model, tmp_path / "lora")
    family = tiny_family(model.name, model.folder, lora=str(saved.path), lora_scale=SCALE)
    pipeline = model.pipeline.from_pretrained(model.folder, local_files_only=True)
    pipeline.load_lora_weights(saved.path.parent, weight_name=FILE, adapter_name="style", local_files_only=True)
    pipeline.transformer.set_adapters("style", SCALE)
    noisy, timestep, condition = draw(family)
    with torch.no_grad():
        wanted = family.predict(pipeline.transformer.eval(), noisy, timestep, condition)
        found = family.predict(family.load_teacher(), noisy, timestep, condition)
        plain = family.predict(plain_teacher(model), noisy, timestep, condition)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert (found - plain).norm() >= 1e-2 * wanted.norm()


def other_keys(layers: dict[str, Any], *, style: str) -> dict[str, Tensor]:
    """The tensors of a LoRA for all attention and feed-forward layers of Wan, as other trainers name them, with alphas."""
    parts = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    found = {}
    for name, (down, up, factor, _) in layers.items():
        original = name.replace("net.0.proj", "0").replace("net.2", "2")
        for ours, theirs in parts.items():
            original = original.replace(ours, theirs)
        original = f"diffusion_model.{original}" if style == "comfy" else f"lora_unet_{original.replace('.', '_')}"
        found[f"{original}.lora_down.weight"], found[f"{original}.lora_up.weight"] = down.half(), up.half()
        found[f"{original}.alpha"] = torch.tensor(factor * down.shape[0])
    return found


@pytest.mark.parametrize("style", ["comfy", "musubi"])
def test_other_keys_and_their_alphas_are_diffusers_conversion(wan: Model, style: str, tmp_path: Path) -> None:
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    transformer, _ = adapted(wan, target_modules=layers)
    state = {key: value.half().float() for key, value in get_peft_model_state_dict(transformer).items()}
    saved = Saved(path=tmp_path / "lora.safetensors", layers=saved_layers(state, pattern_factor))
    tensors = other_keys(saved.layers, style=style)
    if style == "comfy":  # what such files add: differences of biases, and of norms where they are zero
        tensors["diffusion_model.blocks.0.self_attn.norm_q.diff"] = torch.zeros(32)
        bias = torch.linspace(-1, 1, 32)
        tensors["diffusion_model.blocks.1.self_attn.k.diff_b"] = bias
        down, up, factor, _ = saved.layers["blocks.1.attn1.to_k"]
        # The converter multiplies alpha / rank into A and leaves the bias's difference as it is.
        saved.layers["blocks.1.attn1.to_k"] = (down * factor, up, 1.0, bias)
    save_file(tensors, saved.path)
    family = tiny_family("wan", wan.folder, lora=str(saved.path), lora_scale=SCALE)
    assert len(saved.layers) == 20
    check_merged(family.load_teacher(), plain_teacher(wan), saved, scale=SCALE)


def test_a_bf16_transformer_is_rounded_once(model: Model, tmp_path: Path) -> None:
    saved = save_diffusers(model, tmp_path / "lora")
    family = tiny_family(model.name, model.folder, lora=str(saved.path), dtype="bfloat16")
    plain, merged = plain_teacher(model, dtype="bfloat16"), family.load_teacher()
    assert [parameter.dtype for parameter in merged.parameters()] == [
        parameter.dtype for parameter in plain.parameters()
    ]
    naive = copy.deepcopy(plain)
    naive.load_lora_adapter(tmp_path / "lora", weight_name=FILE, use_safetensors=True, local_files_only=True)
    naive.fuse_lora()
    worse = 0
    for name, layer in saved.layers.items():
        weight = plain.get_submodule(name).weight
        if weight.dtype != torch.bfloat16:
            continue  # Wan keeps its timestep's embedding in float32
        wanted = exact(weight, layer, scale=1.0)
        half_step = torch.exp2(torch.frexp(wanted).exponent - 9.0)  # bf16 has 8 bits of significand
        bound = half_step + 1e-6  # of the float32 arithmetic
        assert bool(((merged.get_submodule(name).weight.double() - wanted).abs() <= bound).all()), name
        worse += int(((naive.get_submodule(name).get_base_layer().weight.double() - wanted).abs() > bound).sum())
    assert worse > 0  # the bound tells peft's own rounding of A, B and their product apart
    assert (
        tiny_family(model.name, model.folder, lora=str(saved.path)).load_teacher(dtype=torch.bfloat16).dtype
        == torch.bfloat16
    )


def test_scale_zero_is_no_lora_and_revisions_differ(model: Model, tmp_path: Path) -> None:
    first, second = save_diffusers(model, tmp_path / "first"), save_diffusers(model, tmp_path / "second", seed=1)
    plain = tiny_family(model.name, model.folder)
    none = tiny_family(model.name, model.folder, lora=str(first.path), lora_scale=0)
    wanted = plain.load_teacher().state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in none.load_teacher().state_dict().items())
    families = [
        tiny_family(model.name, model.folder, lora=str(saved.path), lora_scale=scale)
        for saved in (first, second)
        for scale in (1.0, 0.5)
    ]
    revisions = {family.revision for family in (plain, none, *families)}
    assert len(revisions) == 6
    assert {len(revision) for revision in revisions} == {64}
    moved = shutil.copytree(tmp_path / "first", tmp_path / "moved") / FILE
    again = tiny_family(model.name, model.folder, lora=str(moved), lora_scale=1)
    assert again.revision == families[0].revision
    assert tiny_family(model.name, model.folder, lora_scale=0.5).revision == plain.revision
    assert "lora" in LOCAL_ARGUMENTS  # a path
    assert "lora_scale" not in LOCAL_ARGUMENTS


def test_revision_is_of_an_adapters_configuration_too(wan: Model, tmp_path: Path) -> None:
    saved = save_peft(wan, tmp_path / "lora")
    before = tiny_family("wan", wan.folder, lora=str(saved.path)).revision
    edit_config(saved.path, lora_alpha=7)
    assert tiny_family("wan", wan.folder, lora=str(saved.path)).revision != before


def test_random_numbers_are_left_alone(model: Model, tmp_path: Path) -> None:
    saved = save_diffusers(model, tmp_path / "lora")
    teacher, state = plain_teacher(model), torch.get_rng_state()
    lora = Lora(file=LoraFile(path=saved.path), scale=1.0, components=("transformer",), trained="transformer")
    merge_loras_(teacher, [lora], component="transformer")
    assert torch.equal(torch.get_rng_state(), state)


# Two experts


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("hub") / "a14b", "a14b")


def save_of_experts(experts: Path, path: Path, prefixes: list[str]) -> dict[str, Saved]:
    model = Model(name="wan2.2-a14b", folder=experts, pipeline=WanPipeline)
    tensors, found = {}, {}
    for seed, prefix in enumerate(prefixes):
        transformer, _ = adapted(
            model, seed=seed, target_modules=["to_k"], lora_alpha=4, rank_pattern={}, alpha_pattern={}
        )
        state = get_peft_model_state_dict(transformer)
        tensors |= {f"{prefix}.{key}": value for key, value in state.items()}
        found[prefix] = Saved(path=path, layers=saved_layers(state, lambda name, rank: 1.0))
    save_file(tensors, path)
    return found


@pytest.mark.parametrize("expert", ["high", "low"])
def test_each_expert_gets_its_own_keys(experts: Path, expert: str, tmp_path: Path) -> None:
    path = tmp_path / "both.safetensors"
    saved = save_of_experts(experts, path, ["transformer", "transformer_2"])
    family = tiny_family("wan2.2-a14b", experts, expert=expert, lora=str(path), lora_scale=SCALE)
    plain = tiny_family("wan2.2-a14b", experts, expert=expert)
    own, other = ("transformer", "transformer_2") if expert == "high" else ("transformer_2", "transformer")
    teacher, unchanged = family.load_teacher(), plain.load_teacher()
    check_merged(teacher, unchanged, saved[own], scale=SCALE)
    check_merged(family.partner(teacher), plain.partner(teacher), saved[other], scale=SCALE)
    arguments = {"num_steps": 3, "guidance_scale": 4.0}
    with_both = family.generate(teacher, CAPTIONS[:1], [1], **arguments)
    family.use_partner(plain.partner(teacher))
    assert not torch.equal(with_both, family.generate(teacher, CAPTIONS[:1], [1], **arguments))


def test_keys_of_one_transformer_are_of_the_expert_that_is_trained(experts: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    saved = save_of_experts(experts, path, ["transformer"])["transformer"]
    for expert in ("high", "low"):
        family = tiny_family("wan2.2-a14b", experts, expert=expert, lora=str(path))
        plain = tiny_family("wan2.2-a14b", experts, expert=expert)
        teacher = family.load_teacher()
        check_merged(teacher, plain.load_teacher(), saved, scale=1.0)
        wanted = plain.partner(teacher).state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in family.partner(teacher).state_dict().items())
    save_of_experts(experts, path, ["transformer_2"])
    with pytest.raises(
        ValueError, match="it is of transformer_2, transformer is trained; choose the expert that it is of"
    ):
        tiny_family("wan2.2-a14b", experts, expert="high", lora=str(path)).load_teacher()
