"""Tiny checkpoints in the layout of QVGen's own release, and its modules written down anew: they import nothing of qvgen.

    w' = w + B A                                       where there is a LoRA
    g = 1 / sqrt(K P), s' = (s - s g) + s g, z' alike  in the checkpoint's type, as everything about weights
    q = clamp(round(w' / s' + z'), 0, P), W = s' (q - z')
    x: min and max of each token, times sigmoid(lower or upper) of the group, times 0.95; a range that need not hold 0
       z = clamp(round(-min / scale), 0, P), X = scale (clamp(round(x / scale + z), 0, P) - z)

The group is a counter's: with --fix it goes down by one with every call of the transformer, from 49 to 0. Calls do not
depend on one another, so several are one batch here, each sample with the group of its own call.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

GROUPS = 50


class Quantizer(nn.Module):
    """Holds parameters under the release's names."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))


class ReleaseLinear(nn.Module):
    """A quantized Linear of the release; activations in float32."""

    def __init__(self, linear: nn.Linear, *, bits: tuple[int, int], dtype: torch.dtype, rank: int = 0) -> None:
        super().__init__()
        # Transformers of diffusers ask some layers for the dtype of their first parameter; it is in no file.
        self.float32 = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.weight_levels, self.input_levels = 2 ** bits[0] - 1, 2 ** bits[1] - 1
        rows, columns = linear.weight.shape
        weight = linear.weight.detach().clone()
        weight[::5] += 3 * weight.abs().amax(1, keepdim=True)[::5]  # rows without 0
        self.w = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.b = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        if rank:
            self.loraA = nn.Parameter((0.02 * torch.randn(rank, columns)).to(dtype), requires_grad=False)
            self.loraB = nn.Parameter((0.02 * torch.randn(rows, rank)).to(dtype), requires_grad=False)
        low, high = self.merged().amin(1, keepdim=True).float(), self.merged().amax(1, keepdim=True).float()
        scale = 0.95 * (high - low) / self.weight_levels  # a little is cut off, as by the release's start
        self.wquantizer = Quantizer(scale=scale.to(dtype), zero_point=(-low * 0.97 / scale).to(dtype))
        logits = [(math.log(0.95 / 0.05) + 0.3 * torch.randn(GROUPS)).to(dtype) for _ in range(2)]
        self.aquantizer = Quantizer(lower=logits[0], upper=logits[1])
        self.groups = [GROUPS - 1]

    def merged(self) -> Tensor:
        """The weight with its LoRA."""
        if not hasattr(self, "loraA"):
            return self.w
        return self.w + (self.loraB.float() @ self.loraA.float()).to(self.w.dtype)

    def weight_codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, s', z'."""
        g = 1 / math.sqrt(self.w.shape[1] * self.weight_levels)
        s, z = self.wquantizer.scale, self.wquantizer.zero_point
        s, z = (s - s * g) + s * g, (z - z * g) + z * g
        return torch.clamp(torch.round(self.merged() / s + z), 0, self.weight_levels), s, z

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        q, s, z = (value.float() for value in self.weight_codes())
        count = len(self.groups)  # one for each sample, whose rows follow on one another
        lower, upper = (
            logits[self.groups].sigmoid().float().repeat_interleave(len(x) // count).reshape(-1, *[1] * (x.ndim - 1))
            for logits in (self.aquantizer.lower, self.aquantizer.upper)
        )
        low, high = x.amin(-1, keepdim=True) * lower * 0.95, x.amax(-1, keepdim=True) * upper * 0.95
        scale = (high - low) / self.input_levels
        zero = torch.clamp(torch.round(-low / scale), 0, self.input_levels)
        inputs = scale * (torch.clamp(torch.round(x / scale + zero), 0, self.input_levels) - zero)
        bias = None if self.b is None else self.b.float()
        return nn.functional.linear(inputs, s * (q - z), bias)


def make_release(
    kind: str, *, dtype: torch.dtype = torch.bfloat16, bits: tuple[int, int] = (4, 4), rank: int = 0, keep: str = ""
) -> nn.Module:
    """A tiny transformer as the release holds it; Linears whose name contains ``keep`` stay in full precision."""
    torch.manual_seed(3)
    model = tiny_transformer(kind)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not (keep and keep in name):
            model.set_submodule(name, ReleaseLinear(module, bits=bits, dtype=dtype, rank=rank))
    for value in model.parameters():
        if value.dtype == torch.float32:
            value.data = value.data.to(dtype).float()
    return model.eval()


def tiny_transformer(kind: str) -> Any:
    """The sizes of tests/models/hub_folders.py."""
    if kind == "wan":
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
            ffn_dim=48, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=16, num_layers=2, sample_height=4, sample_width=6, sample_frames=9,
    )  # fmt: skip


def release_layers(model: nn.Module) -> dict[str, ReleaseLinear]:
    """Its quantized layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ReleaseLinear)}


def save_release(model: Any, folder: Path, *, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> Path:
    """Write the folder that the release's training leaves: config.json, and safetensors in one file or several."""
    folder.mkdir(parents=True)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    (folder / "config.json").write_text(json.dumps({"_class_name": type(model).__name__, **config}))
    stored = {key: value for key, value in model.state_dict().items() if not key.endswith(".float32")}
    state = {key: value.to(dtype).contiguous() for key, value in stored.items()}
    stem = "diffusion_pytorch_model"
    if shards == 1:
        save_file(state, folder / f"{stem}.safetensors")
        return folder
    names, index = sorted(state), {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        save_file({name: state[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def set_groups(model: nn.Module, groups: list[int]) -> None:
    """The counter's values for the calls that the samples of the next batch stand for."""
    for layer in release_layers(model).values():
        layer.groups = groups
