"""How many threads compute; on which of them torch's functions are called first: tests/test_new_process.py."""

from __future__ import annotations

import pytest
import torch

from qvgen.cpu_threads import one_thread, set_threads


def test_the_number_of_threads_is_what_was_asked_for_and_comes_back() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(2)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="0 CPU threads; give 1 or more"):
        set_threads(0)
