"""A packed model's backend copies on the device where it is called: made at once or not at all, counted and said.

Moving a model moves the tensors of its checkpoint and drops the copies that backends made of them. The first call on the
other device makes new ones before anything else, so that memory that runs out leaves the model without any of them, which
computes as before. What offloading brings for a call alone has a copy for that call (:mod:`qvgen.layers.packed_linear`), and
is not waited for here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.deploy.merged_linear import MergedPackedLinear, are_hooked
from qvgen.deploy.packed_fusion import prepack_layers_, prepacked_layers
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import packed_layers

log = logging.getLogger(__name__)

_SAID = "_qvgen_copies_said"
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class PackedBytes:
    """Memory that the packed layers of a model take on one device.

    Attributes:
        stored: Bytes of the checkpoint's tensors: codes, scales, tables, branches and biases.
        copies: Bytes of the backends' copies, which are in no checkpoint; 0 where a backend reads the codes as they are.
        weights: How many weights the codes stand for.
    """

    stored: int
    copies: int
    weights: int


def packed_bytes(model: nn.Module) -> dict[torch.device, PackedBytes]:
    """Count what the packed layers of a model take now, by device; a tensor that is used twice counts once."""
    layers = packed_layers(model).values()
    stored = [tensor for layer in layers for tensor in layer.state_dict().values()]
    copies = [tensor for module in prepacked_layers(model) for tensor in _copies(module)]
    found = {}
    for device in dict.fromkeys(tensor.device for tensor in [*stored, *copies]):
        here, made = ([tensor for tensor in tensors if tensor.device == device] for tensors in (stored, copies))
        found[device] = PackedBytes(
            stored=_sum_bytes(here),
            copies=_sum_bytes(made, known=here),
            weights=sum(layer.in_features * layer.out_features for layer in layers if layer.codes.device == device),
        )
    return found


def _sum_bytes(tensors: Iterable[Tensor], *, known: Iterable[Tensor] = ()) -> int:
    if any(tensor.is_meta for tensor in tensors):
        return 0
    seen = {_place(tensor) for tensor in known}
    sizes = {_place(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(size for place, size in sizes.items() if place not in seen)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Equal for two tensors that are the same memory; fake tensors have one too, and no address."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def copies_line(model: nn.Module) -> str:
    """One line: what the packed layers take on each device, and what was prepacked."""
    parts = []
    for device, count in packed_bytes(model).items():
        if device.type == "meta":
            parts.append("no device between calls: what hooks keep elsewhere")
            continue
        share = f" ({count.stored / count.weights:.3f} bytes a weight)" if count.weights else ""
        made = f"{count.copies / _MIB:.1f} MiB prepacked beside them"
        parts.append(f"{device}: {count.stored / _MIB:.1f} MiB as stored{share}, {made}")
    made_for = sorted({module.last_made for module in prepacked_layers(model) if module.last_made is not None})
    names = ", ".join(f"{name}{' for each call' if alone else ''}" for name, alone in made_for)
    return f"packed layers on {'; '.join(parts)}; prepacked for {names or 'no kernel yet'}"


def watch_copies_(model: nn.Module) -> None:
    """Prepare a packed model as a whole when it is called on a device for the first time, and say what that took."""
    if not hasattr(model, _SAID):
        model.register_forward_pre_hook(_prepare, with_kwargs=True)
        model.register_forward_hook(_say)
    setattr(model, _SAID, _state(model))


def _prepare(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Make the copies of all layers that live where the inputs are and have none, or of none of them.

    On the CPU loading has made them, or a hook takes the model elsewhere.
    """
    if torch.compiler.is_compiling():
        return
    if (home := group_home(model)) is not None:
        for module in prepacked_layers(model):
            module.settle_(home)
    device = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if device is not None and device.type != "cpu":
        prepack_layers_([module for module in prepacked_layers(model) if _lacks_copy(module, device)])


def group_home(model: nn.Module) -> torch.device | None:
    """Where diffusers' group offloading keeps a model's tensors between calls; None where it is not on.

    With streams, files on disk and groups of leaves it exchanges tensors without moving modules, so the layers can't see it.
    """
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None:
            home: torch.device = hook.config.offload_device
            return home
    return None


def _copies(module: MergedPackedLinear | PackedLinear) -> list[Tensor]:
    if isinstance(module, PackedLinear):
        return [tensor for _, _, weight in module._prepacked.values() for tensor in weight]
    if module._prepacked is None:
        return []
    _, _, weight, bias = module._prepacked
    return weight if bias is None else [*weight, bias]


def _lacks_copy(module: MergedPackedLinear | PackedLinear, device: torch.device) -> bool:
    parts = (module,) if isinstance(module, PackedLinear) else module.parts
    apart = len(parts) > 1 and are_hooked(parts)  # then the parts are called
    return not (apart or parts[0].visits or parts[0].codes.device != device or _copies(module))


def _say(model: nn.Module, args: tuple[Any, ...], output: object) -> None:
    del args, output
    if not torch.compiler.is_compiling() and getattr(model, _SAID) != (state := _state(model)):
        setattr(model, _SAID, state)
        log.info("%s", copies_line(model))


def _state(model: nn.Module) -> set[tuple[object, ...]]:
    """Devices, kernels, and whether copies stay: a line is said again where one of them changes."""
    leads = ((m, m if isinstance(m, PackedLinear) else m.parts[0]) for m in prepacked_layers(model))
    return {(lead.codes.device, module.last_made) for module, lead in leads}
