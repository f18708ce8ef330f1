"""DINO's vision transformer (arXiv 2104.14294): the feature of an image is its class token behind the last normalization.

The network is transformers' ViTModel; the published file (dino_vitbase16_pretrain.pth of facebookresearch/dino) is read into
it by name, each joint projection of queries, keys and values cut into three. Widths and depths are the file's, a head has 64
channels. One part is DINO's own: for images that are not of the trained size its position embeddings are resized bicubically
by the factor (patches + 0.1) / side, not to a size, which moves them a little.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.published_tensors import read_tensors
from qvgen.evaluation.placement import sampling_device

HEAD_CHANNELS = 64
_LAYER = {
    "norm1": "layernorm_before", "attn.proj": "attention.o_proj", "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
_WHOLE = {
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias",
}  # fmt: skip


class Dino(nn.Module):
    """The network.

    Args:
        tensors: Name -> tensor, as published.

    Raises:
        ValueError: They are another network's.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        try:
            width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
            self.side = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
            hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
        except (KeyError, ValueError) as error:
            raise ValueError(f"they are no weights of DINO's vision transformer ({error})") from error
        layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        config = ViTConfig(
            hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, image_size=self.side * patch,
            num_attention_heads=width // HEAD_CHANNELS, patch_size=patch, layer_norm_eps=1e-6,
        )  # fmt: skip
        self.model = ViTModel(config, add_pooling_layer=False)
        try:
            self.model.load_state_dict(transformers_names(tensors), strict=True)
        except RuntimeError as error:
            line = " ".join(str(error).split())[:160]
            raise ValueError(f"they are no weights of DINO's vision transformer ({line})") from error
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """The features of normalized images, float32 [B, D]; H and W need not be multiples of the patch."""
        patches = self.model.embeddings.patch_embeddings.projection(images)
        tokens = patches.flatten(2).mT
        first = self.model.embeddings.cls_token.expand(len(images), -1, -1)
        x = torch.cat((first, tokens), 1) + self._positions(patches.shape[-2], patches.shape[-1])
        for layer in self.model.layers:
            x = layer(x, None)
        features: Tensor = self.model.layernorm(x)[:, 0]
        return features

    def _positions(self, height: int, width: int) -> Tensor:
        """Position embeddings of the class token and of height x width patches, [1, 1 + height * width, D]."""
        table = self.model.embeddings.position_embeddings
        if (height, width) == (self.side, self.side):
            return table
        grid = table[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        factors = ((height + 0.1) / self.side, (width + 0.1) / self.side)
        grid = functional.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat((table[:, :1], grid.flatten(2).mT), 1)


def transformers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under the names of transformers' ViTModel; an unknown name stays as it is, to be refused."""
    found = {}
    for name, value in tensors.items():
        parts = name.split(".")
        if parts[0] != "blocks":
            found[_WHOLE.get(name, name)] = value.float()
            continue
        place, part, kind = f"layers.{parts[1]}", ".".join(parts[2:-1]), parts[-1]
        if part == "attn.qkv":
            for letter, piece in zip("qkv", value.float().chunk(3), strict=True):
                found[f"{place}.attention.{letter}_proj.{kind}"] = piece
        else:
            found[f"{place}.{_LAYER.get(part, part)}.{kind}"] = value.float()
    return found


@cache
def load_dino(path: Path) -> Dino:
    """The network of a file, loaded once; raises ValueError for a damaged or another network's file."""
    try:
        return Dino(read_tensors(path)).to(sampling_device())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
