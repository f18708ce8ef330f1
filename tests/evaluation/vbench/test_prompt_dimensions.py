"""VBench's dimensions of a prompt's content: ViCLIP's two, UMT's actions and Tag2Text's scenes, with small random networks.

The networks' own oracles (float64, nothing of qvgen) are those of tests/evaluation/networks/.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qvgen.config.leaves import load_leaf
from qvgen.evaluation.metrics.base import Clip, Pair
from qvgen.evaluation.networks.clip import load_tokens
from qvgen.evaluation.networks.tag2text.captioner import Captioner, Tag2Text
from qvgen.evaluation.networks.umt import UmtSizes
from qvgen.evaluation.networks.viclip import ViclipSizes
from qvgen.evaluation.prompt_list import PromptFacts
from qvgen.evaluation.vbench.human_action import HumanAction, recognized
from qvgen.evaluation.vbench.overall_consistency import OverallConsistency
from qvgen.evaluation.vbench.published_file import (
    BERT_VOCABULARY,
    CLIP_VOCABULARY,
    KINETICS_ACTIONS,
    TAG2TEXT,
    TAG_LIST,
    UMT,
    VICLIP,
)
from qvgen.evaluation.vbench.scene import Scene
from qvgen.evaluation.vbench.temporal_style import TemporalStyle
from tests.evaluation.networks import test_tag2text, test_umt, test_viclip
from tests.evaluation.networks.float64_layers import random_file
from tests.evaluation.vbench import published_networks as published

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_MERGES = ["b o", "a t</w>", "bo at</w>", "o n</w>"]
_ACTIONS = ["Riding a bike", "surfing", "tai chi", "zumba", "yoga"]


def _video(frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)


def _pair(frames: Tensor, caption: str | None, **more: object) -> Pair:
    return Pair(video=Clip(frames), reference=None, caption=caption, **more)


def _squares(frames: Tensor, *, cubic: bool) -> np.ndarray:
    """Frames of 8 x 14 as the middle of 4 x 7, rounded to levels and normalized: [F, 3, 4, 4]."""
    found = []
    for frame in frames.permute(0, 3, 1, 2).double():
        big = published.resize(frame, (4, 7), (2.0, 2.0), cubic=cubic).round().clamp(0, 255)[:, :, 2:6]
        mean, deviation = (np.array(values).reshape(3, 1, 1) for values in (_CLIP if cubic else _IMAGENET))
        found.append((big.numpy() / 255 - mean) / deviation)
    return np.stack(found)


@pytest.mark.parametrize("metric", [TemporalStyle, OverallConsistency])
def test_viclips_dimensions_are_the_cosine_of_video_and_prompt(metric: type[TemporalStyle], tmp_path: Path) -> None:
    sizes = test_viclip.SMALL | {"vocabulary": 514 + len(_MERGES)}
    weights = random_file(test_viclip.shapes(sizes), tmp_path / VICLIP.name)
    (tmp_path / CLIP_VOCABULARY.name).write_bytes(gzip.compress("\n".join(["#version", *_MERGES, ""]).encode()))

    class Small(metric):
        sizes = ViclipSizes(**test_viclip.SMALL | {"vocabulary": 514 + len(_MERGES)})

    small = Small(weights=str(tmp_path))
    assert small.absent() is None
    frames = _video(7, 8, 14)
    # 7 frames in three parts: 0 and 1, 2 and 3, 4 to 6.
    video = test_viclip.video_oracle(_squares(frames[[0, 2, 5]], cubic=True), weights)
    start, end = 512 + len(_MERGES), 513 + len(_MERGES)
    text = test_viclip.text_oracle([start, 514, 515, end, 0, 0], weights)
    assert small.measure(_pair(frames, "Boat  on")) == pytest.approx(float(video @ text), abs=2e-5)
    # A prompt of more than six tokens is cut and keeps its end.
    text = test_viclip.text_oracle([start, 514, 514, 514, 514, end], weights)
    assert small.measure(_pair(frames, "boat boat boat boat boat on")) == pytest.approx(float(video @ text), abs=2e-5)
    with pytest.raises(ValueError, match="needs the prompts"):
        small.measure(_pair(frames, None))


def test_a_prompt_that_is_cut_keeps_its_end(tmp_path: Path) -> None:
    (tmp_path / "bpe.gz").write_bytes(gzip.compress("\n".join(["#version", *_MERGES, ""]).encode()))
    tokens = load_tokens(tmp_path / "bpe.gz")
    assert tokens("boat boat boat", context=4, cut=True).tolist() == [[516, 514, 514, 517]]
    with pytest.raises(ValueError, match="has 5 tokens, and CLIP takes 4"):
        tokens("boat boat boat", context=4)


class _SmallAction(HumanAction):
    sizes = UmtSizes(**test_umt.SMALL)


def test_an_action_counts_where_its_probability_is_large_enough(tmp_path: Path) -> None:
    weights = random_file(test_umt.shapes(test_umt.SMALL), tmp_path / UMT.name, key=None)
    frames = _video(7, 8, 14)
    video = _squares(frames[[0, 2, 5]], cubic=False).transpose(1, 0, 2, 3)
    logits = test_umt.oracle(video, weights)
    # The head is moved so that the second action has 0.9 and the fourth 0.8.
    shift = {1: np.log(9.0), 3: np.log(4.0)}
    tensors = torch.load(tmp_path / UMT.name)
    tensors["head.bias"] += torch.tensor([shift.get(number, -5.0) - value for number, value in enumerate(logits)])
    torch.save(tensors, tmp_path / UMT.name)
    lines = [f"{action}\t{number}" for number, action in enumerate(_ACTIONS)]
    (tmp_path / KINETICS_ACTIONS.name).write_text("\n".join(reversed(lines)))
    small = _SmallAction(weights=str(tmp_path))
    assert small.absent() is None
    asked = {action: small.measure(_pair(frames, f"A person is {action}")) for action in ("surfing", "zumba", "yoga")}
    assert asked == {"surfing": 1.0, "zumba": 0.0, "yoga": 0.0}
    (tmp_path / KINETICS_ACTIONS.name).write_text("\n".join(lines[1:]))
    other = tmp_path / "other"
    other.mkdir()
    for file in (UMT, KINETICS_ACTIONS):
        (other / file.name).write_bytes((tmp_path / file.name).read_bytes())
    with pytest.raises(ValueError, match="has 4 actions, numbered 1 to 4; the network has 5"):
        _SmallAction(weights=str(other)).measure(_pair(frames, "a person is surfing"))


def test_five_actions_count_at_most_and_probabilities_are_rounded() -> None:
    logits = torch.full((8,), 3.0) - torch.arange(8) / 100
    assert recognized(logits) == [0, 1, 2, 3, 4]
    edge = torch.tensor([0.84996, 0.84994]).double().logit()
    assert recognized(edge) == [0]  # 0.84996 is 0.85 in four places


class _SmallScene(Scene):
    sizes = test_tag2text.SIZES


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    shapes = test_tag2text.shapes(test_tag2text.SWIN, test_tag2text.BERT, tags=6)
    random_file(shapes, tmp_path / TAG2TEXT.name, seed=4)
    (tmp_path / TAG_LIST.name).write_text("\n".join(test_tag2text.TAGS) + "\n")
    (tmp_path / BERT_VOCABULARY.name).write_text("\n".join(test_tag2text.WORDS) + "\n")
    return tmp_path


def _asks(scene: object) -> dict[str, object]:
    return {"prompt": PromptFacts(dimensions=frozenset(["scene"]), auxiliary={"scene": scene}), "has_prompt_list": True}


def test_a_scene_is_the_share_of_frames_whose_caption_has_its_words(scenes: Path) -> None:
    frames = (
        (_video(17, 4, 5) // 128 * 255).repeat_interleave(5, 1).repeat_interleave(6, 2)
    )  # big and bright: captions differ
    network = Tag2Text.load(scenes / TAG2TEXT.name, sizes=test_tag2text.SIZES)
    captioner = Captioner(network, words=test_tag2text.WORDS, tags=test_tag2text.TAGS)
    captions = []
    for frame in frames[:16]:  # 17 frames in sixteen parts: the last one has two, and the first of them is its middle
        image = np.asarray(Image.fromarray(frame.numpy()).resize((16, 16), Image.Resampling.BILINEAR)) / 255
        pixels = (image - np.array(_IMAGENET[0])) / np.array(_IMAGENET[1])
        captions += captioner(torch.from_numpy(pixels.transpose(2, 0, 1)).float()[None])
    word, other = "picture", "red"
    shares = {word: sum(word in caption for caption in captions) / 16 for word in (word, other)}
    assert all(0 < share < 1 for share in shares.values())
    small = _SmallScene(weights=str(scenes))
    assert small.absent() is None
    measured = {
        scene: small.measure(_pair(frames, "a scene", **_asks({"scene": {"scene": scene}})))
        for scene in (word, f"{word} {other}", "nowhere")
    }
    both = sum(word in caption and other in caption for caption in captions) / 16
    assert measured == {word: shares[word], f"{word} {other}": both, "nowhere": 0.0}


def test_a_list_that_names_no_scene_is_refused(scenes: Path) -> None:
    with pytest.raises(ValueError, match=r"auxiliary_info.scene=\{'scene': 3\}, which names no scene"):
        _SmallScene(weights=str(scenes)).measure(_pair(_video(2, 20, 30), "a scene", **_asks({"scene": 3})))


@pytest.mark.parametrize("name", ["temporal_style", "overall_consistency", "human_action", "scene"])
def test_a_missing_or_foreign_file_is_named(name: str, tmp_path: Path) -> None:
    metric = load_leaf("metric", name, weights=str(tmp_path))
    for file in metric.files:
        assert f"{tmp_path / file.name} is not there" in metric.absent()
        (tmp_path / file.name).write_bytes(b"no weights")
    assert metric.absent() is None
    with pytest.raises(ValueError, match=r"holds no weights|is no list of actions"):
        metric.measure(_pair(_video(2, 20, 30), "a scene", **_asks({"scene": {"scene": "alley"}})))
