"""UMT against the published names and shapes, and, with a small network of random weights, its definition in float64."""

import numpy as np
import torch

from qvgen.evaluation.networks.umt import Umt, UmtSizes
from tests.evaluation.networks.float64_layers import (
    Weights,
    attention,
    gelu,
    layer_norm,
    linear,
    patches,
    random_file,
    under,
)

SMALL = {"side": 4, "patch": 2, "frames": 3, "width": 8, "layers": 2, "heads": 2, "classes": 5}
_PUBLISHED = {"side": 224, "patch": 16, "frames": 16, "width": 1024, "layers": 24, "heads": 16, "classes": 400}


def shapes(s: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoint, of these sizes."""
    width = s["width"]
    shapes = {
        "pos_embed": (1, s["frames"] * (s["side"] // s["patch"]) ** 2, width),
        "patch_embed.proj.weight": (width, 3, 1, s["patch"], s["patch"]),
        "patch_embed.proj.bias": (width,),
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
        "head.weight": (s["classes"], width),
        "head.bias": (s["classes"],),
    }
    for number in range(s["layers"]):
        block = f"blocks.{number}"
        shapes |= {
            f"{block}.attn.q_bias": (width,),
            f"{block}.attn.v_bias": (width,),
            f"{block}.attn.qkv.weight": (3 * width, width),
            f"{block}.attn.proj.weight": (width, width),
            f"{block}.attn.proj.bias": (width,),
            f"{block}.mlp.fc1.weight": (4 * width, width),
            f"{block}.mlp.fc1.bias": (4 * width,),
            f"{block}.mlp.fc2.weight": (width, 4 * width),
            f"{block}.mlp.fc2.bias": (width,),
        }
        shapes |= {f"{block}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    return shapes


def oracle(video: np.ndarray, weights: Weights) -> np.ndarray:
    """Video [3, F, H, W] -> logits."""
    kernel = weights["patch_embed.proj.weight"][:, :, 0]
    x = np.concatenate([patches(video[:, frame], kernel) for frame in range(video.shape[1])])
    x = x + weights["patch_embed.proj.bias"] + weights["pos_embed"][0]
    for number in range(2):
        block = under(weights, f"blocks.{number}.")
        q, k, v = np.split(layer_norm(x, block, "norm1", eps=1e-6) @ block["attn.qkv.weight"].T, 3, -1)
        mixed = attention(q + block["attn.q_bias"], k, v + block["attn.v_bias"], heads=2)
        x = x + linear(mixed, block, "attn.proj")
        x = x + linear(gelu(linear(layer_norm(x, block, "norm2", eps=1e-6), block, "mlp.fc1")), block, "mlp.fc2")
    return linear(layer_norm(x.mean(0), weights, "fc_norm", eps=1e-6), weights, "head")


def test_its_tensors_are_those_of_the_published_checkpoint():
    with torch.device("meta"):
        network = Umt(UmtSizes())
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == shapes(_PUBLISHED)


def test_logits_follow_the_definition(tmp_path):
    weights = random_file(shapes(SMALL), tmp_path / "umt.pth", key=None)
    network = Umt.load(tmp_path / "umt.pth", sizes=UmtSizes(**SMALL))
    videos = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = np.array([oracle(video.double().numpy(), weights) for video in videos])
    # float32 against float64 over two blocks of logits about 1.
    np.testing.assert_allclose(network(videos).numpy(), expected, atol=5e-5)
