"""Appearance style: how well the frames fit the style that the prompt asks for, CLIP ViT-B/32's logit over 100.

The text is the list's own name of the style ("Van Gogh style"), not the prompt. Frames are resized as images.
"""

from __future__ import annotations

from torch.nn import functional

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.networks.clip import load_clip, load_tokens
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.vbench import published_file
from qvgen.evaluation.vbench.clip_features import clip_features
from qvgen.evaluation.vbench.dimension import NetworkDimension


class AppearanceStyle(NetworkDimension):
    """Cosine of the frames and the style, times CLIP's own factor over 100, which is about 1."""

    name, sampling, asks_for = "appearance_style", "all frames, each alone", True
    title = "appearance style"
    source = "VBench, arXiv 2311.17982, appearance style (vbench/appearance_style.py), CLIP ViT-B/32"
    low, high = -1.0, 1.0
    files = (published_file.CLIP_B, published_file.CLIP_VOCABULARY)
    blind_to = ("frozen",)

    def measure(self, pair: Pair) -> float:
        """See the module.

        Raises:
            ValueError: The list of prompts names no style.
        """
        asked = self.asked(pair)
        if not isinstance(asked, dict) or not isinstance(asked.get(self.name), str):
            raise ValueError(
                f"vbench.info: {pair.caption!r} has auxiliary_info.{self.name}={asked}, which names no style"
            )
        path = self.path(published_file.CLIP_B)
        network = load_clip(path)
        tokens = load_tokens(self.path(published_file.CLIP_VOCABULARY))(asked[self.name], context=network.context)
        text = functional.normalize(network.text_features(tokens.to(sampling_device())).cpu().double(), dim=1)
        images = functional.normalize(clip_features(pair.video, path, as_images=True).double(), dim=1)
        return float((images @ text[0]).mean() * network.logit_scale / 100)
