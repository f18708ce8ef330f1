"""Beam search: the likeliest text by a few partial texts that grow together.

At each step every beam of an image is continued by every token, and the 2 x ``beams`` best sums of log probabilities are
taken in their order: one that ends the text is kept as finished if it is among the first ``beams``, and the first ``beams``
others go on. Finished texts are compared by their sum over their length, the prompt counted and the end not; the ``beams``
best are kept. An image is done when it has as many and its best new sum, over the new length, is no better than the worst of
them, or at the greatest length, where its partial texts count as finished.

The rules are those of transformers' BeamSearchScorer (``length_penalty=1``, ``early_stopping=False``) at about the version
4.33 that VBench names. Later versions divide by the number of generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BeamRules:
    """The bounds of a search.

    Attributes:
        beams: Partial texts of an image.
        shortest: Fewest tokens, the prompt and the end counted.
        longest: Most tokens, the prompt counted.
        end: The token that ends a text.
    """

    beams: int = 3
    shortest: int = 10
    longest: int = 30
    end: int = 102


@dataclass
class _Search:
    """The search of one image: partial texts with their sums, and finished texts with their scores."""

    partial: list[tuple[float, list[int]]]
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def finish(self, total: float, text: list[int], beams: int) -> None:
        score = total / len(text)
        if len(self.finished) == beams:
            worst = min(self.finished, key=lambda found: found[0])
            if score <= worst[0]:
                return
            self.finished.remove(worst)
        self.finished.append((score, text))

    def advance(self, totals: Tensor, rules: BeamRules) -> None:
        """Take the best of all continuations; ``totals`` [beams, V] are their sums."""
        values, places = totals.flatten().topk(2 * rules.beams)
        candidates = list(zip(values.tolist(), places.tolist(), strict=True))
        following: list[tuple[float, list[int]]] = []
        for rank, (total, place) in enumerate(candidates):
            beam, token = divmod(place, totals.shape[1])
            text = self.partial[beam][1]
            if token != rules.end:
                following.append((total, [*text, token]))
            elif rank < rules.beams:
                self.finish(total, text, rules.beams)
            if len(following) == rules.beams:
                break
        self.partial = following
        best = candidates[0][0] / len(following[0][1])
        self.done = len(self.finished) == rules.beams and min(score for score, _ in self.finished) >= best


@torch.no_grad()
def beam_search(
    next_logits: Callable[[Tensor, Tensor], Tensor],
    prompt: Sequence[int],
    *,
    images: int,
    device: torch.device,
    rules: BeamRules,
) -> list[list[int]]:
    """The best text of each image, as tokens with the prompt and without the end.

    Args:
        next_logits: Partial texts int64 [R, T] and the numbers of their images int64 [R] -> logits of the next token [R, V].
        prompt: Tokens that every text begins with.
        images: So many images.
        device: Where ``next_logits`` computes.
        rules: Number of beams, lengths and the end.
    """
    # Equal beams would find the same text: all but the first start so low that its continuations are taken.
    start = [(0.0 if beam == 0 else -1e9, list(prompt)) for beam in range(rules.beams)]
    searches = [_Search(partial=list(start)) for _ in range(images)]
    for length in range(len(prompt), rules.longest):
        running = [number for number, search in enumerate(searches) if not search.done]
        if not running:
            break
        texts = torch.tensor([text for number in running for _, text in searches[number].partial], device=device)
        rows = torch.tensor(running, device=device).repeat_interleave(rules.beams)
        scores = next_logits(texts, rows).log_softmax(-1)
        if length < rules.shortest:
            scores[:, rules.end] = -torch.inf
        sums = torch.tensor([total for number in running for total, _ in searches[number].partial], dtype=scores.dtype)
        totals = (scores + sums.to(device).unsqueeze(1)).unflatten(0, (-1, rules.beams)).cpu()
        for number, part in zip(running, totals, strict=True):
            searches[number].advance(part, rules)
    for search in searches:
        if not search.done:
            for total, text in search.partial:
                search.finish(total, text, rules.beams)
    return [max(search.finished, key=lambda found: found[0])[1] for search in searches]
