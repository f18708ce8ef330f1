"""Packed folders in diffusers' own loaders: what they load is what load_packed loads, bit for bit, wherever they put it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from diffusers import (
    AutoModel,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    WanTransformer3DModel,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qvgen
from qvgen.layers.swap import packed_layers
from tests.deploy.test_packed_fusion import MODELS, call, make_fake
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=sorted(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder; its parent's name is the model's."""
    made: Path = tmp_path_factory.mktemp("packed") / request.param / "packed"
    model = make_fake(request.param)
    qvgen.fold(model)
    qvgen.save_packed(model, made)
    return made


def output(folder: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return call(folder.parent.name, model, dtype)


def load(folder: Path, **options: object) -> nn.Module:
    model: nn.Module = MODELS[folder.parent.name][0].from_pretrained(folder, **options)
    return model


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_what_from_pretrained_loads_is_what_load_packed_loads(folder: Path) -> None:
    loaded, reference = load(folder), qvgen.load_packed(folder)
    assert same_state(loaded, reference)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(output(folder, loaded), output(folder, reference))
    assert type(AutoModel.from_pretrained(str(folder))) is type(reference)
    assert {type(module) for module in loaded.modules()} == {type(module) for module in reference.modules()}  # fused


@pytest.mark.parametrize("size", ["10GB", "30KB"])
@pytest.mark.parametrize("source", ["load_packed", "from_pretrained", "fold"])
def test_what_is_saved_is_what_is_loaded_again(folder: Path, source: str, size: str, tmp_path: Path) -> None:
    if source == "fold":
        model = make_fake(folder.parent.name)
        qvgen.fold(model)
    else:
        model = qvgen.load_packed(folder) if source == "load_packed" else load(folder)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (size == "30KB")
    again = type(model).from_pretrained(tmp_path)
    assert same_state(again, qvgen.load_packed(folder))
    assert torch.equal(output(folder, again), output(folder, qvgen.load_packed(folder)))


def test_half_precision_keeps_scales(folder: Path) -> None:
    whole, half = qvgen.load_packed(folder), load(folder, dtype=torch.bfloat16)
    moved = load(folder).to(torch.bfloat16)
    packed = packed_layers(whole)
    for name, value in whole.state_dict().items():
        for model in (half, moved):
            mine = model.state_dict()[name]
            if name.rpartition(".")[0] in packed:
                assert mine.dtype == value.dtype
                assert torch.equal(mine, value)
            elif model is moved:
                assert mine.dtype == torch.bfloat16
    kept = [name for name, value in half.named_parameters() if value.dtype == torch.float32]
    if isinstance(half, WanTransformer3DModel):  # modules that diffusers keeps in float32 in any Wan
        assert any("norm2" in name for name in kept)
    assert torch.isfinite(output(folder, half, torch.bfloat16)).all()


def _offloaded(buffers: bool) -> Callable[[nn.Module], nn.Module]:
    return lambda model: cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)


def _grouped(kind: str) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(torch.device("cpu"), offload_type=kind, **blocks)
        return model

    return change


PLACES = {
    "sequential": _offloaded(False), "sequential_with_buffers": _offloaded(True),
    "groups_of_blocks": _grouped("block_level"), "groups_of_leaves": _grouped("leaf_level"),
    "to": lambda model: model.to("cpu"),
    "copied": copy.deepcopy,
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("source", ["load_packed", "from_pretrained"])
def test_offloading_moving_and_compiling_change_no_bit(folder: Path, place: str, source: str) -> None:
    expected = output(folder, qvgen.load_packed(folder))
    model = PLACES[place](load(folder) if source == "from_pretrained" else qvgen.load_packed(folder))
    for _ in range(2):
        assert torch.equal(output(folder, model), expected)
    if place == "sequential":  # the device keeps none of what was made from codes that went away
        assert not any(layer._prepacked for layer in packed_layers(model).values())


def test_compiling_changes_no_bit(tmp_path: Path) -> None:
    model_class, config, _ = MODELS["wan"]
    model = model_class(**{**config, "num_layers": 1}).eval()
    qvgen.prepare(model, bits=4, init="rtn")
    qvgen.fold(model)
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    compiled = torch.compile(loaded, backend="eager", fullgraph=True)
    assert torch.equal(call("wan", compiled), call("wan", model))


@pytest.mark.skipif(
    os.environ.get("QVGEN_LONG_TESTS") != "1", reason="inductor compiles for a minute: QVGEN_LONG_TESTS=1"
)
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of torch's own, inside of inductor
@pytest.mark.parametrize("name", MODELS)
def test_compiling_by_inductor_changes_last_bits_alone(name: str) -> None:
    model_class, config, _ = MODELS[name]
    model = model_class(**{**config, "num_layers": 1}).eval()
    qvgen.prepare(model, bits=4, init="rtn")
    qvgen.fold(model)
    expected = call(name, model)
    found = call(name, torch.compile(model, fullgraph=True))
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "balanced"])
def test_device_maps(folder: Path, device_map: object) -> None:
    if isinstance(device_map, str) and folder.parent.name == "cogvideox":
        device_map = {"": torch.device("cpu")}
    loaded = load(folder, device_map=device_map)
    assert torch.equal(output(folder, loaded), output(folder, qvgen.load_packed(folder)))


def test_a_map_over_several_places_keeps_the_hooks_that_it_puts_on_blocks(folder: Path) -> None:
    model = qvgen.load_packed(folder)
    places = {name: "cpu" for name, _ in model.named_children()}
    dispatch_model(model, {**places, "": "cpu"}, force_hooks=True)
    assert torch.equal(output(folder, model), output(folder, qvgen.load_packed(folder)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"device_map": {"": "disk"}, "offload_folder": "x"},
            "puts layers on disk, where diffusers would round their scales",
        ),
        (
            {"offload_state_dict": True},
            "went through a file on disk, which rounds scales; leave offload_state_dict out",
        ),
        ({"low_cpu_mem_usage": False}, "`low_cpu_mem_usage` cannot be False"),
        ({"dtype": torch.float8_e4m3fn}, "is no type to compute in; use torch.bfloat16"),
    ],
)
def test_what_would_lose_bits_is_refused(
    folder: Path, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    if "offload_folder" in options:
        options = options | {"offload_folder": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


def test_another_class_is_refused(folder: Path) -> None:
    other = CogVideoXTransformer3DModel if folder.parent.name == "wan" else WanTransformer3DModel
    with pytest.raises((ValueError, TypeError)):
        other.from_pretrained(folder)


def test_a_lora_on_top_is_refused_with_the_way_that_works(folder: Path) -> None:
    for model in (load(folder), qvgen.load_packed(folder)):
        with pytest.raises(ValueError, match=r"merge it into the full-precision weights .* model.lora=FILE"):
            model.add_adapter(LoraConfig(target_modules=["to_q"]))
        with pytest.raises(ValueError, match=r"merge it into the full-precision weights .* model.lora=FILE"):
            model.load_lora_adapter({})


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_whole_pipelines(name: str, tmp_path: Path) -> None:
    make = {"wan": make_wan_folder, "cogvideox": make_cogvideox_folder}[name]
    source = make(tmp_path / "hub")
    asked = qvgen.QvgenConfig(profile="paper", bits="w4a8", init="rtn")
    pipe = DiffusionPipeline.from_pretrained(
        source, quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": asked})
    )
    plain = DiffusionPipeline.from_pretrained(source).transformer
    qvgen.prepare(plain, bits="w4a8", init="rtn")
    qvgen.fold(plain)
    assert same_state(pipe.transformer, plain)
    pipe.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert same_state(again.transformer, pipe.transformer)

    def sample(pipeline: DiffusionPipeline) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(
            prompt="a red square", height=32, width=32, num_frames=9 if name == "cogvideox" else 5,
            num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        frames: Tensor = made.frames
        return frames

    expected = sample(pipe)
    assert torch.isfinite(expected).all()
    assert torch.equal(sample(again), expected)
    qvgen.save_packed(pipe.transformer, tmp_path / "packed")
    alone = type(pipe.transformer).from_pretrained(tmp_path / "packed")
    assert torch.equal(sample(type(pipe).from_pretrained(source, transformer=alone)), expected)
    pipe.to(torch.bfloat16)
    assert (
        packed_layers(pipe.transformer)[next(iter(packed_layers(pipe.transformer)))].weight_scale.dtype == torch.float32
    )
    with pytest.raises(ValueError, match="merge it into the full-precision weights"):
        pipe.load_lora_weights(
            {"transformer.x.lora_A.weight": torch.ones(1, 1), "transformer.x.lora_B.weight": torch.ones(1, 1)}
        )


def test_the_code_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text(), re.DOTALL)
    make_wan_folder(tmp_path / "weights" / "wan")
    model = WanTransformer3DModel.from_pretrained(tmp_path / "weights" / "wan" / "transformer", dtype=torch.bfloat16)
    qvgen.prepare(model, bits="w4a8", init="mse")
    qvgen.fold(model)
    qvgen.save_packed(model, tmp_path / "RUN" / "packed")
    monkeypatch.chdir(tmp_path)
    for block in (first, second):
        names: dict[str, Any] = {}
        exec(block, names)
        assert names["pipe"].transformer.config["quantization_config"].quant_method == "qvgen"
    packed = qvgen.load_packed("packed-mse").state_dict()
    assert torch.equal(packed["blocks.0.attn1.to_q.codes"], model.state_dict()["blocks.0.attn1.to_q.codes"])


def test_quantizing_on_the_fly(tmp_path: Path) -> None:
    model_class, config, _ = MODELS["wan"]
    torch.manual_seed(0)
    model_class(**config).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")

    def load_with(**options: object) -> nn.Module:
        asked = qvgen.QvgenConfig(**options)
        model: nn.Module = model_class.from_pretrained(
            tmp_path / "bf16", dtype=torch.bfloat16, quantization_config=asked
        )
        return model

    made = load_with(bits=4, init="mse", exclude=["*attn2*"])
    plain = model_class.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    qvgen.prepare(plain, bits=4, init="mse", options=qvgen.PrepareOptions(exclude=["*attn2*"]))
    qvgen.fold(plain)
    assert same_state(made, plain)
    assert torch.equal(call("wan", made, torch.bfloat16), call("wan", plain, torch.bfloat16))
    made.save_pretrained(tmp_path / "again")
    again = model_class.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert torch.equal(call("wan", made, torch.bfloat16), call("wan", again, torch.bfloat16))
    for options, message in (
        ({"bits": 9}, "bits=9 is outside 2..8"),
        ({"bits": 4, "init": "gptq"}, r"init=gptq needs calibration .* use init='mse' or 'rtn'"),
        ({"bits": 4, "init": "rtm"}, "rtm"),
        ({"bits": 4, "profile": "papr"}, "papr"),
        ({"bits": 4, "include": ["nothing*"]}, "include pattern 'nothing\\*' matches none"),
        ({}, "QvgenConfig needs bits"),
    ):
        with pytest.raises(ValueError, match=message):
            load_with(**options)


def test_old_folders_load_and_say_what_from_pretrained_lacks(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / folder.parent.name / "packed"
    old.mkdir(parents=True)
    for name in ("model.safetensors", "manifest.json"):
        (old / name).write_bytes((folder / name).read_bytes())
    with caplog.at_level("INFO"):
        model = qvgen.load_packed(old)
    assert "has no config.json, which from_pretrained reads; qvgen.save_packed writes it" in caplog.text
    assert torch.equal(output(folder, model), output(folder, qvgen.load_packed(folder)))
    qvgen.save_packed(model, old)
    assert torch.equal(output(folder, load(old)), output(folder, model))


def test_load_packed_names_the_loader_of_what_diffusers_saved(folder: Path, tmp_path: Path) -> None:
    qvgen.load_packed(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was written by save_pretrained; load it by .*from_pretrained"):
        qvgen.load_packed(tmp_path)


def test_shards_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    qvgen.load_packed(folder).save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    first = load_file(shards[0])
    save_file({**first, **dict(list(load_file(shards[1]).items())[:1])}, shards[0])
    with pytest.raises(ValueError, match="which another shard beside it holds too"):
        load(_named(tmp_path, folder))
    save_file(dict(list(first.items())[1:]), shards[0])
    with pytest.raises(ValueError, match="lacks the tensor"):
        load(_named(tmp_path, folder))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # diffusers gives it
def test_a_folder_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    """What a download leaves: links into blobs, under the name of a repository."""
    cache, revision = tmp_path / "models--org--packed", "0" * 40
    snapshot = cache / "snapshots" / revision
    for path in (snapshot, cache / "blobs", cache / "refs"):
        path.mkdir(parents=True)
    (cache / "refs" / "main").write_text(revision)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = cache / "blobs" / f"{number:064d}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    loaded = MODELS[folder.parent.name][0].from_pretrained("org/packed", cache_dir=tmp_path, local_files_only=True)
    assert same_state(loaded, qvgen.load_packed(folder))
    assert same_state(qvgen.load_packed(snapshot), loaded)


def _named(path: Path, folder: Path) -> Path:
    """A link to a folder whose parent has the model's name, by which its class is found."""
    link = path.parent / f"{path.name}-links" / folder.parent.name / "packed"
    if not link.exists():
        link.parent.mkdir(parents=True)
        link.symlink_to(path)
    return link
