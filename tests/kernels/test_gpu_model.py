"""The model of the GPU kernels' times: against figures worked out by hand, and its page against the program."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from gpu.models import NAMES, Layer, read_model
from gpu_model import CARDS, attention_ms, bf16_ms, card_of, packed_ms, page_text, quantize_ms, step_ms

ROOT = Path(__file__).resolve().parents[2]
H200, A100, ADA = CARDS


def test_the_page_is_what_the_program_writes():
    text = (ROOT / "docs" / "benchmarks" / "gpu-model.md").read_text(encoding="utf-8")
    assert text == page_text(), "run python kernels/bench/gpu_model.py docs/benchmarks/gpu-model.md"
    assert text.startswith("# Times of the GPU kernels: predicted, not measured\n")


def test_a_large_product_is_bound_by_operations():
    layer = Layer(name="ff1", rows=17776, columns=1920, outputs=7680)
    operations = 2 * 17776 * 1920 * 7680
    assert math.isclose(bf16_ms(layer, H200), 1e3 * operations / 989.5e12)
    quantize = 1e3 * (3 * 17776 * 1920 + 8 * 17776) / 4.32e12
    assert math.isclose(quantize_ms(layer, H200), quantize)
    assert math.isclose(packed_ms(layer, 4, H200), quantize + 1e3 * operations / 1979e12)
    four = 1e3 * ((2.5 * 17776 * 1920 + 8 * 17776) / (0.9 * 2.039e12) + operations / 1248e12)
    assert math.isclose(packed_ms(layer, 4, A100, four=True), four)


def test_few_rows_are_bound_by_the_weights_bytes():
    layer = Layer(name="any", rows=16, columns=4096, outputs=4096)
    moved = 16 * 4096 + 4096 * 4096 * 3 / 8 + 12 * 4096 + 2 * 16 * 4096
    expected = 1e3 * moved / 4.32e12 + quantize_ms(layer, H200)
    assert math.isclose(packed_ms(layer, 3, H200), expected)
    assert bf16_ms(layer, H200) / packed_ms(layer, 3, H200) > 4


def test_attention_is_bound_by_its_instructions_or_its_products():
    scores = 17776 * 17776
    dense, products, around = attention_ms(H200, heads=30, scores=scores, head_size=64)
    assert math.isclose(dense, 1e3 * 4 * 30 * scores * 64 / 989.5e12)
    assert math.isclose(products, 1e3 * 4 * 30 * scores * 64 / 1979e12)
    assert math.isclose(around, 1e3 * 30 * scores * 12 / 33.45e12)
    _, _, around = attention_ms(A100, heads=30, scores=scores, head_size=64)  # it adds half as fast as it issues
    assert math.isclose(around, 1e3 * 30 * scores * 7 / 9.75e12)
    _, products, around = attention_ms(ADA, heads=12, scores=scores, head_size=128)
    assert products > around


LIMITS = {
    ("H200", "cogvideox"): (1.22, 1.46, 1.83),
    ("A100", "cogvideox"): (1.37, 1.68, 2.19),
    ("RTX 4090", "cogvideox"): (1.46, 2.08, 2.92),
    ("H200", "wan"): (1.15, 1.42, 1.83),
    ("A100", "wan"): (1.25, 1.56, 2.09),
    ("RTX 4090", "wan"): (1.30, 1.90, 2.73),
    ("H200", "wan-14b"): (1.27, 1.50, 1.83),
    ("A100", "wan-14b"): (1.47, 1.79, 2.28),
    ("RTX 4090", "wan-14b"): (1.59, 2.24, 3.07),
}
"""Times bfloat16 of a whole step, by operations alone: packed linears, and scores in int8, and all of attention in 8 bits."""


@pytest.mark.parametrize(("card", "model"), LIMITS)
def test_without_bytes_a_step_is_what_its_operations_allow(card, model):
    free = replace(card_of(card), memory=math.inf)
    step = step_ms(read_model(model), 4, free, four=bool(free.int4))
    found = [step.bf16 / time for time in (step.linears, step.scores, step.attention)]
    assert found == pytest.approx(LIMITS[card, model], abs=0.02)


def test_bytes_only_make_it_slower():
    for name in NAMES:
        model = read_model(name)
        for card in CARDS:
            assert step_ms(model, 4, card).linears > step_ms(model, 4, replace(card, memory=math.inf)).linears


def test_a_card_is_found_by_its_drivers_name():
    assert card_of("NVIDIA H200") is H200
    assert card_of("NVIDIA A100-SXM4-80GB") is A100
    assert card_of("NVIDIA GeForce RTX 4090") is ADA
    assert card_of("Tesla T4") is None
