"""GRiT (arXiv 2212.00280) with ViT-B: the objects in an image, each with a box and a text, as VBench reads it.

    image -> normalized, filled up with zeros to multiples of 32 -> pyramid of features -> proposals -> objects
    an object's features in 14 x 14 cells -> a class's name, or a phrase, as the start token says

Modules have the names of ``grit_b_densecap_objectdet.pth``. The head of masks is not read: no dimension looks at a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.grit.cascade import FIRST_LEVEL, LEVELS, Cascade
from qvgen.evaluation.networks.grit.proposals import CenterNet
from qvgen.evaluation.networks.grit.pyramid import MULTIPLE, Pyramid
from qvgen.evaluation.networks.grit.roi_align import pooled
from qvgen.evaluation.networks.grit.text_decoder import DecoderSizes, TextDecoder
from qvgen.evaluation.networks.grit.vit import VitSizes
from qvgen.evaluation.networks.published_tensors import fill_, read_tensors

_MEAN, _DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_SIDE = 14
_LEFT_OUT = (r"^roi_heads\.mask_head\.", r"^pixel_(mean|std)$")
"""Names of the head of masks, and of what an image is normalized with."""


@dataclass(frozen=True, kw_only=True)
class GritSizes:
    """The sizes of the published network, and of smaller ones of the same kind.

    Attributes:
        vit: Sizes of the ViT.
        decoder: Sizes of the text decoder.
        channels: Channels of the pyramid's maps.
        groups: Groups of the proposals' normalization.
        hidden: Channels of the cascade's linear layers.
        phrase_start: The token before a phrase, BERT's first unused one behind its mask.
    """

    vit: VitSizes = field(default_factory=VitSizes)
    decoder: DecoderSizes = field(default_factory=DecoderSizes)
    channels: int = 256
    groups: int = 32
    hidden: int = 1024
    phrase_start: int = 104


class _Heads(Cascade):
    def __init__(self, sizes: GritSizes) -> None:
        super().__init__(channels=sizes.channels, hidden=sizes.hidden)
        self.text_decoder = TextDecoder(sizes.decoder, channels=sizes.channels)


class Grit(nn.Module):
    """The network; :meth:`load` gives it weights."""

    def __init__(self, sizes: GritSizes) -> None:
        super().__init__()
        self.phrase_start = sizes.phrase_start
        self.backbone = Pyramid(sizes.vit, channels=sizes.channels)
        self.proposal_generator = CenterNet(channels=sizes.channels, groups=sizes.groups)
        self.roi_heads = _Heads(sizes)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path, *, sizes: GritSizes) -> Self:
        """Read a checkpoint of these sizes.

        Raises:
            ValueError: It is damaged, or a tensor is missing, unexpected or of another shape.
        """
        with torch.device("meta"):
            network = cls(sizes)
        fill_(network, read_tensors(path, inside="model"), path=path, derived=_LEFT_OUT)
        return network

    @torch.no_grad()
    def objects(self, image: Float[Tensor, "3 H W"]) -> tuple[Float[Tensor, "N 4"], Float[Tensor, "N L C"]]:
        """Boxes in pixels of the objects of an image, the surest first, and the features that their texts are read from.

        Args:
            image: Red, green and blue in [0, 255].
        """
        height, width = image.shape[1:]
        shift, scale = (image.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
        filled = functional.pad((image - shift) / scale, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
        maps = self.backbone(filled[None])
        used = [features[0] for features in maps[:LEVELS]]
        boxes = self.roi_heads.objects(used, self.proposal_generator(maps), height=height, width=width)
        return boxes, pooled(used, boxes, first=FIRST_LEVEL, side=_SIDE).flatten(2).transpose(1, 2)


class Describer:
    """Objects of frames in words.

    Args:
        network: GRiT.
        words: BERT's tokens in their order.

    Raises:
        ValueError: There are not as many words as the network has.
    """

    def __init__(self, network: Grit, *, words: list[str]) -> None:
        from transformers import BertTokenizer

        size = network.roi_heads.text_decoder.textual.output.out_features
        if len(words) != size:
            raise ValueError(f"{len(words)} words were given where the network has {size}; give BERT's vocab.txt")
        self.network = network
        self.tokenizer: Any = BertTokenizer(vocab={word: number for number, word in enumerate(words)})

    def classes(self, features: Float[Tensor, "N L C"]) -> list[str]:
        """The class's name of each object."""
        return self._texts(features, start=self.tokenizer.cls_token_id)

    def phrases(self, features: Float[Tensor, "N L C"]) -> list[str]:
        """A phrase for each object."""
        return self._texts(features, start=self.network.phrase_start)

    @torch.no_grad()
    def _texts(self, features: Tensor, *, start: int) -> list[str]:
        texts = self.network.roi_heads.text_decoder.texts(features, start=start, end=self.tokenizer.sep_token_id)
        return [
            self.tokenizer.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=True) for text in texts
        ]
