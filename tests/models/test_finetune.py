"""``model.transformer``: a finetune as its owner has it, against the same weights as a whole folder of the base model.

Original names are written by our own rules (:mod:`qvgen.models.original.names`, tested against diffusers' converters).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config.leaves import load_leaf
from qvgen.models.original.names import ORIGINAL_NAMES
from qvgen.models.original.tensors import join_original, original_sources
from tests.models.family_checks import CAPTIONS, tiny_family
from tests.models.further_folders import make_hunyuan_folder
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder
from tests.models.ltx_folders import make_ltx_folder

MAKE = {
    "wan": make_wan_folder,
    "cogvideox": make_cogvideox_folder,
    "ltx": make_ltx_folder,
    "hunyuanvideo": make_hunyuan_folder,
}
SIZES: dict[str, dict[str, Any]] = {"ltx": {"height": 64, "width": 96}}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME: the base model; tuned-NAME: a whole folder with other weights of the transformer, in bfloat16."""
    root = tmp_path_factory.mktemp("finetunes")
    for name, make in MAKE.items():
        make(root / name)
        tuned = make(root / f"tuned-{name}")
        file = tuned / "transformer" / WEIGHTS
        state = {key: (value * 1.01 + 0.001).bfloat16() for key, value in load_file(file).items()}
        save_file(state, file)
    return root


def original(state: dict[str, Tensor], prefix: str, name: str = "wan") -> dict[str, Tensor]:
    names = ORIGINAL_NAMES[load_leaf("model", name).transformer_class]
    sources = original_sources(state, names)
    return {prefix + key: join_original(key, [state[one] for one in own], names) for key, own in sources.items()}


def comfy(key: str, end: str) -> str:
    """The name that ComfyUI's class HunyuanVideo gives a tensor of the original code, written down one by one."""
    for ours, theirs in {
        "txt_in.t_embedder.mlp.0.": "txt_in.t_embedder.in_layer.", "txt_in.t_embedder.mlp.2.": "txt_in.t_embedder.out_layer.",
        "txt_in.c_embedder.linear_1.": "txt_in.c_embedder.in_layer.",
        "txt_in.c_embedder.linear_2.": "txt_in.c_embedder.out_layer.",
        "time_in.mlp.0.": "time_in.in_layer.", "time_in.mlp.2.": "time_in.out_layer.",
        "guidance_in.mlp.0.": "guidance_in.in_layer.", "guidance_in.mlp.2.": "guidance_in.out_layer.",
        "_mod.linear.": "_mod.lin.", ".modulation.linear.": ".modulation.lin.",
        "_attn_qkv.": "_attn.qkv.", "_attn_proj.": "_attn.proj.", "mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.2.",
        "_attn_q_norm.weight": f"_attn.norm.query_norm.{end}", "_attn_k_norm.weight": f"_attn.norm.key_norm.{end}",
        ".q_norm.weight": f".norm.query_norm.{end}", ".k_norm.weight": f".norm.key_norm.{end}",
    }.items():  # fmt: skip
        key = key.replace(ours, theirs)
    return key


def written(form: str, root: Path, name: str, place: Path) -> Path:
    """The finetune in one of its forms."""
    folder = root / f"tuned-{name}" / "transformer"
    state = load_file(folder / WEIGHTS)
    if form == "folder":
        return Path(shutil.copytree(folder, place / "style"))
    file = place / "style.safetensors"
    prefix = form.partition(":")[2]
    if form.startswith("comfy"):
        end = "weight" if "weight" in form else "scale"
        state = {prefix + comfy(key, end): value for key, value in original(state, "", name).items()}
    elif form.startswith("original"):
        state = original(state, prefix, name)
    else:
        state = {prefix + key: value for key, value in state.items()}
    if form.endswith("+vae:model.diffusion_model."):
        state["vae.decoder.weight"] = torch.ones(1)
    save_file(state, file)
    return file


FORMS = [
    ("wan", "folder"),
    ("wan", "original:"),
    ("wan", "original:diffusion_model."),
    ("wan", "original+vae:model.diffusion_model."),
    ("wan", "diffusers:"),
    ("ltx", "original+vae:model.diffusion_model."),
    ("hunyuanvideo", "original:"),
    ("hunyuanvideo", "comfy:model.model."),
    ("hunyuanvideo", "comfy, weight:model.diffusion_model."),
    ("cogvideox", "folder"),
    ("cogvideox", "diffusers:model.diffusion_model."),
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_form_loads_what_the_whole_folder_loads(name: str, form: str, root: Path, tmp_path: Path) -> None:
    place = written(form, root, name, tmp_path)
    whole = tiny_family(name, root / f"tuned-{name}", **SIZES.get(name, {}))
    family = tiny_family(name, root / name, transformer=str(place), **SIZES.get(name, {}))
    for dtype in (torch.float32, torch.bfloat16):
        wanted, model = whole.load_teacher(dtype=dtype), family.load_teacher(dtype=dtype)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for key, value in (dict(wanted.named_parameters()) | dict(wanted.named_buffers())).items():
            assert tensors[key].dtype == value.dtype, key
            assert torch.equal(tensors[key], value), key
        assert not model.training
    plain = [{key: value for key, value in config.items() if key[0] != "_"} for config in (wanted.config, model.config)]
    assert plain[0] == plain[1]
    family.check_transformer(family.build(family.transformer_config))
    # The rest comes from the base model.
    base = tiny_family(name, root / name, **SIZES.get(name, {}))
    assert family.text_revision == base.text_revision
    assert family.latent_revision == base.latent_revision
    assert family.revision != base.revision
    wrote = family.encode(CAPTIONS)["encoder_hidden_states"]
    assert torch.equal(wrote, base.encode(CAPTIONS)["encoder_hidden_states"])


def test_identity_is_of_the_finetune_s_bytes_and_not_of_its_place(root: Path, tmp_path: Path) -> None:
    base = tiny_family("wan", root / "wan").identity()
    files = [written(form, root, "wan", tmp_path) for form in ("original:", "folder")]
    for place in files:
        family = tiny_family("wan", root / "wan", transformer=str(place))
        found, revision = family.identity(), family.revision
        assert {key for key in base if found[key] != base[key]} == {"transformer"}
        assert family.identity(transformer_only=True) == {"transformer": found["transformer"]}
        moved = tmp_path / f"moved-{place.name}"
        place.rename(moved)
        again = tiny_family("wan", root / "wan", transformer=str(moved))
        assert (again.identity(), again.revision) == (found, revision)
        weights = moved / WEIGHTS if moved.is_dir() else moved
        state = load_file(weights)
        state[sorted(state)[0]] = state[sorted(state)[0]] * 2
        save_file(state, weights)
        changed = tiny_family("wan", root / "wan", transformer=str(moved))
        assert changed.identity()["transformer"] != found["transformer"]
        assert changed.revision != revision


def test_the_base_model_is_found_in_the_hub_s_cache_and_is_not_needed_for_the_transformer(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = written("folder", root, "wan", tmp_path)
    published = load_leaf("model", "wan").published
    published = {**published, "vae": {**published["vae"], "z_dim": 4}}  # the tiny model's
    alone = tiny_family("wan", None, transformer=str(place), published=published)
    assert alone.folder is None
    wanted = tiny_family("wan", root / "tuned-wan").load_teacher().state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in alone.load_teacher().state_dict().items())
    with pytest.raises(ValueError, match="hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers"):
        alone.encode(CAPTIONS)
    snapshot = tmp_path / "hub" / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers" / "snapshots" / ("a" * 40)
    shutil.copytree(root / "wan", snapshot)
    family = tiny_family("wan", None, transformer=str(place))
    assert family.folder.path == snapshot
    assert family.encode(CAPTIONS)["encoder_hidden_states"].shape[0] == 2


def break_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(root: Path, place: Path, *, name: str = "wan") -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        tiny_family(name, root / name, transformer=str(place)).load_teacher()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_quantized_already_is_refused_with_the_reason(root: Path, tmp_path: Path) -> None:
    file = written("original:", root, "wan", tmp_path)
    state = load_file(file)
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in state.items()}, file)
    message = refused(root, file)
    assert (
        "weight is F8_E4M3): what they lost is not to be had back, and they would be quantized a second time" in message
    )
    assert message.endswith("take the full-precision ones, in bf16, fp16 or fp32")
    gguf = tmp_path / "wan-Q4_K_M.gguf"
    gguf.write_bytes(b"GGUF")
    message = refused(root, gguf)
    assert "is GGUF, whose weights are integers of blocks already" in message
    assert message.endswith("take the finetune's bf16 or fp16 file")


def test_what_is_no_transformer_of_the_model_is_named(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    state = load_file(root / "tuned-wan" / "transformer" / WEIGHTS)
    name = "blocks.1.attn1.to_q.weight"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({key: value for key, value in state.items() if key != name}, f"lacks '{name}', which the model has"),
        (state | {name: torch.ones(3, 3)}, f"holds '{name}' of shape [3, 3], and the model's is [32, 32]"),
        (state | {"more": torch.ones(1)}, "holds 'more' and 0 other tensors that the model does not have"),
        ({"blocks.0.lora_A.weight": torch.ones(1)}, f"is a LoRA; write model.lora={file} beside the base model"),
        (
            {"transformer.layers.0.attention.query_key_value.weight": torch.ones(1)},
            "in CogVideoX's original layout (SAT)",
        ),
        (state | {name: torch.full((32, 32), float("nan"))}, f"'{name}', float32 [32, 32], holds 1024 NaNs"),
    ]
    for content, message in cases:
        save_file(content, file)
        assert message in refused(root, file)
    save_file(original(state, ""), file)
    assert "has the names of Wan's own code, and the model is a CogVideoX" in refused(root, file, name="cogvideox")
    assert "has the names of Wan's own code, and the model is a HunyuanVideo" in refused(
        root, file, name="hunyuanvideo"
    )
    state = original(load_file(root / "tuned-hunyuanvideo" / "transformer" / WEIGHTS), "", "hunyuanvideo")
    for key, rows in (("double_blocks.0.txt_attn_qkv.weight", 96), ("single_blocks.1.linear1.weight", 224)):
        save_file(state | {key: state[key][:-1].clone()}, file)
        message = f"holds '{key}' of shape [{rows - 1}, 32], and the model's has {rows} rows"
        assert message in refused(root, file, name="hunyuanvideo")
    save_file(state | {"x_embedder.proj.weight": torch.ones(1)}, file)
    message = "holds 'x_embedder.proj.weight' under this name of diffusers and under the original one"
    assert message in refused(root, file, name="hunyuanvideo")
    for suffix, message in ((".ckpt", "is a pickle, which runs code"), (".zip", "is no .safetensors file")):
        (tmp_path / f"x{suffix}").write_bytes(b"x")
        assert message in refused(root, tmp_path / f"x{suffix}")
    assert "is not there" in refused(root, tmp_path / "nowhere")
    (tmp_path / "lone").mkdir()
    save_file(state, tmp_path / "lone" / "style.safetensors")
    assert "holds no config.json; write model.transformer=" in refused(root, tmp_path / "lone")
    file.write_bytes(file.read_bytes()[:-1])
    assert "is cut off" in refused(root, file)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
    "blocks": ({"num_layers": 2**31}, "its config.json says num_layers=2147483648, and its weights are"),
    "rows": ({"ffn_dim": 2**40}, "its config.json says ffn_dim=1099511627776"),
    "positions": ({"rope_max_seq_len": 2**20, "attention_head_dim": 512, "num_attention_heads": 1}, "model"),
    "quantized": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantized already"),
    "class": ({"_class_name": "CogVideoXTransformer3DModel"}, "holds a CogVideoXTransformer3DModel"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_configuration_from_elsewhere_names_no_code_and_asks_for_no_more_than_its_weights(
    case: str, root: Path, tmp_path: Path
) -> None:
    changes, message = HOSTILE[case]
    folder = written("folder", root, "wan", tmp_path)
    break_config(folder, **changes)
    assert message in refused(root, folder)


def test_an_index_leads_to_no_file_outside_of_its_folder(root: Path, tmp_path: Path) -> None:
    folder = written("folder", root, "wan", tmp_path)
    (folder / WEIGHTS).rename(tmp_path / "x.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    assert "holds a damaged index" in refused(root, folder)


def test_ptq_packs_a_finetune_and_a_run_goes_on_with_that_one_alone(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written("original:", root, "wan", tmp_path)
    keys = [
        "model=wan", f"model.path={root / 'wan'}", f"model.transformer={file}", "model.height=32", "model.width=48",
        "model.num_frames=9", "model.sampling_frames=9", "init=rtn", "bits=4", "evaluation.samples=0",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main(["ptq", *keys]) == DONE
    manifest = json.loads((tmp_path / "run" / "packed" / "manifest.json").read_text())
    assert manifest["base"]["revision"] == tiny_family("wan", root / "wan", transformer=str(file)).revision
    assert str(tmp_path) not in (tmp_path / "run" / "packed" / "manifest.json").read_text()
    state = load_file(file)
    save_file({key: value * 2 for key, value in state.items()}, file)
    capsys.readouterr()
    assert main(["ptq", *keys, "resume=true"]) == BAD_INPUT
    assert "model.transformer" in capsys.readouterr().err
