"""GRiT's texts: a BERT (arXiv 1810.04805) that continues the features of an object, token by token.

    features of 14 x 14 cells -> linear, layer norm -> 196 tokens of the object
    a start token that names the task, and the tokens of the text so far -> words plus places, layer norm
    6 layers over both: an object's tokens see one another, a text's tokens see the object's, those before and themselves
    -> logits of the next token, by the embedding of words

Since an object's tokens never see the text, and a token never what follows it, keys and values of all that was read are kept:
each step computes one token. Modules have the names of ``grit_b_densecap_objectdet.pth`` below
``roi_heads.text_decoder.textual``.

The search is the published one with one beam, as VBench asks for it: the likeliest token each time, but never the last one
again (its logit is set to -10000 from the second step on), until each text has ended or has 40 tokens with the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.tag2text.bert import Dense, Output

_WORDS_EPS = 1e-8
_LONGEST, _AGAIN = 40, -10000.0
_OBJECTS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """The sizes of the published decoder, and of smaller ones of the same kind.

    Attributes:
        width: Channels of tokens.
        hidden: Channels between the two linear layers.
        layers: Layers.
        heads: Attention heads.
        vocabulary: BERT's tokens.
        places: Longest text in tokens that has places of its own.
    """

    width: int = 768
    hidden: int = 3072
    layers: int = 6
    heads: int = 12
    vocabulary: int = 30522
    places: int = 1024


Read = tuple[Tensor, Tensor]
"""Keys and values of what a layer has read, each [N, heads, T, D]."""


class _Scores(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, read: Read | None) -> tuple[Tensor, Read]:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        if read is not None:
            key, value = torch.cat((read[0], key), 2), torch.cat((read[1], value), 2)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(2), (key, value)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self, self.output = _Scores(width, heads), Output(width, width)

    def forward(self, x: Tensor, read: Read | None) -> tuple[Tensor, Read]:
        mixed, read = self.self(x, read)
        return self.output(mixed, x), read


class _Layer(nn.Module):
    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.attention = _Attention(sizes.width, sizes.heads)
        self.intermediate, self.output = Dense(sizes.width, sizes.hidden), Output(sizes.hidden, sizes.width)

    def forward(self, x: Tensor, read: Read | None) -> tuple[Tensor, Read]:
        """All tokens of ``x`` see one another and what was read."""
        x, read = self.attention(x, read)
        return self.output(self.intermediate(x), x), read


class _Layers(nn.Module):
    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(sizes) for _ in range(sizes.layers))


class _Transformer(nn.Module):
    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.encoder = _Layers(sizes)


class _Embedding(nn.Module):
    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(torch.zeros(sizes.vocabulary, sizes.width))
        self.positions = nn.Embedding.from_pretrained(torch.zeros(sizes.places, sizes.width))
        self.layer_norm = nn.LayerNorm(sizes.width, eps=_WORDS_EPS)

    def forward(self, tokens: Tensor, place: int) -> Tensor:
        y: Tensor = self.layer_norm(self.words(tokens) + self.positions.weight[place])
        return y


class Textual(nn.Module):
    """The decoder, without weights; ``channels`` are those of an object's features."""

    def __init__(self, sizes: DecoderSizes, *, channels: int) -> None:
        super().__init__()
        self.object_feature_projection = nn.Sequential(nn.Linear(channels, sizes.width), nn.LayerNorm(sizes.width))
        self.embedding, self.transformer = _Embedding(sizes), _Transformer(sizes)
        # Its weight is the words' embedding, which the published file has under both names.
        self.output = nn.Linear(sizes.width, sizes.vocabulary)

    def read_objects(self, features: Float[Tensor, "N L C"]) -> list[Read]:
        """The keys and values of objects' tokens, of each layer."""
        return self._through(self.object_feature_projection(features), None)[1]

    def next_logits(self, tokens: Tensor, place: int, read: Sequence[Read]) -> tuple[Float[Tensor, "N V"], list[Read]]:
        """Logits behind one more token of each text.

        Args:
            tokens: The tokens, int64 [N].
            place: Their place in the texts, from 0.
            read: Keys and values of all before.

        Returns:
            The logits, and the keys and values with those of the tokens.
        """
        x, kept = self._through(self.embedding(tokens, place).unsqueeze(1), read)
        return self.output(x[:, 0]), kept

    def _through(self, x: Tensor, read: Sequence[Read] | None) -> tuple[Tensor, list[Read]]:
        kept = []
        for number, layer in enumerate(self.transformer.encoder.layer):
            x, seen = layer(x, None if read is None else read[number])
            kept.append(seen)
        return x, kept


class TextDecoder(nn.Module):
    """Texts of objects; the arguments are those of :class:`Textual`."""

    def __init__(self, sizes: DecoderSizes, *, channels: int) -> None:
        super().__init__()
        self.textual = Textual(sizes, channels=channels)

    def texts(self, features: Float[Tensor, "N L C"], *, start: int, end: int) -> list[list[int]]:
        """The text of each object, as tokens without the start and the end.

        Args:
            features: Features of the objects' cells.
            start: The token that names the task.
            end: The token that ends a text.
        """
        parts = features.split(_OBJECTS_AT_ONCE) if len(features) else ()
        return [text for part in parts for text in self._likeliest(part, start, end)]

    def _likeliest(self, features: Tensor, start: int, end: int) -> list[list[int]]:
        read = self.textual.read_objects(features)
        last = torch.full((len(features),), start, device=features.device)
        ended = torch.zeros_like(last, dtype=torch.bool)
        tokens: list[Tensor] = []
        while len(tokens) < _LONGEST - 1 and not bool(ended.all()):
            logits, read = self.textual.next_logits(last, len(tokens), read)
            if tokens:
                logits = logits.scatter(1, last[:, None], _AGAIN)
            last = logits.argmax(1).where(~ended, end)
            ended = ended | (last == end)
            tokens.append(last)
        return [[token for token in text if token != end] for text in torch.stack(tokens, 1).tolist()]
