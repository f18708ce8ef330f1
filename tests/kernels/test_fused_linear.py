"""The steps before a packed linear: norm, modulation, type and function, against torch's operators one by one.

The Triton kernels run in Triton's interpreter and are held to the reference with torch.equal. Nothing here ran on a GPU.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional

from qvgen_kernels import LinearTensors, packed_linear, prepack
from qvgen_kernels.fused_op import fused_linear
from qvgen_kernels.input_steps import WIDEST_NORM, InputSteps, InputTensors, apply_steps, stated_norm
from qvgen_kernels.triton import backend as triton_backend
from qvgen_kernels.triton import quantize_form
from tests.kernels.layer import DTYPES, make_layer, make_rows
from tests.kernels.triton_interpreter import _quiet_numpy, function_choice, quantize
from tests.kernels.triton_interpreter import steps as triton_steps

__all__ = ["_quiet_numpy"]

ROWS, COLUMNS = 12, 40


def weight_of(layer, kernel):
    return prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec, kernel=kernel)


def run(layer, x, kernel="reference", *, before=None, steps=None, **tensors):
    """The outputs of a layer with its steps, by one backend."""
    return fused_linear(
        x,
        weight=weight_of(layer, kernel),
        before=before or InputTensors(),
        steps=steps or InputSteps(),
        tensors=LinearTensors(bias=layer.bias, **tensors),
        spec=layer.spec,
        kernel=kernel,
    )


def alone(layer, x, kernel="reference"):
    """The outputs of the layer for an input that has gone through its steps."""
    weight = weight_of(layer, kernel)
    return packed_linear(x, weight=weight, tensors=LinearTensors(bias=layer.bias), spec=layer.spec, kernel=kernel)


def modulation(count, columns, dtype, *, row=None):
    generator = torch.Generator().manual_seed(count)
    gain, shift = (torch.randn(count, columns, generator=generator).to(dtype) for _ in range(2))
    return InputTensors(gain=gain + 1, shift=shift, row=row)


def drawn(seed):
    """Rows, tensors and steps of any kind: x's type, T, gains of samples, rows or by index, norms with or without weights."""
    kinds = list(DTYPES)
    x = make_rows(ROWS, COLUMNS, seed=seed, dtype=DTYPES[kinds[seed % 3]])
    before, generator = InputTensors(), torch.Generator().manual_seed(seed)
    if seed % 4:
        count = (1, 3, ROWS, 5)[seed % 4]
        row = None
        if count == 5 or seed % 5 == 0:
            row = torch.randint(0, count, (ROWS,), generator=generator, dtype=torch.int32)
        before = modulation(count, COLUMNS, (torch.float32, x.dtype)[seed % 2], row=row)
    norm = ("none", "layer", "rms")[seed % 3]
    if norm != "none" and seed % 2:
        kind = torch.float32 if seed % 4 == 1 else x.dtype
        weight, bias = (torch.randn(COLUMNS, generator=generator).to(kind) for _ in range(2))
        before = before._replace(norm_weight=weight, norm_bias=bias)
    return x, before, InputSteps(norm=norm, eps=1e-6, dtype=("", *kinds)[seed // 3 % 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulations_round_as_torchs_operators(dtype):
    """What Wan's and CogVideoX's blocks write: float32 between a float32 norm and the type; and a type's own operators."""
    layer = make_layer(in_features=COLUMNS, out_features=9)
    normed = make_rows(6, COLUMNS).view(2, 3, COLUMNS)
    given = modulation(2, COLUMNS, torch.float32)
    gain, shift = given.gain.unsqueeze(1), given.shift.unsqueeze(1)
    steps = InputSteps(dtype=str(dtype).removeprefix("torch."))
    found = run(layer, normed, before=given, steps=steps)
    assert torch.equal(found, alone(layer, (normed * gain + shift).to(dtype)))
    assert found.dtype == dtype
    x = normed.to(dtype)
    given = InputTensors(gain=given.gain.to(dtype), shift=given.shift.to(dtype))
    expected = x * given.gain.unsqueeze(1) + given.shift.unsqueeze(1)
    assert torch.equal(run(layer, x, before=given), alone(layer, expected))
    row = torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.int32)
    expected = x.flatten(0, 1) * given.gain[row] + given.shift[row]
    assert torch.equal(run(layer, x, before=given._replace(row=row)).flatten(0, 1), alone(layer, expected))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_are_float64s_but_for_last_bits(kind):
    x = make_rows(40, 1920, seed=1)
    exact = x.double()
    exact = exact - exact.mean(-1, keepdim=True) if kind == "layer" else exact
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    weight, bias = torch.linspace(0.5, 2, 1920), torch.linspace(-1, 1, 1920)
    found = stated_norm(x, kind=kind, eps=1e-6)
    # 2^-22 of a row's largest number, which is up to sqrt(K) in units of the deviation, and a few roundings
    assert ((found - exact).abs() <= 2.0**-21 * exact.abs().amax(-1, keepdim=True)).all()
    assert torch.equal(stated_norm(x, weight, bias, kind=kind, eps=1e-6), found * weight + bias)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_no_order_of_columns_changes_a_norm(kind):
    x = make_rows(20, 999, seed=2)
    order = torch.randperm(999, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stated_norm(x, kind=kind)[:, order], stated_norm(x[:, order], kind=kind))
    # an ordinary sum does depend on it
    assert not torch.equal(x.sum(-1), x[:, order].sum(-1))


def test_a_norm_divides_by_the_ieee_square_root():
    """The norm is an RMSNorm, whose sums are exact here; numpy's root is the processor's own."""
    x = torch.randint(1 << 20, 1 << 21, (20_000, 2), generator=torch.Generator().manual_seed(0)).to(torch.float32)
    mean_square = (x.numpy().astype("float64") ** 2).sum(1, keepdims=True).astype("float32") / np.float32(2)
    assert np.array_equal(stated_norm(x, kind="rms").numpy(), x.numpy() * (np.float32(1) / np.sqrt(mean_square)))


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-30, 5.0, 1e30, 3e38, float("nan"), float("inf")])
def test_norms_of_extreme_rows_change_no_other_row(value):
    x = make_rows(5, COLUMNS)
    before = stated_norm(x, eps=1e-6)
    x[3] = value
    x[3, 0] = 0.0
    found = stated_norm(x, eps=1e-6)
    others = [0, 1, 2, 4]
    assert torch.equal(found[others], before[others])
    is_number = abs(value) < float("inf")
    assert bool(found[3].isfinite().all() if is_number else found[3].isnan().all())


@pytest.mark.parametrize("seed", range(24))
def test_the_triton_kernel_computes_the_steps_of_the_reference(seed, monkeypatch):
    options = {"activation_bits": (4, 8, 3)[seed % 3], "activation_zero_point": ("integer", "none")[seed % 2]}
    if seed % 6 == 3:  # elementwise steps with groups, which a program does not hold whole
        options |= {"weight_group_size": 8} if seed % 4 == 1 else {"activation_group_size": 8}
    layer = make_layer(in_features=COLUMNS, out_features=17, weight_bits=4, seed=seed, **options)
    x, before, steps = drawn(seed)
    scale = torch.linspace(0.5, 2, COLUMNS) if seed % 4 == 2 else None
    tensors = {"clip_high": torch.linspace(0.5, 1, ROWS), "input_scale": scale}
    expected = run(layer, x, before=before, steps=steps, **tensors)
    monkeypatch.setattr(triton_backend, "apply_steps", None)  # it does not leave them to torch
    found = run(layer, x, "triton", before=before, steps=steps, **tensors)
    assert found.dtype == expected.dtype == steps.output_dtype(x)
    assert torch.equal(found, expected)
    assert found.isfinite().all()


def test_rows_of_samples_that_lie_apart_are_read_where_they_lie(monkeypatch):
    layer = make_layer(in_features=COLUMNS, out_features=9)
    x = make_rows(2 * 7, COLUMNS).view(2, 7, COLUMNS)[:, 2:]
    given = modulation(2, COLUMNS, torch.float32)
    seen = []
    own = quantize.quantize_rows
    monkeypatch.setattr(quantize, "quantize_rows", lambda x, **rest: (seen.append(x.data_ptr()), own(x, **rest))[1])
    assert torch.equal(run(layer, x, "triton", before=given), run(layer, x, before=given))
    assert seen == [x.data_ptr()]


@pytest.mark.parametrize(
    "options",
    [
        {"rotation": 8},
        {"branch_rank": 2},
        {"weight_group_size": 8, "norm": "layer"},
        {"activation_group_size": 8, "norm": "rms"},
    ],
)
def test_what_the_kernel_does_not_compute_is_torchs(options):
    norm = options.pop("norm", "none") if "norm" in options else "none"
    layer = make_layer(in_features=COLUMNS, out_features=9, **options)
    x, before = make_rows(4, COLUMNS, dtype=torch.bfloat16), modulation(2, COLUMNS, torch.bfloat16)
    rank = layer.spec.branch_rank
    branch = {"branch_down": torch.ones(rank, COLUMNS) / 64, "branch_up": torch.ones(9, rank)} if rank else {}
    steps = InputSteps(norm=norm, eps=1e-5)
    found, expected = (
        run(layer, x, kernel, before=before, steps=steps, **branch) for kernel in ("triton", "reference")
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("function", "dtype"), [("silu", torch.float16), ("gelu_tanh", torch.bfloat16), ("silu", torch.float32)]
)
def test_functions_are_torchs_to_the_bit_whoever_computes_them(function, dtype, monkeypatch):
    """The interpreter's SiLU has torch's bits for all float16 numbers; its GELU has not, so torch's runs."""
    layer = make_layer(in_features=COLUMNS, out_features=9)
    x, steps = make_rows(6, COLUMNS, dtype=dtype), InputSteps(function=function)
    wanted = functional.silu(x) if function == "silu" else functional.gelu(x, approximate="tanh")
    expected = alone(layer, wanted)
    assert torch.equal(run(layer, x, steps=steps), expected)
    variant = function_choice.variant_of(function, dtype, x.device)
    assert (variant is not None) == (dtype == torch.float16)
    if variant is not None:
        monkeypatch.setattr(triton_backend, "apply_steps", None)
    assert torch.equal(run(layer, x, "triton", steps=steps), expected)


@pytest.mark.parametrize("variant", [name for names in triton_steps.VARIANTS.values() for name in names])
def test_the_quantizer_takes_exactly_the_numbers_of_a_variant(variant):
    x = make_rows(2, 2048, dtype=torch.bfloat16)
    wanted = function_choice.computed(x, variant)
    spec = make_layer(in_features=2048, out_features=1, weight_bits=4, activation_bits=8).spec
    before = quantize_form.StepsBefore(InputSteps(function=variant.partition(",")[0]), InputTensors(), variant)
    found = quantize.quantize_rows(x, spec=spec, tensors=LinearTensors(), before=before)
    expected = quantize.quantize_rows(wanted, spec=spec, tensors=LinearTensors())
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale[:, :2], expected.scale[:, :2])


def test_no_rows_and_their_type():
    layer = make_layer(in_features=COLUMNS, out_features=9)
    x = torch.empty(2, 0, COLUMNS)
    for kernel in ("reference", "triton"):
        y = run(
            layer, x, kernel, before=modulation(2, COLUMNS, torch.float32), steps=InputSteps("layer", dtype="bfloat16")
        )
        assert (y.shape, y.dtype) == ((2, 0, 9), torch.bfloat16)


def test_steps_compile_as_one_node_of_the_stated_type():
    layer = make_layer(in_features=COLUMNS, out_features=9)
    x, given, weight = make_rows(4, COLUMNS), modulation(2, COLUMNS, torch.float32), weight_of(layer, "reference")
    norm = torch.nn.LayerNorm(COLUMNS, eps=1e-6)

    def fused(x):
        steps = InputSteps(norm="layer", eps=norm.eps, dtype="bfloat16")
        return fused_linear(x, weight=weight, before=given, steps=steps, spec=layer.spec, kernel="reference")

    assert torch.equal(torch.compile(fused, fullgraph=True, backend="eager")(x), fused(x))
    torch._dynamo.reset()
    meta = [value.to("meta") for value in (x, given.gain, given.shift, *weight)]
    y = torch.ops.qvgen.fused_linear(
        meta[0], [*meta[1:3], None, None, None], InputSteps(dtype="float16").to_string(), meta[3:], [None] * 10,
        layer.spec.to_string(), "reference",
    )  # fmt: skip
    assert (y.shape, y.dtype, y.device.type) == ((4, 9), torch.float16, "meta")


@pytest.mark.parametrize(
    ("before", "steps", "message"),
    [
        ({"gain": torch.ones(3, COLUMNS)}, {}, "gain and shift of the input steps come together"),
        (
            {"gain": torch.ones(3, COLUMNS), "shift": torch.ones(3, COLUMNS)},
            {},
            "gain has 3 rows, which do not divide the 4",
        ),
        (
            {"gain": torch.ones(2, 8), "shift": torch.ones(2, 8)},
            {},
            r"gain is torch.float32 \[2, 8\]; it must be .*\[2, 40\]",
        ),
        ({"gain": torch.ones(2, COLUMNS), "shift": torch.ones(2, COLUMNS).half()}, {}, "shift is torch.float16"),
        ({"norm_weight": torch.ones(COLUMNS)}, {}, "norm_weight or norm_bias given with norm='none'"),
        ({"norm_bias": torch.ones(3)}, {"norm": "rms"}, r"norm_bias is torch.float32 \[3\]; it must be"),
        ({}, {"norm": "batch"}, "norm='batch' of the input steps is unknown; use one of 'none', 'layer', 'rms'"),
        ({}, {"function": "relu"}, "function='relu' of the input steps is unknown"),
        ({}, {"eps": float("nan")}, "eps=nan of the input steps must be finite"),
        ({}, {"dtype": "int8"}, "dtype='int8' of the input steps is unknown"),
        (
            {"gain": torch.ones(1, COLUMNS), "shift": torch.ones(1, COLUMNS), "row": torch.zeros(4)},
            {},
            "row is torch.float32",
        ),
    ],
)
def test_bad_steps_are_named(before, steps, message):
    layer = make_layer(in_features=COLUMNS, out_features=9)
    with pytest.raises(ValueError, match=message):
        run(layer, make_rows(4, COLUMNS), before=InputTensors(**before), steps=InputSteps(**steps))


def test_a_norm_that_could_leave_int64_is_refused():
    with pytest.raises(ValueError, match=f"up to {WIDEST_NORM}"):
        run(
            make_layer(in_features=WIDEST_NORM + 4, out_features=1),
            torch.ones(1, WIDEST_NORM + 4),
            steps=InputSteps("rms"),
        )


def test_there_is_no_backward_pass():
    layer = make_layer(in_features=COLUMNS, out_features=9)
    x = make_rows(4, COLUMNS).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        run(layer, x).sum().backward()


def test_the_reference_is_what_the_operators_docstring_says():
    x = make_rows(4, COLUMNS, dtype=torch.bfloat16)
    given = modulation(2, COLUMNS, torch.bfloat16)._replace(norm_weight=torch.linspace(0.5, 2, COLUMNS))
    found = apply_steps(x, tensors=given, steps=InputSteps("layer", 1e-5))
    normed = stated_norm(x, given.norm_weight, eps=1e-5).bfloat16()
    expected = normed.view(2, 2, -1) * given.gain.unsqueeze(1) + given.shift.unsqueeze(1)
    assert torch.equal(found, expected.flatten(0, 1))
    # torch's own norm rounds otherwise in the last bit of a few numbers at most
    theirs = functional.layer_norm(x, (COLUMNS,), given.norm_weight.bfloat16(), None, 1e-5)
    mine = stated_norm(x, given.norm_weight.bfloat16(), eps=1e-5).bfloat16()
    assert ((mine != theirs).float().mean() < 0.02).item()
