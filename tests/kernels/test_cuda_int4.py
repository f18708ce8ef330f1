"""The 4-bit kernels of CUDA, emulated thread by thread on the CPU, against the exact reference; and their machine code.

No card runs here: what is tested is the source, with the registers of matrix instructions as NVIDIA documents them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qvgen_kernels import LinearTensors, available_kernels, get_backend, resolve_kernel
from qvgen_kernels.cpu_build import BuildError, find_compiler
from qvgen_kernels.cuda_int4 import __main__ as build_command
from qvgen_kernels.cuda_int4 import backend, build, structures
from qvgen_kernels.weight import CanonicalWeight
from tests.kernels.cpu_cases import Case, Seeded, compare, draw_case
from tests.kernels.kept_build import kept_build
from tests.kernels.layer import make_layer, make_rows

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def emulated(pytestconfig):
    """The emulation as a library; behaviour that C++ does not define ends the process."""
    flags = ["-std=c++17", "-O2", "-g", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", "-Wno-clobbered", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    command = [*find_compiler(), *flags, f"-I{build.SOURCE}", f"-I{HERE}"]

    def make(folder):
        driver = str(HERE / "cuda_driver.cpp")
        command_line = [*command, driver, "-o", str(folder / "emulated.so")]
        done = subprocess.run(command_line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    read = [*build.SOURCE.glob("*.*"), *HERE.glob("*.cpp"), *HERE.glob("*.h")]
    path = kept_build(pytestconfig, "cuda", command=command, inputs=read, make=make) / "emulated.so"
    library = ctypes.CDLL(str(path))
    library.quantize_size.restype = library.multiply_size.restype = ctypes.c_int64
    assert library.quantize_size() == ctypes.sizeof(structures.CQuantize)
    assert library.multiply_size() == ctypes.sizeof(structures.CMultiply)
    return library


def launcher(library):
    def launch(device, name, argument, *, blocks, shared):
        assert device.type == "cpu"
        assert shared <= 48 << 10
        getattr(library, name.replace("qv_", "run_"))(ctypes.byref(argument), blocks, ctypes.c_size_t(shared))

    return launch


def probe(library, case):
    """Operands [M, K], scales [M, G], accumulators [M, N, G] and outputs of the emulated kernels."""
    spec, x = case.layer.spec, case.x
    own = get_backend("cuda_int4")
    weight = own.prepack(case.layer.planes, scale=case.layer.scale, zero_point=case.layer.zero_point, spec=spec)
    accumulators = torch.zeros(len(x), spec.out_features, spec.num_groups, dtype=torch.int32)
    seen = {}

    def look(first, second, between):
        del first
        second.accumulators = accumulators.data_ptr()
        seen.update(between)

    y = backend.run(x, weight, tensors=case.tensors, spec=spec, launch=launcher(library), probe=look)
    codes = torch.stack([seen["codes"] & 15, seen["codes"] >> 4], -1).flatten(1).int()
    assert not codes[:, spec.in_features :].any()
    zero = seen["zero"].t().repeat_interleave(spec.in_features // len(seen["zero"]), 1)
    operand = (codes[:, : spec.in_features] - zero).to(torch.int16)
    sums = codes[:, : spec.in_features].unflatten(1, (spec.num_groups, -1)).sum(-1)
    assert torch.equal(seen["sums"].t().long(), sums)
    return operand, seen["scale"].t(), accumulators, y


class Narrow(Seeded):
    """Draws widths of up to 4 bits where others draw up to 8."""

    def integers(self, low, high):
        return super().integers(low, 4 if (low, high) == (2, 8) else high)


@pytest.mark.parametrize("seed", range(16))
def test_any_layer_of_up_to_4_bits(emulated, seed):
    case = draw_case(Narrow(seed), columns=(1, 300), rows=(1, 140), seed=seed)
    spec = case.layer.spec
    if spec.num_groups > 1 and spec.group_size % 64:
        assert "groups of multiples of 64" in backend.refusal_of_spec(spec)
        groups = 64 * (1 + seed % 2)
        options = {
            f"{side}_group_size": groups for side in ("weight", "activation") if getattr(spec, f"{side}_group_size")
        }
        fields = {name: getattr(spec, name) for name in ("weight_bits", "activation_bits", "weight_zero_point")}
        fields |= {
            name: getattr(spec, name) for name in ("activation_zero_point", "scale_dtype", "activation_arithmetic")
        }
        layer = make_layer(seed=seed, in_features=256, out_features=spec.out_features, **fields, **options)
        case = Case(layer, make_rows(len(case.x), 256, seed=seed, dtype=case.x.dtype), LinearTensors(bias=layer.bias))
    assert backend.refusal_of_spec(case.layer.spec) is None
    compare(case, probe(emulated, case))


@pytest.mark.parametrize("weight_zero_point", ["integer", "real", "none"])
@pytest.mark.parametrize("activation_zero_point", ["integer", "none"])
def test_all_pairs_of_bits(emulated, weight_zero_point, activation_zero_point):
    """With each pair of zero points every width of both sides; all pairs of widths in three of these tests together."""
    kinds = {"weight_zero_point": weight_zero_point, "activation_zero_point": activation_zero_point}
    turn = ["integer", "real", "none"].index(weight_zero_point)
    for weight_bits in (2, 3, 4):
        bits = {"weight_bits": weight_bits, "activation_bits": 2 + (weight_bits + turn) % 3}
        layer = make_layer(seed=weight_bits, in_features=200, out_features=40, **bits, **kinds)
        case = Case(layer, make_rows(9, 200, seed=1, dtype=torch.bfloat16))
        compare(case, probe(emulated, case))


def test_several_blocks_each_way_and_a_long_row(emulated):
    layer = make_layer(seed=3, in_features=640, out_features=140, weight_bits=4, activation_bits=4)
    case = Case(layer, make_rows(130, 640, seed=2, dtype=torch.bfloat16), LinearTensors(bias=layer.bias))
    compare(case, probe(emulated, case))


def test_largest_sums_are_exact(emulated):
    """Every code 15 and every zero point 0: the largest sum that 13824 columns can give."""
    layer = make_layer(seed=0, in_features=13824, out_features=8, weight_bits=4, activation_bits=4)
    planes = [torch.full_like(layer.planes[0], 0xFF)]
    zero = torch.zeros_like(layer.zero_point)
    own, reference = get_backend("cuda_int4"), get_backend("reference")
    x = torch.ones(2, 13824)
    found = backend.run(
        x, own.prepack(planes, scale=layer.scale, zero_point=zero, spec=layer.spec), tensors=LinearTensors(),
        spec=layer.spec, launch=launcher(emulated),
    )  # fmt: skip
    weight = reference.prepack(planes, scale=layer.scale, zero_point=zero, spec=layer.spec)
    assert torch.equal(found, reference.linear(x, weight, tensors=LinearTensors(), spec=layer.spec))
    assert found.abs().min() > 0


def test_layers_of_one_input_are_one_layer(emulated):
    layers = [
        make_layer(seed=s, in_features=192, out_features=n, weight_bits=3, activation_bits=4)
        for s, n in enumerate((24, 40))
    ]
    own, x = get_backend("cuda_int4"), make_rows(5, 192, seed=4, dtype=torch.float32)
    parts = [(layer.planes, layer.scale, layer.zero_point) for layer in layers]
    spec = replace(layers[0].spec, out_features=64)
    weight = own.prepack_parts([CanonicalWeight(*part) for part in parts], spec=spec)
    both = backend.run(x, weight, tensors=LinearTensors(), spec=spec, launch=launcher(emulated))
    each = [probe(emulated, Case(layer, x))[3] for layer in layers]
    assert torch.equal(both, torch.cat(each, 1))


def test_no_rows_start_no_kernel():
    layer = make_layer(seed=0, in_features=64, out_features=8, weight_bits=4, activation_bits=4)
    own = get_backend("cuda_int4")
    weight = own.prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec)
    y = own.linear(torch.zeros(0, 64, dtype=torch.bfloat16), weight, tensors=LinearTensors(), spec=layer.spec)
    assert (y.shape, y.dtype) == ((0, 8), torch.bfloat16)


def test_a_plane_of_4_bits_serves_as_it_is():
    layer = make_layer(seed=0, in_features=256, out_features=8, weight_bits=4, activation_bits=4)
    weight = get_backend("cuda_int4").prepack(
        layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec
    )
    assert weight[0].data_ptr() == layer.planes[0].data_ptr()


def test_what_it_does_not_run_is_said_and_never_replaced():
    spec = make_layer(seed=0, in_features=64, out_features=8, weight_bits=4, activation_bits=4).spec
    assert "cuda_int4" not in available_kernels(spec)
    with pytest.raises(RuntimeError, match="kernel=cuda_int4 runs on NVIDIA cards, not on cpu"):
        resolve_kernel("cuda_int4", spec)
    wide = replace(spec, activation_bits=8)
    assert backend.refusal_of_spec(wide) == "kernel=cuda_int4 multiplies codes of 2 to 4 bits, not w4a8"
    long = replace(spec, in_features=65536)
    assert "in_features=65536 is more than" in backend.refusal_of_spec(long)


def test_a_compiler_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    monkeypatch.setenv("QVGEN_KERNEL_CACHE", str(tmp_path))
    with pytest.raises(BuildError, match="NVCC='/nowhere/nvcc' is not there"):
        build.fatbin_path()


def test_one_command_builds_it_before_its_first_use(monkeypatch, tmp_path, capsys):
    """A program that writes the file that it is asked for stands for nvcc."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\nfor word; do last=$word; done\necho code > "$last"\necho built >> "$0.log"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("QVGEN_KERNEL_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        assert build_command.main() == 0
        path = Path(capsys.readouterr().out.strip())
        assert path.read_text() == "code\n"
    assert path == build.fatbin_path()  # what a first use takes
    assert (tmp_path / "nvcc.log").read_text() == "built\n"
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    monkeypatch.setenv("QVGEN_KERNEL_CACHE", str(tmp_path / "empty"))
    assert build_command.main() == 2
    assert capsys.readouterr().err.splitlines() == [
        "NVCC='/nowhere/nvcc' is not there; name CUDA's compiler or unset it"
    ]


def disassembler():
    """The program cuobjdump, of a CUDA toolkit or of Triton's package."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    package = importlib.util.find_spec("triton")
    folder = "" if package is None else Path(package.origin).parent / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump", path=str(folder))


LONG = pytest.mark.skipif(
    os.environ.get("QVGEN_LONG_TESTS") != "1", reason="set QVGEN_LONG_TESTS=1 to compile for it too"
)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize(
    ("architecture", "instruction", "size"),
    [
        pytest.param(75, "IMMA.8832.U4.U4", 4, marks=LONG),
        (80, "IMMA.16864.U4.U4", 1),
        pytest.param(86, "IMMA.16864.U4.U4", 1, marks=LONG),
        pytest.param(89, "IMMA.16864.U4.U4", 1, marks=LONG),
    ],
)
def test_the_machine_code_multiplies_4_bits_and_spills_nothing(architecture, instruction, size, pytestconfig):
    """Ampere and Ada have one instruction for 16 x 8 x 64, Turing takes four; sums stay in registers."""
    command = ["nvcc", *build.FLAGS, "-DQV_BFLOAT16_ALONE", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]

    def make(folder):
        words = [*command, str(build.SOURCE / "int4.cu"), "-o", str(folder / "int4.cubin")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        (folder / "ptxas.txt").write_text(done.stderr)

    files = build.SOURCE.glob("*.*")
    folder = kept_build(pytestconfig, f"int4_{architecture}", command=command, inputs=files, make=make)
    made, said = folder / "int4.cubin", (folder / "ptxas.txt").read_text()
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 3
    if (program := disassembler()) is None:
        pytest.skip("no cuobjdump: what the registers hold was checked, the instructions were not")
    code = subprocess.run([program, "-sass", str(made)], capture_output=True, text=True, check=True).stdout
    plain, groups = (code.split(f"Function : qv_multiply_{name}bfloat16")[1] for name in ("", "groups_"))
    assert plain.split("Function : ")[0].count(instruction) == 32 * size  # a stage: 16 for each half
    assert groups.split("Function : ")[0].count(instruction) == 16 * size
