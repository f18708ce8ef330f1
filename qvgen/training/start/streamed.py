"""A PTQ start that no process ever holds a model for (``strategy.low_host_memory=true``), rank 0 included.

    every rank    for each of its layers: read its weight from the model's files, set it up, write it, forget it
    rank 0        reads what decides whether layers share the quantizer of an input (few numbers of each layer), and puts
                  start.safetensors together, tensor by tensor: from the layers' files, and from the model's what no layer
                  changed or is in none

The bits are those of the start that rank 0 makes with a model (:mod:`qvgen.training.start.student`): the same functions
set up each layer, and they ask for nothing but its weight and its name. What asks for more is refused before
(:func:`qvgen.training.start.student_check.why_not_streamed`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from qvgen.initializers.base import Initializer
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.shared_input import unshare_activations_
from qvgen.layers.swap import quantized_layers
from qvgen.models.base import TensorReader, VideoDiT
from qvgen.models.tensor_reader import tensor_reader_of
from qvgen.quant.finite import check_finite
from qvgen.training.design.layer_setup import share_inputs_
from qvgen.training.design.meta_model import build_student
from qvgen.training.design.student import StudentDesign
from qvgen.training.distributed.layer_shares import (
    SHARES_DIRECTORY,
    balanced_shares,
    layer_file,
    read_form,
    remove_shares,
    setup_costs,
    write_shares,
)
from qvgen.training.start.file import START_REMEDY, START_SOURCE, save_start_of
from qvgen.training.start.shared import POLL_SECONDS, StartHelpers, set_up_share

log = logging.getLogger(__name__)

_OF_AN_INPUT = ("activation_quantizer.", "other_activation_quantizers.", "input_scale")
"""What the names of a layer's tensors that decide an input's codes begin with."""


def make_streamed_start(
    run_dir: Path, *, family: VideoDiT, design: StudentDesign, init: Initializer, seed: int, helpers: StartHelpers
) -> None:
    """As rank 0, make a run's start and write it.

    Args:
        run_dir: The run's folder.
        family: The model family.
        design: The student's layers; ``why_not_streamed`` found nothing against them.
        init: The PTQ method.
        seed: The run's.
        helpers: The other processes.

    Raises:
        UserError: A weight is missing or not finite, or the start is not.
        UnfitEnvironmentError: Another process failed or is gone.
    """
    student, folder = build_student(family, design)[0], run_dir / SHARES_DIRECTORY
    layers = quantized_layers(student)
    shares = balanced_shares(setup_costs(layers, needs=()), helpers.world_size)
    remove_shares(folder)
    folder.mkdir()
    write_shares(folder, shares, neighbours=helpers.neighbours, statistics=None)
    helpers.ask()
    log.info("the start: %d layers, set up by %d processes, none of which loads the model", len(layers), len(shares))
    set_up_share(run_dir, rank=0, family=family, design=design, init=init, seed=seed, one_by_one=True)
    for name in layers:
        while not layer_file(folder, name).exists():
            helpers.check()
            time.sleep(POLL_SECONDS)
    _take_forms_(layers, folder)
    share_inputs_(student, family=family, method=design.method)
    read = tensor_reader_of(family)
    assert read is not None, "it was asked before"
    save_start_of(student, run_dir, value_of=_values(student, folder, read=read))
    remove_shares(folder)


def _take_forms_(layers: dict[str, FakeQuantLinear], folder: Path) -> None:
    """Bring layers on the meta device to the forms that a method gave them, with the values that decide an input's codes."""
    unshare_activations_(layers)
    for name, layer in layers.items():
        if (form := read_form(layer_file(folder, name))) != LayerForm.of(layer):
            form.declare_(layer)
        with safe_open(layer_file(folder, name), framework="pt") as content:
            for key in (key for key in content.keys() if key.startswith(_OF_AN_INPUT)):  # noqa: SIM118 - no mapping
                module, _, last = key.rpartition(".")
                parent, value = layer.get_submodule(module), content.get_tensor(key)
                held = parent._parameters.get(last)
                if held is None:
                    parent._buffers[last] = value
                else:
                    parent._parameters[last] = nn.Parameter(value, requires_grad=held.requires_grad)


def _values(student: nn.Module, folder: Path, *, read: TensorReader) -> Callable[[str], Tensor]:
    """Name -> a tensor of the student where training starts: a layer's file has it, or the model's."""
    place = {}
    for layer in quantized_layers(student):
        with safe_open(layer_file(folder, layer), framework="pt") as content:
            place.update({f"{layer}.{key}": (layer_file(folder, layer), key) for key in content.keys()})  # noqa: SIM118

    def value_of(name: str) -> Tensor:
        if name not in place:
            return read(name)
        file, key = place[name]
        with safe_open(file, framework="pt") as content:
            value: Tensor = content.get_tensor(key)
        check_finite([(name, value)], source=START_SOURCE, remedy=START_REMEDY)
        return value

    return value_of
