"""A model of each kernel's time on a card, shape by shape: what it can't be faster than.

    python kernels/bench/gpu_model.py docs/benchmarks/gpu-model.md

A kernel takes as long as its bytes at the memory's rate or its operations at the matrix units' peak, whichever is longer:

    bfloat16     2 (M K + N K + M N) bytes                              2 M K N operations at the bfloat16 peak
    quantize     2 M K + M K c + 8 M bytes                              none to speak of
    product      M K c + N K b / 8 + 12 N + 2 M N bytes                 2 M K N operations at the integer peak

with b bits a weight and c bytes an input code: 1, or 1/2 where the matrix units take 4-bit operands. A packed layer is
quantize and product, one after the other. Memory reaches 0.9 of what the datasheet says. A step adds attention in bfloat16
at its peak and all other operations, 10 % of the bfloat16 model's products. Attention's scores in 8 bits run at the integer
peak, its second product, whose sums are of probabilities, at twice bfloat16's.

Attention in 8 bits as kernels/attention.md defines it is bound otherwise. What it asks for each score, apart from products,
are 9 instructions: a conversion, a scale, a maximum, a multiply-add that clamps, a shift with a difference, a fraction, and
three multiply-adds to the rounded code. One more packs the code and adds it up, and every D / 64 of the block's sums costs an
addition and a multiply-add: 10 + D / 32, of which 5 + D / 32 are float32 additions and products.

What it leaves out: launches, the last wave of tiles, epilogues, and that no kernel reaches a peak.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from gpu.models import NAMES, Layer, Model, read_model

__all__ = ["CARDS", "Card", "attention_ms", "bf16_ms", "card_of", "packed_ms", "page_text", "quantize_ms", "step_ms"]

REACHED = 0.9
"""Share of a memory's rate that a kernel reaches: 4.3 of the H200's 4.8 TB/s."""
OTHERS = 0.1
"""Time of all that is no matrix product, of the bfloat16 model's products."""
WIDTHS = ((8, 8), (4, 8), (4, 4), (3, 3))


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card by its datasheet, dense rates.

    Attributes:
        name: As the driver says it, or a part of that.
        bf16: Operations per second, sums in float32.
        int8: Operations per second.
        int4: Operations per second; 0 where 4-bit operands are none of the matrix units'.
        float32: Float32 operations per second outside of the matrix units, a multiply-add being two.
        issued: Instructions per second, of all lanes: four warps a multiprocessor and clock.
        memory: Bytes per second.
        source: Where the numbers stand.
    """

    name: str
    bf16: float
    int8: float
    int4: float
    float32: float
    issued: float
    memory: float
    source: str


CARDS = (
    Card(
        name="H200",
        bf16=989.5e12,
        int8=1979e12,
        int4=0.0,
        float32=66.9e12,
        issued=33.45e12,
        memory=4.8e12,
        source="NVIDIA H200 Tensor Core GPU datasheet (SXM; its rates with sparsity, halved)",
    ),
    Card(
        name="A100",
        bf16=312e12,
        int8=624e12,
        int4=1248e12,
        float32=19.5e12,
        issued=19.5e12,
        memory=2.039e12,
        source="NVIDIA A100 80GB Tensor Core GPU datasheet (SXM), INT4: NVIDIA A100 architecture whitepaper",
    ),
    Card(
        name="RTX 4090",
        bf16=165.2e12,
        int8=660.6e12,
        int4=1321.2e12,
        float32=82.6e12,
        issued=41.3e12,
        memory=1.008e12,
        source="NVIDIA Ada GPU architecture whitepaper, appendix A",
    ),
)


def card_of(name: str) -> Card | None:
    """The card whose name is a part of this one."""
    return next((card for card in CARDS if card.name in name), None)


def _ms(card: Card, moved: float, operations: float, peak: float) -> float:
    return 1e3 * max(moved / (REACHED * card.memory), operations / peak)


def bf16_ms(layer: Layer, card: Card) -> float:
    """Milliseconds of the layer in bfloat16."""
    M, K, N = layer.rows, layer.columns, layer.outputs
    return _ms(card, 2.0 * (M * K + N * K + M * N), layer.operations, card.bf16)


def quantize_ms(layer: Layer, card: Card, *, four: bool = False) -> float:
    """Milliseconds of bringing the rows to codes; ``four``: two codes in a byte."""
    M, K = layer.rows, layer.columns
    return _ms(card, (2.5 if four else 3.0) * M * K + 8 * M, 0.0, card.int8)


def packed_ms(layer: Layer, weight_bits: int, card: Card, *, four: bool = False) -> float:
    """Milliseconds of the packed layer, its input's quantization included.

    Args:
        layer: The layer.
        weight_bits: Bits of a weight in memory.
        card: The card; one that has 4-bit matrix units if ``four``.
        four: Whether those multiply, as ``cuda_int4`` does.
    """
    M, K, N = layer.rows, layer.columns, layer.outputs
    code = 0.5 if four else 1.0
    moved = M * K * code + N * K * weight_bits / 8 + 12 * N + 2 * M * N
    product = _ms(card, moved, layer.operations, card.int4 if four else card.int8)
    return quantize_ms(layer, card, four=four) + product


def attention_ms(card: Card, *, heads: int, scores: int, head_size: int) -> tuple[float, float, float]:
    """Milliseconds of attention: in bfloat16; its products in 8 bits; the instructions around those.

    Args:
        card: The card.
        heads: Heads of all samples.
        scores: Queries times keys of a head.
        head_size: D.
    """
    operations, sums = 4.0 * heads * scores * head_size, head_size / 32
    around = heads * scores * max((10 + sums) / card.issued, 2 * (5 + sums) / card.float32)
    return 1e3 * operations / card.bf16, 1e3 * operations / card.int8, 1e3 * around


def _of_block(model: Model, card: Card) -> tuple[float, float, float]:
    scores = model.tokens * (model.tokens + model.text_tokens)
    return attention_ms(card, heads=model.heads, scores=scores, head_size=model.width // model.heads)


@dataclass(frozen=True)
class Step:
    """Milliseconds of a whole denoising step: one pass of one sample through all blocks.

    Attributes:
        bf16: In bfloat16.
        linears: With packed linears.
        scores: And attention's scores in 8-bit integers.
        attention: And its second product in 8 bits too.
        contract: With packed linears and attention in 8 bits as kernels/attention.md defines it.
    """

    bf16: float
    linears: float
    scores: float
    attention: float
    contract: float


def step_ms(model: Model, weight_bits: int, card: Card, *, four: bool = False) -> Step:
    """The time of a step of a model."""
    dense = model.blocks * sum(layer.count * bf16_ms(layer, card) for layer in model.layers)
    packed = model.blocks * sum(layer.count * packed_ms(layer, weight_bits, card, four=four) for layer in model.layers)
    attention = 1e3 * model.blocks * model.attention_operations / card.bf16
    half, share = attention / 2, card.bf16 / card.int8
    others = OTHERS * (dense + attention)
    return Step(
        dense + attention + others,
        packed + attention + others,
        packed + half * (1 + share) + others,
        packed + half * (share + max(share, 0.5)) + others,
        packed + model.blocks * max(_of_block(model, card)[1:]) + others,
    )


HEADER = """# Times of the GPU kernels: predicted, not measured

**Nothing here was measured.** `python kernels/bench/gpu_model.py docs/benchmarks/gpu-model.md` computes what no kernel can be
faster than: bytes at 0.9 of the memory's rate, or operations at the matrix units' dense peak, whichever takes longer. It is
what the first measurement (`bash kernels/bench/gpu.sh OUT`) is held against. Milliseconds; in brackets times bfloat16, whose
time is predicted the same way. Packed layers include the quantization of their input.

Per second:

| card | bfloat16 | int8 | int4 | float32 | instructions | memory | source |
|---|---|---|---|---|---|---|---|
"""


def page_text() -> str:
    """The whole page."""
    lines = [HEADER]
    for card in CARDS:
        four = f"{card.int4 / 1e12:g} T" if card.int4 else "emulated"
        rates = f"{card.bf16 / 1e12:g} T | {card.int8 / 1e12:g} T | {four} | {card.float32 / 1e12:g} T | "
        rates += f"{card.issued / 1e12:g} T | {card.memory / 1e12:g} TB"
        lines.append(f"| {card.name} | {rates} | {card.source} |\n")
    models = [read_model(name) for name in NAMES]
    for card in CARDS:
        names = [f"W{w}A{a}" for w, a in WIDTHS] + (["W4A4, 4-bit units"] if card.int4 else [])
        columns = ["model", "layer", "M x K -> N", "bf16", *names, "quantize alone"]
        lines.append(f"\n## {card.name}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n")
        lines += [_layer_line(model.name, layer, card) for model in models for layer in model.layers]
    lines.append(_steps(models))
    return "".join(lines)


def _layer_line(model: str, layer: Layer, card: Card) -> str:
    dense = bf16_ms(layer, card)
    times = [packed_ms(layer, bits[0], card) for bits in WIDTHS]
    times += [packed_ms(layer, 4, card, four=True)] if card.int4 else []
    cells = [f"{time:.3f} ({dense / time:.2f})" for time in times]
    shape = f"{layer.rows} x {layer.columns} -> {layer.outputs}"
    values = [model, layer.name, shape, f"{dense:.3f}", *cells, f"{quantize_ms(layer, card):.3f}"]
    return f"| {' | '.join(values)} |\n"


STEPS = """
## A whole step

One pass of one sample through all blocks, 4-bit weights and inputs (on a card with 4-bit matrix units: by those). Other
operations count as 10 % of bfloat16's products. Share: attention's of all products. Scores in int8 and all of attention:
what the matrix units allow, its scores at the int8 peak, its second product at twice bfloat16's. By the contract: attention
as `kernels/attention.md` defines it, which the table after this one explains.

| card | model | tokens | share | bf16 | packed linears | and scores in int8 | and all of attention | by the contract |
|---|---|---|---|---|---|---|---|---|
"""

ATTENTION = """
## Attention in 8 bits

Of one block, at the matrix units' peaks in bfloat16 and in int8, and the instructions that `kernels/attention.md` asks for
around the products: 10 + D / 32 for each score, of which 5 + D / 32 are float32 additions and products (an A100 issues
twice as many instructions as it adds numbers). The compiled loops (`gpu-code.md`) have 20 for D = 64. The longer one of the
two bounds attention in 8 bits; in brackets times bfloat16 at its peak, of which flash attention is published to reach half
to three quarters on an H100 or A100.

| card | model | heads x D | bf16 | int8 products | instructions | attention in 8 bits |
|---|---|---|---|---|---|---|
"""


def _steps(models: list[Model]) -> str:
    lines = [STEPS]
    for card in CARDS:
        for model in models:
            step = step_ms(model, 4, card, four=bool(card.int4))
            linears = sum(layer.count * layer.operations for layer in model.layers)
            share = model.attention_operations / (model.attention_operations + linears)
            four = (step.linears, step.scores, step.attention, step.contract)
            times = [f"{time:.0f} ({step.bf16 / time:.2f})" for time in four]
            head = f"{card.name} | {model.name} | {model.tokens} | {100 * share:.0f} % | {step.bf16:.0f}"
            lines.append(f"| {head} | {' | '.join(times)} |\n")
    lines.append(ATTENTION)
    for card in CARDS:
        for model in models:
            dense, products, instructions = _of_block(model, card)
            longer = max(products, instructions)
            shape = f"{card.name} | {model.name} | {model.heads} x {model.width // model.heads}"
            times = f"{dense:.2f} | {products:.2f} | {instructions:.2f} | {longer:.2f} ({dense / longer:.2f})"
            lines.append(f"| {shape} | {times} |\n")
    return "".join(lines)


def main() -> None:
    """Write the page."""
    Path(sys.argv[1]).write_text(page_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
