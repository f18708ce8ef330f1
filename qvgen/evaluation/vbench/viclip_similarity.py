"""How well a video fits its prompt by ViCLIP: the cosine of their features, which two of VBench's dimensions are.

    8 frames, each the middle of an eighth of the video -> the features of ViCLIP's video tower
    the prompt, cut to 32 tokens                        -> the features of its text tower

The two dimensions differ in their prompts alone.
"""

from __future__ import annotations

from typing import ClassVar

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.networks.clip import load_tokens
from qvgen.evaluation.networks.viclip import ViclipSizes, load_viclip
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.vbench import published_file
from qvgen.evaluation.vbench.dimension import NetworkDimension
from qvgen.evaluation.vbench.frame_preparation import middle_frames, viclip_tensors


class ViclipDimension(NetworkDimension):
    """Base of the two.

    Attributes:
        sizes: The sizes of the network that the file has.
    """

    sizes: ClassVar[ViclipSizes] = ViclipSizes()
    sampling = "8, the middle one of each eighth"
    low, high = -1.0, 1.0
    files = (published_file.VICLIP, published_file.CLIP_VOCABULARY)

    def measure(self, pair: Pair) -> float:
        """See the module.

        Raises:
            ValueError: Nobody said what the video's prompt is.
        """
        if pair.caption is None:
            raise ValueError(f"{self.name} needs the prompts of the videos; write prompts=FILE, or leave it out")
        device, sizes = sampling_device(), self.sizes
        network = load_viclip(self.path(published_file.VICLIP), sizes)
        frames = viclip_tensors(middle_frames(pair.video.frames, sizes.frames), side=sizes.side)
        video = pair.video.once("viclip", lambda: network.video_features(frames[None].to(device)).cpu().double()[0])
        tokens = load_tokens(self.path(published_file.CLIP_VOCABULARY))(pair.caption, context=sizes.context, cut=True)
        return float(video @ network.text_features(tokens.to(device)).cpu().double()[0])
