"""Which kernel backend runs the layers of a model on a device, and what that costs: checked and said before it runs."""

from __future__ import annotations

from collections import Counter
from itertools import product

import torch
from torch import nn

from qvgen.deploy.manifest import Manifest
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.packed_linear import layer_spec
from qvgen.layers.swap import quantized_layers
from qvgen_kernels import LinearSpec, describe_choice, resolve_kernel


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
    specs = _specs_in(layers) if isinstance(layers, Manifest) else _specs_of(layers)
    return describe_choice(specs, kernel=kernel, device=device)


def _specs_of(model: nn.Module) -> Counter[LinearSpec]:
    layers = [(LayerForm.folded(layer), layer) for layer in quantized_layers(model).values()]
    return _specs([(form, layer.in_features, layer.out_features) for form, layer in layers])


def _specs_in(manifest: Manifest) -> Counter[LinearSpec]:
    return _specs([(entry.form, entry.in_features, entry.out_features) for entry in manifest.layers])


def _specs(layers: list[tuple[LayerForm, int, int]]) -> Counter[LinearSpec]:
    return Counter(
        layer_spec(form, in_features=columns, out_features=outputs, widths=widths)
        for form, columns, outputs in layers
        for widths in product(form.weight_widths, form.activation_widths)
    )
