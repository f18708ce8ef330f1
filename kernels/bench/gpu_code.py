"""Compile the Triton and Gluon kernels for cards that need not be here, and say what the machine code is: a table, or JSON.

    python kernels/bench/gpu_code.py docs/benchmarks/gpu-code.md       all kernels and cards, some minutes
    python kernels/bench/gpu_code.py - 90:w4a4 80:quantize             those, as JSON on stdout

It needs Triton and no GPU. Tiles are those that the backends take for 17 776 rows of [1920 -> 5760] (CogVideoX-2b).
"""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import triton
from attention_kernels import ATTENTION_KERNELS, attention_kernel
from fake_kernels import FAKE_KERNELS, fake_kernel
from machine_code import EMPTYING, MATRIX, disassembled, inner_loop, operation
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from qvgen_kernels import LinearSpec
from qvgen_kernels.gluon import gemm as gluon_gemm
from qvgen_kernels.gluon import tile as gluon_tile
from qvgen_kernels.hadamard import paley_factor
from qvgen_kernels.input_steps import InputSteps
from qvgen_kernels.triton import gemm, quantize, quantize_form, rotate
from qvgen_kernels.triton.fake_operators import WARPS
from qvgen_kernels.triton.launch import OPTIONS
from qvgen_kernels.triton.layout import unsigned_activations
from qvgen_kernels.triton.tiles import Card, tile_of

ROWS = 17776
CARDS = {
    80: Card((8, 0), 108),
    89: Card((8, 9), 128),
    90: Card((9, 0), 132),
    100: Card((10, 0), 148),
    120: Card((12, 0), 170),
    942: Card((0, 0), 304),
}
"""By compute capability; AMD's by the number of its architecture."""

AMD = {942}
NAMES = {80: "A100", 89: "RTX 4090, L40", 90: "H100, H200", 100: "B200", 120: "RTX 5090", 942: "MI300"}

_GROUPED = {"weight_group_size": 64, "activation_group_size": 64}
_SYMMETRIC = {"weight_zero_point": "none", "activation_zero_point": "none"}
PRODUCTS = {
    "w2a8": {"weight_bits": 2, "activation_bits": 8},
    "w3a3": {"weight_bits": 3, "activation_bits": 3},
    "w4a4": {"weight_bits": 4, "activation_bits": 4},
    "w4a8": {"weight_bits": 4, "activation_bits": 8},
    "w8a8-symmetric": {"weight_bits": 8, "activation_bits": 8, **_SYMMETRIC},
    "w4a4-real-zero": {"weight_bits": 4, "activation_bits": 4, "weight_zero_point": "real"},
    "w4a4-groups": {"weight_bits": 4, "activation_bits": 4, **_GROUPED, **_SYMMETRIC},
    "w4a4-gelu-gate-residual": {"weight_bits": 4, "activation_bits": 4, "function": "gelu_tanh"},
}
ROW_KERNELS = {
    "quantize": {},
    "quantize-groups": _GROUPED,
    "quantize-division": {**_SYMMETRIC, "activation_arithmetic": "division"},
    "norm-modulate-quantize": {},
    "gelu-quantize": {"in_features": 7680, "out_features": 1920},
    "butterfly": {"rotation": 1920},
    "regular": {"rotation": 64, "rotation_kind": "regular"},
    "paley": {"rotation": 1920},
}

STEPS = {
    "norm-modulate-quantize": (InputSteps(norm="layer", eps=1e-5), "none"),
    "gelu-quantize": (InputSteps(function="gelu_tanh"), "gelu_tanh, contracted"),
}

GLUON = ("w3a3", "w4a4", "w4a8", "w8a8-symmetric", "w4a4-real-zero", "w4a4-gelu-gate-residual")
"""Products that are also compiled in Gluon, for the one card that its kernel is for."""


def spec_of(options):
    """Return the layer of a variant."""
    return LinearSpec(**({"in_features": 1920, "out_features": 5760, "weight_bits": 4, "activation_bits": 4} | options))


def target_of(capability):
    """Return what Triton compiles for."""
    return GPUTarget("hip", f"gfx{capability}", 64) if capability in AMD else GPUTarget("cuda", capability, 32)


def compiled(kernel, arguments, *, capability, **options):
    """Compile a kernel; an argument is a type (":16" where it is a multiple of 16), None, a number, or a tuple of them."""
    signature, constants, attributes = {}, {}, {}

    def described(value, path):
        if isinstance(value, tuple):
            parts = [described(part, (*path, place)) for place, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        if value.endswith(":16"):
            attributes[path] = [["tt.divisibility", 16]]
        return value.removesuffix(":16")

    for place, name in enumerate(kernel.arg_names):
        signature[name] = described(arguments[name], (place,))
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    return triton.compile(source, target=target_of(capability), options=options | OPTIONS)


def product(options, capability, *, in_gluon=False):
    """The compiled product of a layer with bias; with its tail where it has a function."""
    spec = spec_of(options)
    tail = spec.function != "none"
    zero, unsigned = spec.weight_zero_point, "*i32:16" if unsigned_activations(spec) else None
    zeros = "*i32:16" if zero == "integer" else None, "*fp32:16" if zero == "real" else None
    operands = quantize_form.Operands("*i8:16", "*fp32:16", unsigned, None if zero == "none" else "*i32:16")
    weight = gemm.WeightTensors("*i8:16", "*fp32:16", *zeros, unsigned)
    strides = ("i32", "i32:16", 1, "i32:16", 1) if tail else (1, 0, 0, 0, 0)
    groups = 1 if spec.num_groups == 1 else "i32"
    arguments = {
        "a": operands,
        "w": weight,
        "tail": gemm.GemmTensors("*bf16:16", "*fp32:16", None, *(["*bf16:16"] * 2 if tail else [None, None])),
        "sizes": gemm.GemmSizes("i32:16", "i32:16", "i32", groups, "i32:16", *strides),
    }
    if in_gluon:
        return gluon_product(spec, arguments)
    tile = tile_of(spec, rows=ROWS, card=CARDS[capability])
    arguments["form"] = replace(gemm.gemm_form(spec, tile), plain=capability in AMD)
    found = compiled(gemm.gemm_kernel, arguments, capability=capability, num_warps=tile.warps, num_stages=tile.stages)
    return found, f"{tile.outputs} x {tile.rows}, {tile.stages} stages"


def with_steps(form, tensors, sizes, steps, variant):
    """What the quantizer's kernel takes for bfloat16 steps; a norm's with a gain and a shift for each of two samples."""
    form = quantize_form.form_with_steps(form, steps, dtype=torch.bfloat16, round_to=torch.bfloat16, variant=variant)
    if steps.norm != "none":
        names = ("gain", "shift_by", "norm_weight", "norm_bias")
        tensors = tensors._replace(**dict.fromkeys(names, "*bf16:16"))
        sizes = sizes._replace(gain_rows="i32", gain_count="i32", gain_row="i32:16", shift_row="i32:16")
    return form, tensors, sizes


def gluon_product(spec, arguments):
    """The compiled product in Gluon, for sm_90."""
    tile = gluon_tile.tile_of(spec, rows=ROWS, card=CARDS[90])
    arguments["form"] = gluon_gemm.ring_form(spec, tile)
    arguments["operands"] = (arguments.pop("a"), arguments.pop("w"))
    arguments["descriptors"] = tuple(
        f"tensordesc<i8[{side},{gluon_tile.CHUNK}],{gluon_gemm.OPERAND!r}>" for side in (tile.outputs, tile.rows)
    )
    found = compiled(gluon_gemm.multiply_kernel, arguments, capability=90, num_warps=tile.warps)
    return found, f"{tile.outputs} x {tile.rows}, {tile.stages} stages"


def row_kernel(name, options, capability):
    """The compiled kernel of that name for rows of bfloat16 (the sum of Paley: float32)."""
    spec = spec_of(options)
    if "quantize" in name:
        parts = spec.num_groups if spec.activation_group_size else 1
        form = quantize_form.quantize_form(spec, segments=ROWS * parts)
        sums = "*i32:16" if spec.weight_zero_point != "none" else None
        tensors = quantize_form.QuantizeTensors("*bf16:16", "*i8:16", "*fp32:16", None, sums, *[None] * 5)
        sizes = quantize_form.QuantizeSizes("i32:16", "i32:16", 1, "i32:16", "i32:16")
        if name in STEPS:
            form, tensors, sizes = with_steps(form, tensors, sizes, *STEPS[name])
        arguments, warps = {"t": tensors, "sizes": sizes, "form": form}, quantize_form.warps_of(form)
        found = compiled(quantize.quantize_kernel, arguments, capability=capability, num_warps=warps)
        return found, f"{form.rows} x {form.block}"
    if name == "paley":
        order = paley_factor(spec.rotation)
        form = rotate.PaleyForm(order, spec.rotation // order, 64, 32, 0.1)
        arguments = {"x": "*fp32:16", "signs": "*fp32:16", "out": "*fp32:16", "form": form}
        return compiled(rotate.paley_kernel, arguments, capability=capability, num_warps=4), "64 x 32"
    radix, run = (4, spec.rotation) if name == "regular" else (2, spec.rotation // paley_factor(spec.rotation))
    form = rotate.RotateForm(spec.in_features, run, 4096 // run, radix, 1.0)
    arguments = {
        "t": rotate.RotateTensors("*bf16:16", "*fp32:16", None),
        "sizes": rotate.RotateSizes("i32:16", "i32:16", 1),
        "form": form,
        "steps": (run.bit_length() - 1) // (radix // 2),
    }
    return compiled(rotate.butterfly_kernel, arguments, capability=capability, num_warps=4), f"{4096 // run} x {run}"


def measured_amd(found):
    """Count what can be read off AMD's assembly text; loops are not looked at."""
    text = found.asm["amdgcn"]
    return {
        "matrix_instruction": ", ".join(sorted(set(re.findall(r"\bv_mfma_\w+", text)))),
        "registers": int(re.search(r"\.vgpr_count: +(\d+)", text)[1]),
        "stack_bytes": int(re.search(r"\.private_segment_fixed_size: +(\d+)", text)[1]),
        "shared_bytes": found.metadata.shared,
        "loop_instructions": 0,
    }


def measure(capability, name):
    """What the machine code of a kernel is, as a dict of names and numbers."""
    options = PRODUCTS.get(name.removeprefix("gluon-"))
    if options is not None:
        found, tile = product(options, capability, in_gluon=name.startswith("gluon-"))
    elif name in FAKE_KERNELS:
        kernel, arguments, tile = fake_kernel(name, rows=ROWS)
        found = compiled(kernel, arguments, capability=capability, num_warps=WARPS)
    elif name in ATTENTION_KERNELS:
        kernel, arguments, tile, launched = attention_kernel(name, rows=ROWS)
        found = compiled(kernel, arguments, capability=capability, **launched)
    else:
        found, tile = row_kernel(name, ROW_KERNELS[name], capability)
    head = {"capability": capability, "kernel": name, "tile": tile, "warps": found.metadata.num_warps}
    if capability in AMD:
        return head | measured_amd(found)
    lines, registers, stack = disassembled(found)
    loop = inner_loop(lines)
    every, inside = Counter(operation(text) for _, text in lines), Counter(map(operation, loop))
    matrix = sorted({name for name in every if MATRIX.match(name)})

    def count(counted, *prefixes):
        return sum(number for key, number in counted.items() if key.startswith(prefixes))

    return head | {
        "matrix_instruction": ", ".join(matrix),
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": found.metadata.shared,
        "instructions": len(lines),
        "loop_instructions": len(loop),
        "loop_products": count(inside, "IMMA", "IGMMA", "UTCIMMA", "HMMA", "HGMMA", "UTCHMMA"),
        "loop_permutes": count(inside, "PRMT"),
        "loop_local": count(inside, "LDL", "STL"),
        "loop_contractions": count(inside, "FFMA"),
        "loop_clamps": count(inside, "FFMA.SAT"),
        "loop_waits": sum(bool(EMPTYING.search(text)) for text in loop),
        "loop_partial_waits": count(inside, "WARPGROUP.DEPBAR") - sum(bool(EMPTYING.search(text)) for text in loop),
        "loop_barriers": count(inside, "BAR.SYNC"),
        "loop_copies_waited_for": count(inside, "SYNCS.PHASECHK"),
        "tma_copies": count(every, "UTMALDG"),
        "contractions": count(every, "FFMA"),
        "divisions_ieee": found.asm["ptx"].count("div.rn.f32"),
        "divisions_fast": found.asm["ptx"].count("div.full.f32"),
        "multiply_adds": found.asm["ptx"].count("fma.rn"),
        "roots_ieee": found.asm["ptx"].count("sqrt.rn.f32"),
        "roots_fast": found.asm["ptx"].count("sqrt.approx"),
        "flushed": found.asm["ptx"].count(".ftz"),
        "coalesced_stores": count(every, "STG.E.128"),
    }


HEADER = """# Machine code of the GPU kernels

**Compiled only: nothing of this has run on a GPU.** Triton {triton}, made by `python kernels/bench/gpu_code.py
docs/benchmarks/gpu-code.md`, for {rows} rows of [1920 -> 5760], bfloat16 in and out, with bias. Stack and shared memory in
bytes. A loop is the innermost one that holds matrix products; permutes are byte permutations (`PRMT`) in it; waits are those
for all matrix products under way in it (Hopper: Triton {triton} does so in every tile of columns for sums of integers). Rows
`gluon-...` are the Gluon kernel, whose loop leaves one product under way; its warps are eight that multiply, one that copies
and three that fill up a group. Rows `attention-...` are the attention in 8 bits of {rows} tokens: a tile is queries x keys,
its loop holds a thread's 32 scores and, in a branch that most blocks skip, the rescaling of its sums. No loop uses its stack.
"""

COLUMNS = (
    "card", "kernel", "tile", "warps", "matrix instruction", "registers", "stack", "shared memory",
    "loop: instructions / products / permutes / waits",
)  # fmt: skip


def table_row(m):
    """A line of the table."""
    keys = ("loop_instructions", "loop_products", "loop_permutes", "loop_waits")
    loop = " / ".join(str(m[key]) for key in keys) if m["loop_instructions"] else ""
    card = f"gfx{m['capability']}" if m["capability"] in AMD else f"sm_{m['capability']}"
    return (
        f"| {card} ({NAMES[m['capability']]}) | {m['kernel']} | {m['tile']} | {m['warps']} | "
        f"{m['matrix_instruction']} | {m['registers']} | {m['stack_bytes']} | {m['shared_bytes']} | {loop} |\n"
    )


def main() -> None:
    """Write the table, or print what was asked for."""
    target, *chosen = sys.argv[1:]
    if chosen:
        pairs = [choice.partition(":")[::2] for choice in chosen]
        print(json.dumps([measure(int(capability), name) for capability, name in pairs]))
        return
    rows = []
    for capability in CARDS:
        gluon = [f"gluon-{name}" for name in GLUON if capability == 90]
        for name in (*PRODUCTS, *ROW_KERNELS, *FAKE_KERNELS, *ATTENTION_KERNELS, *gluon):
            print(f"sm_{capability} {name}", file=sys.stderr)
            rows.append(table_row(measure(capability, name)))
    text = HEADER.format(triton=triton.__version__, rows=f"{ROWS:,}".replace(",", " "))
    table = f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
    Path(target).write_text(text + table + "".join(rows))


if __name__ == "__main__":
    main()
