"""The kernels of fused fake quantization as gpu_code.py compiles them: for a row of an input in bfloat16, and of a weight."""

from qvgen_kernels.fake_quantize import RowSpec
from qvgen_kernels.triton import fake_form, fake_gradient, fake_quantize

FAKE_KERNELS = {
    "fake-quantize": {"kind": "dynamic", "qmin": 0, "qmax": 15, "zero_point": "integer", "group": 1920},
    "fake-gradient": {"kind": "dynamic", "qmin": 0, "qmax": 15, "zero_point": "integer", "group": 1920},
    "fake-gradient-weight": {"kind": "learned", "qmin": 0, "qmax": 15, "zero_point": "integer", "group": 1920},
}
"""The step of training (qvgen_kernels.fake_quantize) of an input, and of a weight."""


def fake_kernel(name, *, rows):
    """Return the kernel of that name, its arguments by type, and its tile in words."""
    spec = RowSpec(floor=1e-8, ceiling=3e38, **FAKE_KERNELS[name])
    form = fake_form.fake_form(spec, groups=1, segments=rows)
    dynamic = "*fp32:16" if spec.kind == "dynamic" else None
    given = ("*bf16:16" if dynamic else "*fp32:16", "*fp32:16", "*fp32:16", dynamic, dynamic)
    tensors = fake_form.FakeTensors(*given, operand="*bf16:16" if dynamic else None)
    sizes = fake_form.FakeSizes("i32:16", "i32:16")
    if name == "fake-quantize":
        arguments = {"t": tensors._replace(scale="*fp32:16"), "sizes": sizes, "form": form}
        return fake_quantize.fake_quantize_kernel, arguments, f"{form.rows} x {form.block}"
    tensors = tensors._replace(grad="*fp32:16", grad_first="*fp32:16", grad_second="*fp32:16")
    arguments = {"t": tensors, "sizes": sizes, "form": form}
    return fake_gradient.fake_gradient_kernel, arguments, f"{form.rows} x {fake_form.RUN}"
