"""`qvgen fold`: what the run itself packed, from its newest checkpoint; refused while Phi has rank."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config.compose import compose_plain
from qvgen.deploy.tensor_file import TensorWriter
from qvgen.layers import weight_rows
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import pack_layer, quantized_layers
from qvgen.run_directory import write_plain
from qvgen.training.session import newest_checkpoint, read_trained
from qvgen.training.start import streamed_fold
from qvgen.training.start.streamed_fold import StreamedFold, why_whole
from qvgen.verbs._parts import student_design
from tests.runs import BOUNDARIES, SHORT, copy_until, snapshot, train_config


def test_folding_a_finished_run_gives_its_packed_directory(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(short_run)
    first = f"out={tmp_path / 'first'}"
    for out, overrides in ((first, []), (first, ["overwrite=true"])):  # twice into the same: idempotent
        assert main(["fold", f"run_dir={short_run}", out, *overrides]) == DONE
        assert "191488 codes, equal to the trained ones" in capsys.readouterr().out
        assert snapshot(tmp_path / "first") == snapshot(short_run / "packed")
    assert snapshot(short_run) == before


def test_a_packed_directory_is_not_written_over_in_silence(short_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(short_run)
    for dry_run in ("true", "false"):  # into RUN/packed, which the run itself wrote
        assert main(["fold", f"run_dir={short_run}", f"dry_run={dry_run}"]) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"qvgen fold: out={short_run / 'packed'} holds 2 of the 2 files that would be written, from an earlier call "
            "(first: model.safetensors); write out=ANOTHER, or overwrite=true to replace them"
        )
    assert snapshot(short_run) == before


def test_out_is_the_runs_own_packed_directory_by_default(short_run: Path, tmp_path: Path) -> None:
    run_dir = copy_until(short_run, tmp_path / "run", step=12)
    assert main(["fold", f"run_dir={run_dir}"]) == DONE
    assert snapshot(run_dir / "packed") == snapshot(short_run / "packed")


@pytest.mark.parametrize(("step", "rank"), [(BOUNDARIES[0], 2), (9, 1)])
def test_folding_while_phi_has_rank_is_refused(
    step: int, rank: int, short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    run_dir = copy_until(short_run, tmp_path / "run", step=step)
    before = snapshot(run_dir)
    assert main(["fold", f"run_dir={run_dir}"]) == BAD_INPUT
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("qvgen fold: cannot fold condition_embedder.time_embedder.linear_1")
    assert f"Phi still has rank {rank}; train until its decay is over, then fold" in line
    assert shown.out == ""
    assert not caplog.messages  # they would stand beside the line
    assert snapshot(run_dir) == before


def test_a_checkpoint_that_is_not_finite_is_not_folded(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy_until(short_run, tmp_path / "run", step=12)
    newest = run_dir / "checkpoints" / "step-00000012.ckpt"
    state = torch.load(newest, weights_only=True)
    state["state_dict"]["student.proj_out.weight"][3, 4] = float("nan")
    torch.save(state, newest)
    assert main(["fold", f"run_dir={run_dir}"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"qvgen fold: {newest}: 'state_dict.student.proj_out.weight'")
    assert "holds 1 NaN among 3072 values" in line
    assert line.endswith("; delete it to resume from the one before")
    assert not (run_dir / "packed").exists()


def test_runs_without_anything_to_fold_are_refused(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy_until(short_run, tmp_path / "untrained", step=0)
    assert main(["fold", f"run_dir={run_dir}"]) == BAD_INPUT
    assert "holds no checkpoint; train first" in capsys.readouterr().err
    full_precision = tmp_path / "pretrain"
    full_precision.mkdir()
    write_plain(full_precision / "config.yaml", compose_plain("train", ["experiment=tiny_teacher", *SHORT]))
    assert main(["fold", f"run_dir={full_precision}"]) == BAD_INPUT
    assert "is a run of method=pretrain: there is nothing to fold" in capsys.readouterr().err
    assert main(["fold", f"run_dir={tmp_path / 'nowhere'}"]) == BAD_INPUT
    assert "config.yaml is missing" in capsys.readouterr().err
    for folder in (run_dir, full_precision):
        assert not (folder / "packed").exists()


@pytest.mark.parametrize("change", ["one parameter less", "one parameter more", "another shape"])
def test_a_checkpoint_of_another_model_is_refused(
    change: str, short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy_until(short_run, tmp_path / "run", step=12)
    path = run_dir / "checkpoints" / "step-00000012.ckpt"
    state = torch.load(path, weights_only=True)
    if change == "one parameter less":
        del state["state_dict"]["student.proj_out.bias"]
    elif change == "one parameter more":
        state["state_dict"]["student.blocks.9.ffn.net.2.bias"] = torch.zeros(64)
    else:
        state["state_dict"]["student.proj_out.weight"] = torch.zeros(3, 4)
    torch.save(state, path)
    assert main(["fold", f"run_dir={run_dir}"]) == BAD_INPUT
    assert f"{path} is of another model" in capsys.readouterr().err
    assert not (run_dir / "packed").exists()


def test_no_layer_is_held_longer_than_it_is_packed(short_run: Path) -> None:
    """Shares of an average have one of the names of what layers share, and count for all."""
    run = train_config("accumulate=2")
    design, family = student_design(run), run.model
    path = newest_checkpoint(short_run)
    step, trained, _ = read_trained(path, short_run, averaged=False)
    (alias, other) = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k")
    clip = "activation_quantizer.clip_high"
    given = {"trained": trained, "schedule": design.schedule(run.steps), "step": step}
    averaged = {f"{alias}.{clip}": torch.full_like(trained[f"{alias}.{clip}"], 0.75)}
    folding = StreamedFold(family, design, short_run, averaged=averaged, **given)
    for name, layer, weight in folding.layers():
        held = [one for one in quantized_layers(folding.model).values() if not one.weight_quantizer.scale.is_meta]
        assert held == [layer]
        assert layer.weight.is_meta
        assert torch.equal(weight[1:3], trained[f"{name}.weight"][1:3])
        if name in (alias, other):
            assert torch.equal(layer.get_parameter(clip), averaged[f"{alias}.{clip}"])
    folded = folding.declare_(kernel="reference")
    assert all(value.is_meta for value in folded.state_dict().values())
    assert folding.kept_rank == 0


class Counted:
    """A trained weight that counts the numbers of all weights that were read and are still alive."""

    alive: ClassVar[list[weakref.ref[torch.Tensor]]] = []
    most: ClassVar[dict[str, int]] = {}

    def __init__(self, name: str, value: torch.Tensor) -> None:
        self.name, self.value, self.shape = name, value, value.shape

    def __getitem__(self, rows: slice) -> torch.Tensor:
        found = self.value[rows].clone()
        self.alive.append(weakref.ref(found))
        values = [one for reference in self.alive if (one := reference()) is not None]
        self.most[self.name] = max(self.most.get(self.name, 0), sum(one.numel() for one in values))
        return found


def test_of_all_weights_a_few_rows_are_in_memory_while_they_are_packed_and_compared(
    short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No packed layer outlives its writing either, and the bytes are the run's own."""
    monkeypatch.setattr(weight_rows, "CHUNK", 512)
    run = train_config("accumulate=2")
    design, family = student_design(run), run.model
    step, trained, _ = read_trained(newest_checkpoint(short_run), short_run, averaged=False)
    counted = {name: Counted(name, value) if name.endswith(".weight") else value for name, value in trained.items()}
    given = {"trained": counted, "averaged": {}, "schedule": design.schedule(run.steps), "step": step}
    folding = StreamedFold(family, design, short_run, **given)
    folding._threads = 1
    model, packed = folding.declare_(kernel="reference"), short_run / "packed"
    layers = [name for name, _, _ in folding.layers()]
    assert not Counted.most  # what a model is packed to is known without one number of a weight
    made: list[weakref.ref[PackedLinear]] = []

    def pack(*args: Any, **keywords: Any) -> PackedLinear:
        layer = pack_layer(*args, **keywords)
        made.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(streamed_fold, "pack_layer", pack)
    with TensorWriter(tmp_path / "model.safetensors", model.state_dict()) as file:

        def put(name: str, value: torch.Tensor) -> None:
            file.put(name, value)
            assert sum(layer() is not None for layer in made) == any(name.startswith(f"{one}.") for one in layers)

        # what is not quantized is asked for whole, and has no rows
        folding._values |= {name: value for name, value in trained.items() if name.rpartition(".")[0] not in layers}
        folding.write(put, kernel="reference")
    assert len(made) == len(layers)
    assert (tmp_path / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    assert folding.codes_equal(packed) == (True, 191488)
    assert set(Counted.most) == {f"{name}.weight" for name in layers}
    assert max(Counted.most.values()) <= 2 * max(512, *(trained[name].shape[1] for name in Counted.most))


@pytest.mark.parametrize(("method", "is_whole"), [("qvgen", False), ("lsq", False), ("efficientdm", True)])
def test_methods_that_may_look_at_the_whole_student_get_it(method: str, is_whole: bool) -> None:
    assert (why_whole(student_design(train_config(f"method={method}")), 12) is not None) == is_whole
