"""Sampling that several processes share: each batch once, whatever their number, and the files of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from qvgen.config.prompts.prompt import PromptedVideo
from qvgen.evaluation.item_queue import OneProcess
from qvgen.evaluation.kept_samples import KeptSamples
from qvgen.evaluation.shared_sampling import Asked, ModelAbsentError, OpenModel, SharedSampling
from qvgen.models.base import VideoDiT
from qvgen.training.distributed.store_queue import StoreQueue
from tests.runs import shallow, train_config

STAGE = "models"
TEXTS = ("a red three moving up left", "a blue one moving down", "a green two standing still")


@pytest.fixture(scope="module")
def family() -> VideoDiT:
    return train_config("model.num_inference_steps=1", *shallow(1)).model


class Counted:
    """A model, and how often it was asked for; one that is absent raises."""

    def __init__(self, model: nn.Module, *, is_absent: bool = False) -> None:
        self.model, self.is_absent, self.opened = model, is_absent, 0

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        self.opened += 1
        if self.is_absent:
            raise ModelAbsentError("it is gone")
        yield self.model


def asked_for(family: VideoDiT, *, shown: int, table: int) -> Asked:
    prompts = [PromptedVideo(caption=text, seed=7, negative=None) for text in TEXTS[:shown]]
    items = [{"caption": text} for text in TEXTS[:table]]
    return Asked(family=family, encode=family.encode, shown=prompts, items=items, seeds=list(range(table)))


def files(folder: Path) -> dict[str, list[int]]:
    """Frames of every file, whose other content is measured."""
    kept = KeptSamples(folder, key="0")
    return {path.stem: kept.read(path.stem).frames.tolist() for path in sorted(kept.folder.glob("*.safetensors"))}


def part(asked: Asked, folder: Path, queue: StoreQueue | OneProcess, *, is_helper: bool = False) -> SharedSampling:
    return SharedSampling(asked, kept=KeptSamples(folder, key="0"), queue=queue, is_helper=is_helper)


@pytest.mark.parametrize("apart", [False, True])
def test_the_files_are_those_of_one_process_and_each_batch_is_sampled_once(
    family: VideoDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    monkeypatch.setattr(family, "samples_apart", apart, raising=False)
    teacher = family.load_teacher()
    asked = asked_for(family, shown=2, table=3)
    alone: dict[str, OpenModel] = {"teacher": Counted(teacher), "packed": Counted(teacher)}
    one = part(asked, tmp_path / "one", OneProcess())
    one.sample(STAGE, alone)
    found = one.gather(STAGE, alone)
    assert len(found["teacher"].shown) == 2
    assert len(found["packed"].table) == 3
    assert len(files(tmp_path / "one")) == 2 * (5 if apart else 2)

    store = HashStore()
    helper, other, rank0 = ({"teacher": Counted(teacher), "packed": Counted(teacher)} for _ in range(3))
    first = StoreQueue(store, num_processes=3)
    first.take(STAGE)  # one batch is being sampled by a process that is slow
    part(asked, tmp_path / "two", StoreQueue(store, num_processes=3), is_helper=True).sample(STAGE, helper)
    part(asked, tmp_path / "two", StoreQueue(store, num_processes=3), is_helper=True).sample(STAGE, other)
    assert [model.opened for model in other.values()] == [0, 0]
    first.give_back(STAGE, 0)
    shared = part(asked, tmp_path / "two", first)
    shared.sample(STAGE, rank0)
    again = shared.gather(STAGE, rank0)
    assert [model.opened for model in rank0.values()] == [1, 0]  # what was given back
    assert files(tmp_path / "two") == files(tmp_path / "one")
    for name, sampled in found.items():
        assert torch.equal(again[name].shown, sampled.shown)
        assert torch.equal(again[name].table, sampled.table)


def test_what_a_process_can_not_do_is_said_by_rank_0(family: VideoDiT, tmp_path: Path) -> None:
    asked, store = asked_for(family, shown=1, table=1), HashStore()
    absent: dict[str, OpenModel] = {"start": Counted(family.load_teacher(), is_absent=True)}
    part(asked, tmp_path, StoreQueue(store, num_processes=2), is_helper=True).sample(STAGE, absent)
    assert files(tmp_path) == {}
    rank0 = part(asked, tmp_path, StoreQueue(store, num_processes=2))
    rank0.sample(STAGE, absent)
    with pytest.raises(ModelAbsentError, match="it is gone"):
        rank0.gather(STAGE, absent)


def test_nothing_to_sample_is_shared_by_any_number(family: VideoDiT, tmp_path: Path) -> None:
    store, asked = HashStore(), asked_for(family, shown=0, table=1)
    opened: dict[str, OpenModel] = {"teacher": Counted(family.load_teacher())}
    for rank in range(4):
        part(asked, tmp_path, StoreQueue(store, num_processes=4), is_helper=rank > 0).sample(STAGE, opened)
    assert opened["teacher"].opened == 1
    assert (
        part(asked, tmp_path, StoreQueue(store, num_processes=4)).gather(STAGE, opened)["teacher"].shown.shape[0] == 0
    )
    assert part(asked, tmp_path, StoreQueue(store, num_processes=4)).gather(STAGE, {}) == {}


def test_a_batch_that_is_there_is_not_sampled_again_and_a_damaged_one_is(family: VideoDiT, tmp_path: Path) -> None:
    asked, model = asked_for(family, shown=1, table=1), Counted(family.load_teacher())
    part(asked, tmp_path, OneProcess()).sample(STAGE, {"teacher": model})
    before = files(tmp_path)
    part(asked, tmp_path, OneProcess()).sample(STAGE, {"teacher": model})
    assert model.opened == 1
    (damaged,) = (tmp_path / "sampled").glob("teacher-table-*")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    resumed = part(asked, tmp_path, OneProcess())
    resumed.sample(STAGE, {"teacher": model})
    resumed.gather(STAGE, {"teacher": model})
    assert model.opened == 2
    assert files(tmp_path) == before
