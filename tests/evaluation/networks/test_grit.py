"""GRiT against the published names and shapes, and, with a small network of random weights, its definition in float64.

Ours computes in float64 here, so that both take the same side of each threshold.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from qvgen.evaluation.networks.grit.boxes import suppressed
from qvgen.evaluation.networks.grit.detector import Describer, Grit, GritSizes
from qvgen.evaluation.networks.grit.proposals import candidates
from qvgen.evaluation.networks.grit.roi_align import pooled, roi_align
from qvgen.evaluation.networks.grit.text_decoder import DecoderSizes
from qvgen.evaluation.networks.grit.vit import VitSizes
from tests.evaluation.networks import grit_oracle as oracle
from tests.evaluation.networks.float64_layers import Weights, random_file, under

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[unused99]",
    "dog",
    "cat",
    "red",
    "##s",
    "boat",
    "a",
    "sky",
    "blue",
]
PHRASE_START = 5
SIZES = GritSizes(
    vit=VitSizes(width=8, layers=3, heads=2, window=3, whole=(1,), side=5, learned_side=3),
    decoder=DecoderSizes(width=12, hidden=16, layers=2, heads=3, vocabulary=14, places=40),
    channels=4, groups=2, hidden=6, phrase_start=PHRASE_START,
)  # fmt: skip


def grit_file(path: Path, *, seed: int = 0, sure: float = 0.5, ending: float = 0.0) -> Weights:
    """A file as it is published, with a head of masks, of a network that finds objects; returns its weights in float64.

    The larger ``sure`` the more objects there are, and the larger ``ending`` the shorter are their texts.
    """
    beside = {"roi_heads.mask_head.deconv.weight": (4, 4, 2, 2), "pixel_mean": (3, 1, 1)}
    random_file(oracle.shapes(oracle.SMALL) | beside, path, seed=seed)
    tensors = torch.load(path)["model"]
    head, text = "proposal_generator.centernet_head", "roi_heads.text_decoder.textual"
    for level in range(5):
        tensors[f"{head}.scales.{level}.scale"] += 1
    tensors[f"{head}.bbox_pred.bias"] += 3
    tensors[f"{head}.agn_hm.bias"] += 1
    for stage in range(3):
        tensors[f"roi_heads.box_predictor.{stage}.cls_score.bias"] += torch.tensor([sure, -sure])
    tensors[f"{text}.output.weight"] = tensors[f"{text}.embedding.words.weight"]
    tensors[f"{text}.output.bias"][[0, 1, 2, 4, 5]] -= 2
    tensors[f"{text}.output.bias"][3] += ending
    torch.save({"model": tensors}, path)
    return {name: value.double().numpy() for name, value in tensors.items()}


@pytest.fixture
def small(tmp_path: Path) -> tuple[Grit, Weights]:
    weights = grit_file(tmp_path / "grit.pth")
    return Grit.load(tmp_path / "grit.pth", sizes=SIZES).double(), weights


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _boxes(count: int, *, side: float, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    first, size = torch.rand(2, count, 2, generator=generator, dtype=torch.float64) * side
    return torch.cat((first, first + size), 1)


def test_its_tensors_are_those_of_the_published_checkpoint() -> None:
    with torch.device("meta"):
        network = Grit(GritSizes())
    found = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert found == oracle.shapes(oracle.PUBLISHED)
    assert len(found) == 355


def test_the_pyramid_follows_the_definition(small: tuple[Grit, Weights]) -> None:
    network, weights = small
    image = _random(3, 64, 96)
    expected = oracle.backbone(image.numpy(), under(weights, "backbone."))
    for found, values in zip(network.backbone(image[None]), expected, strict=True):
        np.testing.assert_allclose(found[0].numpy(), values, atol=1e-10)


def test_roi_align_follows_the_definition() -> None:
    """Boxes in the map, over its borders, far outside, much larger, and without width."""
    features = _random(3, 7, 9)
    odd = torch.tensor(
        [[-60.0, -9, 300, 40], [200, 200, 240, 260], [20, 5, 20, 30], [-30, 1, -9, 50], [60, 40, 75, 62]]
    )
    boxes = torch.cat((_boxes(12, side=60), odd.double()))
    found = roi_align(features, boxes, scale=0.125, side=3)
    expected = [oracle.roi_align(features.numpy(), box.numpy(), scale=0.125, side=3) for box in boxes]
    np.testing.assert_allclose(found.numpy(), np.array(expected), atol=1e-12)
    assert not found[13].any()
    assert not found[14].any()


def test_the_larger_a_box_the_coarser_its_map() -> None:
    maps = [_random(2, 64 >> level, 64 >> level, seed=level) for level in range(3)]
    boxes = torch.tensor(
        [[0, 0, 111, 112], [0, 0, 112, 112], [0, 0, 223, 224], [0, 0, 224, 224], [0, 0, 512, 512], [3, 3, 9, 5]]
    )
    found = pooled(maps, boxes.double(), first=3, side=2)
    np.testing.assert_allclose(found.numpy(), oracle.pool([m.numpy() for m in maps], boxes.numpy(), 2), atol=1e-12)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_suppression_follows_the_definition(threshold: float) -> None:
    """Of equal scores the earlier box goes first; an IoU of just the threshold suppresses nothing."""
    boxes = torch.cat((_boxes(60, side=20), torch.tensor([[0.0, 0, 2, 3], [0, 0, 2, 2.9]]).double()))
    scores = (_random(62) * 3).round()
    expected = oracle.suppress(boxes.numpy(), scores.numpy(), threshold)
    assert suppressed(boxes, scores, threshold=threshold).tolist() == expected
    assert len(expected) < 62
    half = torch.tensor([[0.0, 0, 2, 3], [0, 0, 2, 1.5], [0, 0, 2, 1.4]])
    assert suppressed(half, torch.tensor([1.0, 3.0, 2.0]), threshold=0.5).tolist() == [1, 0]


def test_proposals_follow_the_definition(small: tuple[Grit, Weights]) -> None:
    """Boxes that are so large that neighbours are nearly the same, and more than 256 that stay."""
    network, weights = small
    head = under(weights, "proposal_generator.centernet_head.")
    head["bbox_pred.bias"] = head["bbox_pred.bias"] + 6
    maps = [_random(1, 4, 40 >> level, 36 >> level, seed=level) for level in range(5)]
    expected, scores = oracle.proposals([m[0].numpy() for m in maps], head)
    with torch.no_grad():
        network.proposal_generator.centernet_head.bbox_pred.bias += 6
        found = network.proposal_generator(maps)
    assert len(expected) == 256
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(found[1].numpy(), scores, atol=1e-12)


def test_a_map_has_1000_candidates_at_most() -> None:
    """The likeliest ones, none of 0.0001 or less, and each a hundredth of a pixel wide and tall at least."""
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(1))
    likely = torch.linspace(0.00005, 0.01, 1500, dtype=torch.float64)[order]
    centers = torch.arange(3000).view(1500, 2)
    sides = torch.zeros(1500, 4).double()
    for count, kept in ((1500, 1000), (600, 600 - int((likely[:600] <= 0.0001).sum()))):
        boxes, scores = candidates(likely[:count], centers[:count], sides[:count])
        best = sorted((x for x in likely[:count].tolist() if x > 0.0001), reverse=True)[:1000]
        assert len(boxes) == kept == len(best)
        assert sorted(scores.square().tolist(), reverse=True) == pytest.approx(best, rel=1e-12)
        torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], torch.full((kept, 2), 0.01).double(), atol=1e-9, rtol=0)


def test_objects_and_their_texts_follow_the_definition(tmp_path: Path) -> None:
    """Scores on both sides of the threshold."""
    weights = grit_file(tmp_path / "grit.pth", sure=0.0)
    network = Grit.load(tmp_path / "grit.pth", sizes=SIZES).double()
    image = (_random(3, 60, 70) * 60 + 120).clamp(0, 255)
    mean, deviation = (np.reshape(x, (3, 1, 1)) for x in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    filled = np.pad((image.numpy() - mean) / deviation, ((0, 0), (0, 4), (0, 26)))
    maps = oracle.backbone(filled, under(weights, "backbone."))
    expected = oracle.objects(maps, weights, 60, 70)
    boxes, features = network.objects(image)
    assert len(expected) > 3
    np.testing.assert_allclose(boxes.numpy(), expected, atol=1e-8)
    cells = oracle.pool(maps, expected, 14).reshape(len(expected), 4, -1).transpose(0, 2, 1)
    np.testing.assert_allclose(features.numpy(), cells, atol=1e-9)

    describer, features, cells = Describer(network, words=WORDS), features[:3], cells[:3]
    textual = under(weights, "roi_heads.text_decoder.textual.")
    for found, start in ((describer.classes(features), 2), (describer.phrases(features), PHRASE_START)):
        tokens = [oracle.text(cell, start, 3, textual) for cell in cells]
        words = [" ".join(WORDS[token] for token in text if token > 4).replace(" ##", "") for text in tokens]
        assert found == words


@pytest.mark.parametrize("seed", [1, 2])
def test_texts_are_the_likeliest_tokens_in_turn(tmp_path: Path, seed: int) -> None:
    """Texts that end, and such that go on to their greatest length."""
    weights = grit_file(tmp_path / "grit.pth", seed=seed)
    decoder = Grit.load(tmp_path / "grit.pth", sizes=SIZES).double().roi_heads.text_decoder
    features = 2 * _random(4, 5, 4, seed=seed)
    textual = under(weights, "roi_heads.text_decoder.textual.")
    with torch.no_grad():
        for start in (2, PHRASE_START):
            expected = [oracle.text(cells.numpy(), start, 3, textual) for cells in features]
            assert decoder.texts(features, start=start, end=3) == expected
        assert decoder.texts(features[:0], start=2, end=3) == []


def test_words_of_another_number_are_refused(small: tuple[Grit, Weights]) -> None:
    with pytest.raises(ValueError, match="13 words were given where the network has 14"):
        Describer(small[0], words=WORDS[1:])
