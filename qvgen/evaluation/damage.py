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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from qvgen.errors import UserError
from qvgen.evaluation.distance import ssim
from qvgen.evaluation.networks import fetched
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.text_similarity import TextSimilarity

VisualKind = Literal["lpips", "i3d", "ssim"]
MotionKind = Literal["raft", "differences"]


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
    network = fetched.load_lpips(_path(fetched.LPIPS, substitute="init.visual=ssim"))

    def against(reference: Tensor, captions: Sequence[str]) -> Judge:
        del captions
        return lambda videos: float(fetched.lpips_of_frames(network, videos, reference).mean())

    return Damage(name="lpips", key=f"lpips {fetched.LPIPS.sha256}", against=against)


def _i3d_damage() -> Damage:
    network = fetched.load_i3d(_path(fetched.I3D, substitute="init.visual=ssim"))

    def against(reference: Tensor, captions: Sequence[str]) -> Judge:
        del captions
        exact = fetched.i3d_logits(network, reference)
        return lambda videos: float((fetched.i3d_logits(network, videos) - exact).square().sum(1).mean())

    return Damage(name="i3d", key=f"i3d {fetched.I3D.sha256}", against=against)


def _differences_damage() -> Damage:
    def against(reference: Tensor, captions: Sequence[str]) -> Judge:
        del captions
        _check_frames(reference)
        exact = reference.double().diff(dim=1)
        return lambda videos: float((videos.double().diff(dim=1) - exact).abs().mean()) / 255

    return Damage(name="differences", key="differences", against=against)


def _raft_damage() -> Damage:
    network = fetched.load_raft(_path(fetched.RAFT, substitute="init.motion=differences"))

    def against(reference: Tensor, captions: Sequence[str]) -> Judge:
        del captions
        _check_frames(reference)
        exact = fetched.optical_flow(network, reference)
        diagonal = (reference.shape[-3] ** 2 + reference.shape[-2] ** 2) ** 0.5
        return lambda videos: float((fetched.optical_flow(network, videos) - exact).norm(dim=1).mean()) / diagonal

    return Damage(name="raft", key=f"raft {fetched.RAFT.sha256}", against=against)


def text_damage(folder: str | Path) -> Damage:
    """Change of the cosine with the caption, by a user's model; raises ValueError where the folder holds none."""
    network = TextSimilarity(Path(folder))

    def against(reference: Tensor, captions: Sequence[str]) -> Judge:
        def cosine(videos: Tensor) -> Tensor:
            return network(videos, captions, device=sampling_device()).double()

        exact = cosine(reference)
        return lambda videos: float((cosine(videos) - exact).abs().mean())

    return Damage(name="clip", key=f"clip {network.revision}", against=against)


def _check_frames(video: Tensor) -> None:
    if video.shape[1] < 2:
        raise ValueError(f"a video of {video.shape[1]} frame has no motion; use another metric for the group")


def _path(weights: fetched.Weights, *, substitute: str) -> Path:
    if weights.path is None:
        raise UserError(
            f"the network {weights.asset} is not there; fetch it with `qvgen assets names=[{weights.asset}]`, or write "
            f"{substitute} for a distance without a network"
        )
    return weights.path
