"""Tag2Text (arXiv 2303.05657): captions of images, guided by the tags that the network itself finds in them.

    image -> Swin-B -> features
    3429 labels that see the features -> a logit each -> tags above the threshold, less some that disturb captions
    "tag | tag | ..." that sees the features -> BERT -> features of the tags
    "a picture of" ... that sees the features of the tags -> BERT -> a caption by beam search

Modules have the names of ``tag2text_swin_14m.pth``. The threshold and the tags that are left out are VBench's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qvgen.evaluation.networks.published_tensors import fill_, read_tensors
from qvgen.evaluation.networks.tag2text.beam_search import BeamRules, beam_search
from qvgen.evaluation.networks.tag2text.bert import BertSizes, Decoder, Encoder, TagHead
from qvgen.evaluation.networks.tag2text.swin import Swin, SwinSizes

PROMPT = "a picture of "
THRESHOLD = 0.7

_TAG_TOKENS = 40
_IMAGES_AT_ONCE = 4
_DERIVED = (r"relative_position_index$", r"attn_mask$", r"position_ids$", r"cls\.predictions\.decoder\.bias$")
"""Names that hold indices and masks, and the output's bias under its second name."""


@dataclass(frozen=True, kw_only=True)
class Tag2TextSizes:
    """The sizes of the published network, and of smaller ones of the same kind.

    Attributes:
        swin: Sizes of the image encoder.
        bert: Sizes of the three transformers over text and labels.
        tags: Labels.
        left_out: Numbers of tags that disturb captions: "quarter" and the words for numbers.
    """

    swin: SwinSizes = field(default_factory=SwinSizes)
    bert: BertSizes = field(default_factory=BertSizes)
    tags: int = 3429
    left_out: tuple[int, ...] = (127, 3351, 3265, 3338, 3355, 3359)


class _LogitOfEach(nn.Module):
    """A weight vector and a bias for each label."""

    def __init__(self, tags: int, width: int) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.zeros(1, tags, width)), nn.Parameter(torch.zeros(1, tags))

    def forward(self, x: Tensor) -> Tensor:
        return (self.W * x).sum(-1) + self.b


class Tag2Text(nn.Module):
    """The network; :meth:`load` gives it weights."""

    def __init__(self, sizes: Tag2TextSizes) -> None:
        super().__init__()
        self.left_out = sizes.left_out
        self.visual_encoder = Swin(sizes.swin)
        self.text_decoder = Decoder(sizes.bert)
        self.tag_encoder = Encoder(sizes.bert, seen_width=sizes.swin.outputs)
        self.vision_multi = TagHead(sizes.bert, seen_width=sizes.swin.outputs)
        self.label_embed = nn.Embedding.from_pretrained(torch.zeros(sizes.tags, sizes.bert.width))
        self.fc = _LogitOfEach(sizes.tags, sizes.bert.width)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path, *, sizes: Tag2TextSizes) -> Self:
        """Read a checkpoint of these sizes.

        Raises:
            ValueError: It is damaged, or a tensor is missing, unexpected or of another shape.
        """
        with torch.device("meta"):
            network = cls(sizes)
        fill_(network, read_tensors(path, inside="model"), path=path, derived=_DERIVED)
        return network

    @torch.no_grad()
    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B L C"]:
        """Features of normalized images, a few at once for memory."""
        return torch.cat([self.visual_encoder(part) for part in images.split(_IMAGES_AT_ONCE)])

    @torch.no_grad()
    def tags(self, features: Float[Tensor, "B L C"]) -> Bool[Tensor, "B K"]:
        """Which tags are in each image."""
        labels = self.label_embed.weight
        logits = [self.fc(self.vision_multi(labels.expand(1, -1, -1), image[None])) for image in features]
        found = torch.cat(logits).sigmoid() > THRESHOLD
        found[:, list(self.left_out)] = False
        return found


class Captioner:
    """Captions of frames.

    Args:
        network: Tag2Text.
        words: BERT's tokens in their order, without the two that Tag2Text adds.
        tags: The labels in their order.

    Raises:
        ValueError: There are not as many words or tags as the network has.
    """

    def __init__(self, network: Tag2Text, *, words: list[str], tags: list[str]) -> None:
        from transformers import BertTokenizer

        size = network.tag_encoder.embeddings.word_embeddings.num_embeddings
        if len(words) + 2 != size:
            raise ValueError(f"{len(words)} words were given where the network has {size - 2}; give BERT's vocab.txt")
        if len(tags) != network.label_embed.num_embeddings:
            raise ValueError(
                f"{len(tags)} tags were given where the network has {network.label_embed.num_embeddings}; "
                "give Tag2Text's list of tags"
            )
        self.network, self.labels = network, tags
        self.tokenizer: Any = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
        self.decoder_start, self.encoder_start = len(words), len(words) + 1
        self._silent = {self.decoder_start, self.encoder_start, *self.tokenizer.all_special_ids}

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> list[str]:
        """The caption of each normalized image, without the prompt."""
        features = self.network.features(images)
        device = features.device
        found = [row.nonzero().flatten().tolist() for row in self.network.tags(features)]
        tokens = self.tokenizer(
            [" | ".join(self.labels[number] for number in row) for row in found],
            padding="max_length",
            truncation=True,
            max_length=_TAG_TOKENS,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"].bool()[:, None, None].to(device)
        ids = tokens["input_ids"].to(device)
        ids[:, 0] = self.encoder_start
        seen = self.network.tag_encoder(ids, features, mask)
        prompt = [self.decoder_start, *self.tokenizer(PROMPT)["input_ids"][1:-1]]
        texts = beam_search(
            lambda partial, rows: self.network.text_decoder(partial, seen[rows]),
            prompt,
            images=len(images),
            device=device,
            rules=BeamRules(end=self.tokenizer.sep_token_id),
        )
        return [self._text(text)[len(PROMPT) :] for text in texts]

    def _text(self, tokens: list[int]) -> str:
        kept = [token for token in tokens if token not in self._silent]
        text: str = self.tokenizer.decode(kept, clean_up_tokenization_spaces=True)
        return text
