"""A start that several processes make together, against that of one: the same bits of every tensor and every form.

The shares of other ranks are made in this process, by the function that they call; whole runs of two processes, and what
happens where one of them dies, stand in tests/training/distributed/test_shared_starts.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qvgen.config.bits import Bits
from qvgen.config.defaults import load_section
from qvgen.config.leaves import load_leaf, load_profile
from qvgen.evaluation.sampled_teacher import SampledTeacher
from qvgen.layers.swap import forms
from qvgen.models.named_family import NamedFamily
from qvgen.training.design.student import StudentDesign
from qvgen.training.distributed.layer_shares import SHARES_DIRECTORY, claim_layer, remove_shares
from qvgen.training.start.ptq_method import PTQMethod
from qvgen.training.start.shared import StartHelpers, set_up_share
from qvgen.training.start.student import prepare_student, set_up_student_
from tests.runs import shallow

WORLD = 3
UNFOLDED = {"fold_smoothing": False}


def design_of(profile: str, bits: str, method: str) -> StudentDesign:
    phi = load_section("phi", rank=2)
    return StudentDesign(profile=load_profile(profile, Bits.parse(bits)), method=load_leaf("method", method), phi=phi)


def make_start(
    tmp_path: Path,
    *,
    init: tuple[str, dict[str, object]],
    design: StudentDesign,
    helped: Callable[[Path, NamedFamily, PTQMethod], StartHelpers] | None,
) -> nn.Module:
    """A start of the tiny model's first block, with other ranks' help or without it."""
    blocks, weights = (key.partition("=")[2] for key in shallow(1))
    model = NamedFamily.load("tiny", num_inference_steps=2, num_layers=int(blocks), weights=weights)
    calibration = load_section("calibration", videos=1, steps=2, cache=str(tmp_path / "cache"))
    ptq = PTQMethod(name=init[0], init=load_leaf("init", init[0], **init[1]), calibration=calibration)
    student, _ = prepare_student(model.family, design, seed=None)
    family = model.family
    teacher = SampledTeacher(model=model, transformer=family.load_teacher(), encode=family.encode, seed=7)
    helpers = None if helped is None else helped(tmp_path, model, ptq)
    set_up_student_(student, design=design, ptq=ptq, teacher=teacher, helpers=helpers)
    return student


def helpers_of(run_dir: Path, ask: Callable[[], object]) -> StartHelpers:
    return StartHelpers(world_size=WORLD, neighbours=WORLD, run_dir=run_dir, ask=ask, check=lambda: None)


@pytest.mark.parametrize(
    ("init", "options", "profile", "bits", "method"),
    [
        ("mse", {}, "paper", "w4a4", "qvgen"),
        ("rtn", {}, "convrot", "w4a4", "efficientdm"),
        ("svdquant", UNFOLDED, "svdq_g64", "w4a4", "qvgen"),
        ("gptq", {}, "paper", "w4a4", "qvgen"),
        ("static", UNFOLDED, "int8", "w8a8", "lsq"),
    ],
)
def test_shared_layers_have_the_bits_of_one_process(
    tmp_path: Path, init: str, options: dict[str, object], profile: str, bits: str, method: str
) -> None:
    design, done = design_of(profile, bits, method), []

    def helped(run_dir: Path, model: NamedFamily, ptq: PTQMethod) -> StartHelpers:
        def ask() -> None:
            for rank in range(1, WORLD):
                set_up_share(run_dir, rank=rank, family=model.rebuild(), design=design, init=ptq.init, seed=7)
                done.append(rank)

        return helpers_of(run_dir, ask)

    how = {"init": (init, options), "design": design}
    alone = make_start(tmp_path, **how, helped=None)  # type: ignore[arg-type]
    together = make_start(tmp_path, **how, helped=helped)  # type: ignore[arg-type]
    assert done == [1, 2]
    assert forms(together) == forms(alone)
    wanted, found = alone.state_dict(), together.state_dict()
    assert list(found) == list(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert not (tmp_path / SHARES_DIRECTORY).exists()


def test_rank_0_sets_up_what_nobody_has_begun_and_who_comes_later_does_nothing(tmp_path: Path) -> None:
    design, asked = design_of("paper", "w4a4", "qvgen"), []

    def helped(run_dir: Path, model: NamedFamily, ptq: PTQMethod) -> StartHelpers:
        asked.append(
            lambda: set_up_share(run_dir, rank=1, family=model.rebuild(), design=design, init=ptq.init, seed=7)
        )
        return helpers_of(run_dir, lambda: None)

    alone = make_start(tmp_path, init=("mse", {}), design=design, helped=None)
    late = make_start(tmp_path, init=("mse", {}), design=design, helped=helped)
    wanted, found = alone.state_dict(), late.state_dict()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    asked[0]()
    assert not (tmp_path / SHARES_DIRECTORY).exists()


@pytest.mark.parametrize("left", [False, True])
def test_a_late_process_can_claim_no_layer_while_the_shares_are_deleted(
    left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for each layer whenever a file or folder is deleted; in its place, the folder would then not be empty."""
    folder = tmp_path / SHARES_DIRECTORY
    folder.mkdir()
    assert claim_layer(folder, "a")
    assert claim_layer(folder, "b")
    if left:  # by a process that was killed while it deleted
        (tmp_path / f".{SHARES_DIRECTORY}.old.tmp").mkdir()
    claims = []

    def asked_after(delete: Callable[..., None]) -> Callable[..., None]:
        def deletes(*args: object, **keys: object) -> None:
            delete(*args, **keys)
            claims.append(claim_layer(folder, "a") or claim_layer(folder, "b"))

        return deletes

    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(os, name, asked_after(getattr(os, name)))
    remove_shares(folder)
    monkeypatch.undo()
    assert claims == [False] * (3 + left)
    assert list(tmp_path.iterdir()) == []
    remove_shares(folder)  # there is none
