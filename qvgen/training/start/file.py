"""The state that training starts from: written once, read by every process, so that all begin with the same bits.

    RUN_DIR/start.safetensors   all tensors of the student
    RUN_DIR/layers.json         what its layers are besides their tensors (:func:`qvgen.layers.swap.forms`)

safetensors has no checksum: that of both files stands in the run's identity.json and is compared whenever they are read.
Either may be deleted: what is missing is made again, and a run that has a checkpoint goes on from there without the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qvgen.checksum import file_checksum
from qvgen.deploy.tensor_file import write_tensors
from qvgen.errors import UserError
from qvgen.layers.swap import forms, restore_forms_
from qvgen.quant.finite import check_finite
from qvgen.run_directory import atomic_write
from qvgen.run_identity import RunIdentity
from qvgen.training.checkpoint.file import CHECKPOINT_DIRECTORY
from qvgen.training.checkpoint_writer import checkpoints

START_FILE = "start.safetensors"
LAYERS_FILE = "layers.json"

START_SOURCE, START_REMEDY = "the start of training", "choose another init"
"""The words for numbers of a start that are not finite, as :func:`qvgen.quant.finite.check_finite` takes them."""

_REMEDY = "delete it and write resume=true: it is made again, and what was trained stays"


def save_start(student: nn.Module, run_dir: Path) -> None:
    """Write the state that training starts from: forms of the layers, then all tensors, then their checksums.

    What layers share is written under the name of each: safetensors has no tensor of two names.

    Raises:
        UserError: The start is not finite; or the run has checkpoints, and they continue another start than this one.
    """
    state = student.state_dict()
    check_finite(state.items(), source=START_SOURCE, remedy=START_REMEDY)
    save_start_of(student, run_dir, value_of=state.__getitem__)


def save_start_of(student: nn.Module, run_dir: Path, *, value_of: Callable[[str], Tensor]) -> None:
    """Do what :func:`save_start` does for a student whose tensors come from elsewhere, one after another.

    Args:
        student: Its layers have their final form; its tensors may be on the meta device.
        run_dir: The run's folder.
        value_of: Gives a tensor of the student's state dict, on the host; whoever gives it has found it finite.

    Raises:
        UserError: See :func:`save_start`.
    """
    layers = run_dir / LAYERS_FILE
    known = RunIdentity.read(run_dir)
    before = None if known is None else known.files.get(LAYERS_FILE)
    content = json.dumps(forms(student)).encode()
    if checkpoints(run_dir / CHECKPOINT_DIRECTORY) and before not in (None, hashlib.sha256(content).hexdigest()):
        raise UserError(
            f"{layers}, made again, is another than the one that the checkpoints continue; start another run"
        )
    atomic_write(layers, content)
    state = student.state_dict()
    atomic_write(run_dir / START_FILE, lambda temporary: write_tensors(temporary, state, value_of))
    if known is not None:
        known.with_files({name: file_checksum(run_dir / name) for name in (LAYERS_FILE, START_FILE)}).write(run_dir)


def has_start(run_dir: Path) -> bool:
    """Whether a run has all that it needs to go on from: the layers, and the start's tensors or a checkpoint."""
    trained = bool(checkpoints(run_dir / CHECKPOINT_DIRECTORY))
    return (run_dir / LAYERS_FILE).is_file() and (trained or (run_dir / START_FILE).is_file())


def check_start(run_dir: Path) -> None:
    """Raise UserError where a file of the run's start is not the one that was written."""
    for name in (LAYERS_FILE, START_FILE):
        _check(run_dir / name)


def load_start(student: nn.Module, run_dir: Path) -> None:
    """Read what :func:`save_start` wrote; its layers alone where a checkpoint stands in for its tensors.

    Raises:
        ValueError: It is damaged, or of another run.
    """
    restore_layers_(student, run_dir)
    path = run_dir / START_FILE
    if not path.exists() and checkpoints(run_dir / CHECKPOINT_DIRECTORY):
        return
    _check(path)
    try:
        tensors = load_file(path)
        student.load_state_dict(tensors, strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} does not hold this run's start ({error}); start another run") from error
    check_finite(tensors.items(), source=str(path), remedy="start another run")


def restore_layers_(student: nn.Module, run_dir: Path) -> None:
    """Bring the layers of a prepared student to the coordinates that the run starts in; their tensors stay.

    Raises:
        ValueError: The file is missing, damaged or of another model.
    """
    path = run_dir / LAYERS_FILE
    _check(path)
    try:
        restore_forms_(student, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold this run's layers ({error}); start another run") from error


def _check(path: Path) -> None:
    """Raise UserError for a file of the run's start that is not the one that was written."""
    known = RunIdentity.read(path.parent)
    wanted = None if known is None else known.files.get(path.name)
    if wanted is None or not path.exists():  # whoever opens it says so
        return
    found = file_checksum(path)
    if found != wanted:
        raise UserError(f"{path} is damaged: its sha256 is {found[:12]}, {wanted[:12]} was written; {_REMEDY}")
