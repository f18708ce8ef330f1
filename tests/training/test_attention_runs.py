"""Whole runs with attention in 8 bits: one process, DDP, FSDP, continued, and with blocks that are compiled: the same bits.

The runs have learned factors of attention, which are parameters that DDP averages and FSDP shares out. Forms that are left
open (``auto``) are chosen by one process for all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from qvgen.cli import DONE
from qvgen.deploy.checkpoint import load_packed
from qvgen.layers.attention_swap import packed_attentions
from qvgen.training.blocks import compiled as compiled_blocks
from qvgen.training.start.file import START_FILE
from tests.runs import UNSEEN, copy_until, load_state, packed_bytes, read_metrics, shallow, train

STEPS = 4
ATTENTION = "profile.attention={kind:int8,clips:true}"
OPEN = (
    "profile.attention={kind:int8,clips:true,smooth_key:auto,rotation:auto}",
    "calibration.videos=2",
    "calibration.steps=2",
)
OPTIONS = (
    f"steps={STEPS}", "phi.ranks=[2]", f"checkpoint.every_steps={STEPS // 2}", "checkpoint.keep=9",
    "evaluation.samples=1", *shallow(1), *UNSEEN, ATTENTION, "model.include=['*.attn1.to_q','*.attn2.to_k','*.ffn.net.2']",
)  # fmt: skip
TWO = {
    "ddp": ("devices=2", "strategy=ddp"),
    "fsdp": ("devices=2", "strategy=fsdp", "strategy.gradient_checkpointing=true"),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    run_dir = tmp_path_factory.mktemp("attention") / "one"
    assert train(run_dir, *OPTIONS) == DONE
    return run_dir


def same(run_dir: Path, other: Path) -> None:
    assert len(read_metrics(run_dir)) == STEPS
    assert read_metrics(run_dir) == read_metrics(other)
    assert packed_bytes(run_dir) == packed_bytes(other)


def test_factors_were_trained_and_packed(one: Path) -> None:
    first, last = (load_state(one / "checkpoints" / f"step-{step:08d}.ckpt") for step in (STEPS // 2, STEPS))
    clips = [name for name in last if "attention_product" in name]
    assert len(clips) == 4
    for name in clips:
        assert last[name].ne(0).any()
        assert not torch.equal(first[name], last[name])
    products = packed_attentions(load_packed(one / "packed"))
    assert list(products) == json.loads((one / "report.json").read_text())["attentions_quantized"]
    assert all(table.ne(1).any() for product in products.values() for table in product.tables() or ())


@pytest.mark.parametrize("strategy", TWO)
def test_two_processes_train_and_pack_what_one_does_and_go_on_to_the_same_bytes(
    one: Path, strategy: str, tmp_path: Path
) -> None:
    assert train(tmp_path / "two", *OPTIONS, *TWO[strategy]) == DONE
    assert (tmp_path / "two" / START_FILE).read_bytes() == (one / START_FILE).read_bytes()
    same(tmp_path / "two", one)
    run_dir = copy_until(tmp_path / "two", tmp_path / "again", step=STEPS // 2)
    assert train(run_dir, *OPTIONS, *TWO[strategy], "resume=true") == DONE
    same(run_dir, one)


@pytest.fixture(scope="module")
def one_open(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that chooses the forms of its attentions."""
    root = tmp_path_factory.mktemp("open")
    assert train(root / "run", *OPTIONS, *OPEN, f"calibration.cache={root / 'cache'}") == DONE
    return root


@pytest.mark.parametrize("strategy", TWO)
def test_two_processes_choose_the_forms_that_one_does(one_open: Path, strategy: str, tmp_path: Path) -> None:
    """By the errors that are measured once, which both read: the forms with the least, in the start and the packed model."""
    cache = tmp_path / "cache"
    assert train(tmp_path / "run", *OPTIONS, *OPEN, *TWO[strategy], f"calibration.cache={cache}") == DONE
    (found,), (wanted,) = (list(folder.glob("attention-*.json")) for folder in (cache, one_open / "cache"))
    assert found.read_bytes() == wanted.read_bytes()
    assert (tmp_path / "run" / START_FILE).read_bytes() == (one_open / "run" / START_FILE).read_bytes()
    same(tmp_path / "run", one_open / "run")
    errors = json.loads(wanted.read_text())
    products = packed_attentions(load_packed(tmp_path / "run" / "packed"))
    assert list(products) == list(errors)
    for name, product in products.items():
        # Candidates in their order: smoothed keys and keys as they are, each without a rotation and with one.
        forms = [(smooth, rotation) for smooth in (True, False) for rotation in (False, True)]
        assert len(errors[name]) == len(forms)
        best = forms[errors[name].index(min(errors[name]))]
        assert (product.form.smooth_key, bool(product.form.rotation)) == best


def test_one_process_goes_on_to_the_same_bytes(one: Path, tmp_path: Path) -> None:
    run_dir = copy_until(one, tmp_path / "run", step=STEPS // 2)
    assert train(run_dir, *OPTIONS, "resume=true") == DONE
    same(run_dir, one)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's tracer
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_compiled_blocks_have_the_bits_of_a_run_that_is_not_compiled(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced whole, and run by torch's own operators; with gradient checkpointing."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiled_blocks, "BACKEND", counter)
    keys = ("strategy.compile=true", "strategy.gradient_checkpointing=true")
    assert train(tmp_path / "run", *OPTIONS, *keys) == DONE
    assert counter.frame_count == 2  # with Phi and without
    same(tmp_path / "run", one)
