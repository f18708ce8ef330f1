"""A program with torchao that trains with moments of 8 bits and compares them with torchao's own optimizer; prints JSON.

adamw_8bit_program.py FOLDER
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.optim import AdamW8bit

from qvgen.methods.phi_decay import forget_moments_
from qvgen.training.optim.streamed_adamw import StreamedAdamW
from qvgen.training.planning.stored_state import StoredState
from qvgen.verbs._parts import training_run
from tests.parts import planned, prepared
from tests.runs import UNSEEN, copy_until, packed_bytes, read_metrics, shallow, train, train_config

RATES = {"lr": 1e-2, "weight_decay": 1e-2}
OPTIONS = (
    *shallow(1), *UNSEEN, "optim=adamw_8bit", "accumulate=1", "steps=4", "phi.ranks=[4]",
    "checkpoint.every_steps=2", "checkpoint.keep=9",
)  # fmt: skip


def weight(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))


def streamed(parameters: list[nn.Parameter], **options: Any) -> StreamedAdamW:
    group = {"name": "weights", "params": parameters, **RATES}
    return StreamedAdamW([group], betas=(0.9, 0.95), eps=1e-8, eight_bit=True, **options)


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], *, rows: int, columns: int) -> None:
    for number in range(4):
        gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(number))
        for parameter, part in zip(parameters, gradient.split(rows // len(parameters)), strict=True):
            parameter.grad = part.clone()
        optimizer.step()


def compare() -> dict[str, Any]:
    """Against torchao's own optimizer, whose blocks are the same where rows have 256 numbers; in shares; on the host."""
    mine, theirs = weight(32, 512), weight(32, 512)
    optimizer = streamed([mine])
    steps(optimizer, [mine], rows=32, columns=512)
    with torch.compiler.set_stance("force_eager"):
        other = AdamW8bit([theirs], betas=(0.9, 0.95), eps=1e-8, block_size=256, **RATES)
        steps(other, [theirs], rows=32, columns=512)
    state, reference = optimizer.state[mine], other.state[theirs]
    found: dict[str, Any] = {"weights": torch.equal(mine, theirs)}
    for name in ("exp_avg", "exp_avg_sq"):
        found[f"{name} codes"] = torch.equal(state[name], reference[name].codes)
        found[f"{name} scale"] = torch.equal(state[f"{name}_scale"].flatten(), reference[name].scale)
    found["dtypes"] = sorted({str(value.dtype) for value in state.values()})

    whole, pieces = weight(128, 64), [nn.Parameter(part.clone()) for part in weight(128, 64).detach().split(64)]
    steps(streamed([whole]), [whole], rows=128, columns=64)
    cut = streamed(pieces, offload=True)
    steps(cut, pieces, rows=128, columns=64)
    found["in shares on the host"] = torch.equal(whole, torch.cat(pieces))

    again = streamed(pieces)
    again.load_state_dict(cut.state_dict())
    loaded = again.state[pieces[0]]
    found["loaded"] = all(torch.equal(value, loaded[name]) for name, value in cut.state[pieces[0]].items())
    found["codes stay codes"] = str(loaded["exp_avg"].dtype)
    forget_moments_(cut, pieces[0])
    fresh, reset = weight(64, 64), pieces[0]
    with torch.no_grad():
        reset.copy_(fresh)
    pieces[1].grad = None
    fresh.grad = torch.ones_like(fresh)
    reset.grad = torch.ones_like(fresh)
    cut.step()
    streamed([fresh]).step()
    found["forgotten is new"] = torch.equal(fresh, reset)
    return found


def run(folder: Path) -> dict[str, Any]:
    """A run, the same with moments on the host, and its second half again."""
    assert train(folder / "one", *OPTIONS) == 0
    again = copy_until(folder / "one", folder / "again", step=2)
    assert train(again, *OPTIONS, "resume=true") == 0
    assert train(folder / "host", *OPTIONS, "optim.offload=true") == 0
    found: dict[str, Any] = {
        name: packed_bytes(folder / name) == packed_bytes(folder / "one")
        and read_metrics(folder / name) == read_metrics(folder / "one")
        for name in ("again", "host")
    }
    state = torch.load(folder / "one" / "checkpoints" / "step-00000004.ckpt", weights_only=True)["optimizer_states"][0]
    config = train_config(*OPTIONS)
    student, _ = prepared(config)
    saved = sum(value.nbytes for entry in state["state"].values() for value in entry.values())
    found["planned bytes"] = StoredState.of(training_run(config), student).moment_bytes(student) == saved
    found["planned"] = any("moments, 8 bits" in part.name for part in planned(config).memory)
    found["codes"] = sum(entry["exp_avg"].dtype == torch.uint8 for entry in state["state"].values())
    facts = json.loads((folder / "one" / "identity.json").read_text())
    found["recorded"] = "code.torchao" in json.dumps(facts)
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = {**compare(), **run(Path(sys.argv[1]))}
    print(json.dumps(result))
