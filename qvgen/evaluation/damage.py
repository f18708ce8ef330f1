"""What quantization did to a video: distances between a quantized model's video and the full-precision one's, same noise.

    visual   lpips   mean over frames of LPIPS (:mod:`qvgen.evaluation.lpips`)
             ssim    1 - SSIM, the stated substitute without a network
    motion   raft         mean |flow_a - flow_b| of the optical flow from each frame to the next, as a share of the frame's
                          diagonal (:mod:`qvgen.evaluation.raft`)
             differences  mean |(a_{f+1} - a_f) - (b_{f+1} - b_f)| / 255, the stated substitute
    text     clip    mean over frames of |cos(a, caption) - cos(b, caption)| of the user's model
                     (:mod:`qvgen.evaluation.text_similarity`)

0 for equal videos, larger is worse; they are not commensurable. ViDiT-Q (2406.02540) scores a group's sensitivity by CLIP
similarity, flow score and a visual quality predictor; here all are distances to the full-precision video, so that a
change is seen even where a score happens to rise. Left out: the text substitute, which looks at no video
(:mod:`qvgen.training.probe`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qvgen.config.errors import UserError
from qvgen.data.asset_table import ASSETS
from qvgen.data.assets import find_asset
from qvgen.evaluation import lpips, raft
from qvgen.evaluation.metrics import ssim
from qvgen.evaluation.text_similarity import TextSimilarity

VisualKind = Literal["lpips", "ssim"]
MotionKind = Literal["raft", "differences"]

_FRAMES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One distance.

    Attributes:
        name: For tables, e.g. "lpips".
        key: Decides its values: the name, and the checksum of the network's archive or folder.
        measure: (videos, reference, captions) -> its value; videos uint8 [B, F, H, W, 3].
    """

    name: str
    key: str
    measure: Callable[[Tensor, Tensor, Sequence[str]], float]


def visual_damage(kind: VisualKind) -> Damage:
    """Distance of frames; see the module.

    Raises:
        UserError: The network was not fetched.
    """
    if kind == "ssim":
        return Damage(name=kind, key=kind, measure=lambda a, b, _: 1.0 - ssim(a, b, max_value=255))
    network = lpips.Lpips.load(_file(lpips.ASSET, lpips.FILE, substitute="init.visual=ssim")).to(_device())

    def measure(a: Tensor, b: Tensor, captions: Sequence[str]) -> float:
        del captions
        parts = zip(_frames(a).split(_FRAMES_AT_ONCE), _frames(b).split(_FRAMES_AT_ONCE), strict=True)
        return float(torch.cat([network(*_pixels(*part)).cpu() for part in parts]).double().mean())

    return Damage(name=kind, key=f"{kind} {_checksum(lpips.ASSET)}", measure=measure)


def motion_damage(kind: MotionKind) -> Damage:
    """Distance of motions; see the module.

    Raises:
        UserError: The network was not fetched.
    """
    if kind == "differences":

        def differences(a: Tensor, b: Tensor, captions: Sequence[str]) -> float:
            del captions
            _check_frames(a)
            return float((a.double().diff(dim=1) - b.double().diff(dim=1)).abs().mean()) / 255

        return Damage(name=kind, key=kind, measure=differences)
    network = raft.Raft.load(_file(raft.ASSET, raft.FILE, substitute="init.motion=differences")).to(_device())

    def flow(video: Tensor) -> Tensor:
        first, second = _frames(video[:, :-1]), _frames(video[:, 1:])
        parts = zip(first.split(_FRAMES_AT_ONCE), second.split(_FRAMES_AT_ONCE), strict=True)
        return torch.cat([network(*_pixels(*part)).cpu() for part in parts]).double()

    def measure(a: Tensor, b: Tensor, captions: Sequence[str]) -> float:
        del captions
        _check_frames(a)
        diagonal = (a.shape[-3] ** 2 + a.shape[-2] ** 2) ** 0.5
        return float((flow(a) - flow(b)).norm(dim=1).mean()) / diagonal

    return Damage(name=kind, key=f"{kind} {_checksum(raft.ASSET)}", measure=measure)


def text_damage(folder: str | Path) -> Damage:
    """Change of the cosine with the caption, by a user's model; raises ValueError where the folder holds none."""
    network = TextSimilarity(Path(folder))

    def measure(a: Tensor, b: Tensor, captions: Sequence[str]) -> float:
        cosines = [network(video, captions, device=_device()).double() for video in (a, b)]
        return float((cosines[0] - cosines[1]).abs().mean())

    return Damage(name="clip", key=f"clip {network.revision}", measure=measure)


def _check_frames(video: Tensor) -> None:
    if video.shape[1] < 2:
        raise ValueError(f"a video of {video.shape[1]} frame has no motion; use another metric for the group")


def _frames(videos: Tensor) -> Tensor:
    """All frames uint8 [B F, 3, H, W]."""
    return videos.flatten(0, 1).permute(0, 3, 1, 2)


def _pixels(*frames: Tensor) -> list[Tensor]:
    """In [-1, 1], float32, where networks run."""
    return [part.to(_device()).float() / 127.5 - 1 for part in frames]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _file(asset: str, file: str, *, substitute: str) -> Path:
    folder = find_asset(asset)
    if folder is None:
        raise UserError(
            f"the network {asset} is not there; fetch it with `qvgen assets names=[{asset}]`, or write {substitute} "
            "for a distance without a network"
        )
    return folder / file


def _checksum(asset: str) -> str:
    (found,) = (entry for entry in ASSETS if entry.name == asset)
    return found.sha256
