"""Which kernel backend runs the layers of a model on a device, and what that costs: checked and said before it runs."""

from __future__ import annotations

from collections import Counter
from itertools import product

import torch
from torch import nn

from qvgen.deploy.manifest import Manifest
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.layer_spec import layer_spec
from qvgen.layers.swap import quantized_layers
from qvgen_kernels import LinearSpec, describe_choice, get_backend, resolve_kernel
from qvgen_kernels.registry import AUTO


def check_kernel(model: nn.Module, *, kernel: str, device: torch.device) -> None:
    """Find out before training whether a kernel will run what a prepared model is folded to.

    Args:
        model: A prepared model; its weights may lie on the meta device.
        kernel: Name or auto.
        device: Where the packed model will run.

    Raises:
        ValueError: An unknown kernel.
        RuntimeError: A kernel that was asked for by name does not run here.
    """
    for spec in _specs_of(model):
        resolve_kernel(kernel, spec, device=device)


def kernel_line(layers: nn.Module | Manifest, *, kernel: str, device: torch.device) -> str:
    """One line: what runs the packed layers on a device, what it costs, and why nothing faster does.

    Args:
        layers: A prepared model, or the manifest of a packed one.
        kernel: Name or auto.
        device: Where the packed model will run.

    Raises:
        RuntimeError: A kernel that was asked for by name does not run there.
    """
    specs = manifest_specs(layers) if isinstance(layers, Manifest) else _specs_of(layers)
    return describe_choice(specs, kernel=kernel, device=device)


def waits_for_device(manifest: Manifest, *, kernel: str, device: torch.device) -> torch.device | None:
    """The device that a packed model has to be moved to before a kernel that was asked for by name prepares its weights.

    Args:
        manifest: The model's.
        kernel: Name or auto.
        device: Where the model is.

    Returns:
        None where the kernel runs on ``device``, or where nothing says that it is written for another one.

    Raises:
        ValueError: An unknown kernel.
        RuntimeError: It is written for devices that this machine does not have, or it can't run the layers there.
    """
    types = () if kernel == AUTO else getattr(get_backend(kernel), "device_types", ())
    if not types or device.type in types:
        return None
    places = [torch.device(name) for name in types]
    for place in places:
        if all(get_backend(kernel).refusal(spec, device=place) is None for spec in manifest_specs(manifest)):
            return place
    for spec in manifest_specs(manifest):
        resolve_kernel(kernel, spec, device=places[0])
    return None


def _specs_of(model: nn.Module) -> Counter[LinearSpec]:
    layers = [(LayerForm.folded(layer), layer) for layer in quantized_layers(model).values()]
    return _specs([(form, layer.in_features, layer.out_features) for form, layer in layers])


def manifest_specs(manifest: Manifest) -> Counter[LinearSpec]:
    """The specs of a packed model's layers, and how many layers have each; one of changing widths counts for each width."""
    return _specs([(entry.form, entry.in_features, entry.out_features) for entry in manifest.layers])


def _specs(layers: list[tuple[LayerForm, int, int]]) -> Counter[LinearSpec]:
    return Counter(
        layer_spec(form, in_features=columns, out_features=outputs, widths=widths)
        for form, columns, outputs in layers
        for widths in product(form.weight_widths, form.activation_widths)
    )
