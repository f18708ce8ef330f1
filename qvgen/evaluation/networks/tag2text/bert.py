"""BERT (arXiv 1810.04805) with attention to an image, as Tag2Text has it three times.

    Encoder   tokens that see one another and the image                           tags -> features of tags
    Decoder   tokens that see what is before them and the features of the tags    a text so far -> logits of the next token
    TagHead   learned labels that see the image alone, without one another        labels -> features of labels

A layer is attention among the tokens, attention to the image and two linear layers, each with a residual and then the
normalization. Modules have the names of the published checkpoint; there are no segment embeddings and no pooling layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class BertSizes:
    """The sizes of Tag2Text's three parts, and of smaller ones of the same kind.

    Attributes:
        width: Channels of tokens.
        hidden: Channels between the two linear layers.
        layers: Layers of the encoder and of the decoder.
        heads: Their attention heads.
        label_layers: Layers of the head of tags.
        label_heads: Its attention heads.
        vocabulary: Tokens: BERT's, then the decoder's start and the encoder's.
        places: Longest text in tokens.
    """

    width: int = 768
    hidden: int = 3072
    layers: int = 12
    heads: int = 12
    label_layers: int = 2
    label_heads: int = 4
    vocabulary: int = 30524
    places: int = 512


class _Scores(nn.Module):
    def __init__(self, width: int, seen: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(seen, width), nn.Linear(seen, width)

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            layer(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, states in ((self.query, x), (self.key, seen), (self.value, seen))
        )
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class Output(nn.Module):
    """LayerNorm(W x + b + residual)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, width), nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Rows [..., inputs] and [..., C] -> [..., C]."""
        y: Tensor = self.LayerNorm(self.dense(x) + residual)
        return y


class _Attention(nn.Module):
    def __init__(self, width: int, seen: int, heads: int) -> None:
        super().__init__()
        self.self, self.output = _Scores(width, seen, heads), Output(width, width)

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.output(self.self(x, seen, mask), x)
        return y


class Dense(nn.Module):
    """gelu(W x + b)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [..., inputs] -> [..., outputs]."""
        return functional.gelu(self.dense(x))


class _Layer(nn.Module):
    def __init__(self, sizes: BertSizes, *, seen: int, heads: int, among_tokens: bool) -> None:
        super().__init__()
        if among_tokens:
            self.attention = _Attention(sizes.width, sizes.width, heads)
        self.crossattention = _Attention(sizes.width, seen, heads)
        self.intermediate, self.output = Dense(sizes.width, sizes.hidden), Output(sizes.hidden, sizes.width)
        self.among_tokens = among_tokens

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
        if self.among_tokens:
            x = self.attention(x, x, mask)
        x = self.crossattention(x, seen)
        y: Tensor = self.output(self.intermediate(x), x)
        return y


class _Layers(nn.Module):
    def __init__(self, layers: list[_Layer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layer:
            x = layer(x, seen, mask)
        return x


class _Embeddings(nn.Module):
    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding.from_pretrained(torch.zeros(sizes.vocabulary, sizes.width))
        self.position_embeddings = nn.Embedding.from_pretrained(torch.zeros(sizes.places, sizes.width))
        self.LayerNorm = nn.LayerNorm(sizes.width, eps=_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.LayerNorm(self.word_embeddings(tokens) + self.position_embeddings.weight[: tokens.shape[1]])
        return y


class Encoder(nn.Module):
    """Tokens that see one another and ``seen``; ``seen_width`` is its channels."""

    def __init__(self, sizes: BertSizes, *, seen_width: int) -> None:
        super().__init__()
        self.embeddings = _Embeddings(sizes)
        self.encoder = _Layers(
            [_Layer(sizes, seen=seen_width, heads=sizes.heads, among_tokens=True) for _ in range(sizes.layers)]
        )

    def forward(
        self, tokens: Int[Tensor, "B T"], seen: Float[Tensor, "B L S"], mask: Bool[Tensor, "B 1 t T"]
    ) -> Float[Tensor, "B T C"]:
        """Features of the tokens; where ``mask`` is true a token may see another one."""
        y: Tensor = self.encoder(self.embeddings(tokens), seen, mask)
        return y


class TagHead(nn.Module):
    """Labels that see an image."""

    def __init__(self, sizes: BertSizes, *, seen_width: int) -> None:
        super().__init__()
        self.encoder = _Layers(
            [
                _Layer(sizes, seen=seen_width, heads=sizes.label_heads, among_tokens=False)
                for _ in range(sizes.label_layers)
            ]
        )

    def forward(self, labels: Float[Tensor, "B K C"], seen: Float[Tensor, "B L S"]) -> Float[Tensor, "B K C"]:
        """Features of the labels."""
        y: Tensor = self.encoder(labels, seen, None)
        return y


class _Transform(nn.Module):
    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(sizes.width, sizes.width), nn.LayerNorm(sizes.width, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.LayerNorm(functional.gelu(self.dense(x)))
        return y


class _Predictions(nn.Module):
    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.transform, self.bias = _Transform(sizes), nn.Parameter(torch.zeros(sizes.vocabulary))
        self.decoder = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.transform(x)) + self.bias
        return y


class Decoder(nn.Module):
    """The caption so far -> logits of the next token."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.bert = Encoder(sizes, seen_width=sizes.width)
        self.cls = nn.ModuleDict({"predictions": _Predictions(sizes)})

    def forward(self, tokens: Int[Tensor, "B T"], seen: Float[Tensor, "B L C"]) -> Float[Tensor, "B V"]:
        """Logits behind the last token; each token sees those before it, itself and ``seen``."""
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril().view(1, 1, length, length)
        y: Tensor = self.cls["predictions"](self.bert(tokens, seen, causal)[:, -1])
        return y
