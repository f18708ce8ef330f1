"""VBench's four dimensions of what GRiT sees, with a small random network and by their published rules.

The network's own oracle (float64, nothing of qvgen) is that of tests/evaluation/networks/.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qvgen.config.leaves import load_leaf
from qvgen.evaluation.metrics.base import Clip, Pair
from qvgen.evaluation.networks.grit.detector import Describer, Grit
from qvgen.evaluation.prompt_list import PromptFacts
from qvgen.evaluation.vbench.color import Color, colored, object_of
from qvgen.evaluation.vbench.detected_objects import DetectorDimension
from qvgen.evaluation.vbench.frame_preparation import detector_pixels
from qvgen.evaluation.vbench.multiple_objects import MultipleObjects
from qvgen.evaluation.vbench.object_class import ObjectClass
from qvgen.evaluation.vbench.published_file import BERT_VOCABULARY, GRIT
from qvgen.evaluation.vbench.spatial_relationship import SpatialRelationship, best_pair
from tests.evaluation.networks.test_grit import SIZES, WORDS, grit_file
from tests.evaluation.vbench.published_networks import resize

Seen = list[list[tuple[str, str, list[float]]]]
COLORED = [{"boat": "redboat", "dog": "pinkdog"}.get(word, word) for word in WORDS]
NAMES = ["object_class", "multiple_objects", "color", "spatial_relationship"]


def _video() -> Tensor:
    coarse = torch.rand(17, 3, 3, 4, generator=torch.Generator().manual_seed(7))
    smooth = functional.interpolate(coarse, size=(30, 60), mode="bilinear", align_corners=False)
    return (smooth.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)


VIDEO = _video()


def _pair(caption: str, name: str, asked: object) -> Pair:
    facts = PromptFacts(dimensions=frozenset([name]), auxiliary={name: asked})
    return Pair(video=Clip(VIDEO), reference=None, caption=caption, prompt=facts, has_prompt_list=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("weights")
    grit_file(found / GRIT.name, seed=8, sure=0.2, ending=2.2)
    (found / BERT_VOCABULARY.name).write_text("\n".join(COLORED) + "\n")
    return found


@pytest.fixture(scope="module")
def seen(folder: Path) -> Seen:
    """The class, the phrase and the box of each object of each frame that is looked at, one frame after another."""
    describer = Describer(Grit.load(folder / GRIT.name, sizes=SIZES), words=COLORED)
    found: Seen = []
    for frame in VIDEO[:16]:  # 17 frames in sixteen parts: the last part has two, and the first of them is its middle
        boxes, features = describer.network.objects(frame.permute(2, 0, 1).float())
        texts = describer.classes(features), describer.phrases(features)
        found.append(list(zip(*texts, boxes.tolist(), strict=True)))
    return found


def _small(metric: type[DetectorDimension], folder: Path) -> DetectorDimension:
    class Small(metric):
        sizes = SIZES

    found = Small(weights=str(folder))
    assert found.absent() is None
    return found


def _score(first: list[int], second: list[int], axis: int) -> float:
    """The published rule of two boxes in whole pixels, by counting pixels."""
    center = [[(box[a] + box[a + 2]) / 2 for a in (0, 1)] for box in (first, second)]
    distance = [abs(center[1][a] - center[0][a]) for a in (0, 1)]
    if distance[axis] <= distance[1 - axis]:
        return 0.0
    pixels = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in (first, second)]
    iou = len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1])
    return 1.0 if iou < 0.1 else 0.1 / iou


def test_the_dimensions_follow_their_published_rules(folder: Path, seen: Seen) -> None:
    in_frames = [{name for name, _, _ in frame} for frame in seen]
    names = sorted({name for frame in in_frames for name in frame}, key=lambda name: sum(name in f for f in in_frames))
    share = {name: sum(name in frame for frame in in_frames) / 16 for name in names}
    other, one = [name for name in names if 0 < share[name] < 1 and name][-2:]

    assert _small(ObjectClass, folder).measure(_pair("a", "object_class", {"object": one})) == share[one]
    asked: dict[str, object] = {"object": f"{one} and {other}"}
    both = sum({one, other} <= frame for frame in in_frames) / 16
    assert _small(MultipleObjects, folder).measure(_pair("a", "multiple_objects", asked)) == both
    assert 0 < both < max(share[one], share[other])

    scores = []
    for frame in seen:
        boxes = [[int(x) for x in box] for name, _, box in frame if name in (one, other)]
        pairs = [(a, b) for number, a in enumerate(boxes) for b in boxes[:number]]
        scores.append(max([_score(a, b, 0) for a, b in pairs], default=0.0))
    asked = {"spatial_relationship": {"object_a": one, "object_b": other, "relationship": "on the right of"}}
    found = _small(SpatialRelationship, folder).measure(_pair("a", "spatial_relationship", asked))
    assert found == pytest.approx(np.mean(scores), abs=1e-12)
    assert len(set(scores)) > 2


def test_pairs_of_boxes_follow_the_published_rule() -> None:
    generator = np.random.default_rng(3)
    scores = []
    for _ in range(60):
        first, second = (
            [*start, *(start + size)]
            for start, size in zip(generator.integers(0, 8, (2, 2)), generator.integers(1, 9, (2, 2)), strict=True)
        )
        for axis in (0, 1):
            scores.append(_score(first, second, axis))
            assert best_pair([tuple(first), tuple(second)], across=axis == 0) == pytest.approx(scores[-1], abs=1e-12)
    assert {0.0, 1.0} < set(scores)


def test_color_looks_at_frames_whose_surest_object_has_the_class(folder: Path, seen: Seen) -> None:
    frames = [[phrase for _, phrase, _ in frame] for frame in seen if frame and frame[0][0] == "redboat"]
    with_any = [frame for frame in frames if any("red" in phrase or "pink" in phrase for phrase in frame)]
    right = sum(any("pink" in phrase for phrase in frame) for frame in with_any)
    measured = _small(Color, folder).measure(_pair("a pink redboat", "color", {"color": "pink"}))
    assert measured == right / len(with_any)
    assert 0 < right < len(with_any) < 16
    assert _small(Color, folder).measure(_pair("a red vase", "color", {"color": "red"})) is None


def test_a_color_counts_by_frames_and_within_words() -> None:
    frames = [["a grey cat", "a white wall"], ["a colored cat"], ["cat"], [], ["silver"]]
    assert colored(frames, "white") == pytest.approx(1 / 3)
    assert colored(frames, "red") == pytest.approx(1 / 3)
    assert colored(frames[2:4], "red") is None
    assert object_of("an orange suitcase", color="orange") == "suitcase"


def test_two_boxes_of_less_than_a_pixel_score_by_their_direction() -> None:
    assert best_pair([(3, 3, 3, 3), (5, 3, 5, 3)], across=True) == 1.0
    assert best_pair([(3, 3, 3, 3), (5, 3, 5, 3)], across=False) == 0.0
    assert best_pair([(3, 3, 9, 9)], across=True) == 0.0


def test_large_frames_are_shrunk_to_720() -> None:
    """A shorter side of 768 pixels stays, and one of 960 is three quarters; without antialiasing for *color*."""
    small = torch.zeros(1, 768, 900, 3, dtype=torch.uint8)
    assert detector_pixels(small, whole_levels=False).shape == (1, 3, 768, 900)
    frames = torch.randint(0, 256, (1, 960, 1000, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels = frames[0].permute(2, 0, 1).double()
    whole = detector_pixels(frames, whole_levels=True)[0]
    expected = resize(pixels, (720, 750), (4 / 3, 4 / 3), cubic=False)
    assert whole.shape == (3, 720, 750)
    assert (whole.double() - expected).abs().max() <= 0.5 + 0.02  # places are float32
    assert torch.equal(whole, whole.round())
    # A triangle of two strides' width around each place, cut at the border.
    place = (torch.arange(720).double() + 0.5) * 4 / 3 - 0.5
    weights = (1 - (torch.arange(960) - place[:, None]).abs() * 3 / 4).clamp(min=0)
    down = weights / weights.sum(1, keepdim=True)
    place = (torch.arange(750).double() + 0.5) * 4 / 3 - 0.5
    weights = (1 - (torch.arange(1000) - place[:, None]).abs() * 3 / 4).clamp(min=0)
    across = weights / weights.sum(1, keepdim=True)
    smooth = detector_pixels(frames, whole_levels=False)[0].double()
    torch.testing.assert_close(smooth, down @ pixels @ across.T, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("name", "asked", "line"),
    [
        ("object_class", {"object": 3}, r"auxiliary_info.object_class=\{'object': 3\}, which has no text object"),
        ("multiple_objects", {"object": "bird"}, r"multiple_objects.object='bird', which is not two objects"),
        ("color", ["red"], r"auxiliary_info.color=\['red'\], which has no text color"),
        ("spatial_relationship", {"spatial_relationship": {"object_a": "cat"}}, "which has no text object_b"),
        (
            "spatial_relationship",
            {"spatial_relationship": {"object_a": "cat", "object_b": "dog", "relationship": "in"}},
            "relationship is one of on the left of, on the right of, on the top of, on the bottom of",
        ),
    ],
)
def test_a_list_that_asks_for_something_else_is_refused(name: str, asked: object, line: str, tmp_path: Path) -> None:
    metric = load_leaf("metric", name, weights=str(tmp_path))
    with pytest.raises(ValueError, match=line):
        metric.measure(_pair("a red cat", name, asked))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_foreign_file_is_named(name: str, tmp_path: Path) -> None:
    metric = load_leaf("metric", name, weights=str(tmp_path))
    for file in (GRIT, BERT_VOCABULARY):
        assert f"{tmp_path / file.name} is not there" in metric.absent()
        (tmp_path / file.name).write_bytes(b"no weights")
    assert metric.absent() is None
    asked: dict[str, object] = {"object": "bird and cat", "color": "red"}
    asked["spatial_relationship"] = {"object_a": "cat", "object_b": "dog", "relationship": "on the left of"}
    with pytest.raises(ValueError, match="holds no weights that can be read"):
        metric.measure(_pair("a red cat", name, asked))
