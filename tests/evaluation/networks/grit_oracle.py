"""GRiT in float64 and numpy from its papers and its published file's names; nothing of qvgen is used.

Published names and shapes, the backbone, RoIAlign place by place, suppression, proposals, the cascade, and texts that are
computed anew for each token.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from tests.evaluation.networks.float64_layers import (
    Weights,
    attention,
    gelu,
    layer_norm,
    linear,
    patches,
    softmax,
    under,
)
from tests.evaluation.vbench.published_networks import resize

Shapes = dict[str, tuple[int, ...]]
PUBLISHED = {
    "width": 768, "layers": 12, "window": 14, "whole": (2, 5, 8, 11), "side": 64, "learned": 14, "heads": 12,
    "channels": 256, "groups": 32, "hidden": 1024,
    "text": 768, "text_hidden": 3072, "text_layers": 6, "text_heads": 12, "vocabulary": 30522, "places": 1024,
}  # fmt: skip
SMALL = {
    "width": 8, "layers": 3, "window": 3, "whole": (1,), "side": 5, "learned": 3, "heads": 2,
    "channels": 4, "groups": 2, "hidden": 6,
    "text": 12, "text_hidden": 16, "text_layers": 2, "text_heads": 3, "vocabulary": 14, "places": 40,
}  # fmt: skip


def _two(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def shapes(s: dict) -> Shapes:
    """Names and shapes of the published checkpoint, of these sizes, without the head of masks."""
    width, channels, hidden, text = s["width"], s["channels"], s["hidden"], s["text"]
    vit, head, words = "backbone.bottom_up", "proposal_generator.centernet_head", "roi_heads.text_decoder.textual"
    found = {f"{vit}.pos_embed": (1, 1 + s["learned"] ** 2, width), **_two(f"{vit}.patch_embed.proj", width, 3, 16, 16)}
    for number in range(s["layers"]):
        block, side = f"{vit}.blocks.{number}", s["side"] if number in s["whole"] else s["window"]
        found |= _two(f"{block}.norm1", width) | _two(f"{block}.norm2", width)
        found |= _two(f"{block}.attn.qkv", 3 * width, width) | _two(f"{block}.attn.proj", width, width)
        found |= {f"{block}.attn.rel_pos_{axis}": (2 * side - 1, width // s["heads"]) for axis in "hw"}
        found |= _two(f"{block}.mlp.fc1", 4 * width, width) | _two(f"{block}.mlp.fc2", width, 4 * width)
    found["backbone.fpn_stride_16_8.weight"] = (width, width, 2, 2)
    for stride in (8, 16, 32):
        level = f"backbone.fpn_stride{stride}"
        found |= {f"{level}_conv1.weight": (channels, width, 1, 1), f"{level}_conv2.weight": (channels, channels, 3, 3)}
        found |= _two(f"{level}_norm1", channels) | _two(f"{level}_norm2", channels)
    for name in ("p6", "p7"):
        found |= _two(f"backbone.top_block.{name}", channels, channels, 3, 3)
    for layer in (0, 3, 6, 9):
        found |= _two(f"{head}.bbox_tower.{layer}", channels, channels, 3, 3)
        found |= _two(f"{head}.bbox_tower.{layer + 1}", channels)
    found |= _two(f"{head}.bbox_pred", 4, channels, 3, 3) | _two(f"{head}.agn_hm", 1, channels, 3, 3)
    found |= {f"{head}.scales.{level}.scale": (1,) for level in range(5)}
    for stage in range(3):
        box, out = f"roi_heads.box_head.{stage}", f"roi_heads.box_predictor.{stage}"
        found |= _two(f"{box}.fc1", hidden, 49 * channels) | _two(f"{box}.fc2", hidden, hidden)
        found |= _two(f"{out}.cls_score", 2, hidden)
        found |= _two(f"{out}.bbox_pred.0", hidden, hidden) | _two(f"{out}.bbox_pred.2", 4, hidden)
    found |= _two(f"{words}.object_feature_projection.0", text, channels)
    found |= _two(f"{words}.object_feature_projection.1", text) | _two(f"{words}.embedding.layer_norm", text)
    found |= {f"{words}.embedding.words.weight": (s["vocabulary"], text)}
    found |= {f"{words}.embedding.positions.weight": (s["places"], text)} | _two(
        f"{words}.output", s["vocabulary"], text
    )
    for number in range(s["text_layers"]):
        layer = f"{words}.transformer.encoder.layer.{number}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            found |= _two(f"{layer}.{part}", text, text)
        found |= _two(f"{layer}.intermediate.dense", s["text_hidden"], text)
        found |= _two(f"{layer}.output.dense", text, s["text_hidden"])
        found |= _two(f"{layer}.attention.output.LayerNorm", text) | _two(f"{layer}.output.LayerNorm", text)
    return found


def conv(x: np.ndarray, weights: Weights, name: str, *, stride: int = 1) -> np.ndarray:
    """A convolution of [C, H, W] with zeros around."""
    kernel, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias", np.zeros(1))
    size = kernel.shape[-1]
    x = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2)))
    rows, columns = ((length - size) // stride + 1 for length in x.shape[1:])
    found = np.zeros((len(kernel), rows, columns))
    for y, z in np.ndindex(rows, columns):
        part = x[:, y * stride : y * stride + size, z * stride : z * stride + size]
        found[:, y, z] = (kernel * part).sum((1, 2, 3))
    return found + bias.reshape(-1, 1, 1)


def _distances(learned: np.ndarray, length: int) -> np.ndarray:
    """Vectors of the distances 1 - length to length - 1."""
    count = 2 * length - 1
    place = (np.arange(count) + 0.5) * len(learned) / count - 0.5
    return np.stack([np.interp(place, np.arange(len(learned)), column) for column in learned.T], -1)


def _seen(x: np.ndarray, weights: Weights, heads: int) -> np.ndarray:
    """Attention of a map [H, W, C] with the vectors of distances."""
    height, width, channels = x.shape
    q, k, v = np.split(linear(x.reshape(-1, channels), weights, "attn.qkv"), 3, -1)
    down, across = (_distances(weights[f"attn.rel_pos_{axis}"], n) for axis, n in (("h", height), ("w", width)))
    places = [(y, z) for y in range(height) for z in range(width)]
    added = np.zeros((heads, len(places), len(places)))
    for a, (y, z) in enumerate(places):
        for b, (r, s) in enumerate(places):
            vector = down[y - r + height - 1] + across[z - s + width - 1]
            added[:, a, b] = q[a].reshape(heads, -1) @ vector
    return linear(attention(q, k, v, heads=heads, added=added), weights, "attn.proj").reshape(x.shape)


def backbone(image: np.ndarray, weights: Weights) -> list[np.ndarray]:
    """The five maps of a normalized image [3, H, W]; weights below ``backbone``, of the small sizes."""
    vit = under(weights, "bottom_up.")
    height, width = image.shape[1] // 16, image.shape[2] // 16
    learned = torch.from_numpy(vit["pos_embed"][0, 1:].T.reshape(8, 3, 3))
    places = resize(learned, (height, width), (3 / height, 3 / width), cubic=True).numpy().transpose(1, 2, 0)
    x = patches(image, vit["patch_embed.proj.weight"]).reshape(height, width, 8) + vit["patch_embed.proj.bias"] + places
    for number in range(3):
        block = under(vit, f"blocks.{number}.")
        y = layer_norm(x, block, "norm1", eps=1e-6)
        if number == 1:
            y = _seen(y, block, 2)
        else:
            y = np.pad(y, ((0, -height % 3), (0, -width % 3), (0, 0)))
            for r in range(0, y.shape[0], 3):
                for s in range(0, y.shape[1], 3):
                    y[r : r + 3, s : s + 3] = _seen(y[r : r + 3, s : s + 3], block, 2)
            y = y[:height, :width]
        x = x + y
        x = x + linear(gelu(linear(layer_norm(x, block, "norm2", eps=1e-6), block, "mlp.fc1")), block, "mlp.fc2")
    x = x.transpose(2, 0, 1)
    finer = np.zeros((8, 2 * height, 2 * width))
    for a in (0, 1):
        for b in (0, 1):
            finer[:, a::2, b::2] = np.einsum("ci,chw->ihw", weights["fpn_stride_16_8.weight"][:, :, a, b], x)
    coarser = x.reshape(8, height // 2, 2, width // 2, 2).max((2, 4))
    maps = []
    for stride, y in ((8, finer), (16, x), (32, coarser)):
        for part in (1, 2):
            y = conv(y, weights, f"fpn_stride{stride}_conv{part}").transpose(1, 2, 0)
            y = layer_norm(y, weights, f"fpn_stride{stride}_norm{part}", eps=1e-5).transpose(2, 0, 1)
        maps.append(y)
    maps.append(conv(maps[2], weights, "top_block.p6", stride=2))
    return [*maps, conv(np.maximum(maps[3], 0), weights, "top_block.p7", stride=2)]


def _between(features: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The map at places by their four neighbours, [C, places]; 0 more than 1 outside."""
    height, width = features.shape[1:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    bottom, right, b, a = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1), y - top, x - left
    upper = (1 - a) * features[:, top, left] + a * features[:, top, right]
    return inside * ((1 - b) * upper + b * ((1 - a) * features[:, bottom, left] + a * features[:, bottom, right]))


def roi_align(features: np.ndarray, box: np.ndarray, *, scale: float, side: int) -> np.ndarray:
    """[C, side, side]: each cell is the mean of ceil(its size) places each way."""
    left, top, right, bottom = box * scale - 0.5
    tall, wide = (bottom - top) / side, (right - left) / side
    rows, columns = math.ceil(tall), math.ceil(wide)
    if not rows or not columns:
        return np.zeros((len(features), side, side))
    ys = top + np.repeat(np.arange(side), rows) * tall + (np.tile(np.arange(rows), side) + 0.5) * tall / rows
    xs = left + np.repeat(np.arange(side), columns) * wide + (np.tile(np.arange(columns), side) + 0.5) * wide / columns
    values = _between(features, np.repeat(ys, len(xs)), np.tile(xs, len(ys)))
    return values.reshape(len(features), side, rows, side, columns).mean((2, 4))


def pool(maps: list[np.ndarray], boxes: np.ndarray, side: int) -> np.ndarray:
    """Features of boxes from the maps of stride 8, 16 and 32."""
    found = []
    for box in boxes:
        root = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        level = min(max(math.floor(4 + math.log2(root / 224 + 1e-8)), 3), 5)
        found.append(roi_align(maps[level - 3], box, scale=0.5**level, side=side))
    return np.array(found).reshape(len(boxes), -1, side, side)


def iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of one box with others; between two without area it is no number, which is not above any threshold."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = np.maximum(sides, 0).prod(-1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(-1) - common
    with np.errstate(invalid="ignore"):
        return common / union


def suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Numbers of the boxes that stay: the best one, what it leaves of the others, and so on."""
    left, stay = sorted(range(len(scores)), key=lambda number: -scores[number]), []
    while left:
        stay.append(left.pop(0))
        left = [n for n, same in zip(left, iou(boxes[stay[-1]], boxes[left]), strict=True) if not same > threshold]
    return stay


def proposals(maps: list[np.ndarray], weights: Weights, groups: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and scores, the best first; weights below ``centernet_head``."""
    boxes, scores = [], []
    for level, x in enumerate(maps):
        stride = 8 * 2**level
        for layer in (0, 3, 6, 9):
            x = conv(x, weights, f"bbox_tower.{layer}")
            part = x.reshape(groups, -1)
            part = (part - part.mean(1, keepdims=True)) / np.sqrt(part.var(1, keepdims=True) + 1e-5)
            scale, shift = (weights[f"bbox_tower.{layer + 1}.{name}"].reshape(-1, 1, 1) for name in ("weight", "bias"))
            x = np.maximum(part.reshape(x.shape) * scale + shift, 0)
        sides = np.maximum(conv(x, weights, "bbox_pred") * weights[f"scales.{level}.scale"][0], 0) * stride
        likely = 1 / (1 + np.exp(-conv(x, weights, "agn_hm")[0]))
        found = []
        for y, z in np.ndindex(*likely.shape):
            if likely[y, z] > 0.0001:
                across, down, (a, b, c, d) = z * stride + stride / 2, y * stride + stride / 2, sides[:, y, z]
                box = across - a, down - b, max(across + c, across - a + 0.01), max(down + d, down - b + 0.01)
                found.append((likely[y, z], box))
        found = sorted(found, reverse=True)[:1000]
        boxes += [box for _, box in found]
        scores += [math.sqrt(value) for value, _ in found]
    boxes, scores = np.array(boxes), np.array(scores)
    stay = suppress(boxes, scores, 0.9)[:256]
    return boxes[stay], scores[stay]


def _cut(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.stack([np.clip(boxes[:, a], 0, (width, height)[a % 2]) for a in range(4)], 1)


def objects(maps: list[np.ndarray], weights: Weights, height: int, width: int) -> np.ndarray:
    """Boxes of the objects, the surest first; those that lie in the filling have no area and are none."""
    boxes, scores = proposals(maps, under(weights, "proposal_generator.centernet_head."))
    sure = []
    for stage, (move, grow) in enumerate(((10, 5), (20, 10), (30, 15))):
        box = under(weights, f"roi_heads.box_head.{stage}.") | under(weights, f"roi_heads.box_predictor.{stage}.")
        boxes = _cut(boxes, height, width) if stage else boxes
        x = pool(maps, boxes, 7).reshape(len(boxes), -1)
        x = np.maximum(linear(np.maximum(linear(x, box, "fc1"), 0), box, "fc2"), 0)
        sure.append(softmax(linear(x, box, "cls_score"))[:, 0])
        dx, dy, dw, dh = linear(np.maximum(linear(x, box, "bbox_pred.0"), 0), box, "bbox_pred.2").T
        wide, tall = (boxes[:, 2:] - boxes[:, :2]).T
        across, down = boxes[:, 0] + wide / 2 + dx / move * wide, boxes[:, 1] + tall / 2 + dy / move * tall
        wide, tall = (n * np.exp(np.minimum(d / grow, math.log(62.5))) / 2 for n, d in ((wide, dw), (tall, dh)))
        boxes = np.stack((across - wide, down - tall, across + wide, down + tall), 1)
    scores = np.sqrt(np.mean(sure, axis=0) * scores)
    boxes, scores = _cut(boxes, height, width)[scores > 0.5], scores[scores > 0.5]
    boxes = boxes[suppress(boxes, scores, 0.5)[:256]]
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


def next_logits(features: np.ndarray, tokens: list[int], weights: Weights, heads: int = 3) -> np.ndarray:
    """Logits behind the last token, from features [L, C] of an object; weights below ``textual``."""
    seen = linear(features, weights, "object_feature_projection.0")
    seen = layer_norm(seen, weights, "object_feature_projection.1", eps=1e-5)
    x = weights["embedding.words.weight"][tokens] + weights["embedding.positions.weight"][: len(tokens)]
    x = np.concatenate((seen, layer_norm(x, weights, "embedding.layer_norm", eps=1e-8)))
    added = np.triu(np.full((len(x), len(x)), -np.inf), 1)
    added[: len(seen), : len(seen)] = 0
    for number in range(2):
        layer = under(weights, f"transformer.encoder.layer.{number}.")
        q, k, v = (linear(x, layer, f"attention.self.{part}") for part in ("query", "key", "value"))
        y = linear(attention(q, k, v, heads=heads, added=added), layer, "attention.output.dense")
        x = layer_norm(x + y, layer, "attention.output.LayerNorm", eps=1e-12)
        y = linear(gelu(linear(x, layer, "intermediate.dense")), layer, "output.dense")
        x = layer_norm(x + y, layer, "output.LayerNorm", eps=1e-12)
    return linear(x[-1:], weights, "output")[0]


def text(features: np.ndarray, start: int, end: int, weights: Weights) -> list[int]:
    """The likeliest token each time, never the last one again but for the start, up to 40 with the start."""
    tokens = [start]
    while len(tokens) < 40 and (len(tokens) == 1 or tokens[-1] != end):
        logits = next_logits(features, tokens, weights)
        if len(tokens) > 1:
            logits[tokens[-1]] = -10000
        tokens.append(int(logits.argmax()))
    return [token for token in tokens[1:] if token != end]
