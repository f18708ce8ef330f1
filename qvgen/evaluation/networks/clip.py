"""OpenAI's CLIP (arXiv 2103.00020): features of images and of texts, by the published files ViT-B-32.pt and ViT-L-14.pt.

The network is transformers' CLIPModel; the published tensors are read into it by name, each joint projection of queries, keys
and values cut into three, and the two last projections transposed. Sizes are the file's, a head has 64 channels. All is
float32, where the published program computes in float16 on a GPU. Texts are cut into tokens by the published vocabulary
(bpe_simple_vocab_16e6.txt.gz) with transformers' CLIPTokenizer; damaged Unicode is not repaired (ftfy, as published).
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qvgen.evaluation.networks.published_tensors import read_tensors
from qvgen.evaluation.placement import sampling_device

HEAD_CHANNELS, NUM_MERGES = 64, 48894
_FACTS = ("input_resolution", "context_length", "vocab_size")
_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight", "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight", "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight", "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}  # fmt: skip


class Clip(nn.Module):
    """The network.

    Args:
        tensors: Name -> tensor, as published.

    Raises:
        ValueError: They are another network's.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        from transformers import CLIPModel

        tensors = {name: value for name, value in tensors.items() if name not in _FACTS}
        try:
            self.model = CLIPModel(_config(tensors))
            self.model.load_state_dict(transformers_names(tensors), strict=True)
        except (KeyError, RuntimeError, ValueError) as error:
            line = " ".join(str(error).split())[:160]
            raise ValueError(f"they are no weights of OpenAI's CLIP ({line})") from error
        self.side: int = self.model.config.vision_config.image_size
        self.context: int = self.model.config.text_config.max_position_embeddings
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def image_features(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """The features of normalized images, of any length, float32 [B, D]."""
        found: Tensor = self.model.visual_projection(self.model.vision_model(pixel_values=images).pooler_output)
        return found

    @torch.no_grad()
    def text_features(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B D"]:
        """The features of texts, of any length, float32 [B, D]."""
        found: Tensor = self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)
        return found

    @property
    def logit_scale(self) -> float:
        """The factor of a cosine in CLIP's logits, about 100."""
        return float(self.model.logit_scale.double().exp())


def _config(tensors: Mapping[str, Tensor]) -> Any:
    from transformers import CLIPConfig

    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    side = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    dimension = tensors["text_projection"].shape[1]
    vision = {
        "hidden_size": width, "image_size": side * patch, "patch_size": patch, "projection_dim": dimension,
        **_depth(tensors, "visual.transformer.", width),
    }  # fmt: skip
    text = {
        "hidden_size": text_width, "vocab_size": vocabulary, "max_position_embeddings": len(tensors["positional_embedding"]),
        "projection_dim": dimension, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": 0,
        **_depth(tensors, "transformer.", text_width),
    }  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimension)


def _depth(tensors: Mapping[str, Tensor], prefix: str, width: int) -> dict[str, Any]:
    start = f"{prefix}resblocks."
    return {
        "num_hidden_layers": len({name[len(start) :].split(".")[0] for name in tensors if name.startswith(start)}),
        "intermediate_size": len(tensors[f"{start}0.mlp.c_fc.weight"]),
        "num_attention_heads": width // HEAD_CHANNELS,
        "hidden_act": "quick_gelu",
    }


def transformers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under the names of transformers' CLIPModel; an unknown name stays as it is, to be refused."""
    found = {}
    for name, value in tensors.items():
        before, blocks, rest = name.partition("transformer.resblocks.")
        value = value.float()
        if not blocks:
            found[_WHOLE.get(name, name)] = value.mT if name in ("visual.proj", "text_projection") else value
            continue
        tower = "vision_model" if before == "visual." else "text_model"
        number, _, inner = rest.partition(".")
        place = f"{tower}.encoder.layers.{number}"
        if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for letter, piece in zip("qkv", value.chunk(3), strict=True):
                found[f"{place}.self_attn.{letter}_proj.{inner.rpartition('_')[2]}"] = piece
        else:
            part, _, kind = inner.rpartition(".")
            found[f"{place}.{_LAYER.get(part, part)}.{kind}"] = value
    return found


@cache
def load_clip(path: Path) -> Clip:
    """The network of a file, loaded once; raises ValueError for a damaged or another network's file."""
    try:
        return Clip(read_tensors(path)).to(sampling_device())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class ClipTokens:
    """The published vocabulary: pairs of symbols to join, a line each behind the first, in the order of joining.

    Args:
        path: The file, compressed by gzip.

    Raises:
        ValueError: It is another file.
    """

    def __init__(self, path: Path) -> None:
        from transformers import CLIPTokenizer

        try:
            lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : NUM_MERGES + 1]
            merges = [(left, right) for left, right in (line.split() for line in lines if line)]
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is no vocabulary of CLIP ({error}); get it again") from error
        signs = _signs()
        words = [*signs, *(f"{sign}</w>" for sign in signs), *("".join(pair) for pair in merges)]
        words += ["<|startoftext|>", "<|endoftext|>"]
        self._tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges)

    def __call__(self, text: str, *, context: int, cut: bool = False) -> Int[Tensor, "1 T"]:
        """The tokens of a text between start and end, int64 [1, context], 0 behind the end.

        Args:
            text: The text.
            context: So many tokens.
            cut: Whether a text that has more loses those before its end, instead of being refused.

        Raises:
            ValueError: There are more than ``context``.
        """
        found = self._tokenizer(text)["input_ids"]
        if cut and len(found) > context:
            found = [*found[: context - 1], found[-1]]
        if len(found) > context:
            raise ValueError(f"{text!r} has {len(found)} tokens, and CLIP takes {context}")
        return torch.tensor([found + [0] * (context - len(found))])


def _signs() -> list[str]:
    """A visible sign for each of the 256 bytes, in the vocabulary's order: those that are visible first."""
    visible = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\u00a1"), ord("\u00ac") + 1),
        *range(ord("\u00ae"), ord("\u00ff") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [*map(chr, visible), *(chr(256 + number) for number in range(len(hidden)))]


@cache
def load_tokens(path: Path) -> ClipTokens:
    """The vocabulary of a file, read once."""
    return ClipTokens(path)
