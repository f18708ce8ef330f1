"""Ranges beside the fields, against the interval notation that they are written in."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.errors import UserError

INSIDE_AND_OUTSIDE = {
    "> 0": ((1e-300, 7), (0, -1, float("inf"), float("nan"))),
    ">= 0": ((0, 7), (-1e-300, float("inf"), float("nan"))),
    "2..8": ((2, 8), (1, 9)),
    "(0, 1]": ((1e-300, 1), (0, 1.0000001, float("nan"))),
    "[0, 1)": ((0, 0.9999999), (-1e-300, 1)),
    "[0, 1]": ((0, 1), (-1e-300, 1.0000001)),
}


@pytest.mark.parametrize("text", INSIDE_AND_OUTSIDE)
def test_the_notation_says_which_ends_belong(text: str) -> None:
    inside, outside = INSIDE_AND_OUTSIDE[text]
    assert all(value in Range(text) for value in inside)
    assert not any(value in Range(text) for value in outside)


def test_another_notation_is_a_bug_of_ours() -> None:
    with pytest.raises(ValueError, match="range 'up to 3' has no known form"):
        Range("up to 3")


@dataclass(frozen=True, kw_only=True)
class Knobs:
    share: Annotated[float | None, Range("(0, 1]", write="0.5")] = None
    counts: Annotated[tuple[int, ...], Range("> 0")] = ()
    free: int = -5

    def __post_init__(self) -> None:
        check_ranges(self, section="knobs")


def test_a_bad_value_is_refused_by_name_value_range_and_a_good_one() -> None:
    assert Knobs().share is None
    assert Knobs(share=1, counts=(1, 2)).free == -5
    with pytest.raises(UserError, match=r"^knobs\.share=0 is outside \(0, 1\]; write for example knobs\.share=0\.5$"):
        Knobs(share=0)
    with pytest.raises(UserError, match=r"^knobs\.counts=0 must be greater than 0$"):
        Knobs(counts=(3, 0))
