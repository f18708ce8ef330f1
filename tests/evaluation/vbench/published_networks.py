"""VBench's networks in float64 from their papers and published files' names, importing nothing of qvgen: the oracles."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, t: Mapping[str, Tensor], name: str) -> Tensor:
    return x @ t[f"{name}.weight"].double().T + t[f"{name}.bias"].double()


def norm(x: Tensor, t: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    y = x - x.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    return y * t[f"{name}.weight"].double() + t[f"{name}.bias"].double()


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, fill: float = -math.inf
) -> Tensor:
    """One image or text: q, k, v [N, D]; mask [N, N], True where a pair is looked at."""
    out = []
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        logits = a @ b.T / a.shape[1] ** 0.5
        logits = logits if mask is None else torch.where(mask, logits, torch.full_like(logits, fill))
        out.append(logits.softmax(1) @ c)
    return torch.cat(out, 1)


def bicubic_weights(place: Tensor) -> tuple[Tensor, Tensor]:
    """The four neighbours of a place and their weights, Keys' kernel with a = -0.75."""
    base = place.floor()
    near = torch.stack([base + shift for shift in (-1, 0, 1, 2)], -1)
    d, a = (place[:, None] - near).abs(), -0.75
    inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
    outer = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return near.long(), torch.where(d <= 1, inner, outer)


def resize(x: Tensor, size: tuple[int, int], steps: tuple[float, float], *, cubic: bool) -> Tensor:
    """[..., H, W] at (i + 0.5) * step - 0.5, borders repeated, no antialiasing."""
    for axis, (number, step) in zip((-2, -1), zip(size, steps, strict=True), strict=True):
        length = x.shape[axis]
        place = (torch.arange(number, dtype=torch.float64) + 0.5) * step - 0.5
        if cubic:
            near, weights = bicubic_weights(place)
        else:
            place = place.clamp(min=0)
            near = torch.stack((place.floor(), place.floor() + 1), -1).long()
            weights = torch.stack((1 - (place - place.floor()), place - place.floor()), -1)
        near = near.clamp(0, length - 1)
        matrix = torch.zeros(number, length, dtype=torch.float64)
        matrix.scatter_add_(1, near, weights)
        x = (x.transpose(axis, -1) @ matrix.T).transpose(axis, -1)
    return x


def dino(image: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    """Image [3, H, W] float64 -> class token [D]."""
    weight = t["patch_embed.proj.weight"].double()
    patch, width = weight.shape[-1], weight.shape[0]
    grid = functional.conv2d(image[None], weight, t["patch_embed.proj.bias"].double(), stride=patch)[0]
    table = t["pos_embed"].double()[0]
    side = round((len(table) - 1) ** 0.5)
    rows, columns = grid.shape[1:]
    places = table[1:]
    if (rows, columns) != (side, side):
        image_of_places = places.T.reshape(width, side, side)
        steps = (side / (rows + 0.1), side / (columns + 0.1))
        places = resize(image_of_places, (rows, columns), steps, cubic=True).flatten(1).T
    x = torch.cat((t["cls_token"].double()[0] + table[:1], grid.flatten(1).T + places))
    for index in range(len({name.split(".")[1] for name in t if name.startswith("blocks.")})):
        b = f"blocks.{index}"
        q, k, v = linear(norm(x, t, f"{b}.norm1", 1e-6), t, f"{b}.attn.qkv").chunk(3, 1)
        x = x + linear(attention(q, k, v, width // 64), t, f"{b}.attn.proj")
        x = x + linear(functional.gelu(linear(norm(x, t, f"{b}.norm2", 1e-6), t, f"{b}.mlp.fc1")), t, f"{b}.mlp.fc2")
    return norm(x, t, "norm", 1e-6)[0]


def clip_blocks(x: Tensor, t: Mapping[str, Tensor], prefix: str, mask: Tensor | None) -> Tensor:
    for index in range(len({name.split("resblocks.")[1].split(".")[0] for name in t if name.startswith(prefix)})):
        b = f"{prefix}resblocks.{index}"
        y = norm(x, t, f"{b}.ln_1", 1e-5)
        joint = y @ t[f"{b}.attn.in_proj_weight"].double().T + t[f"{b}.attn.in_proj_bias"].double()
        x = x + linear(attention(*joint.chunk(3, 1), x.shape[1] // 64, mask), t, f"{b}.attn.out_proj")
        y = linear(norm(x, t, f"{b}.ln_2", 1e-5), t, f"{b}.mlp.c_fc")
        x = x + linear(y * (1.702 * y).sigmoid(), t, f"{b}.mlp.c_proj")
    return x


def clip_image(image: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    """Image [3, S, S] float64 -> feature [D]."""
    weight = t["visual.conv1.weight"].double()
    tokens = functional.conv2d(image[None], weight, stride=weight.shape[-1])[0].flatten(1).T
    x = torch.cat((t["visual.class_embedding"].double()[None], tokens)) + t["visual.positional_embedding"].double()
    x = clip_blocks(norm(x, t, "visual.ln_pre", 1e-5), t, "visual.transformer.", None)
    return norm(x[:1], t, "visual.ln_post", 1e-5)[0] @ t["visual.proj"].double()


def clip_text(tokens: list[int], t: Mapping[str, Tensor]) -> Tensor:
    """Tokens up to the end of the text -> feature [D]."""
    x = t["token_embedding.weight"].double()[tokens] + t["positional_embedding"].double()[: len(tokens)]
    mask = torch.ones(len(tokens), len(tokens)).tril().bool()
    x = clip_blocks(x, t, "transformer.", mask)
    return norm(x[-1:], t, "ln_final", 1e-5)[0] @ t["text_projection"].double()


def musiq(image: Tensor, t: Mapping[str, Tensor]) -> float:
    """Image [3, H, W] float64 in [0, 1] -> score."""
    image = image * 2 - 1
    tokens, seen, longest = [], [], max(image.shape[1:])
    for scale, side in enumerate((224, 384, None)):
        scaled = image
        if side is not None:
            size = tuple(round(length * (side / longest)) for length in image.shape[1:])
            steps = tuple(before / after for before, after in zip(image.shape[1:], size, strict=True))
            scaled = resize(image, size, steps, cubic=True)
        patches, places = musiq_patches(scaled)
        more = 0 if side is None else math.ceil(side / 32) ** 2 - len(patches)
        patches = torch.cat((patches, torch.zeros(more, 3, 32, 32, dtype=torch.float64)))
        table, sizes = (t[f"transformer_encoder.{name}"].double() for name in
                        ("posembed_input.position_emb", "scaleembed_input.scale_emb"))  # fmt: skip
        for index, patch in enumerate(patches):
            real = index < len(places)
            tokens.append(musiq_token(patch, t) + table[0, places[index] if real else 0] + sizes[scale if real else 0])
            seen.append(real)
    x = torch.cat((t["transformer_encoder.cls"].double()[0], torch.stack(tokens)))
    flags = torch.tensor([True, *seen])
    mask = flags[:, None] & flags[None]
    start = "transformer_encoder.transformer.encoderblock_"
    for index in range(len({name[len(start) :].split(".")[0] for name in t if name.startswith(start)})):
        b = f"{start}{index}"
        y = norm(x, t, f"{b}.norm1", 1e-6)
        q, k, v = (linear(y, t, f"{b}.attention.{part}") for part in ("query", "key", "value"))
        x = x + linear(attention(q, k, v, 6, mask, -1e3), t, f"{b}.attention.out")
        x = x + linear(functional.gelu(linear(norm(x, t, f"{b}.norm2", 1e-6), t, f"{b}.mlp.fc1")), t, f"{b}.mlp.fc2")
    return float(linear(norm(x[:1], t, "transformer_encoder.encoder_norm", 1e-6), t, "head"))


def musiq_patches(image: Tensor) -> tuple[Tensor, list[int]]:
    rows, columns = (math.ceil(length / 32) for length in image.shape[1:])
    padded = torch.zeros(3, rows * 32, columns * 32, dtype=torch.float64)
    top, left = ((number * 32 - length) // 2 for number, length in zip((rows, columns), image.shape[1:], strict=True))
    padded[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    patches = [padded[:, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32] for y in range(rows) for x in range(columns)]
    return torch.stack(patches), [
        (y * 10 // rows) * 10 + x * 10 // columns for y in range(rows) for x in range(columns)
    ]


def standardized(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    weight = weight.double()
    flat = weight.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    flat = flat / ((flat.square().sum(1, keepdim=True) / (flat.shape[1] - 1)).sqrt() + 1e-5)
    size = weight.shape[-1]
    total = (math.ceil(x.shape[-1] / stride) - 1) * stride + size - x.shape[-1]
    x = functional.pad(x, (total // 2, total - total // 2) * 2)
    return functional.conv2d(x, flat.reshape(weight.shape), stride=stride)


def group_norm(x: Tensor, t: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    y = x.reshape(32, -1)
    y = y - y.mean(1, keepdim=True)
    y = (y / (y.square().mean(1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    return y * t[f"{name}.weight"].double().view(-1, 1, 1) + t[f"{name}.bias"].double().view(-1, 1, 1)


def musiq_token(patch: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    x = group_norm(standardized(patch[None], t["conv_root.weight"], 2), t, "gn_root", 1e-6).relu()
    x = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 3, 2)
    y = group_norm(standardized(x, t["block1.conv1.weight"]), t, "block1.gn1", 1e-4).relu()
    y = group_norm(standardized(y, t["block1.conv2.weight"]), t, "block1.gn2", 1e-4).relu()
    y = group_norm(standardized(y, t["block1.conv3.weight"]), t, "block1.gn3", 1e-4)
    x = (y + group_norm(standardized(x, t["block1.conv_proj.weight"]), t, "block1.gn_proj", 1e-4)).relu()
    return linear(x[0].permute(1, 2, 0).flatten()[None], t, "embedding")[0]


def random_tensors(shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> dict[str, Tensor]:
    """Values of a deviation that keeps activations of order 1; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        fan = math.prod(shape[1:]) if len(shape) > 1 else 1
        values = torch.randn(shape, generator=generator)
        is_scale = len(shape) == 1 and name.endswith("weight")
        found[name] = 1 + 0.2 * values if is_scale else values * (1.5 / fan**0.5 if len(shape) > 1 else 0.2)
    return found


def _block(prefix: str, width: int, names: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, shape in names.items():
        found[f"{prefix}.{name}.weight"] = shape
        found[f"{prefix}.{name}.bias"] = shape[:1]
    return found


def dino_tensors(width: int = 128, layers: int = 2) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width), "pos_embed": (1, 197, width), "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    names = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,),
             "mlp.fc1": (96, width), "mlp.fc2": (width, 96)}  # fmt: skip
    for index in range(layers):
        shapes |= _block(f"blocks.{index}", width, names)
    found = random_tensors(shapes)
    found["pos_embed"] = torch.randn((1, 197, width), generator=torch.Generator().manual_seed(1))
    return found


def clip_tensors(
    width: int = 128, text_width: int = 64, vocabulary: int = 514 + 6, context: int = 12
) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,), "visual.positional_embedding": (50, width),
        "visual.conv1.weight": (width, 3, 32, 32), "visual.proj": (width, 48), "text_projection": (text_width, 48),
        "token_embedding.weight": (vocabulary, text_width), "positional_embedding": (context, text_width),
        "ln_final.weight": (text_width,), "ln_final.bias": (text_width,),
        **{f"visual.{name}.{kind}": (width,) for name in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
    }  # fmt: skip
    for prefix, size in (("visual.transformer.", width), ("transformer.", text_width)):
        names = {
            "ln_1": (size,),
            "ln_2": (size,),
            "attn.out_proj": (size, size),
            "mlp.c_fc": (80, size),
            "mlp.c_proj": (size, 80),
        }
        for index in range(2):
            block = f"{prefix}resblocks.{index}"
            shapes |= _block(block, size, names)
            shapes |= {f"{block}.attn.in_proj_weight": (3 * size, size), f"{block}.attn.in_proj_bias": (3 * size,)}
    return {**random_tensors(shapes), "logit_scale": torch.tensor(4.6)}


def musiq_tensors(width: int = 12) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"conv_root.weight": (64, 3, 7, 7)}
    for name, size in (
        ("gn_root", 64),
        ("block1.gn1", 64),
        ("block1.gn2", 64),
        ("block1.gn3", 256),
        ("block1.gn_proj", 256),
    ):
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for name, shape in (
        ("conv1", (64, 64, 1, 1)),
        ("conv2", (64, 64, 3, 3)),
        ("conv3", (256, 64, 1, 1)),
        ("conv_proj", (256, 64, 1, 1)),
    ):
        shapes[f"block1.{name}.weight"] = shape
    shapes |= _block(
        "x", width, {"embedding": (width, 16384), "head": (1, width), "transformer_encoder.encoder_norm": (width,)}
    )
    shapes = {name.removeprefix("x."): shape for name, shape in shapes.items()}
    shapes |= {
        "transformer_encoder.posembed_input.position_emb": (1, 100, width),
        "transformer_encoder.cls": (1, 1, width),
    }
    shapes["transformer_encoder.scaleembed_input.scale_emb"] = (3, width)
    names = {"norm1": (width,), "norm2": (width,), "mlp.fc1": (20, width), "mlp.fc2": (width, 20),
             **{f"attention.{part}": (width, width) for part in ("query", "key", "value", "out")}}  # fmt: skip
    for index in range(2):
        shapes |= _block(f"transformer_encoder.transformer.encoderblock_{index}", width, names)
    return random_tensors(shapes)
