"""The kernels of the quantized attention as gpu_code.py compiles them: self-attention of 17 776 tokens in bfloat16."""

from qvgen_kernels.attention.contract import BLOCK
from qvgen_kernels.attention.triton import attend, form, gradient, quantize

ATTENTION_KERNELS = {
    "attention-64": (64, "none"),
    "attention-128": (128, "none"),
    "attention-128-mask": (128, "all"),
    "attention-qk-64": (64, "none"),
    "attention-qk-128": (128, "none"),
    "attention-qk-128-mask": (128, "all"),
    "attention-gradient-queries-64": (64, "query"),
    "attention-gradient-queries-128": (128, "query"),
    "attention-gradient-keys-64": (64, "key"),
    "attention-gradient-keys-128": (128, "key"),
    "attention-sums": (64, "sums"),
    "attention-keys": (64, "keys"),
    "attention-values": (64, "values"),
}
"""By name: D, and the mask of the attention's kernel, the side of the gradient's, or the kernel that quantizes."""


def attention_kernel(name, *, rows):
    """Return the kernel of that name, its arguments by type, its tile in words, and its options."""
    head_size, what = ATTENTION_KERNELS[name]
    if what in ("none", "all"):
        return _attend(head_size, what, rows, plain="-qk-" in name)
    if what in ("query", "key"):
        return _gradient(head_size, what)
    own = form.token_form(head_size, sums=what == "sums")
    sizes = form.TokenSizes("i32", "i32", "i32:16", "i32:16", "i32", "i32:16", "i32:16", "i32:16", 1, "fp32")
    mean, vector, codes = "*fp32:16", "*fp32:16", "*i8:16"
    kernel, t, tile = {
        "sums": (
            quantize.sums_kernel,
            form.TokenTensors(x="*bf16:16", partial=vector, low=vector, high=vector),
            f"{own.tokens} x {own.width}",
        ),
        "keys": (
            quantize.tokens_kernel,
            form.TokenTensors(x="*bf16:16", mean=mean, scale=vector, clip=vector, codes=codes),
            f"{own.tokens} x {own.width}",
        ),
        "values": (
            quantize.values_kernel,
            form.TokenTensors(x="*bf16:16", mean=mean, scale=vector, codes=codes, base="*i32:16"),
            f"{BLOCK} x {own.width}",
        ),
    }[what]
    return kernel, {"t": t, "sizes": sizes, "form": own}, tile, {"num_warps": 4}


def _attend(head_size, mask, tokens, *, plain):
    own = form.attend_form(head_size, keys=tokens, mask=mask, plain=plain, interpreted=False)
    scales, codes = "*fp32:16", "*i8:16"
    of_values = (None,) * 4 if plain else (codes, "*i32:16", scales, scales)
    quantized = form.Codes(codes, scales, codes, scales, *of_values)
    strides = (0, 0, 0, 0) if mask == "none" else ("i32:16", 0, "i32:16", 1)
    strides += ("i32:16", "i32:16", "i32:16") if plain else (0, 0, 0)
    arguments = {
        "t": form.AttendTensors(
            quantized, "*bf16:16", None if mask == "none" else "*i1:16", "*bf16:16" if plain else None
        ),
        "sizes": form.AttendSizes("i32", "i32:16", "i32:16", "i32", *strides),
        "form": own,
    }
    tile = f"{attend.ROWS} x {BLOCK}, {attend.STAGES} stages"
    return attend.attend_kernel, arguments, tile, {"num_warps": attend.WARPS, "num_stages": attend.STAGES}


def _gradient(head_size, side):
    own = form.attend_form(head_size, keys=BLOCK, mask="none", plain=False, interpreted=False)
    floats, codes = "*fp32:16", "*i8:16"
    quantized = form.Codes(codes, floats, codes, floats, codes, "*i32:16", floats, floats)
    statistics = form.Statistics(floats, floats, floats, floats)
    arguments = {
        "t": gradient.GradientTensors(quantized, statistics, floats, floats, None, None, floats, floats, floats),
        "sizes": form.AttendSizes("i32", "i32:16", "i32:16", "i32", 0, 0, 0, 0),
        "form": gradient.GradientForm(own.head_size, own.width, own.mask, own.plain, own.interpreted),
    }
    kernel, tile = {
        "query": (gradient.query_kernel, f"{attend.ROWS} x {BLOCK // 2}"),
        "key": (gradient.key_kernel, f"{gradient.QUERIES} x {BLOCK}"),
    }[side]
    return kernel, arguments, tile, {"num_warps": gradient.warps_of(own.width), "num_stages": 1}
