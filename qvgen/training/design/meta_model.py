"""The models of a run without their memory: on the meta device, and as fake tensors that a forward pass accepts.

They are built by the family and swapped by the library's own functions, so that their parameters, buffers and names are those
of the real ones; no weight is read and no PTQ method runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qvgen.initializers.prepare import PrepareConfig
from qvgen.layers.swap import SwapReport, select_linears, swap_fake_quant_
from qvgen.models.base import VideoDiT
from qvgen.models.few_step import own_timesteps
from qvgen.training.design.layer_setup import add_configured_switch, choose_gradient_path_, set_up_phi_, share_inputs_
from qvgen.training.design.student import StudentDesign
from qvgen.training.records.frame import assemble, describe
from qvgen.training.records.keys import frame_key
from qvgen.training.records.store import recorded

Prepared = tuple[nn.Module, SwapReport]
"""A student on the meta device, and what is quantized of it."""


def num_blocks(family: Any) -> int:
    """Transformer blocks of the whole model."""
    return int(family.transformer_config["num_layers"])


def build_transformer(family: Any, *, blocks: int | None = None) -> nn.Module:
    """The family's transformer in float32 on the meta device, of so many blocks (None: all)."""
    changes = {} if blocks is None else {"num_layers": blocks}
    with torch.device("meta"):
        transformer: nn.Module = family.build({**family.transformer_config, **changes})
    return transformer


def planned_transformer(family: Any) -> nn.Module:
    """The family's whole transformer on the meta device for a plan, which never runs it: from a record where there is one.

    A record spares the import of the model's class, which is most of a plan's seconds. With LoRAs the class itself is built,
    since they are held to it.
    """
    found: nn.Module = recorded(
        lambda: frame_key(family), read=assemble, find=lambda: build_transformer(family), write=describe
    )
    return found


def build_student(
    family: VideoDiT, design: StudentDesign, *, blocks: int | None = None, is_planned: bool = False
) -> Prepared:
    """The prepared student on the meta device; unquantized for a method that does not quantize.

    Args:
        family: The model family.
        design: Its layers.
        blocks: Transformer blocks; None: all.
        is_planned: Whether it never runs, so that a record of a whole model will do. Attention that is quantized is looked
            for in the model's own classes all the same.

    Raises:
        ValueError: Patterns, a profile or a rank that do not fit the model's layers.
    """
    if is_planned and blocks is None and is_recorded(design):
        student = planned_transformer(family).train()
    else:
        student = build_transformer(family, blocks=blocks).train()
    if not design.method.quantizes:
        linears = tuple(name for name, module in student.named_modules() if isinstance(module, nn.Linear))
        return student, SwapReport(quantized=(), skipped=linears)
    report = select_linears(student, include=family.include, exclude=family.exclude)
    prepare_(student, family, design, names=report.quantized)
    return student, report


def prepare_(transformer: nn.Module, family: VideoDiT, design: StudentDesign, *, names: Sequence[str]) -> None:
    """Quantize the named Linears of a transformer on the meta device as a run does.

    Raises:
        ValueError: Names the layer that the profile, Phi's rank or the configured widths do not fit.
    """
    with torch.device("meta"):
        swap_fake_quant_(
            transformer,
            names=names,
            profile=design.profile,
            num_noise_bands=PrepareConfig.num_noise_bands,
            phi_rank=design.phi_rank,
            phi_keep=design.phi_keep,
            timesteps=own_timesteps(family),
        )
    set_up_phi_(transformer, design.phi)
    add_configured_switch(transformer, design.activation_switch)
    choose_gradient_path_(transformer, design.zero_point_gradient)
    share_inputs_(transformer, family=family, method=design.method)
    with torch.device("meta"):
        design.method.prepare_(transformer)


def is_recorded(design: StudentDesign) -> bool:
    """Whether a student's layers are found without the model's own classes: quantized attention asks these."""
    return not design.method.quantizes or design.profile.attention is None


def build_teacher(family: Any, *, dtype: torch.dtype, blocks: int | None = None, is_planned: bool = False) -> nn.Module:
    """The teacher on the meta device as diffusers loads it: in a dtype, but for what its class keeps in float32.

    Args:
        family: The model family.
        dtype: Of its weights.
        blocks: Transformer blocks; None: all.
        is_planned: Whether it never runs, so that a record of a whole model will do.
    """
    built = planned_transformer(family) if is_planned and blocks is None else build_transformer(family, blocks=blocks)
    return narrow_(built.requires_grad_(False).eval(), dtype=dtype)


def narrow_(transformer: nn.Module, *, dtype: torch.dtype) -> nn.Module:
    """Bring parameters to a dtype as loading in it does: what the class keeps in float32 stays."""
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, parameter in transformer.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return transformer


def fill_(model: nn.Module) -> None:
    """Give all tensors of a model on the meta device storage on the CPU, not written to: fake under FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
