"""A program that samples a video per row of a plan, its transformer loaded by a consumer, and one of ours; prints JSON.

    round_trip_program.py PLAN.json

A row is {family, target, dtype, layers, steps, model, packed, export}: a model folder, a packed folder that was made of its
transformer, and what `qvgen export` made of that. Both videos come from diffusers' own pipeline, with one prompt and seed.

    qvgen           from_pretrained of the packed folder
    bf16, torchao   from_pretrained of the exported folder
    sdnq            the same, once SDNQ has told diffusers of itself
    comfy, int8     diffusers' converter from the original names, comfy-kitchen's QuantizedTensor of every marked layer, and
                    its eager functions for the CPU
    cache_dit       cache-dit's loader puts its layers into the exported folder's transformer
    nunchaku_lite   diffusers' configuration class reads the targets
    humming         every layer that has scales; humming's own schemas and packer are in humming_program.py

The layers of the last three have products for GPUs alone: theirs are replaced by the reference arithmetic of the exporter, on
the tensors that were loaded, and where there is one once more with sums in half precision.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from comfy_export_program import quantized
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from qvgen.config.leaves import load_leaf
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.exported_model import open_packed
from qvgen.deploy.parity import ExportedLinear
from qvgen.evaluation.distance import psnr_db
from qvgen.layers.swap import packed_layers

PIPELINES = {"wan": "WanPipeline", "cogvideox-5b": "CogVideoXPipeline"}
TRANSFORMERS = {"wan": "WanTransformer3DModel", "cogvideox-5b": "CogVideoXTransformer3DModel"}
SEED = 7


class ComfyLinear(nn.Module):
    """A layer of ComfyUI: comfy-kitchen's tensor and function, in float32."""

    def __init__(self, tensors: dict[str, Tensor], name: str, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.marker = quantized(tensors, name, linear.out_features, linear.in_features)
        self.bias = tensors[f"{name}.bias"].float()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; the CPU's whole functions know 4-bit inputs and tensor-wise weights."""
        return torch.nn.functional.linear(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


def transformer_of(row: Mapping[str, Any], folder: Path) -> nn.Module:
    """The full-precision transformer of a folder, in float32."""
    loaded: nn.Module = getattr(diffusers, TRANSFORMERS[row["family"]]).from_pretrained(
        folder, torch_dtype=torch.float32
    )
    return loaded


def from_qvgen(row: Mapping[str, Any]) -> nn.Module:
    """Our own folder."""
    return transformer_of(row, row["packed"])


def from_bf16(row: Mapping[str, Any]) -> nn.Module:
    """The dequantized folder."""
    return transformer_of(row, row["export"])


def from_sdnq(row: Mapping[str, Any]) -> nn.Module:
    """SDNQ's layers, which diffusers makes once SDNQ is imported."""
    import sdnq  # noqa: F401 # registers itself

    return transformer_of(row, row["export"])


def from_comfy(row: Mapping[str, Any]) -> nn.Module:
    """One file with original names."""
    (file,) = Path(row["export"]).glob("*.safetensors")
    tensors = convert_wan_transformer_to_diffusers(load_file(file))
    model = transformer_of(row, Path(row["model"]) / "transformer")
    rest = {name: value.float() for name, value in tensors.items() if value.is_floating_point()}
    own = set(model.state_dict())
    marked = [name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")]
    missing, _ = model.load_state_dict({name: value for name, value in rest.items() if name in own}, strict=False)
    assert {name.removesuffix(".weight") for name in missing} == set(marked), "each tensor is loaded, or is a layer's"
    for name in marked:
        model.set_submodule(name, ComfyLinear(tensors, name, model.get_submodule(name)))
    return model


def from_cache_dit(row: Mapping[str, Any]) -> nn.Module:
    """The folded folder with cache-dit's layers in it, their product replaced."""
    from cache_dit.quantization.svdquant.linear import SVDQW4A4Linear
    from cache_dit.quantization.svdquant.ptq import load_svdq

    model = getattr(diffusers, TRANSFORMERS[row["family"]]).from_pretrained(
        Path(row["export"]) / "transformer", torch_dtype=torch.bfloat16
    )
    model = load_svdq(model, str(Path(row["export"]) / "svdq"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDQW4A4Linear)}
    assert len(layers) == row["layers"]
    for name, layer in layers.items():
        tensors = {key: value.detach() for key, value in layer.state_dict().items()}
        model.set_submodule(
            name, ExportedLinear(load_leaf("export", "cache_dit"), tensors, out_features=layer.out_features)
        )
    return model.float()


def from_nunchaku_lite(row: Mapping[str, Any]) -> nn.Module:
    """The targets of the folder's configuration, their product replaced."""
    config = json.loads((Path(row["export"]) / "config.json").read_text())
    scheme = NunchakuLiteQuantizationConfig(**config.pop("quantization_config"))
    return replaced(row, config, scheme.svdq_w4a4["targets"])


def from_humming(row: Mapping[str, Any]) -> nn.Module:
    """The layers that have scales, their product replaced."""
    config = json.loads((Path(row["export"]) / "config.json").read_text())
    left_alone = config.pop("quantization_config")["modules_to_not_convert"]
    scales = [name for name in load_file(Path(row["export"]) / WEIGHTS) if name.endswith(".weight_scale")]
    targets = [name.removesuffix(".weight_scale") for name in scales]
    assert not set(targets) & set(left_alone)
    return replaced(row, config, targets)


def replaced(row: Mapping[str, Any], config: Mapping[str, Any], targets: Sequence[str]) -> nn.Module:
    """A transformer with an exported folder's tensors, whose named layers have the exporter's reference arithmetic."""
    tensors = load_file(Path(row["export"]) / WEIGHTS)
    assert len(targets) == row["layers"]
    model = getattr(diffusers, TRANSFORMERS[row["family"]]).from_config(config)
    for name in targets:
        linear = model.get_submodule(name)
        own = {key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
        target = load_leaf("export", row["target"])
        model.set_submodule(name, ExportedLinear(target, own, out_features=linear.out_features))
    left, extra = model.load_state_dict(tensors, strict=False)
    assert not extra
    assert all(name.endswith(".float32") for name in left), left  # what ExportedLinear tells diffusers its dtype by
    floats: nn.Module = model.float()
    return floats


WEIGHTS = "diffusion_pytorch_model.safetensors"
WITH_HALF_SUMS = ("cache_dit", "nunchaku_lite")
"""Targets whose kernels keep their sums in half precision."""


def with_half_sums(row: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """The same model, its layers with the kernels' sums."""
    for module in model.modules():
        if isinstance(module, ExportedLinear):
            module.output = load_leaf("export", row["target"]).half_output
    return model


CONSUMERS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "qvgen": from_qvgen,
    "bf16": from_bf16,
    "torchao": from_bf16,
    "sdnq": from_sdnq,
    "comfy": from_comfy,
    "int8": from_comfy,
    "cache_dit": from_cache_dit,
    "nunchaku_lite": from_nunchaku_lite,
    "humming": from_humming,
}


def rounded_like(row: Mapping[str, Any]) -> nn.Module:
    """Our packed model, its biases and other weights rounded as the export rounds them."""
    model = open_packed(
        Path(row["packed"]), names=None
    ).model.float()  # not fused: a merged layer has a bias of its own
    dtype = None if row["dtype"] is None else getattr(torch, row["dtype"])
    own = {
        f"{name}.{end}" for name, layer in packed_layers(model).items() for end in layer.state_dict() if end != "bias"
    }
    state = {
        key: value.float() if dtype is None else value.to(dtype).float()
        for key, value in model.state_dict().items()
        if key not in own
    }
    model.load_state_dict(state, strict=False, assign=True)
    return model


def video(row: Mapping[str, Any], transformer: nn.Module) -> Tensor:
    """Frames uint8 [F, H, W, 3] of the row's model folder with another transformer in it."""
    pipeline_class = getattr(diffusers, PIPELINES[row["family"]])
    pipeline = pipeline_class.from_pretrained(row["model"], transformer=transformer.eval(), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer is transformer
    (frames,) = pipeline(
        prompt="a red boat", negative_prompt="two dogs", height=32, width=48, num_frames=9, num_inference_steps=row["steps"],
        guidance_scale=4.0, generator=torch.Generator().manual_seed(SEED), output_type="np",
    ).frames  # fmt: skip
    return torch.from_numpy((frames * 255).round().astype("uint8"))


def main(plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """PSNR of each row's video in dB: to our packed model's, to ours rounded alike; and of ours to full precision.

    ``half_sums_db`` is to ours rounded alike, for the targets whose kernels have such sums.
    """
    made: dict[tuple[str, ...], Tensor] = {}

    def once(key: tuple[str, ...], row: Mapping[str, Any], load: Callable[[], nn.Module]) -> Tensor:
        if key not in made:
            made[key] = video(row, load())
        return made[key]

    results = []
    for row in plan:
        packed = once(("packed", row["packed"]), row, lambda row=row: load_packed(row["packed"], kernel="reference"))
        rounded = once(("rounded", row["packed"], str(row["dtype"])), row, lambda row=row: rounded_like(row))
        full = once(
            ("full", row["model"]), row, lambda row=row: transformer_of(row, Path(row["model"]) / "transformer")
        )
        model = CONSUMERS[row["target"]](row)
        theirs = video(row, model)
        assert len(theirs.unique()) > 20, "a video of few colours compares nothing"
        half = video(row, with_half_sums(row, model)) if row["target"] in WITH_HALF_SUMS else None
        results.append(
            {
                "psnr_db": psnr_db(theirs, packed, max_value=255),
                "same_rounding_db": psnr_db(theirs, rounded, max_value=255),
                "packed_to_full_db": psnr_db(packed, full, max_value=255),
                "half_sums_db": None if half is None else psnr_db(half, rounded, max_value=255),
            }
        )
    return results


@torch.no_grad()
def answers(plan: Path) -> list[dict[str, str]]:
    """The results of each row of a plan's file, numbers as text: one may be infinite."""
    results = main(json.loads(plan.read_text()))
    return [{key: str(value) for key, value in row.items() if value is not None} for row in results]


if __name__ == "__main__":
    print(json.dumps(answers(Path(sys.argv[1]))))
