"""A transformer without values as plain data, and modules made from it: all that a plan reads of a model that never runs.

    {"class": name, "timestep": whether its forward takes one, "float32": names that stay in that type, "module": MODULE}
    MODULE    {"kind": linear | list | dropout | part, "class": name, "own": [[name, shape, dtype, trained]],
               "buffers": [[name, shape, dtype, saved]], "parts": [[name, MODULE]]}
              a Linear is {"kind": "linear", "in", "out", "bias", "dtype"}, and a list of equal blocks {"kind": "list",
              "times", "of": MODULE}

Names, order, shapes and types are those of the model. Linears, lists and dropouts are torch's own classes, since layers are
chosen by them; any other module is a :class:`torch.nn.Module` of the same class name, which only says what it has. A record
names no code: class names become names of empty classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.config.plain_json import flag, items, mapping, text, whole

_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)} | {
    str(dtype): dtype for dtype in (torch.int64, torch.int32, torch.bool, torch.complex64, torch.complex128)
}
_MAX_VALUES = 2**36
"""Most numbers of a tensor, and most modules of a list are 2**12: more than any model has."""


def describe(model: nn.Module) -> dict[str, Any] | None:
    """A transformer on the meta device as plain data; None where something of it can't be said so."""
    tensors = [*model.parameters(), *model.buffers()]
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if len(named) != len(tensors) or len({id(module) for module in model.modules()}) != sum(
        1 for _ in model.named_modules(remove_duplicate=False)
    ):
        return None  # tensors or modules that have two names
    module = _described(model)
    if module is None:
        return None
    return {
        "class": type(model).__name__,
        "timestep": "timestep" in inspect.signature(model.forward).parameters,
        "float32": sorted(getattr(model, "_keep_in_fp32_modules", None) or ()),
        "module": module,
    }


def _described(module: nn.Module) -> dict[str, Any] | None:
    own = [value for value in (*module._parameters.values(), *module._buffers.values()) if value is not None]
    if any(str(value.dtype) not in _DTYPES for value in own):
        return None
    if isinstance(module, nn.Linear):
        if type(module) is not nn.Linear or not all(value.requires_grad for value in own):
            return None
        sizes = {"in": module.in_features, "out": module.out_features, "bias": module.bias is not None}
        return {"kind": "linear", **sizes, "dtype": str(module.weight.dtype)}
    parts = [[name, _described(child)] for name, child in module.named_children()]
    if any(part is None for _, part in parts):
        return None
    if isinstance(module, nn.ModuleList):
        if parts and all(part == parts[0][1] for _, part in parts):
            return {"kind": "list", "times": len(parts), "of": parts[0][1]}
        return {"kind": "list", "parts": parts}
    return {
        "kind": "dropout" if isinstance(module, nn.Dropout) else "part",
        "class": type(module).__name__,
        "own": [
            [name, *_tensor(value), value.requires_grad]
            for name, value in module._parameters.items()
            if value is not None
        ],
        "buffers": [
            [name, *_tensor(value), name not in module._non_persistent_buffers_set]
            for name, value in module._buffers.items()
            if value is not None
        ],
        "parts": parts,
    }


def _tensor(value: Tensor) -> tuple[list[int], str]:
    return list(value.shape), str(value.dtype)


class _Part(nn.Module):
    """Stands for a module that never runs: torch's own refusal is what a call meets."""


class _Timed(_Part):
    """Stands for a transformer that is told a timestep."""

    def forward(self, timestep: Any) -> Any:
        """Refuse to run."""
        raise RuntimeError(f"{type(self).__name__} was made for a plan and has no forward pass, at timestep {timestep}")


def assemble(record: Any) -> nn.Module:
    """The modules of a record, on the meta device.

    Raises:
        ValueError: It is no such record; UserError is one.
    """
    whole_record = mapping(record, "record")
    module = mapping(whole_record.get("module"), "module")
    kind = _Timed if flag(whole_record.get("timestep"), "timestep") else _Part
    with torch.device("meta"):
        model = _assembled(module, base=kind, name=_class_name(whole_record.get("class")), depth=0)
    kept = [text(name, "float32") for name in items(whole_record.get("float32"), "float32")]
    model._keep_in_fp32_modules = kept  # type: ignore[assignment]
    return model


def _assembled(plain: Mapping[str, Any], *, base: type[_Part], name: str, depth: int) -> nn.Module:
    if depth > 16:
        raise ValueError("modules within modules without an end")
    kind = plain.get("kind")
    if kind == "linear":
        sizes = (whole(plain.get("in"), "in", low=1, high=2**20), whole(plain.get("out"), "out", low=1, high=2**20))
        return nn.Linear(*sizes, bias=flag(plain.get("bias"), "bias"), dtype=_dtype(plain.get("dtype")))
    if kind == "list" and "of" in plain:
        of = mapping(plain["of"], "of")
        times = whole(plain.get("times"), "times", low=1, high=2**12)
        return nn.ModuleList(_part(of, depth=depth) for _ in range(times))
    parts = [(text(key, "part"), mapping(part, "part")) for key, part in items(plain.get("parts"), "parts")]
    if kind == "list":
        return nn.ModuleList(_part(part, depth=depth) for _, part in parts)
    if kind not in ("part", "dropout"):
        raise ValueError(f"a module of kind {kind!r}")
    module: nn.Module = nn.Dropout() if kind == "dropout" else type(name, (base,), {})()  # an empty class
    for key, shape, dtype, trained in items(plain.get("own"), "own"):
        empty = torch.empty(_shape(shape), dtype=_dtype(dtype))
        module.register_parameter(text(key, "own"), nn.Parameter(empty, requires_grad=flag(trained, "trained")))
    for key, shape, dtype, saved in items(plain.get("buffers"), "buffers"):
        empty = torch.empty(_shape(shape), dtype=_dtype(dtype))
        module.register_buffer(text(key, "buffer"), empty, persistent=flag(saved, "saved"))
    for key, part in parts:
        module.add_module(key, _part(part, depth=depth))
    return module


def _part(plain: Mapping[str, Any], *, depth: int) -> nn.Module:
    name = "" if plain.get("kind") in ("linear", "list") else _class_name(plain.get("class"))
    return _assembled(plain, base=_Part, name=name, depth=depth + 1)


def _class_name(value: Any) -> str:
    name = text(value, "class")
    if not name.isidentifier() or len(name) > 100:
        raise ValueError(f"{name[:100]!r} is no name of a class")
    return name


def _dtype(value: Any) -> torch.dtype:
    if value not in _DTYPES:
        raise ValueError(f"{value!r} is no type of numbers")
    return _DTYPES[value]


def _shape(value: Any) -> list[int]:
    shape = [whole(size, "size", high=_MAX_VALUES) for size in items(value, "shape")]
    if math.prod(shape) > _MAX_VALUES:
        raise ValueError(f"a tensor of shape {shape}")
    return shape
