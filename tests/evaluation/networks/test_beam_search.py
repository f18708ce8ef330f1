"""Beam search, against all texts where the beams hold them all, and against its rules in plain Python where they do not."""

import math

import pytest
import torch

from qvgen.evaluation.networks.tag2text.beam_search import BeamRules, beam_search

_WORDS, _END = 4, 3


def _table(seed: int) -> torch.Tensor:
    """Logits of the next token by image, length of the text and last token, float64."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, 9, _WORDS, _WORDS, generator=generator, dtype=torch.float64)


def _search(table: torch.Tensor, rules: BeamRules) -> list[list[int]]:
    return beam_search(
        lambda texts, images: table[images, texts.shape[1], texts[:, -1]],
        [1],
        images=2,
        device=torch.device("cpu"),
        rules=rules,
    )


def _log_probability(table: torch.Tensor, image: int, text: list[int]) -> float:
    total = 0.0
    for length in range(1, len(text)):
        row = table[image, length, text[length - 1]].tolist()
        total += row[text[length]] - math.log(sum(map(math.exp, row)))
    return total


def _best_of_all(table: torch.Tensor, image: int, rules: BeamRules) -> list[int]:
    texts, best = [[1]], (-math.inf, [1])
    for length in range(1, rules.longest):
        longer = []
        for text in texts:
            if length >= rules.shortest:
                best = max(best, (_log_probability(table, image, [*text, _END]) / length, text))
            longer += [[*text, token] for token in range(_WORDS) if token != _END]
        texts = longer
    return max([best, *((_log_probability(table, image, text) / rules.longest, text) for text in texts)])[1]


def _by_the_rules(table: torch.Tensor, image: int, rules: BeamRules) -> list[int]:
    partial, finished, done = [[1]], [], False
    for length in range(1, rules.longest):
        scored = sorted(
            (
                (_log_probability(table, image, [*text, token]), [*text, token])
                for text in partial
                for token in range(_WORDS)
            ),
            reverse=True,
        )
        scored = [found for found in scored if length >= rules.shortest or found[1][-1] != _END][: 2 * rules.beams]
        ended = [found for found in scored[: rules.beams] if found[1][-1] == _END]
        finished += [(total / length, text[:-1]) for total, text in ended]
        finished = sorted(finished, reverse=True)[: rules.beams]
        partial = [text for _, text in scored if text[-1] != _END][: rules.beams]
        done = len(finished) == rules.beams and finished[-1][0] >= scored[0][0] / (length + 1)
        if done:
            break
    if not done:
        finished += [(_log_probability(table, image, text) / rules.longest, text) for text in partial]
    return max(finished)[1]


@pytest.mark.parametrize("seed", range(4))
def test_with_beams_for_all_texts_it_finds_the_best_of_all(seed):
    rules = BeamRules(beams=90, shortest=2, longest=5, end=_END)
    table = _table(seed)
    assert _search(table, rules) == [_best_of_all(table, image, rules) for image in (0, 1)]


def test_with_three_beams_it_finds_what_its_rules_find():
    rules = BeamRules(beams=3, shortest=4, longest=8, end=_END)
    tables = [_table(seed) for seed in range(10, 30)]
    found = [_search(table, rules) for table in tables]
    assert found == [[_by_the_rules(table, image, rules) for image in (0, 1)] for table in tables]
    lengths = {len(text) for texts in found for text in texts}
    assert min(lengths) >= 4
    assert {4, 8} <= lengths  # some end as soon as they may, and some at the greatest length
