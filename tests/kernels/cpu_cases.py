"""Random calls of the CPU backends, what the reference says of them, and their comparison.

``draw_case`` takes anything with ``integers(low, high)`` (both inclusive) and ``choice(list)``, so that hypothesis and a
seeded generator make the same kind of case.
"""

import ctypes
import random
import subprocess
from dataclasses import dataclass, replace

import torch

from qvgen_kernels import LinearTensors, cpu, get_backend
from qvgen_kernels.cpu_library import BACKENDS
from qvgen_kernels.hadamard import rotation_sizes
from qvgen_kernels.reference import accumulate, quantize_activations
from tests.kernels import oracle
from tests.kernels.layer import DTYPES, Layer, as64, make_layer, make_rows

KERNEL_OF = {"portable": "portable", "avx2": "avx2", "avxvnni": "avx2", "vnni": "vnni", "amx": "amx", "neon": "neon"}
NOTHING = LinearTensors()
POINTERS = [name for name, kind in cpu.CLinear._fields_ if kind is ctypes.c_void_p]
WIDTH = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@dataclass
class Case:
    layer: Layer
    x: torch.Tensor
    tensors: LinearTensors = NOTHING

    def expected(self):
        """Operands [M, K], scales, accumulators, y of the reference, and which rows are finite."""
        spec = self.layer.spec
        operand, scale, _ = quantize_activations(self.x, spec=spec, tensors=self.tensors)
        acc = accumulate(operand, self.layer.weight, spec=spec)
        y = get_backend("reference").linear(self.x, self.layer.weight, tensors=self.tensors, spec=spec)
        finite = scale.isfinite().all(1) & operand.flatten(1).isfinite().all(1)
        return operand.flatten(1), scale, acc, y, finite

    def plain(self):
        """The reference's outputs before function, gate and residual."""
        spec = replace(self.layer.spec, function="none")
        tensors = self.tensors._replace(gate=None, residual=None)
        return get_backend("reference").linear(self.x, self.layer.weight, tensors=tensors, spec=spec)

    def packed(self, variant):
        layer = self.layer
        backend = get_backend(KERNEL_OF[variant])
        weight = backend.prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec)
        return weight, backend.k_unit


def draw_case(draw, *, columns=(1, 260), rows=(1, 70), seed=0):
    K = draw.choice([64, 96, 128, 240, draw.integers(*columns)])
    N, M = draw.integers(1, 100), draw.integers(*rows)
    options = {
        "in_features": K,
        "out_features": N,
        "weight_bits": draw.integers(2, 8),
        "activation_bits": draw.integers(2, 8),
        "weight_zero_point": draw.choice(["integer", "real", "none"]),
        "activation_zero_point": draw.choice(["integer", "none"]),
        "scale_dtype": draw.choice(list(DTYPES)),
    }
    grouped = draw.choice(["", "", "weight", "activation", "both"])
    size = draw.choice([n for n in range(1, K + 1) if K % n == 0])
    for side in ("weight", "activation"):
        if grouped in (side, "both"):
            options[f"{side}_group_size"] = size
    kind = draw.choice(["sylvester", "regular"])
    sizes = rotation_sizes(K, kind)
    if sizes and draw.choice([True, False]):
        options |= {"rotation": draw.choice(sizes), "rotation_kind": kind}
    static = "activation_group_size" not in options and draw.choice([True, False, False])
    options["activation_range"] = "static" if static else "dynamic"
    if options["activation_zero_point"] == "none" and not static:
        options["activation_arithmetic"] = draw.choice(["reciprocal", "division", "unrounded"])
    options["branch_rank"] = min(N, K, draw.choice([0, 0, 3]))
    options["function"] = draw.choice(["none", "none", "none", "gelu_tanh", "silu"])
    layer = make_layer(seed=seed, **options)
    x = layout_of(
        draw.choice(["plain", "transposed", "sliced", "stepped"]), M, K, DTYPES[draw.choice(list(DTYPES))], seed
    )
    generator = torch.Generator().manual_seed(seed)
    if draw.choice([True, False]) and M > 4:
        x[1], x[2] = 0.0, x[2].abs()
        x[0, K // 2], x[3, 0] = float("nan"), -float("inf")
    clipped, smoothed, biased = (draw.choice([True, False]) for _ in range(3))
    clips = [torch.rand(M, generator=generator) * 0.3 + 0.7 for _ in range(2)]
    qmax = layer.spec.activation_qmax
    zeros = torch.randint(0, qmax + 1, (M,), generator=generator).float()
    integer = layer.spec.activation_zero_point == "integer"
    rank = layer.spec.branch_rank
    tensors = LinearTensors(
        bias=layer.bias if biased else None,
        clip_low=clips[0] if clipped and not static else None,
        clip_high=clips[1] if clipped and not static else None,
        input_scale=torch.randn(K, generator=generator) if smoothed else None,
        row_scale=torch.rand(M, generator=generator) + 0.01 if static else None,
        row_zero_point=zeros if static and integer else None,
        branch_down=torch.randn(rank, K, generator=generator) if rank else None,
        branch_up=torch.randn(N, rank, generator=generator) if rank else None,
        **draw_tail(draw, M, N, x.dtype, seed),
    )
    return Case(layer, x, tensors)


def draw_tail(draw, rows, outputs, dtype, seed):
    """A gate and a residual, or one of them, or none; of any strides."""
    samples = draw.choice([1, rows, draw.choice([n for n in range(1, rows + 1) if rows % n == 0])])
    gate = draw.choice([None, None, "x", "float32"])
    kinds = ["plain", "sliced", "transposed", "stepped"]
    layout, residual = draw.choice(kinds), draw.choice([None, None, *kinds])
    gate_dtype = dtype if gate == "x" else torch.float32
    return {
        "gate": None if gate is None else layout_of(layout, samples, outputs, gate_dtype, seed + 1),
        "residual": None if residual is None else layout_of(residual, rows, outputs, dtype, seed + 2),
    }


def layout_of(kind, rows, columns, dtype, seed):
    """Rows [rows, columns] with the strides that views have."""
    if kind == "transposed":
        return make_rows(columns, rows, seed=seed, dtype=dtype).t()
    if kind == "sliced":
        return make_rows(rows, columns + 7, seed=seed, dtype=dtype)[:, 3 : 3 + columns]
    if kind == "stepped":
        return make_rows(2 * rows, 2 * columns, seed=seed, dtype=dtype)[::2, ::2]
    return make_rows(rows, columns, seed=seed, dtype=dtype)


class Seeded:
    """The drawing interface on a seeded generator."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def integers(self, low, high):
        return self.random.randint(low, high)

    def choice(self, values):
        return self.random.choice(values)


def compare(case, found, expected=None):
    """Codes, scales and accumulators are equal; outputs too, but for the allowed rounding of real zero points."""
    operand, scale, acc, y, finite = expected or case.expected()
    found_operand, found_scale, found_acc, found_y = found
    assert torch.equal(found_operand[finite].float(), operand[finite])
    assert torch.equal(found_scale[finite], scale[finite])
    assert torch.equal(found_acc[finite], acc[finite])
    assert found_y.dtype == y.dtype
    assert found_y[~finite].isnan().all()
    if case.layer.spec.function != "none":
        assert bool(near_function(case, y, found_y)[finite].all())
        return
    if not case.layer.spec.branch_rank:
        # Real zero points included: the contract would allow a rounding, but the order of operations is the same.
        assert torch.equal(found_y[finite], y[finite])
        return
    # torch's product may round otherwise when its operands lie elsewhere in memory: 2 eps of the branch's terms, and of y
    down, up = (t.to(y.dtype).double() for t in (case.tensors.branch_down, case.tensors.branch_up))
    bound = (case.x[finite].double().abs() @ down.abs().t()) @ up.abs().t()
    bound = bound * gate_of(case)[finite].abs() + y[finite].double().abs()
    if case.tensors.residual is not None:
        bound += case.tensors.residual[finite].double().abs()  # what is added to it is rounded too
    error = (found_y[finite].double() - y[finite].double()).abs()
    near = error <= 2 * torch.finfo(y.dtype).eps * bound + 1e-6
    same = (found_y[finite] == y[finite]) | (
        found_y[finite].isnan() & y[finite].isnan()
    )  # where infinities are involved
    assert bool((near | same).all())


def gate_of(case):
    """The factor of every output, float64 [M, N] or 1."""
    if case.tensors.gate is None:
        return torch.ones(len(case.x), 1, dtype=torch.float64)
    return case.tensors.gate.double().repeat_interleave(len(case.x) // len(case.tensors.gate), 0)


def near_function(case, y, found_y):
    """Which outputs are within the contract's bound of GELU and SiLU, passed on through gate and residual."""
    plain, gate, spec = case.plain().double(), gate_of(case), case.layer.spec
    eps = torch.finfo(y.dtype).eps
    after = torch.from_numpy(oracle.function_of(spec.function, as64(plain)))
    slack = 2 * eps * after.abs() + 2.0**-22 * plain.abs() + torch.finfo(y.dtype).tiny
    if spec.branch_rank:
        down, up = (t.to(y.dtype).double() for t in (case.tensors.branch_down, case.tensors.branch_up))
        slack += (
            4 * eps * ((case.x.double().abs() @ down.abs().t()) @ up.abs().t() + plain.abs())
        )  # slopes are below 1.13
    residual = 0 if case.tensors.residual is None else case.tensors.residual.double().abs()
    bound = slack * gate.abs() + 2 * eps * ((after * gate).abs() + residual)
    error = (found_y.double() - y.double()).abs()
    # where an output overflowed, both are that infinity or no number
    return (error <= bound) | (found_y == y) | (found_y.isnan() & y.isnan()) | ~bound.isfinite()


def probe(case, variant):
    weight, k_unit = case.packed(variant)
    return cpu.probe(case.x, weight, spec=case.layer.spec, variant=variant, k_unit=k_unit, tensors=case.tensors)


def run_driver(command, cases, *, variant, threads=1):
    """Run cases through cpu_driver.cpp: what probe returns, per case."""
    data, shapes = [len(cases).to_bytes(8, "little")], []
    for case in cases:
        weight, k_unit = case.packed(variant)
        spec, x = case.layer.spec, case.x
        call, _ = cpu._call(x, weight, case.tensors, spec=spec, k_unit=k_unit)
        call.backend, call.threads = BACKENDS[variant], threads
        M, N = len(x), spec.out_features
        pieces = dict.fromkeys(POINTERS, b"")
        pieces["x"] = extent_of(x)
        names = ["weight", "column_sum", "weight_scale"]
        names += ["weight_zero"] if spec.weight_zero_point == "real" else []
        names += ["weight_shift"] if len(weight) > len(names) else []
        given = case.tensors._asdict() | {"row_zero": case.tensors.row_zero_point}
        tensors = dict(zip(names, weight, strict=True))
        given = {name: tensor for name, tensor in given.items() if tensor is not None and name in POINTERS}
        for name in given.keys() & {"gate", "residual"}:
            pieces[name] = extent_of(cpu._dense_rows(given.pop(name)))
        tensors |= given
        tensors |= {"branch": cpu._branch(x, case.tensors)} if spec.branch_rank else {}
        tensors |= {"paley_terms": cpu._paley_terms(call.paley)} if call.paley > 1 else {}
        shape = {
            "y": torch.zeros(M, N, dtype=x.dtype),
            "accumulators": torch.zeros(M, N, spec.num_groups, dtype=torch.int32),
            "operands": torch.zeros(M, spec.in_features, dtype=torch.int16),
            "scales": torch.zeros(M, call.activation_groups),
        }
        pieces |= {name: raw(tensor) for name, tensor in (tensors | shape).items()}
        sizes = (ctypes.c_int64 * len(POINTERS))(*(len(pieces[name]) for name in POINTERS))
        data += [bytes(call), bytes(sizes), *(pieces[name] for name in POINTERS)]
        shapes.append(shape)
    done = subprocess.run(command, input=b"".join(data), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return list(split(done.stdout, shapes))


def extent_of(tensor):
    """The bytes from the first element of a matrix to its last."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return ctypes.string_at(tensor.data_ptr(), extent * tensor.element_size())


def raw(tensor):
    tensor = tensor.detach().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def split(output, shapes):
    place = 0
    for shape in shapes:
        found = {}
        for name, tensor in shape.items():
            part = bytearray(output[place : place + tensor.nbytes])
            found[name] = torch.frombuffer(part, dtype=tensor.dtype).reshape(tensor.shape)
            place += tensor.nbytes
        yield found["operands"], found["scales"], found["accumulators"], found["y"]
    assert place == len(output)
