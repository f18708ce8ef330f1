"""Host memory of a start by rank, against the sizes of Wan 14B's layers and the copies that are made of each."""

from __future__ import annotations

import pytest
import torch

from qvgen.config.bits import Bits
from qvgen.config.defaults import load_section
from qvgen.config.leaves import load_leaf, load_profile
from qvgen.models.named_family import NamedFamily
from qvgen.training.design.meta_model import build_student
from qvgen.training.design.student import StudentDesign
from qvgen.training.planning.host_memory import setup_bytes

MODULATION, FEED_FORWARD = 5120 * 6 * 5120, 5120 * 13824
"""Weights of the largest Linear, which is outside of the blocks, and of a block's largest."""


def test_each_rank_holds_copies_of_the_largest_layers_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    design = StudentDesign(
        profile=load_profile("paper", Bits.parse("w4a4")),
        method=load_leaf("method", "qvgen"),
        phi=load_section("phi", rank=32),
    )
    student, _ = build_student(NamedFamily.load("wan-14b").family, design, blocks=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def of(rank: int, *, cores: int, world_size: int) -> int:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
        return setup_bytes(student, rank=rank, world_size=world_size, neighbours=world_size)

    assert of(0, cores=1, world_size=1) == 14 * MODULATION
    assert of(0, cores=64, world_size=1) == 14 * MODULATION  # 8 GiB are not enough for two of its size
    assert [of(rank, cores=2, world_size=2) for rank in (0, 1)] == [14 * MODULATION, 22 * FEED_FORWARD]
    assert of(1, cores=4, world_size=2) == 2 * 22 * FEED_FORWARD
    assert of(1, cores=64, world_size=2) == 3 * 22 * FEED_FORWARD
