"""ViCLIP against the published names and shapes, and, with a small network of random weights, its definition in float64."""

import numpy as np
import pytest
import torch

from qvgen.evaluation.networks.viclip import Viclip, ViclipSizes
from tests.evaluation.networks.float64_layers import (
    Weights,
    attention,
    layer_norm,
    linear,
    patches,
    random_file,
    under,
)

SMALL = {
    "side": 4, "patch": 2, "frames": 3, "vision_width": 8, "vision_layers": 2, "vision_heads": 2, "text_width": 6,
    "text_layers": 2, "text_heads": 3, "outputs": 5, "vocabulary": 11, "context": 6,
}  # fmt: skip
_PUBLISHED = {
    "side": 224, "patch": 14, "frames": 8, "vision_width": 1024, "vision_layers": 24, "vision_heads": 16,
    "text_width": 768, "text_layers": 12, "text_heads": 12, "outputs": 768, "vocabulary": 49408, "context": 32,
}  # fmt: skip


def _blocks(tower: str, width: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(layers):
        prefix = f"{tower}.transformer.resblocks.{number}"
        shapes |= {
            f"{prefix}.attn.in_proj_weight": (3 * width, width),
            f"{prefix}.attn.in_proj_bias": (3 * width,),
            f"{prefix}.attn.out_proj.weight": (width, width),
            f"{prefix}.attn.out_proj.bias": (width,),
            f"{prefix}.mlp.c_fc.weight": (4 * width, width),
            f"{prefix}.mlp.c_fc.bias": (4 * width,),
            f"{prefix}.mlp.c_proj.weight": (width, 4 * width),
            f"{prefix}.mlp.c_proj.bias": (width,),
        }
        shapes |= {f"{prefix}.{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return shapes


def shapes(s: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoint, of these sizes."""
    video, text = s["vision_width"], s["text_width"]
    norms = [("vision_encoder.ln_pre", video), ("vision_encoder.ln_post", video), ("text_encoder.ln_final", text)]
    return {
        "temp": (),
        "vision_encoder.class_embedding": (video,),
        "vision_encoder.positional_embedding": ((s["side"] // s["patch"]) ** 2 + 1, video),
        "vision_encoder.temporal_positional_embedding": (1, s["frames"], video),
        "vision_encoder.proj": (video, s["outputs"]),
        "vision_encoder.conv1.weight": (video, 3, 1, s["patch"], s["patch"]),
        "text_encoder.token_embedding.weight": (s["vocabulary"], text),
        "text_encoder.positional_embedding": (s["context"], text),
        "text_encoder.text_projection": (text, s["outputs"]),
        **{f"{name}.{part}": (width,) for name, width in norms for part in ("weight", "bias")},
        **_blocks("vision_encoder", video, s["vision_layers"]),
        **_blocks("text_encoder", text, s["text_layers"]),
    }


def _transformer(x: np.ndarray, weights: Weights, heads: int, added: np.ndarray | float) -> np.ndarray:
    for number in range(2):
        block = under(weights, f"transformer.resblocks.{number}.")
        joint = layer_norm(x, block, "ln_1", eps=1e-5) @ block["attn.in_proj_weight"].T + block["attn.in_proj_bias"]
        x = x + linear(attention(*np.split(joint, 3, -1), heads=heads, added=added), block, "attn.out_proj")
        hidden = linear(layer_norm(x, block, "ln_2", eps=1e-5), block, "mlp.c_fc")
        x = x + linear(hidden / (1 + np.exp(-1.702 * hidden)), block, "mlp.c_proj")
    return x


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum())


def video_oracle(frames: np.ndarray, weights: Weights) -> np.ndarray:
    """Frames [F, 3, H, W] -> features [D]."""
    tower = under(weights, "vision_encoder.")
    tokens = [tower["class_embedding"] + tower["positional_embedding"][0]]
    for frame, time in zip(frames, tower["temporal_positional_embedding"][0], strict=True):
        places = patches(frame, tower["conv1.weight"][:, :, 0])
        tokens += list(places + tower["positional_embedding"][1:] + time)
    x = _transformer(layer_norm(np.array(tokens), tower, "ln_pre", eps=1e-5), tower, 2, 0.0)
    return _unit(layer_norm(x[0], tower, "ln_post", eps=1e-5) @ tower["proj"])


def text_oracle(tokens: list[int], weights: Weights) -> np.ndarray:
    tower = under(weights, "text_encoder.")
    future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    x = tower["token_embedding.weight"][tokens] + tower["positional_embedding"]
    x = layer_norm(_transformer(x, tower, 3, future), tower, "ln_final", eps=1e-5)
    return _unit(x[int(np.argmax(tokens))] @ tower["text_projection"])


def test_its_tensors_are_those_of_the_published_checkpoint():
    with torch.device("meta"):
        network = Viclip(ViclipSizes())
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == shapes(_PUBLISHED)


def test_features_of_videos_and_texts_follow_the_definition(tmp_path):
    weights = random_file(shapes(SMALL), tmp_path / "viclip.pth")
    network = Viclip.load(tmp_path / "viclip.pth", sizes=ViclipSizes(**SMALL))
    videos = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    texts = [[9, 3, 4, 10, 0, 0], [9, 10, 0, 0, 0, 0]]
    found = network.video_features(videos)
    expected = np.array([video_oracle(video.double().numpy(), weights) for video in videos])
    # float32 against float64 over two blocks of unit features.
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    expected = np.array([text_oracle(text, weights) for text in texts])
    np.testing.assert_allclose(network.text_features(torch.tensor(texts)).numpy(), expected, atol=2e-5)
    assert not torch.allclose(found, network.video_features(videos.flip(1)), atol=1e-3)  # the order of frames counts


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"temp": None}, r"misses temp; give the checkpoint of Viclip"),
        ({"text_encoder.extra": (2,)}, "has an unexpected text_encoder.extra"),
        ({"vision_encoder.proj": (5, 8)}, r"has another shape of vision_encoder.proj \[5, 8\] where \[8, 5\] belongs"),
    ],
)
def test_a_checkpoint_that_is_not_the_networks_is_refused_by_the_name_of_the_tensor(tmp_path, change, line):
    changed = {name: shape for name, shape in (shapes(SMALL) | change).items() if shape is not None}
    random_file(changed, tmp_path / "viclip.pth")
    with pytest.raises(ValueError, match=line):
        Viclip.load(tmp_path / "viclip.pth", sizes=ViclipSizes(**SMALL))
