"""Exports in the hands of their real consumers, on the CPU: comfy-kitchen, cache-dit, and diffusers' nunchaku_lite."""

from __future__ import annotations

import ast
import itertools
import json
from importlib import util
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel
from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig
from safetensors.torch import load_file
from torch import nn

from qvgen.cli import DONE, main
from tests.deploy.exporters.packed_models import save, svdquant, tiny_cogvideox, tiny_hunyuan_video, tiny_ltx, tiny_wan
from tests.runs import UNSEEN, shallow, train

CASES = {
    "trained": ("comfy", ["convrot_w4a4"], 16),
    "convrot w4a8 wan": ("comfy", ["convrot_w4a4"], 10),
    "int8 w3a8 wan": ("int8", ["int8_tensorwise"], 10),
    "convrot w3a8 wan": ("int8", ["int8_tensorwise"], 10),
    "convrot w4a4 ltx": ("comfy", ["convrot_w4a4"], 10),
    "convrot w4a4 hunyuanvideo": ("comfy", ["convrot_w4a4"], 18),
}
MAKE = {"wan": tiny_wan, "ltx": tiny_ltx, "hunyuanvideo": tiny_hunyuan_video}


def test_comfy_kitchen_computes_the_packed_model(run_consumer: Any, tmp_path: Path) -> None:
    """From training, or PTQ, over the packed checkpoint and its export to the consumer: equal codes and outputs."""
    words = ("profile=convrot", "bits=w4a4", "method=lsq", "steps=2", *UNSEEN, *shallow(1))
    assert train(tmp_path / "run", *words) == DONE
    paths = []
    for case, (target, _, _) in CASES.items():
        packed, out = tmp_path / "run" / "packed", tmp_path / f"out {case}"
        if case != "trained":
            profile, bits, family = case.split()
            packed = save(MAKE[family](), tmp_path / case, profile=profile, bits=bits, name=family)
        assert main(["export", f"packed={packed}", f"target={target}", f"out='{out}'", "export.dtype=null"]) == DONE
        assert json.loads((out / "parity.json").read_text())["model"]["max_abs"] == 0.0
        paths += [str(packed), str(out / "diffusion_model.safetensors")]
    results = json.loads(run_consumer("comfy-kitchen==0.2.40", "comfy_export_program.py", *paths))
    for (case, (_, formats, layers)), result in zip(CASES.items(), results, strict=True):
        assert (result["layers"], result["formats"]) == (layers, formats), case
        assert result["codes_equal"], case
        # With inputs of 8 bits it multiplies the two scales first, which changes the last bit of float32.
        exact = case == "trained" or "w4a4" in case
        assert result["output"] == 0.0 if exact else result["output"] < 3e-7, case
        assert result["weight"] < 1e-6, case  # its rotation sums in an order of its own
        assert result["linear"] < 1e-5, case


def test_cache_dit_packs_alike_and_loads_the_directory(run_consumer: Any, tmp_path: Path) -> None:
    packed = save(tiny_wan(), tmp_path / "packed", profile="svdq_g64", bits="w4a4", init=svdquant(4))
    out = tmp_path / "out"
    assert main(["export", f"packed={packed}", "target=cache_dit", "export.rank=16", f"out={out}"]) == DONE
    said = run_consumer("cache-dit==1.5.3", "cache_dit_program.py", str(out))
    result = json.loads(said.splitlines()[-1])  # its loader says something first
    assert set(result["packed"]) == {"wan", "wan ffn", "cogvideox", "odd"}
    for name, tensors in result["packed"].items():
        assert len(tensors) == 6
        assert all(tensors.values()), (name, tensors)
    assert result["loaded"] == {"layers": 10, "ranks": [16]}


def loader_of_diffusers() -> dict[str, Any]:
    """The functions and classes of diffusers' nunchaku_lite loader, without the statement that downloads its GPU kernels."""
    spec = util.find_spec("diffusers.quantizers.nunchaku")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = (Path(spec.submodule_search_locations[0]) / "utils.py").read_text(encoding="utf-8")
    kinds = (ast.FunctionDef, ast.ClassDef)
    definitions = ast.Module([node for node in ast.parse(source).body if isinstance(node, kinds)], [])
    names: dict[str, Any] = {"torch": torch, "nn": nn, "Any": Any, "itertools": itertools}
    names |= {"init_empty_weights": init_empty_weights, "is_accelerate_available": lambda: True, "nullcontext": None}
    exec(compile(definitions, "utils.py", "exec", dont_inherit=True), names)
    return names


def test_the_loader_of_nunchaku_lite_takes_the_folder(tmp_path: Path) -> None:
    packed = save(tiny_cogvideox(), tmp_path / "packed", profile="svdq_g64", bits="w4a4", name="cogvideox-5b")
    out = tmp_path / "out"
    assert main(["export", f"packed={packed}", "target=nunchaku_lite", f"out={out}"]) == DONE
    config = CogVideoXTransformer3DModel.load_config(out)
    scheme = NunchakuLiteQuantizationConfig(**config["quantization_config"])
    assert scheme.compute_dtype == torch.bfloat16
    loader, model = loader_of_diffusers(), CogVideoXTransformer3DModel.from_config(config)
    replaced = loader["replace_with_nunchaku_linear"](model, config["quantization_config"], torch.bfloat16)
    state = load_file(out / "diffusion_pytorch_model.safetensors")
    loader["check_strict_state_dict_match"](model, state)
    assert replaced == len(scheme.svdq_w4a4["targets"])
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items() if "qweight" in name}
    assert wanted
    for name, tensor in model.state_dict().items():
        assert state[name].shape == tensor.shape, name
        if name.rpartition(".")[0] in scheme.svdq_w4a4["targets"]:
            assert state[name].dtype == tensor.dtype, name
