"""AMT-S in float64 from its paper and its published file's names, importing nothing of qvgen: the oracle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from tests.evaluation.vbench.published_networks import random_tensors, resize

Tensors = Mapping[str, Tensor]


def conv(x: Tensor, t: Tensors, name: str, *, stride: int = 1) -> Tensor:
    weight = t[f"{name}.weight"]
    return functional.conv2d(x[None], weight, t[f"{name}.bias"], stride, weight.shape[-1] // 2)[0]


def prelu(x: Tensor, t: Tensors, name: str) -> Tensor:
    return torch.where(x > 0, x, x * t[f"{name}.weight"].view(-1, 1, 1))


def conv_prelu(x: Tensor, t: Tensors, name: str, *, stride: int = 1) -> Tensor:
    return prelu(conv(x, t, f"{name}.0", stride=stride), t, f"{name}.1")


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


def instance(x: Tensor) -> Tensor:
    y = x - x.mean((1, 2), keepdim=True)
    return y / (y.square().mean((1, 2), keepdim=True) + 1e-5).sqrt()


def by(x: Tensor, factor: float) -> Tensor:
    """Bilinear, half-pixel centres."""
    size = (int(x.shape[-2] * factor), int(x.shape[-1] * factor))
    return resize(x, size, (1 / factor, 1 / factor), cubic=False)


def at(image: Tensor, x: Tensor, y: Tensor, *, each: bool = False) -> Tensor:
    """Bilinear values of an image [C, H, W] at places, 0 outside; with ``each`` the places of each channel are its own."""
    height, width = image.shape[1:]
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = x.floor() + dx, y.floor() + dy
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            channel = torch.arange(len(image)).view(-1, 1, 1) if each else slice(None)
            values = image[channel, row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()]
            total = total + values * (weight * inside)
    return total


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Each place takes the value where its flow (x, y) leads; outside counts as the border."""
    height, width = image.shape[1:]
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return at(image, (x + flow[0]).clamp(0, width - 1), (y + flow[1]).clamp(0, height - 1))


def features(x: Tensor, t: Tensors) -> Tensor:
    x = instance(conv(x, t, "feat_encoder.conv1", stride=2)).relu()
    for layer, step in ((1, 1), (2, 2), (3, 2)):
        for block in (0, 1):
            name, stride = f"feat_encoder.layer{layer}.{block}", step if block == 0 else 1
            y = instance(conv(x, t, f"{name}.conv1")).relu()
            y = instance(conv(y, t, f"{name}.conv2", stride=stride)).relu()
            y = instance(conv(y, t, f"{name}.conv3")).relu()
            x = (y + (x if stride == 1 else instance(conv(x, t, f"{name}.downsample.0", stride=stride)))).relu()
    return conv(x, t, "feat_encoder.conv2")


def decoder(x: Tensor, t: Tensors, name: str) -> Tensor:
    x = conv_prelu(x, t, f"{name}.convblock.0")
    block = f"{name}.convblock.1"
    y = conv_prelu(x, t, f"{block}.conv1")
    y = torch.cat((y[:-20], conv_prelu(y[-20:], t, f"{block}.conv2")))
    y = conv_prelu(y, t, f"{block}.conv3")
    y = torch.cat((y[:-20], conv_prelu(y[-20:], t, f"{block}.conv4")))
    x = prelu(x + conv(y, t, f"{block}.conv5"), t, f"{block}.prelu")
    last = f"{name}.convblock.2"
    return functional.conv_transpose2d(x[None], t[f"{last}.weight"], t[f"{last}.bias"], 2, 1)[0]


def correlations(a: Tensor, b: Tensor, flow: Tensor) -> Tensor:
    """The first frame's places beside the second's, where ``flow`` leads, at four sizes: [4 * 49, H, W]."""
    height, width = a.shape[1:]
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    table = torch.einsum("cyx,cvu->yxvu", a, b) / a.shape[0] ** 0.5
    near, found = torch.arange(-3, 4).double(), []
    for level in range(4):
        # The window's first index runs along x.
        x = ((column + flow[0]) / 2**level)[..., None, None] + near[:, None].expand(7, 7)
        y = ((row + flow[1]) / 2**level)[..., None, None] + near.expand(7, 7)
        own = table[row, column]  # [H, W, H2, W2]
        found.append(at(own.flatten(0, 1), x.flatten(0, 1), y.flatten(0, 1), each=True).reshape(height, width, 49))
        if level < 3:
            table = functional.avg_pool2d(table.flatten(0, 1)[None], 2, 2)[0].unflatten(0, (height, width))
    return torch.cat(found, -1).permute(2, 0, 1)


def update(
    name: str, factor: int, t: Tensors, known: Tensor, flow: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    small = flow if factor == 1 else by(flow, 1 / factor) / factor
    looked = torch.cat((correlations(a, b, 2 * small[2:]), correlations(b, a, 2 * small[:2])))
    c = leaky(conv(looked, t, f"{name}.convc1"))
    f = leaky(conv(leaky(conv(small, t, f"{name}.convf1")), t, f"{name}.convf2"))
    both = leaky(conv(torch.cat((c, f)), t, f"{name}.conv"))
    x = torch.cat((both, small, known if factor == 1 else by(known, 1 / factor)))
    hidden = conv(leaky(conv(x, t, f"{name}.gru.0")), t, f"{name}.gru.2")
    change, moved = (
        conv(leaky(conv(hidden, t, f"{name}.{head}.0")), t, f"{name}.{head}.2") for head in ("feat_head", "flow_head")
    )
    if factor != 1:
        change, moved = by(change, factor), factor * by(moved, factor)
    return known + change, flow + moved


def amt(first: Tensor, second: Tensor, tensors: Tensors) -> Tensor:
    """The frame in the middle of two [3, H, W] float64 in [0, 1]."""
    t = {name: value.double() for name, value in tensors.items()}
    mean = (first.mean() + second.mean()) / 2
    first, second = first - mean, second - mean
    a, b = features(first, t), features(second, t)
    pyramids = []
    for x in (first, second):
        stages = []
        for stage in (1, 2, 3, 4):
            x = conv_prelu(conv_prelu(x, t, f"encoder.pyramid{stage}.0", stride=2), t, f"encoder.pyramid{stage}.1")
            stages.append(x)
        pyramids.append(stages)
    one, two = pyramids
    out = decoder(torch.cat((one[3], two[3], torch.full_like(one[3][:1], 0.5))), t, "decoder4")
    known, flow = update("update4", 1, t, out[4:], out[:4], a, b)
    for stage, factor in ((2, 2), (1, 4)):
        moved = torch.cat((known, warp(one[stage], flow[:2]), warp(two[stage], flow[2:]), flow))
        out = decoder(moved, t, f"decoder{stage + 1}")
        known, flow = update(f"update{stage + 1}", factor, t, out[4:], out[:4] + 2 * by(flow, 2), a, b)
    out = decoder(torch.cat((known, warp(one[0], flow[:2]), warp(two[0], flow[2:]), flow)), t, "decoder1")
    large, images = 2 * by(flow, 2), []
    for index in range(3):
        to_first = out[2 * index : 2 * index + 2] + large[:2]
        to_second = out[6 + 2 * index : 8 + 2 * index] + large[2:]
        mask = 1 / (1 + torch.exp(-out[12 + index]))
        image = mask * warp(first, to_first) + (1 - mask) * warp(second, to_second)
        images.append(image + mean + out[15 + 3 * index : 18 + 3 * index])
    joined = conv(prelu(conv(torch.cat(images), t, "comb_block.0"), t, "comb_block.1"), t, "comb_block.2")
    return (torch.stack(images).mean(0) + joined).clamp(0, 1)


def amt_tensors() -> dict[str, Tensor]:
    """Random values under the published names."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, outputs: int, inputs: int, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, size, size), (outputs,)

    def add_prelu(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.0", outputs, inputs, 3)
        shapes[f"{name}.1.weight"] = (outputs,)

    add("feat_encoder.conv1", 32, 3, 7)
    add("feat_encoder.conv2", 84, 96, 1)
    for layer, (inputs, outputs) in enumerate(((32, 32), (32, 64), (64, 96)), 1):
        for block, before in ((0, inputs), (1, outputs)):
            name = f"feat_encoder.layer{layer}.{block}"
            add(f"{name}.conv1", outputs // 4, before, 1)
            add(f"{name}.conv2", outputs // 4, outputs // 4, 3)
            add(f"{name}.conv3", outputs, outputs // 4, 1)
            if block == 0 and layer > 1:
                add(f"{name}.downsample.0", outputs, before, 1)
    for stage, (inputs, outputs) in enumerate(((3, 20), (20, 32), (32, 44), (44, 56)), 1):
        add_prelu(f"encoder.pyramid{stage}.0", outputs, inputs)
        add_prelu(f"encoder.pyramid{stage}.1", outputs, outputs)
    for name, inputs, width, outputs in (
        ("4", 113, 112, 48),
        ("3", 136, 132, 36),
        ("2", 100, 96, 24),
        ("1", 64, 60, 24),
    ):
        block = f"decoder{name}.convblock"
        add_prelu(f"{block}.0", width, inputs)
        for part, channels in (("conv1", width), ("conv2", 20), ("conv3", width), ("conv4", 20)):
            add_prelu(f"{block}.1.{part}", channels, channels)
        add(f"{block}.1.conv5", width, width, 3)
        shapes[f"{block}.1.prelu.weight"] = (width,)
        shapes[f"{block}.2.weight"], shapes[f"{block}.2.bias"] = (width, outputs, 4, 4), (outputs,)
    for name, channels in (("update4", 44), ("update3", 32), ("update2", 20)):
        for part, outputs, inputs, size in (
            ("convc1", 64, 392, 1),
            ("convf1", 40, 4, 7),
            ("convf2", 20, 40, 3),
            ("conv", 68, 84, 3),
        ):
            add(f"{name}.{part}", outputs, inputs, size)
        for part, inputs, outputs in (("gru", 72 + channels, 76), ("feat_head", 76, channels), ("flow_head", 76, 4)):
            add(f"{name}.{part}.0", 76, inputs, 3)
            add(f"{name}.{part}.2", outputs, 76, 3)
    add("comb_block.0", 18, 9, 3)
    add("comb_block.2", 3, 18, 3)
    shapes["comb_block.1.weight"] = (18,)
    found = random_tensors(shapes)
    for name, value in found.items():
        if value.dim() == 1 and name.endswith("weight"):
            value.mul_(0.3)  # the slope of a PReLU
        elif "convblock.2.weight" in name:
            value.mul_(2 * (value.shape[1] / value.shape[0]) ** 0.5 / 1.5)  # four of sixteen taps meet a pixel
        elif name.endswith("weight"):
            value.mul_(0.7)
    for name, factor in (("decoder1.convblock.2", 0.15), ("comb_block.2", 0.1)):
        found[f"{name}.weight"].mul_(factor)
        found[f"{name}.bias"].mul_(factor)
    return found
