"""Outputs for held-out inputs that several processes compute at the end of a run: each batch once, those of one process.

test_shared_sampling.py holds the same of videos; tests/training/distributed has the runs whose reports are compared.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.distributed import HashStore

from qvgen.evaluation.held_out import HeldOut
from qvgen.evaluation.item_queue import OneProcess
from qvgen.evaluation.kept_samples import KeptSamples
from qvgen.evaluation.shared_sampling import Asked, OpenModel, SharedSampling
from qvgen.training.distributed.store_queue import StoreQueue
from tests.runs import shallow, train_config

STAGE = "models"


def test_outputs_are_those_of_one_process_and_each_batch_is_computed_once(tmp_path: Path) -> None:
    config = train_config("model.num_inference_steps=1", *shallow(1))
    family, split = config.model, config.data.open(config.model, split="held_out")
    inputs = {size: HeldOut(family, split, num_samples=3, batch_size=size) for size in (2, 1)}
    model, calls = family.load_teacher(), [0]

    def counted(*_: object) -> None:
        calls[0] += 1

    opened: dict[str, OpenModel] = {"teacher": lambda: nullcontext(model), "packed": lambda: nullcontext(model)}

    def part(size: int, queue: StoreQueue | OneProcess, *, is_helper: bool = False) -> SharedSampling:
        items = [{"caption": "a red three moving up left"}]
        of_data = {"family": family, "encode": family.encode, "shown": [], "items": items, "seeds": [0]}
        asked = Asked(**of_data, inputs=inputs[size], measured=("packed",))
        return SharedSampling(asked, kept=KeptSamples(tmp_path, key="0"), queue=queue, is_helper=is_helper)

    store = HashStore()
    slow = StoreQueue(store, num_processes=3)
    assert [slow.take(STAGE) for _ in range(3)] == [0, 1, 2]  # two of videos, and the first batch of outputs
    part(2, StoreQueue(store, num_processes=3), is_helper=True).sample(STAGE, opened)
    files = sorted(path.name for path in (tmp_path / "sampled").iterdir())
    assert files == ["packed-outputs2-0001.safetensors"]
    for number in range(3):
        slow.give_back(STAGE, number)
    rank_0 = part(2, slow)
    rank_0.sample(STAGE, opened)
    found = rank_0.gather(STAGE, opened)
    assert found["teacher"].outputs == ()
    check_same(found["packed"].outputs, model, inputs[2])

    handle = model.register_forward_pre_hook(counted)
    alone = part(1, OneProcess())  # gone on with smaller micro-batches: batches of the same numbers are others
    alone.sample(STAGE, opened)
    outputs = alone.gather(STAGE, opened)["packed"].outputs
    handle.remove()
    assert calls == [inputs[1].num_batches]
    check_same(outputs, model, inputs[1])


def check_same(outputs: tuple[torch.Tensor, ...], model: nn.Module, inputs: HeldOut) -> None:
    wanted = list(inputs.predictions(model))
    assert len(outputs) == len(wanted) == inputs.num_batches > 1
    assert all(torch.equal(*pair) for pair in zip(outputs, wanted, strict=True))
