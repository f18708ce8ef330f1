"""No two prompts share a file name, and every name fits into a file system."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qvgen.evaluation.comparison import video_name

prompts = st.one_of(st.text(max_size=200), st.text(alphabet="aA ,.-", max_size=70))


@given(one=prompts, other=prompts)
def test_two_prompts_have_two_names(one: str, other: str) -> None:
    names = [video_name(0, prompt, seed=1, variant="packed") for prompt in (one, other)]
    assert (names[0].casefold() == names[1].casefold()) == (one == other)
    for name in names:
        assert len(name.encode()) <= 255
        assert "/" not in name
        assert name.isprintable()


def test_the_same_first_words() -> None:
    first = "a red boat drives slowly along the coast of an island in the morning"
    names = {video_name(0, prompt, seed=1, variant="packed") for prompt in (first, f"{first} sun", f"{first} fog")}
    assert len(names) == 3
    assert all(name.startswith("00-a-red-boat-drives-slowly-along-the-coast") for name in names)
