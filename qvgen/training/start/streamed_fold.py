"""A checkpoint that is folded layer by layer: nobody ever holds the student, only what is packed of it and a layer.

    the student's layers without memory
    for each layer: read its tensors from the checkpoint, bring Phi to the schedule's step, pack it, forget it
    then: read what is not quantized; write the packed model, read it back, and compare its codes, layer by layer

The codes, and every other tensor, are those of a student that is loaded whole (:func:`qvgen.layers.swap.folded_copy`): the
same functions pack each layer, and they ask for nothing but the layer. A method whose schedule or end is another than Phi's
decay may look at the whole student, which is loaded then (:func:`why_whole`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.evaluation.packed_checks import layer_codes_equal
from qvgen.layers.attention_swap import pack_attentions
from qvgen.layers.branch import kept_rank
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.layer_threads import in_threads, num_threads
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import FOLD_REMEDY, PACKING_SCRATCH, pack_layer, packed_layers, quantized_layers
from qvgen.methods.base import Method, Schedule
from qvgen.methods.phi_decay import PhiDecay
from qvgen.models.base import VideoDiT
from qvgen.quant.finite import check_finite
from qvgen.training.checkpoint.saved_tensor import SavedTensor, whole_values
from qvgen.training.design.meta_model import build_student
from qvgen.training.design.student import StudentDesign
from qvgen.training.start.file import restore_layers_

log = logging.getLogger(__name__)


def why_whole(design: StudentDesign, steps: int) -> str | None:
    """Why a student has to be loaded whole to be folded, in words; None where it is folded layer by layer.

    Args:
        design: The student's layers.
        steps: Of its training.
    """
    schedule = design.schedule(steps)
    kind: Any = type(schedule)
    if type(design.method).finish_ is not Method.finish_:
        return "the method changes the student behind its last step"
    if schedule is not None and kind.apply_ is not PhiDecay.apply_:
        return "the method's schedule may look at the whole student"
    return None


def folding_threads(student: nn.Module) -> int:
    """Layers of a student that are packed at a time: those that together take no more than half of it in bfloat16."""
    weights = [torch.empty(()).expand(layer.weight.shape) for layer in quantized_layers(student).values()]
    room: int = sum(value.numel() for value in student.state_dict().values())
    scratch = PACKING_SCRATCH * max(weight.numel() for weight in weights)
    threads: int = min(num_threads(weights, scratch_per_weight=PACKING_SCRATCH), room // scratch)
    return max(1, threads)


def folding_bytes(student: nn.Module, *, packed: int) -> int:
    """Most bytes on the host at once while a student is folded by layers.

    Args:
        student: On the meta device.
        packed: Bytes of the packed model, which is written from a copy.
    """
    largest = max(layer.weight.numel() for layer in quantized_layers(student).values())
    return packed + max(packed, folding_threads(student) * PACKING_SCRATCH * largest)


class StreamedFold:
    """The layers of a trained student, whose tensors lie in a checkpoint.

    Args:
        family: The model family.
        design: The student's layers; :func:`why_whole` found nothing against them.
        run_dir: The run's folder.
        trained: The student's tensors by name, read or not yet read.
        averaged: Those of its average, which count where they are; shared tensors have one of their names here.
        schedule: The method's.
        step: Of the checkpoint.

    Attributes:
        model: The student, without memory; the packed model behind :meth:`fold_`.
        kept_rank: The largest rank of a Phi that stays, behind :meth:`fold_`.

    Raises:
        ValueError: What the run's folder says of its layers is damaged.
        KeyError: The checkpoint is of another model; RuntimeError: of one of another size.
    """

    def __init__(
        self,
        family: VideoDiT,
        design: StudentDesign,
        run_dir: Path,
        *,
        trained: Mapping[str, Tensor | SavedTensor],
        averaged: Mapping[str, Tensor | SavedTensor],
        schedule: Schedule | None,
        step: int,
    ) -> None:
        self.model = build_student(family, design)[0].eval()
        restore_layers_(self.model, run_dir)
        self.kept_rank = 0
        self._schedule, self._step = schedule, step
        known = self.model.state_dict()
        if unknown := next((name for name in (*trained, *averaged) if name not in known), None):
            raise KeyError(unknown)
        for name, value in known.items():
            if trained[name].shape != value.shape:
                raise RuntimeError(f"{name} has the shape {list(trained[name].shape)} and not {list(value.shape)}")
        self._values = dict(trained)
        for names in _shared_names(self.model):
            for name in names:
                if name in averaged:
                    self._values |= dict.fromkeys(names, averaged[name])

    def layers(self) -> Iterator[tuple[str, FakeQuantLinear]]:
        """Each layer as it was trained, in order; it has its tensors until the next one is asked for."""
        for name, layer in quantized_layers(self.model).items():
            self._load_(name, layer)
            yield name, layer
            _forget_(layer)

    def fold_(self, *, kernel: str) -> nn.Module:
        """Pack all layers, and read what else the model has; the packed model, which is the student no more.

        Raises:
            ValueError: Phi has rank in a layer and is not to be kept, or a tensor is not finite.
        """
        layers = quantized_layers(self.model)

        def pack(name: str) -> PackedLinear:
            self._load_(name, layers[name])
            packed = pack_layer(name, layers[name], kernel=kernel)
            self.kept_rank = max(self.kept_rank, kept_rank(layers[name]))
            _forget_(layers[name])
            return packed

        threads = folding_threads(self.model)
        made = dict(zip(layers, in_threads((partial(pack, name) for name in layers), threads=threads), strict=True))
        for name, packed in made.items():
            self.model.set_submodule(name, packed)
        for name, module in self.model.named_modules():
            if not isinstance(module, PackedLinear) and not any(name.startswith(f"{other}.") for other in made):
                self._fill_(name, module)
        for name, product in pack_attentions(self.model, kernel=kernel).items():
            self.model.set_submodule(name, product)
        return self.model

    def codes_equal(self, packed: nn.Module) -> tuple[bool, int]:
        """Whether every code of a packed model is the trained one, and how many were compared; before :meth:`fold_`."""
        stored, count, equal = packed_layers(packed), 0, True
        for name, layer in self.layers():
            same, codes = layer_codes_equal(layer, stored[name]) if name in stored else (False, 0)
            equal, count = equal and same, count + codes
        return equal and list(stored) == list(quantized_layers(self.model)), count

    def _load_(self, name: str, layer: FakeQuantLinear) -> None:
        for own, module in layer.named_modules(remove_duplicate=False):
            self._fill_(f"{name}.{own}" if own else name, module)
        if self._schedule is not None:
            self._schedule.apply_(_alone(name, layer), None, step=self._step)

    def _fill_(self, prefix: str, module: nn.Module) -> None:
        """Give a module the tensors that are its own."""
        kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for kind in kinds:
            for own, value in list(kind.items()):
                full = f"{prefix}.{own}" if prefix else own
                if value is None or full not in self._values:  # what no checkpoint holds is made again by who loads
                    continue
                read = whole_values(self._values[full]).to(value.dtype)
                check_finite([(full, read)], source="cannot fold", remedy=FOLD_REMEDY)
                kind[own] = nn.Parameter(read, requires_grad=False) if isinstance(value, nn.Parameter) else read


def _forget_(layer: nn.Module) -> None:
    """Give the memory of a layer's large tensors back; what layers share are few numbers, and stay."""
    for module in layer.modules():
        kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for kind in kinds:
            for name, value in list(kind.items()):
                if value is not None and value.dim() > 1:
                    meta = value.detach().to("meta")
                    kind[name] = nn.Parameter(meta, requires_grad=False) if isinstance(value, nn.Parameter) else meta


def _alone(name: str, layer: nn.Module) -> nn.Module:
    """A module in which a layer has its name of the whole model."""
    root = parent = nn.Module()
    *path, last = name.split(".")
    for part in path:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(last, layer)
    return root


def _shared_names(model: nn.Module) -> Iterator[list[str]]:
    """All names of each tensor of a model that is saved."""
    prefixes: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefixes.setdefault(id(module), []).append(prefix)
        modules[id(module)] = module
    for key, module in modules.items():
        for own in (*module._parameters, *module._buffers):
            yield [f"{prefix}.{own}" if prefix else own for prefix in prefixes[key]]
