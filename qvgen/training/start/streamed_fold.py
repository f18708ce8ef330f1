"""A checkpoint that is folded layer by layer, by rows: nobody ever holds the student, a weight of it, or what is packed.

    the student's layers without memory
    for each layer: read all but its weight, bring Phi to the schedule's step: what it is packed to, without memory
    for each layer: read its weight by rows, pack it, write it where it belongs in the file, forget it
    then: write what is not quantized, tensor by tensor; and compare the codes in the file, layer by layer, by rows

The codes, and every other tensor, are those of a student that is loaded whole (:func:`qvgen.layers.swap.folded_copy`): the
same functions pack each layer, and they ask for nothing but the layer. A method whose schedule or end is another than Phi's
decay may look at the whole student, which is loaded then (:func:`why_whole`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.deploy.checkpoint import Put, open_packed
from qvgen.layers.attention_swap import PRODUCT, pack_attentions, quantized_attentions
from qvgen.layers.branch import kept_rank
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.layer_threads import in_threads, num_threads
from qvgen.layers.swap import FOLD_REMEDY, pack_layer, packed_layers, quantized_layers
from qvgen.layers.weight_rows import PACKING_SCRATCH, WeightRows, stored_codes_equal
from qvgen.methods.base import Method, Schedule
from qvgen.methods.phi_decay import PhiDecay
from qvgen.models.base import VideoDiT
from qvgen.quant.finite import check_finite, is_finite
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


def folding_bytes(student: nn.Module) -> int:
    """Most bytes on the host at once while a student, on the meta device, is folded by layers: those of its largest ones."""
    largest = max(layer.weight.numel() for layer in quantized_layers(student).values())
    return folding_threads(student) * PACKING_SCRATCH * largest


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
        model: The student, without memory; the packed model, without memory, behind :meth:`declare_`.
        kept_rank: The largest rank of a Phi that stays, behind :meth:`declare_`.

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
        self._layers, self.kept_rank = quantized_layers(self.model), 0
        self._schedule, self._step, self._threads = schedule, step, folding_threads(self.model)
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

    def layers(self) -> Iterator[tuple[str, FakeQuantLinear, WeightRows]]:
        """Each layer as it was trained, in order, and its weight, of which rows are read; it has the rest until the next."""
        for name, layer in self._layers.items():
            yield name, layer, self._load_(name, layer)
            _forget_(layer)

    def declare_(self, *, kernel: str) -> nn.Module:
        """Give the model packed layers without memory in place of its own: the packed model, which is the student no more.

        Raises:
            ValueError: Phi has rank in a layer and is not to be kept.
        """
        for name, layer, _ in self.layers():
            self.kept_rank = max(self.kept_rank, kept_rank(layer))
            self.model.set_submodule(name, pack_layer(name, layer, kernel=kernel, device="meta"))
        for name, product in quantized_attentions(self.model).items():
            self._fill_(f"{name}.{PRODUCT}", product)
        for name, packed in pack_attentions(self.model, kernel=kernel).items():
            self.model.set_submodule(name, packed)
        return self.model

    def write(self, put: Put, *, kernel: str) -> None:
        """Behind :meth:`declare_`, pack all layers, and give all tensors of the packed model away by ``put(name, values)``.

        Raises:
            ValueError: A tensor is not finite.
        """
        declared = packed_layers(self.model)

        def pack(name: str) -> None:
            weight = self._load_(name, self._layers[name])
            packed = pack_layer(name, self._layers[name], kernel=kernel, weight=weight)
            for own, value in packed.state_dict().items():
                put(f"{name}.{own}", value)
            declared[name].weight_error = packed.weight_error
            _forget_(self._layers[name])

        for _ in in_threads((partial(pack, name) for name in declared), threads=self._threads):
            pass
        for name, value in self.model.state_dict().items():
            if not any(name.startswith(f"{layer}.") for layer in declared):
                put(name, self._read(name, value.dtype) if value.is_meta else value)

    def codes_equal(self, directory: Path) -> tuple[bool, int]:
        """Whether every code of a packed directory is the trained one, and how many were compared; it is checked whole."""
        _, packed, file = open_packed(directory)
        stored, count, equal = packed_layers(packed), 0, True
        for name, layer, weight in self.layers():
            if name in stored:
                own = {key: file.whole(f"{name}.{key}") for key in stored[name].state_dict()}
                stored[name].load_state_dict(own, strict=True, assign=True)
                same, codes = stored_codes_equal(stored[name], layer, weight)
                equal, count = equal and same, count + codes
                _forget_(stored[name])
        return equal and list(stored) == list(self._layers), count

    def _load_(self, name: str, layer: FakeQuantLinear) -> WeightRows:
        """Give a layer its tensors but for the weight, which comes by rows, at the schedule's step."""
        self._fill_(name, layer, but=("weight",))
        if self._schedule is not None:
            self._schedule.apply_(_alone(name, layer), None, step=self._step)
        return _CheckedRows(f"{name}.weight", self._values[f"{name}.weight"], dtype=layer.weight.dtype)

    def _fill_(self, prefix: str, module: nn.Module, *, but: Collection[str] = ()) -> None:
        """Give a module its tensors as loading does, so that it knows the rank of its Phi."""
        found = {own: (f"{prefix}.{own}", like.dtype) for own, like in module.state_dict().items() if own not in but}
        read = {own: self._read(name, dtype) for own, (name, dtype) in found.items()}
        module.load_state_dict(read, strict=False, assign=True)

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        return _checked(name, whole_values(self._values[name]).to(dtype))


class _CheckedRows:
    """Rows of a trained weight, in the student's type, looked at as they are read."""

    def __init__(self, name: str, value: Tensor | SavedTensor, *, dtype: torch.dtype) -> None:
        self._name, self._value, self._dtype = name, value, dtype

    @property
    def shape(self) -> torch.Size:
        return self._value.shape

    def __getitem__(self, rows: slice) -> Tensor:
        found = self._value[rows].to(self._dtype)
        if not is_finite(found):
            _checked(self._name, whole_values(self._value))  # counts over the whole of it
        return found


def _checked(name: str, value: Tensor) -> Tensor:
    check_finite([(name, value)], source="cannot fold", remedy=FOLD_REMEDY)
    return value


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
