"""One transformer block of each model, compiled in bfloat16 and with packed linears: milliseconds, by part, and memory.

The block has the models' sizes and their order of operations: norm and modulation, q, k and v as one linear, attention, the
linear after it with gate and residual; for Wan attention to the caption; norm and modulation, feed-forward with GELU, gate
and residual. Rotary embeddings and norms of q and k are left out: they are the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpu.clock import Timer, by_events, by_wall, compare
from gpu.layer import Canonical, Packed
from gpu.models import Layer, Model
from gpu.setting import Case, Row, Setting
from qvgen_kernels import LinearSpec

Linear = Callable[..., Tensor]
"""Maps x, and maybe gate and residual, to the layer's outputs with what follows it."""
Way = tuple[tuple[int, int], str] | None
"""Bits of weights and inputs and the kernel; None: bfloat16."""


class _Dense:
    """A bfloat16 linear with what follows it."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.weight = torch.randn(layer.outputs, layer.columns, device=device).bfloat16() * 0.02
        self.bias = torch.zeros(layer.outputs, device=device).bfloat16()
        self.gelu = layer.tail == "gelu"

    def __call__(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        if self.gelu:
            return functional.gelu(y, approximate="tanh")
        return y if gate is None or residual is None else residual + gate * y


class _Quantized:
    """A packed linear with what follows it inside."""

    def __init__(self, layer: Layer, bits: tuple[int, int], kernel: str, device: torch.device) -> None:
        spec = LinearSpec(
            in_features=layer.columns,
            out_features=layer.outputs,
            weight_bits=bits[0],
            activation_bits=bits[1],
            function="gelu_tanh" if layer.tail == "gelu" else "none",
        )
        self.packed: Packed = Canonical.random(spec, device=device).packed(kernel)
        self.bias = torch.zeros(layer.outputs, device=device)

    def __call__(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        if gate is None or residual is None:
            return self.packed(x, bias=self.bias)
        return self.packed(x, bias=self.bias, gate=gate, residual=residual)


class Block(nn.Module):
    """A block of a model.

    Args:
        model: Its sizes.
        linear: Makes the linear of a layer.
    """

    def __init__(self, model: Model, linear: Callable[[Layer], Linear]) -> None:
        super().__init__()
        self.model = model
        self.linears = {layer.name: linear(layer) for layer in model.layers}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of rows [M, D] to rows [S, D]."""
        q, k, v = (part.view(1, len(part), self.model.heads, -1).transpose(1, 2) for part in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(q.shape[2], -1)

    def forward(self, x: Tensor, text: Tensor, modulation: Tensor) -> Tensor:
        """Map rows [M, D] to [M, D]; modulation [6, D]: shift, scale and gate of both halves."""
        shift, scale, gate, shift_2, scale_2, gate_2 = modulation.split(1)
        normed = functional.layer_norm(x, x.shape[1:]) * (1 + scale) + shift
        q, k, v = self.linears["qkv"](normed).chunk(3, 1)
        x = self.linears["out"](self.attend(q, k, v), gate, x)
        if self.model.text_tokens:
            q = self.linears["cross q"](functional.layer_norm(x, x.shape[1:]))
            k, v = self.linears["cross kv"](text).chunk(2, 1)
            x = self.linears["cross out"](self.attend(q, k, v), torch.ones_like(gate), x)
        normed = functional.layer_norm(x, x.shape[1:]) * (1 + scale_2) + shift_2
        return self.linears["ff2"](self.linears["ff1"](normed), gate_2, x)


def cases(setting: Setting, *, warm: bool = False) -> Iterator[Case]:
    """One case for every model and way: bfloat16, every kernel at 4 bits, auto's at other widths."""
    for model in setting.models():
        qkv = model.layers[0]
        spec = LinearSpec(in_features=qkv.columns, out_features=qkv.outputs, weight_bits=4, activation_bits=4)
        kernels = setting.kernels(spec)
        ways: list[Way] = [None, *(((4, 4), kernel) for kernel in kernels), ((3, 3), kernels[0])]
        for way in ways if setting.rehearse else [*ways, ((4, 8), kernels[0])]:
            yield f"{model.name} {_label(way)}", partial(_rows, setting, model, way, warm)
            if not (warm or setting.rehearse):
                yield f"{model.name} {_label(way)} as a CUDA graph", partial(_replayed, setting, model, way)


def _label(way: Way) -> str:
    return "bf16" if way is None else f"{way[1]} w{way[0][0]}a{way[0][1]}"


def _made(setting: Setting, model: Model, way: Way) -> tuple[Block, tuple[Tensor, Tensor, Tensor]]:
    """A block with random weights, and its inputs: rows, rows of the caption, modulation."""
    device = setting.device

    def linear(layer: Layer) -> Linear:
        return _Dense(layer, device) if way is None else _Quantized(layer, *way, device)

    torch.manual_seed(0)
    block = Block(model, linear).eval()
    x = torch.randn(model.tokens, model.width, device=device).bfloat16()
    text = torch.randn(max(model.text_tokens, 1), model.width, device=device).bfloat16()
    return block, (x, text, torch.randn(6, model.width, device=device).bfloat16() * 0.1)


def _replayed(setting: Setting, model: Model, way: Way) -> Iterator[Row]:
    """Capture a block as a CUDA graph, which a synchronization or a copy from the host would refuse, and replay it.

    The replay with other inputs in the same place has to give the bytes of ordinary calls.
    """
    block, inputs = _made(setting, model, way)
    with torch.no_grad():
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are compiled and weights prepared before anything is captured
            block(*inputs)
            block(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(*inputs)
        inputs[0].copy_(torch.randn_like(inputs[0]))
        graph.replay()
        row: Row = {"model": model.name, "way": _label(way), "tokens": model.tokens}
        row["equal"] = torch.equal(y, block(*inputs))
        calls: dict[str, Callable[[], Any]] = {"replayed": graph.replay, "called, not compiled": lambda: block(*inputs)}
        for name, found in compare(calls, timer=by_events).items():
            yield row | {"part": name} | found


def _rows(setting: Setting, model: Model, way: Way, warm: bool) -> Iterator[Row]:
    torch.compiler.reset()  # what was compiled for the blocks before is not needed any more
    block, (x, text, modulation) = _made(setting, model, way)
    compiled = setting.compiled(block)
    row: Row = {"model": model.name, "way": _label(way), "tokens": model.tokens}
    timer: Timer = by_wall if setting.rehearse else by_events
    rounds = 1 if warm or setting.rehearse else None
    with torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {"block": lambda: compiled(x, text, modulation)}
        row |= compare(calls, timer=timer, rounds=rounds)["block"]
        if not setting.rehearse:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            compiled(x, text, modulation)
            setting.wait()
            row["weights_mib"] = before / 2**20
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["finite"] = bool(compiled(x, text, modulation).isfinite().all())
        yield row | {"part": "block"}
        if not warm:
            yield from _parts(block, x, row, timer, rounds)


def _parts(block: Block, x: Tensor, row: Row, timer: Timer, rounds: int | None) -> Iterator[Row]:
    """Times of the parts of a block, each alone."""
    model = block.model
    q = torch.randn_like(x)
    calls: dict[str, Callable[[], Any]] = {"attention": lambda: block.attend(q, q, q)}
    gate = torch.ones(1, model.width, device=x.device, dtype=x.dtype)
    for layer in model.layers:
        rows = torch.randn(layer.rows, layer.columns, device=x.device).bfloat16()
        tail = (gate, x) if layer.tail == "gate" else ()
        calls[layer.name] = partial(block.linears[layer.name], rows, *tail)
    for name, found in compare(calls, timer=timer, rounds=rounds).items():
        yield {"model": row["model"], "way": row["way"], "tokens": row["tokens"], "part": name, **found}
