"""How much of a caption the text encoder leaves out: against its embedding, which must not change with what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qvgen.config.leaves import load_leaf
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder


@pytest.mark.parametrize(
    ("name", "make", "most"), [("wan", make_wan_folder, 512), ("cogvideox", make_cogvideox_folder, 226)]
)
def test_tokens_beyond_the_text_encoders(tmp_path: Path, name: str, make, most: int) -> None:
    family = load_leaf("model", name, path=str(make(tmp_path / name)))
    fitting = " ".join(["a"] * (most - 1))  # and the end of the text
    assert family.tokens_left_out("a red boat") == 0
    assert family.tokens_left_out(fitting) == 0
    assert family.tokens_left_out(f"{fitting} red boat") == 2
    if name == "wan":  # whose pipeline resolves the names of characters before it counts
        assert family.tokens_left_out(f"{fitting} &#97;") == family.tokens_left_out(f"{fitting} a") == 1
    whole = family.encode([f"{fitting} red boat", f"{fitting} boat"])["encoder_hidden_states"]
    assert torch.equal(whole[0], whole[1])
