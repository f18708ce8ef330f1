"""VBench's dimensions with small random networks against float64 re-derivations that import nothing of qvgen."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from qvgen.config.leaves import load_leaf
from qvgen.evaluation.metrics.base import Clip, Pair
from qvgen.evaluation.networks.amt import load_amt
from qvgen.evaluation.networks.clip import load_tokens
from qvgen.evaluation.networks.raft import Raft
from qvgen.evaluation.prompt_list import PromptFacts
from qvgen.evaluation.vbench.published_file import AESTHETIC, AMT, CLIP_B, CLIP_L, CLIP_VOCABULARY, DINO, MUSIQ, RAFT
from tests.evaluation.vbench import published_networks as published
from tests.evaluation.vbench.published_amt import amt, amt_tensors

MEAN, DEVIATION = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
TOLERANCE = 2e-5
"""The networks compute in float32, their oracles in float64."""


def video(frames: int = 3, height: int = 40, width: int = 70) -> Tensor:
    return torch.randint(
        0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )


def pair(frames: Tensor, **more: object) -> Pair:
    return Pair(video=Clip(frames), reference=None, caption="a boat", **more)


def consistency(features: list[Tensor]) -> float:
    total = 0.0
    for index in range(1, len(features)):
        for other in (features[index - 1], features[0]):
            total += max(0.0, float(features[index] @ other / features[index].norm() / other.norm())) / 2
    return total / (len(features) - 1)


def save(folder: Path, name: str, tensors: dict[str, Tensor]) -> str:
    torch.save(tensors, folder / name)
    return str(folder)


def normalized(image: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return (image / 255 - mean.double().view(3, 1, 1)) / deviation.double().view(3, 1, 1)


def clip_frames(frames: Tensor) -> list[Tensor]:
    """Bicubic to a shorter side of 224 without antialiasing, the middle, normalized."""
    height, width = frames.shape[1:3]
    size = (224, int(224 * width / height))
    found = []
    for frame in frames.permute(0, 3, 1, 2).double():
        big = published.resize(frame, size, (height / size[0], width / size[1]), cubic=True)
        left = round((size[1] - 224) / 2)
        found.append(normalized(big[:, :, left : left + 224], MEAN, DEVIATION))
    return found


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CLIP as safetensors, whose checksum nobody publishes, and LAION's head."""
    folder = tmp_path_factory.mktemp("weights")
    tensors = published.clip_tensors()
    for file in (CLIP_B, CLIP_L):
        save_file(tensors, folder / f"{Path(file.name).stem}.safetensors")
    torch.save({"weight": torch.linspace(-3, 5, 48)[None], "bias": torch.tensor([4.5])}, folder / AESTHETIC.name)
    lines = ["#version", "b o", "a t</w>", "bo at</w>", "o n", "a b", "v a", ""]
    (folder / CLIP_VOCABULARY.name).write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def test_subject_consistency(tmp_path: Path) -> None:
    """Frames of 40 x 70 become 224 x 392, so that DINO's positions are resized."""
    tensors = published.dino_tensors()
    metric = load_leaf("metric", "subject_consistency", weights=save(tmp_path, DINO.name, tensors))
    frames = video()
    features = []
    for frame in frames.permute(0, 3, 1, 2).double():
        image = published.resize(frame, (224, 392), (40 / 224, 70 / 392), cubic=False)
        image = normalized(image, torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))
        features.append(published.dino(image, tensors))
    assert metric.absent() is None
    expected = consistency(features)
    assert 0.05 < expected < 0.999
    assert metric.measure(pair(frames)) == pytest.approx(expected, abs=TOLERANCE)


def test_background_consistency(clip_weights: Path) -> None:
    metric, frames = load_leaf("metric", "background_consistency", weights=str(clip_weights)), video()
    tensors = published.clip_tensors()
    features = [published.clip_image(image, tensors) for image in clip_frames(frames)]
    expected = consistency(features)
    assert 0.05 < expected < 0.999
    assert metric.measure(pair(frames)) == pytest.approx(expected, abs=TOLERANCE)


def test_aesthetic_quality(clip_weights: Path) -> None:
    metric, frames = load_leaf("metric", "aesthetic_quality", weights=str(clip_weights)), video()
    tensors, head = published.clip_tensors(), torch.linspace(-3, 5, 48, dtype=torch.float64)
    features = [published.clip_image(image, tensors) for image in clip_frames(frames)]
    expected = sum(float(feature @ head / feature.norm()) + 4.5 for feature in features) / len(features) / 10
    assert metric.measure(pair(frames)) == pytest.approx(expected, abs=TOLERANCE)


def test_appearance_style(clip_weights: Path) -> None:
    """Frames are resized by Pillow, and the text is the style of the list, not the caption."""
    metric, frames = load_leaf("metric", "appearance_style", weights=str(clip_weights)), video()
    tensors = published.clip_tensors()
    images = []
    for frame in frames.numpy():
        big = np.asarray(Image.fromarray(frame).resize((392, 224), Image.Resampling.BICUBIC))[:, 84:308]
        images.append(normalized(torch.from_numpy(big.copy()).permute(2, 0, 1).double(), MEAN, DEVIATION))
    end = len(tensors["token_embedding.weight"]) - 1
    # The sign of a visible byte has its place behind "!", joined ones follow: "boat</w>", then "o" and "n</w>".
    tokens = [end - 1, 512 + 2, ord("o") - ord("!"), 256 + ord("n") - ord("!"), end]
    assert load_tokens(clip_weights / CLIP_VOCABULARY.name)("Boat  on", context=12)[0].tolist() == [*tokens, *[0] * 7]
    text = published.clip_text(tokens, tensors)
    facts = PromptFacts(
        dimensions=frozenset({"appearance_style"}), auxiliary={"appearance_style": {"appearance_style": "Boat  on"}}
    )
    asked = pair(frames, prompt=facts, has_prompt_list=True)
    features = [published.clip_image(image, tensors) for image in images]
    cosines = [float(feature @ text / feature.norm() / text.norm()) for feature in features]
    scale = float(tensors["logit_scale"].double().exp())
    assert metric.concerns(asked)
    assert metric.measure(asked) == pytest.approx(sum(cosines) / len(cosines) * scale / 100, abs=TOLERANCE)


def test_imaging_quality(tmp_path: Path) -> None:
    """A frame of 40 x 600 is shortened to 34 x 512 first; its patches fill up at both smaller sizes."""
    tensors = published.musiq_tensors()
    save_file(tensors, tmp_path / f"{Path(MUSIQ.name).stem}.safetensors")
    metric, frames = load_leaf("metric", "imaging_quality", weights=str(tmp_path)), video(1, 40, 600)
    small = published.resize(frames[0].permute(2, 0, 1).double(), (34, 512), (40 / 34, 600 / 512), cubic=False)
    expected = published.musiq(small / 255, tensors) / 100
    assert metric.measure(pair(frames)) == pytest.approx(expected, abs=TOLERANCE)


def test_motion_smoothness(tmp_path: Path) -> None:
    """Frames of 120 x 130: the border is repeated to 128 x 144, and cut again; the fourth frame has one neighbour."""
    tensors = amt_tensors()
    torch.save({"state_dict": tensors}, tmp_path / AMT.name)
    metric = load_leaf("metric", "motion_smoothness", weights=str(tmp_path))
    frames = video(4, 120, 130)
    a, b = (np.pad(frames[i].numpy(), ((4, 4), (7, 7), (0, 0)), mode="edge").transpose(2, 0, 1) / 255 for i in (0, 2))
    exact = amt(torch.from_numpy(a), torch.from_numpy(b), tensors)
    network = load_amt(tmp_path / AMT.name)
    ours = network(*(torch.from_numpy(x).float()[None] for x in (a, b)))[0]
    assert float(exact.std()) > 0.05
    assert float(((exact > 0) & (exact < 1)).double().mean()) > 0.3
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-4)
    middle = np.floor(exact.numpy()[:, 4:124, 7:137].transpose(1, 2, 0) * 255)
    expected = 1 - np.abs(frames[1].numpy() - middle).mean() / 255
    assert metric.measure(pair(frames)) == pytest.approx(expected, abs=2e-4)  # few pixels lie so near a level


@pytest.mark.parametrize(("step", "moves"), [(3.10 / 160, 1.0), (2.95 / 160, 0.0)])
def test_dynamic_degree(tmp_path: Path, step: float, moves: float) -> None:
    """A network whose every update adds one step at an eighth of the size: 20 of them are 160 steps, the threshold 3.05."""
    network = Raft()
    with torch.no_grad():
        network.update_block.flow_head.conv2.weight.zero_()
        network.update_block.flow_head.conv2.bias.copy_(torch.tensor([step, 0.0]))
    save(tmp_path, RAFT.name, network.state_dict())
    metric = load_leaf("metric", "dynamic_degree", weights=str(tmp_path))
    frames = video(1, 132, 130).expand(3, -1, -1, -1)
    assert 2.95 < 6 * 130 / 256 < 3.10
    assert metric.measure(pair(frames, fps=8.0)) == moves  # one pair of two has to move
    assert (
        metric.measure(pair(frames, fps=16.0)) == 1.0
    )  # two frames are left, and round(4 * 2 / 16) is 0, as published


@pytest.mark.parametrize("name", ["subject_consistency", "background_consistency", "aesthetic_quality",
                                  "imaging_quality", "appearance_style", "dynamic_degree"])  # fmt: skip
def test_a_missing_or_foreign_file_is_named(name: str, tmp_path: Path) -> None:
    metric = load_leaf("metric", name, weights=str(tmp_path))
    file = metric.files[0]
    assert f"{tmp_path / file.name} is not there" in metric.absent()
    (tmp_path / file.name).write_bytes(b"no weights")
    if file.sha256 is not None:
        assert "and the published file" in metric.absent()
    else:
        with pytest.raises(ValueError, match=r"(holds no .*weights)"):
            metric.measure(pair(video(2), fps=8.0))
