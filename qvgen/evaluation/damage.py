"""The damage of quantization to a video: its distance from the full-precision model's video of the same noise.

    visual   lpips   mean over frames of LPIPS (:mod:`qvgen.evaluation.networks.lpips`)
             i3d     mean over videos of |f_a - f_b|^2 of I3D's logits, the Frechet video distance of two single videos
                     (:mod:`qvgen.evaluation.networks.i3d`): what happens in time counts too
             ssim    1 - SSIM, the stated substitute without a network
    motion   raft         mean |flow_a - flow_b| of the optical flow from each frame to the next, as a share of the frame's
                          diagonal (:mod:`qvgen.evaluation.networks.raft`)
             differences  mean |(a_{f+1} - a_f) - (b_{f+1} - b_f)| / 255, the stated substitute
    text     clip    mean over frames of |cos(a, caption) - cos(b, caption)| of the user's model
                     (:mod:`qvgen.evaluation.text_similarity`)

0 for equal videos, larger is worse; they are not commensurable. ViDiT-Q (2406.02540) scores a group's sensitivity by CLIP
similarity, flow score and a visual quality predictor; here all are distances to the full-precision video, so that a
change is seen even where a score happens to rise. Left out: the text substitute, which looks at no video
(:mod:`qvgen.training.mixed_precision.layer_probe`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qvgen.data.asset_table import ASSETS
from qvgen.data.assets import find_asset
from qvgen.errors import UserError
from qvgen.evaluation.metrics import ssim
from qvgen.evaluation.networks import i3d, lpips, raft
from qvgen.evaluation.text_similarity import TextSimilarity

VisualKind = Literal["lpips", "i3d", "ssim"]
MotionKind = Literal["raft", "differences"]

_FRAMES_AT_ONCE = 8


Judge = Callable[[Tensor], float]
"""Videos uint8 [B, F, H, W, 3] -> their distance to a reference."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One distance.

    Attributes:
        name: For tables, e.g. "lpips".
        key: Decides its values: the name, and the checksum of the network's archive or folder.
        against: (reference, captions) -> the distance to it; what a network sees in the reference is computed once.
    """

    name: str
    key: str
    against: Callable[[Tensor, Sequence[str]], Judge]

    def measure(self, videos: Tensor, reference: Tensor, captions: Sequence[str]) -> float:
        """The metric's value; videos uint8 [B, F, H, W, 3]."""
        return self.against(reference, captions)(videos)


def visual_damage(kind: VisualKind) -> Damage:
    """Distance of looks; see the module.

    Raises:
        UserError: The network was not fetched.
    """
    return {"lpips": _lpips_damage, "i3d": _i3d_damage, "ssim": _ssim_damage}[kind]()


def motion_damage(kind: MotionKind) -> Damage:
    """Distance of motions; see the module.

    Raises:
        UserError: The network was not fetched.
    """
    return {"raft": _raft_damage, "differences": _differences_damage}[kind]()


def _ssim_damage() -> Damage:
    def against(reference: Tensor, captions: Sequence[str]) -> Judge:
        del captions
        return lambda videos: 1.0 - ssim(videos, reference, max_value=255)

    return Damage(name="ssim", key="ssim", against=against)


def _lpips_damage() -> Damage:
    network = lpips.Lpips.load(_file(lpips.ASSET, lpips.FILE, substitute="init.visual=ssim")).to(_device())

    def against(reference: Tensor, captions: Sequence[str]) -> Judge:
        del captions

        def judge(videos: Tensor) -> float:
            frames = (_frames(x).split(_FRAMES_AT_ONCE) for x in (videos, reference))
            return _mean(network(*map(_pixels, pair)) for pair in zip(*frames, strict=True))

        return judge

    return Damage(name="lpips", key=f"lpips {_checksum(lpips.ASSET)}", against=against)


def _i3d_damage() -> Damage:
    network = i3d.I3d.load(_file(i3d.ASSET, i3d.FILE, substitute="init.visual=ssim")).to(_device())

    def logits(videos: Tensor) -> Tensor:
        parts = videos.permute(0, 4, 1, 2, 3).split(1)  # for memory: 49 frames are 80 MB behind the first layer
        return torch.cat([network(_pixels(part)).cpu() for part in parts]).double()

    def against(reference: Tensor, captions: Sequence[str]) -> Judge:
        del captions
        exact = logits(reference)
        return lambda videos: float((logits(videos) - exact).square().sum(1).mean())

    return Damage(name="i3d", key=f"i3d {_checksum(i3d.ASSET)}", against=against)


def _differences_damage() -> Damage:
    def against(reference: Tensor, captions: Sequence[str]) -> Judge:
        del captions
        _check_frames(reference)
        exact = reference.double().diff(dim=1)
        return lambda videos: float((videos.double().diff(dim=1) - exact).abs().mean()) / 255

    return Damage(name="differences", key="differences", against=against)


def _raft_damage() -> Damage:
    network = raft.Raft.load(_file(raft.ASSET, raft.FILE, substitute="init.motion=differences")).to(_device())

    def flow(video: Tensor) -> Tensor:
        pairs = (_frames(part).split(_FRAMES_AT_ONCE) for part in (video[:, :-1], video[:, 1:]))
        return torch.cat([network(*map(_pixels, pair)).cpu() for pair in zip(*pairs, strict=True)]).double()

    def against(reference: Tensor, captions: Sequence[str]) -> Judge:
        del captions
        _check_frames(reference)
        exact, diagonal = flow(reference), (reference.shape[-3] ** 2 + reference.shape[-2] ** 2) ** 0.5
        return lambda videos: float((flow(videos) - exact).norm(dim=1).mean()) / diagonal

    return Damage(name="raft", key=f"raft {_checksum(raft.ASSET)}", against=against)


def text_damage(folder: str | Path) -> Damage:
    """Change of the cosine with the caption, by a user's model; raises ValueError where the folder holds none."""
    network = TextSimilarity(Path(folder))

    def against(reference: Tensor, captions: Sequence[str]) -> Judge:
        def cosine(videos: Tensor) -> Tensor:
            return network(videos, captions, device=_device()).double()

        exact = cosine(reference)
        return lambda videos: float((cosine(videos) - exact).abs().mean())

    return Damage(name="clip", key=f"clip {network.revision}", against=against)


def _mean(parts: Iterable[Tensor]) -> float:
    return float(torch.cat([part.cpu() for part in parts]).double().mean())


def _check_frames(video: Tensor) -> None:
    if video.shape[1] < 2:
        raise ValueError(f"a video of {video.shape[1]} frame has no motion; use another metric for the group")


def _frames(videos: Tensor) -> Tensor:
    """All frames uint8 [B F, 3, H, W]."""
    return videos.flatten(0, 1).permute(0, 3, 1, 2)


def _pixels(frames: Tensor) -> Tensor:
    """Videos as float32 in [-1, 1], on the device where networks run."""
    return frames.to(_device()).float() / 127.5 - 1


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
