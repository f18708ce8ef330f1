"""HunyuanVideo 1.5 with the names of Tencent's files and of ComfyUI's: read, written and in LoRAs.

Checked against the names of diffusers' script scripts/convert_hunyuan_video1_5_to_diffusers.py, written down here, and the
number of tensors of Comfy-Org's file.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from safetensors.torch import load_file, save_file

from qvgen.cli import main
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.exporters.nibbles import unpack_signed_nibbles
from qvgen.layers.swap import packed_layers
from qvgen.models.original.names import HUNYUAN_VIDEO_15_ORIGINAL_NAMES
from qvgen.models.original.tensors import join_original, original_sources
from tests.deploy.exporters.packed_models import save, tiny_hunyuan_video15
from tests.models.family_checks import tiny_family
from tests.models.further_folders import make_hunyuan15_folder

NAME = "hunyuanvideo1.5"


def authors_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with the names of tencent/HunyuanVideo-1.5: what diffusers' script (see the yaml) makes them from.

    The refiner's queries, keys and values are one tensor, those of the blocks are three.
    """
    block = {
        "norm1.linear": "img_mod.linear", "norm1_context.linear": "txt_mod.linear", "attn.to_out.0": "img_attn_proj",
        "attn.to_add_out": "txt_attn_proj", "ff.net.0.proj": "img_mlp.fc1", "ff.net.2": "img_mlp.fc2",
        "ff_context.net.0.proj": "txt_mlp.fc1", "ff_context.net.2": "txt_mlp.fc2",
        **{f"attn.to_{part}": f"img_attn_{part}" for part in "qkv"},
        **{f"attn.add_{part}_proj": f"txt_attn_{part}" for part in "qkv"},
        **{f"attn.norm_{part}": f"img_attn_{part}_norm" for part in "qk"},
        **{f"attn.norm_added_{part}": f"txt_attn_{part}_norm" for part in "qk"},
    }  # fmt: skip
    refiner = {
        "norm1": "norm1", "norm2": "norm2", "attn.to_out.0": "self_attn_proj", "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2", "norm_out.linear": "adaLN_modulation.1",
    }  # fmt: skip
    names = {
        "time_embed.timestep_embedder.linear_1": "time_in.mlp.0", "time_embed.timestep_embedder.linear_2": "time_in.mlp.2",
        "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
        "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
        "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
        "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
        "context_embedder.proj_in": "txt_in.input_embedder", "context_embedder_2.norm": "byt5_in.layernorm",
        **{f"context_embedder_2.linear_{place}": f"byt5_in.fc{place}" for place in (1, 2, 3)},
        "image_embedder.norm_in": "vision_in.proj.0", "image_embedder.linear_1": "vision_in.proj.1",
        "image_embedder.linear_2": "vision_in.proj.3", "image_embedder.norm_out": "vision_in.proj.4",
        "x_embedder.proj": "img_in.proj", "cond_type_embed": "cond_type_embedding", "proj_out": "final_layer.linear",
    }  # fmt: skip
    found = {}
    for key, value in state.items():
        module, _, end = key.rpartition(".")
        first, _, rest = module.removeprefix("context_embedder.token_refiner.refiner_").partition(".")
        place, _, rest = rest.partition(".")
        if first == "transformer_blocks":
            found[f"double_blocks.{place}.{block[rest]}.{end}"] = value
        elif first == "blocks":
            start = f"txt_in.individual_token_refiner.blocks.{place}"
            if rest in refiner:
                found[f"{start}.{refiner[rest]}.{end}"] = value
            elif rest == "attn.to_q":
                parts = [state[key.replace("to_q", f"to_{part}")] for part in "qkv"]
                found[f"{start}.self_attn_qkv.{end}"] = torch.cat(parts)
        elif module == "norm_out.linear":
            scale, shift = value.chunk(2)
            found[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
        else:
            found[f"{names[module]}.{end}"] = value
    return found


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' tensors with queries, keys and values of the blocks as one."""
    found = {key: value for key, value in tensors.items() if not re.search(r"_attn_[qkv]\.", key)}
    for key in tensors:
        if "_attn_q." in key:
            parts = [tensors[key.replace("_attn_q.", f"_attn_{part}.")] for part in "qkv"]
            found[key.replace("_attn_q.", "_attn_qkv.")] = torch.cat(parts)
    return found


def comfy_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a file that ComfyUI reads, as an export writes it."""
    names = HUNYUAN_VIDEO_15_ORIGINAL_NAMES
    sources = original_sources(state, names)
    return {key: join_original(key, [state[one] for one in own], names) for key, own in sources.items()}


def test_names_are_the_authors_and_layers_are_fused_where_comfyui_s_files_have_one() -> None:
    """Every row at full size has a number of its own; Comfy-Org's file of 480 pixels has 1361 tensors."""
    with torch.device("meta"):
        state = HunyuanVideo15Transformer3DModel(task_type="t2v").state_dict()
    sizes = [len(value) for value in state.values()]
    rows = dict(zip(state, torch.arange(sum(sizes)).split(sizes), strict=True))
    theirs, written = authors_tensors(rows), comfy_tensors(rows)
    assert (len(theirs), len(written)) == (1793, 1361)
    theirs = fused(theirs)
    assert theirs.keys() == written.keys()
    assert all(torch.equal(theirs[key], written[key]) for key in theirs)


@pytest.mark.parametrize("make", [authors_tensors, comfy_tensors])
def test_files_and_loras_with_original_names_are_read(make, tmp_path: Path) -> None:
    family = tiny_family(NAME, make_hunyuan15_folder(tmp_path / "hub"))
    teacher = family.load_teacher()
    state = teacher.state_dict()
    tuned = {key: value * 1.01 + 0.001 for key, value in state.items()}
    written = {f"model.diffusion_model.{key}": value.contiguous() for key, value in make(tuned).items()}
    save_file(written, tmp_path / "style.safetensors")
    found = tiny_family(NAME, family.path, transformer=str(tmp_path / "style.safetensors")).load_teacher().state_dict()
    assert all(torch.equal(found[key], tuned[key]) for key in tuned)

    generator = torch.Generator().manual_seed(0)
    layer = "img_attn_v" if make is authors_tensors else "img_attn_qkv"
    weight = make(state)[f"double_blocks.1.{layer}.weight"]
    down, up = torch.randn(2, weight.shape[1], generator=generator), torch.randn(len(weight), 2, generator=generator)
    lora = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    save_file(
        {f"diffusion_model.double_blocks.1.{layer}.{end}": value for end, value in lora.items()},
        tmp_path / "lora.safetensors",
    )
    found = tiny_family(NAME, family.path, lora=str(tmp_path / "lora.safetensors")).load_teacher().state_dict()
    key = "transformer_blocks.1.attn.to_v.weight"
    wanted = state[key] + (up @ down)[-len(state[key]) :]
    assert torch.allclose(found[key], wanted, atol=1e-6)
    changed = {name for name in state if not torch.equal(found[name], state[name])}
    assert changed == ({key} if make is authors_tensors else {key.replace("to_v", f"to_{part}") for part in "qkv"})


def test_an_export_for_comfyui_has_the_packed_layers_codes_and_scales(tmp_path: Path) -> None:
    packed = save(tiny_hunyuan_video15(), tmp_path / "packed", profile="convrot", bits="w4a4", name=NAME)
    assert main(["export", f"packed={packed}", f"out={tmp_path / 'out'}", "target=comfy", "export.dtype=null"]) == 0
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["exact"] is True
    assert report["model"] == {"relative_error": 0.0, "max_abs": 0.0}
    written = load_file(tmp_path / "out" / "diffusion_model.safetensors")
    layers = packed_layers(load_packed(packed, kernel="reference"))
    blocks = {name: layer for name, layer in layers.items() if name.startswith("transformer_blocks")}
    codes = fused(authors_tensors({f"{name}.weight": layer.integer_codes() for name, layer in blocks.items()}))
    scales = fused(authors_tensors({f"{name}.weight": layer.weight_scale.flatten() for name, layer in blocks.items()}))
    assert len(codes) == 10  # of 14 layers, three are one in either stream
    for key in codes:
        assert torch.equal(unpack_signed_nibbles(written[key]), codes[key]), key
        assert torch.equal(written[f"{key}_scale"].flatten(), scales[key]), key
        assert key.replace("weight", "comfy_quant") in written
