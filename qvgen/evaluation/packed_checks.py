"""Whether a packed model is the one that was trained, to the code and to the pixel; and what its layers are.

Differences are counted, not only bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qvgen.deploy.merged_linear import MergedPackedLinear
from qvgen.evaluation.distance import FlipCount, count_flips, psnr_db
from qvgen.evaluation.held_out import MeasuredInputs
from qvgen.evaluation.report_data import Checks, LayerReport
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.layer_input import LayerInput, entered_input
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import packed_layers, quantized_layers
from qvgen.layers.weight_rows import stored_codes_equal

WATCHED_TOKENS = 256
"""Tokens of a sample whose codes are compared: all tokens of all layers of a large model would not fit into memory."""


def bf16_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and saved buffers of a model in bfloat16."""
    return 2 * sum(value.numel() for value in model.state_dict().values())


def layer_reports(packed: nn.Module) -> tuple[LayerReport, ...]:
    """One row of the report for every packed layer."""
    return tuple(
        LayerReport(
            name=name,
            shape=(layer.out_features, layer.in_features),
            weight_bits=layer.profile.weight.bits,
            activation_bits=layer.profile.activation.bits,
            num_bytes=layer.nbytes(),
            weight_error=float("nan") if layer.weight_error is None else layer.weight_error,
            output_error=None,
        )
        for name, layer in packed_layers(packed).items()
    )


def codes_equal(fake: nn.Module, packed: nn.Module) -> tuple[bool, int]:
    """Whether every code in the packed layers is the trained one, and how many were compared."""
    trained, stored = quantized_layers(fake), packed_layers(packed)
    equal = list(trained) == list(stored)
    count = 0
    for name in trained.keys() & stored.keys():
        same, codes = stored_codes_equal(stored[name], trained[name], trained[name].weight)
        equal, count = equal and same, count + codes
    return equal, count


def check_packed(
    fake: nn.Module,
    packed: nn.Module,
    *,
    held_out: MeasuredInputs,
    outputs: Mapping[str, Sequence[Tensor]],
    videos: Mapping[str, Tensor],
) -> Checks:
    """Whether the packed model is the trained one: codes, outputs for the same inputs, and the table's videos."""
    equal, count = codes_equal(fake, packed)
    largest = 0.0
    for ours, theirs in zip(outputs["packed"], outputs["fake-quantized"], strict=True):
        largest = max(largest, float((ours - theirs).abs().max()))
    helpers = [layer.phi for layer in quantized_layers(fake).values() if layer.phi is not None]
    return Checks(
        packed_codes_equal=equal,
        num_codes=count,
        packed_vs_fake_max_abs=largest,
        trajectory_psnr_db=psnr_db(videos["packed"], videos["fake-quantized"], max_value=255),
        flipped_pixels=count_flips(videos["packed"], videos["fake-quantized"]),
        flipped_codes=_flipped_activation_codes(fake, packed, held_out=held_out),
        phi_rank_final=max((phi.rank for phi in helpers), default=0),
        phi_kept=any(phi.keep for phi in helpers),
    )


@torch.no_grad()
def _flipped_activation_codes(fake: nn.Module, packed: nn.Module, *, held_out: MeasuredInputs) -> FlipCount:
    """How many input codes of all layers differ between the two models on the first held-out batch."""
    trained = _input_codes(fake, quantized_layers(fake), held_out=held_out)
    stored = _input_codes(packed, packed_layers(packed), held_out=held_out)
    counts = [count_flips(trained[name], stored[name]) for name in trained]
    return FlipCount(
        num_flipped=sum(count.num_flipped for count in counts), num_values=sum(count.num_values for count in counts)
    )


def _input_codes(
    model: nn.Module, layers: Mapping[str, FakeQuantLinear] | Mapping[str, PackedLinear], *, held_out: MeasuredInputs
) -> dict[str, Tensor]:
    """Codes of each layer's input on the first held-out batch, of ``WATCHED_TOKENS`` tokens per sample."""
    codes: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(module: nn.Module, name: str) -> RemovableHandle:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], keywords: Mapping[str, Any]) -> None:
            x, kept = inputs[0], codes[name]
            given: LayerInput | None = keywords.get("given")
            # A packed feed-forward is called once for each block of tokens.
            left = WATCHED_TOKENS - sum(part.shape[1] for part in kept) if x.ndim > 2 else 1 - len(kept)
            if left > 0:
                tokens = x[:, :left] if x.ndim > 2 else x
                of_tokens = None if given is None else given.of_tokens(slice(0, left))
                tokens = entered_input((tokens,), {"given": of_tokens})
                kept.append(layers[name].input_codes(tokens).reshape(tokens.shape).cpu())

        return module.register_forward_pre_hook(keep, with_kwargs=True)

    handles = [watch(layer, name) for name, layer in layers.items()]
    places = {id(layer): name for name, layer in layers.items()}
    for module in model.modules():
        if isinstance(module, MergedPackedLinear):  # it is called in place of its parts
            handles += [watch(module, places[id(part)]) for part in module.parts]
    try:
        next(held_out.predictions(model))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts, 1) if parts[0].ndim > 2 else parts[0] for name, parts in codes.items()}
