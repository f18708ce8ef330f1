"""Tag2Text against the published names and shapes, and, with a small network of random weights, its definition in float64."""

import numpy as np
import pytest
import torch

from qvgen.evaluation.networks.tag2text.bert import BertSizes
from qvgen.evaluation.networks.tag2text.captioner import Captioner, Tag2Text, Tag2TextSizes
from qvgen.evaluation.networks.tag2text.swin import SwinSizes
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

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "picture",
    "of",
    "|",
    "dog",
    "cat",
    "red",
    "##s",
    "and",
    "boat",
]
TAGS = ["dog", "cats", "red boat", "boat", "two", "dogs"]
SWIN = {"side": 16, "patch": 2, "width": 8, "layers": (2, 2), "heads": (2, 4), "window": 4}
BERT = {
    "width": 12, "hidden": 16, "layers": 2, "heads": 3, "label_layers": 1, "label_heads": 2, "vocabulary": 17, "places": 42,
}  # fmt: skip
SIZES = Tag2TextSizes(swin=SwinSizes(**SWIN), bert=BertSizes(**BERT), tags=6, left_out=(4,))


def _two(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _swin_shapes(
    *, side: int, patch: int, width: int, layers: tuple, heads: tuple, window: int
) -> dict[str, tuple[int, ...]]:
    swin = "visual_encoder"
    shapes = {f"{swin}.patch_embed.proj.weight": (width, 3, patch, patch), f"{swin}.patch_embed.proj.bias": (width,)}
    shapes |= _norm(f"{swin}.patch_embed.norm", width) | _norm(f"{swin}.norm", width * 2 ** (len(layers) - 1))
    for stage, blocks in enumerate(layers):
        channels, places = width * 2**stage, min(window, side // patch // 2**stage)
        for number in range(blocks):
            block = f"{swin}.layers.{stage}.blocks.{number}"
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * places - 1) ** 2, heads[stage])
            shapes |= _two(f"{block}.attn.qkv", 3 * channels, channels) | _two(f"{block}.attn.proj", channels, channels)
            shapes |= _two(f"{block}.mlp.fc1", 4 * channels, channels) | _two(
                f"{block}.mlp.fc2", channels, 4 * channels
            )
            shapes |= _norm(f"{block}.norm1", channels) | _norm(f"{block}.norm2", channels)
        if stage < len(layers) - 1:
            halving = f"{swin}.layers.{stage}.downsample"
            shapes[f"{halving}.reduction.weight"] = (2 * channels, 4 * channels)
            shapes |= _norm(f"{halving}.norm", 4 * channels)
    return shapes


def _layer_shapes(name: str, b: dict[str, int], *, seen: int, parts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    width = b["width"]
    shapes = _two(f"{name}.intermediate.dense", b["hidden"], width) | _two(f"{name}.output.dense", width, b["hidden"])
    shapes |= _norm(f"{name}.output.LayerNorm", width)
    for part in parts:
        other = seen if part == "crossattention" else width
        shapes |= _two(f"{name}.{part}.self.query", width, width) | _two(f"{name}.{part}.self.key", width, other)
        shapes |= _two(f"{name}.{part}.self.value", width, other) | _two(f"{name}.{part}.output.dense", width, width)
        shapes |= _norm(f"{name}.{part}.output.LayerNorm", width)
    return shapes


def shapes(swin: dict, b: dict[str, int], *, tags: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoint, of these sizes."""
    width, seen = b["width"], swin["width"] * 2 ** (len(swin["layers"]) - 1)
    shapes = {"label_embed.weight": (tags, width), "fc.W": (1, tags, width), "fc.b": (1, tags)} | _swin_shapes(**swin)
    both = ("attention", "crossattention")
    for text, other in (("tag_encoder", seen), ("text_decoder.bert", width)):
        shapes[f"{text}.embeddings.word_embeddings.weight"] = (b["vocabulary"], width)
        shapes[f"{text}.embeddings.position_embeddings.weight"] = (b["places"], width)
        shapes |= _norm(f"{text}.embeddings.LayerNorm", width)
        for layer in range(b["layers"]):
            shapes |= _layer_shapes(f"{text}.encoder.layer.{layer}", b, seen=other, parts=both)
    for layer in range(b["label_layers"]):
        shapes |= _layer_shapes(f"vision_multi.encoder.layer.{layer}", b, seen=seen, parts=("crossattention",))
    head = "text_decoder.cls.predictions"
    shapes |= {f"{head}.bias": (b["vocabulary"],), f"{head}.decoder.weight": (b["vocabulary"], width)}
    return shapes | _two(f"{head}.transform.dense", width, width) | _norm(f"{head}.transform.LayerNorm", width)


def _swin_block(x: np.ndarray, weights: Weights, *, heads: int, window: int, shift: int) -> np.ndarray:
    """Maps [H, H, C]: a place sees those of its moved window that the move did not bring from the other border."""
    side, width = len(x), x.shape[-1]
    joint = linear(layer_norm(x, weights, "norm1", eps=1e-5), weights, "attn.qkv").reshape(side * side, -1)
    places = [(y, z) for y in range(side) for z in range(side)]
    added = np.full((heads, len(places), len(places)), -np.inf)
    for a, (y, z) in enumerate(places):
        for b, (v, w) in enumerate(places):
            moved = [(place - shift) % side for place in (y, z, v, w)]
            if (moved[0] // window, moved[1] // window) == (moved[2] // window, moved[3] // window):
                row = (moved[0] - moved[2] + window - 1) * (2 * window - 1) + moved[1] - moved[3] + window - 1
                apart = (y < shift) != (v < shift) or (z < shift) != (w < shift)
                added[:, a, b] = weights["attn.relative_position_bias_table"][row] - 100.0 * apart
    mixed = attention(*np.split(joint, 3, -1), heads=heads, added=added).reshape(side, side, width)
    x = x + linear(mixed, weights, "attn.proj")
    return x + linear(gelu(linear(layer_norm(x, weights, "norm2", eps=1e-5), weights, "mlp.fc1")), weights, "mlp.fc2")


def _swin(image: np.ndarray, weights: Weights) -> np.ndarray:
    x = patches(image, weights["patch_embed.proj.weight"]) + weights["patch_embed.proj.bias"]
    x = layer_norm(x, weights, "patch_embed.norm", eps=1e-5).reshape(8, 8, 8)
    for stage, heads in enumerate((2, 4)):
        for number in range(2):
            shift = 2 if stage == 0 and number == 1 else 0  # the second stage's map is one window
            x = _swin_block(x, under(weights, f"layers.{stage}.blocks.{number}."), heads=heads, window=4, shift=shift)
        if stage == 0:
            x = np.concatenate((x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]), -1)
            x = linear(
                layer_norm(x, weights, "layers.0.downsample.norm", eps=1e-5), weights, "layers.0.downsample.reduction"
            )
    x = layer_norm(x, weights, "norm", eps=1e-5).reshape(16, 16)
    return np.concatenate((x.mean(0, keepdims=True), x))


def _see(
    x: np.ndarray, other: np.ndarray, weights: Weights, name: str, *, heads: int, added: np.ndarray | float
) -> np.ndarray:
    q, k, v = (
        linear(y, weights, f"{name}.self.{part}") for part, y in (("query", x), ("key", other), ("value", other))
    )
    y = linear(attention(q, k, v, heads=heads, added=added), weights, f"{name}.output.dense")
    return layer_norm(x + y, weights, f"{name}.output.LayerNorm", eps=1e-12)


def _layers(
    x: np.ndarray, other: np.ndarray, weights: Weights, *, layers: int, heads: int, added: np.ndarray | None
) -> np.ndarray:
    for layer in range(layers):
        block = under(weights, f"encoder.layer.{layer}.")
        if added is not None:
            x = _see(x, x, block, "attention", heads=heads, added=added)
        x = _see(x, other, block, "crossattention", heads=heads, added=0.0)
        y = linear(gelu(linear(x, block, "intermediate.dense")), block, "output.dense")
        x = layer_norm(x + y, block, "output.LayerNorm", eps=1e-12)
    return x


def _bert(tokens: list[int], other: np.ndarray, weights: Weights, added: np.ndarray) -> np.ndarray:
    x = weights["embeddings.word_embeddings.weight"][tokens]
    x = layer_norm(
        x + weights["embeddings.position_embeddings.weight"][: len(tokens)], weights, "embeddings.LayerNorm", eps=1e-12
    )
    return _layers(x, other, weights, layers=2, heads=3, added=added)


def _next_logits(tokens: list[int], seen: np.ndarray, weights: Weights) -> np.ndarray:
    decoder = under(weights, "text_decoder.")
    future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    x = _bert(tokens, seen, under(decoder, "bert."), future)[-1]
    x = gelu(linear(x, decoder, "cls.predictions.transform.dense"))
    x = layer_norm(x, decoder, "cls.predictions.transform.LayerNorm", eps=1e-12)
    return decoder["cls.predictions.decoder.weight"] @ x + decoder["cls.predictions.bias"]


@pytest.fixture
def small(tmp_path):
    # What the published file has beside them: indices, masks, and the output's bias once more.
    beside = {
        "visual_encoder.layers.0.blocks.1.attn_mask": (4, 16, 16),
        "visual_encoder.layers.0.blocks.0.attn.relative_position_index": (16, 16),
        "tag_encoder.embeddings.position_ids": (1, 42),
        "text_decoder.cls.predictions.decoder.bias": (17,),
    }
    weights = random_file(shapes(SWIN, BERT, tags=6) | beside, tmp_path / "tag2text.pth", seed=4)
    return Tag2Text.load(tmp_path / "tag2text.pth", sizes=SIZES), weights


def _images(count: int) -> torch.Tensor:
    return 3 * torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def test_its_tensors_are_those_of_the_published_checkpoint():
    with torch.device("meta"):
        network = Tag2Text(Tag2TextSizes())
    swin = {"side": 384, "patch": 4, "width": 128, "layers": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "window": 12}
    bert = {"width": 768, "hidden": 3072, "layers": 12, "label_layers": 2, "vocabulary": 30524, "places": 512}
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == shapes(swin, bert, tags=3429)


def test_images_tags_and_the_next_token_follow_the_definition(small):
    network, weights = small
    images = _images(2)
    features = network.features(images)
    expected = np.stack([_swin(image.double().numpy(), under(weights, "visual_encoder.")) for image in images])
    # float32 against float64 over four blocks.
    np.testing.assert_allclose(features.numpy(), expected, atol=5e-5)

    tags = network.tags(features)
    head = under(weights, "vision_multi.")
    for image, row in zip(expected, tags.tolist(), strict=True):
        labels = _layers(weights["label_embed.weight"], image, head, layers=1, heads=2, added=None)
        logits = (labels * weights["fc.W"][0]).sum(-1) + weights["fc.b"][0]
        assert row == [bool(logit > np.log(0.7 / 0.3)) and number != 4 for number, logit in enumerate(logits)]
    assert tags.any()

    seen = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(6))
    tokens = [15, 5, 6, 7, 9]
    found = network.text_decoder(torch.tensor([tokens]), seen)[0]
    np.testing.assert_allclose(found.numpy(), _next_logits(tokens, seen[0].double().numpy(), weights), atol=5e-5)


def _greedy(image: np.ndarray, tags: list[int], weights: Weights) -> np.ndarray:
    """Features of the tags: their tokens behind the encoder's start, filled up to 40 that nobody sees."""
    numbers = {word: number for number, word in enumerate(WORDS)}
    pieces = {"cats": ["cat", "##s"], "dogs": ["dog", "##s"], "red boat": ["red", "boat"], "two": ["[UNK]"]}
    words = [word for tag in tags for word in ("|", *pieces.get(TAGS[tag], [TAGS[tag]]))][1:]
    tokens = [16, *(numbers[word] for word in words), numbers["[SEP]"]]
    hidden = np.where(np.arange(40) < len(tokens), 0.0, -np.inf)
    return _bert(tokens + [0] * (40 - len(tokens)), image, under(weights, "tag_encoder."), np.tile(hidden, (40, 1)))


def _best_caption(seen: np.ndarray, weights: Weights) -> list[int]:
    """Three beams by the rules that tests/evaluation/networks/test_beam_search.py holds; the end is token 3."""
    partial, finished, done = [(0.0, [15, 5, 6, 7])], [], False
    for length in range(4, 30):
        scored = []
        for total, text in partial:
            logits = _next_logits(text, seen, weights)
            logits = logits - logits.max()
            values = total + logits - np.log(np.exp(logits).sum())
            scored += [(value, [*text, token]) for token, value in enumerate(values) if token != 3 or length >= 10]
        scored = sorted(scored, reverse=True)[:6]
        finished += [(total / length, text[:-1]) for total, text in scored[:3] if text[-1] == 3]
        finished = sorted(finished, reverse=True)[:3]
        partial = [found for found in scored if found[1][-1] != 3][:3]
        done = len(finished) == 3 and finished[-1][0] >= scored[0][0] / (length + 1)
        if done:
            break
    if not done:
        finished += [(total / 30, text) for total, text in partial]
    return max(finished)[1]


def test_captions_follow_the_definition(small):
    network, weights = small
    images = _images(3)
    found = Captioner(network, words=WORDS, tags=TAGS)(images)
    for image, tags, caption in zip(images, network.tags(network.features(images)), found, strict=True):
        features = _swin(image.double().numpy(), under(weights, "visual_encoder."))
        tokens = _best_caption(_greedy(features, tags.nonzero().flatten().tolist(), weights), weights)
        words = [WORDS[token] for token in tokens if 5 <= token < 15]
        assert caption == " ".join(words).replace(" ##", "")[len("a picture of ") :]
    assert len(set(found)) > 1


@pytest.mark.parametrize(("words", "tags", "line"), [(WORDS[1:], TAGS, "14 words"), (WORDS, TAGS[1:], "5 tags")])
def test_lists_of_another_length_are_refused(small, words, tags, line):
    with pytest.raises(ValueError, match=f"{line} were given where the network has"):
        Captioner(small[0], words=words, tags=tags)
