"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, and NEON under an emulator, against the reference.

One build with both sanitizers, with AMX's tiles (csrc/cpu/amx_tiles.h) and AVX-512 (avx512_emulation.h) emulated, runs
random calls as in test_cpu.py on every x86 backend, whatever the processor has, and the other drivers do the rest of the
library; every tensor is an allocation of its exact size. The emulation reads and writes byte by byte, which the sanitizers
see better than the instructions; test_cpu.py runs these. The 64-bit ARM build runs under qemu-user.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qvgen_kernels import cpu_library
from qvgen_kernels.cpu_build import SOURCE
from tests.kernels.cpu_cases import Case, Seeded, compare, draw_case, run_driver
from tests.kernels.kept_build import kept_build
from tests.kernels.layer import make_layer, make_rows

pytestmark = pytest.mark.skipif(cpu_library.missing_reason() is not None, reason="no C++ compiler")
SANITIZERS = ("-O0", "-fsanitize=address,undefined", "-fsanitize-undefined-trap-on-error", "-Wno-psabi")
"""Undefined behaviour ends the program, by SIGILL: calls that say what it was take a quarter of the compiler's time."""
EMULATED = ("-DQV_AMX_EMULATE", "-DQV_AVX512_EMULATE")
"""Flags for sources that have AVX-512, which begin with HEADER."""
HEADER = Path(__file__).with_name("avx512_emulation.h")
CROSS = "aarch64-linux-gnu-g++"
DRIVERS = ("cpu", "prepack", "fake_quantize", "range_search")
ATTENTION = ("attention",)


def build(compiler, flags, emulated, folder, *, drivers):
    """Compile the drivers, each a program with all sources; those of the attention are in its own driver alone.

    Args:
        compiler: Of C++.
        flags: For it.
        emulated: Further flags for sources that have AVX-512; where there are some, HEADER is compiled once for all of them.
        folder: Where objects and programs are put.
        drivers: Their names.
    """
    drivers, with_attention = [Path(__file__).with_name(f"{name}_driver.cpp") for name in drivers], drivers == ATTENTION
    sources = [path for path in sorted(SOURCE.glob("*.cpp")) if with_attention or not path.stem.startswith("attention")]
    sources += drivers
    common = ["-std=c++17", "-ffp-contract=off", "-I", str(SOURCE), *flags]
    if emulated:
        made = folder / f"{HEADER.name}.gch"
        command = [compiler, *common, *emulated, "-w", "-x", "c++-header", str(HEADER), "-o", str(made)]
        subprocess.run(command, check=True)  # -w: the file's #pragma once means something where it is included
        emulated = [*emulated, "-Winvalid-pch", "-Werror=invalid-pch", "-include", str(made.with_suffix(""))]

    def compile_one(source):
        further = emulated if re.search("_mm512|AVX512", source.read_text()) else ()
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *common, *further, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    if emulated:
        made.unlink()  # tens of megabytes
    for path, driver in zip(drivers, objects[-len(drivers) :], strict=True):
        linked = [*objects[: -len(drivers)], driver]
        subprocess.run([compiler, *flags, "-pthread", *map(str, linked), "-o", str(folder / path.stem)], check=True)


def program(config, name, compiler, flags, emulated=(), *, drivers=DRIVERS):
    """The first driver as :func:`build` makes it, the others beside it; compiled again only where a source has changed."""
    here = Path(__file__).parent
    return str(
        kept_build(
            config,
            name,
            command=[compiler, *flags, *emulated],
            inputs=[*SOURCE.glob("*.*"), *here.glob("*.cpp"), *here.glob("*.h")],
            make=lambda folder: build(compiler, flags, emulated, folder, drivers=drivers),
        )
        / f"{drivers[0]}_driver"
    )


@pytest.fixture(scope="module")
def cases():
    made = [draw_case(Seeded(seed), seed=seed) for seed in range(40)]
    for columns, rows in ((1000, 17), (2000, 33)):  # more than one and two chunks of the tiles' K
        layer = make_layer(in_features=columns, out_features=33, weight_bits=4, activation_bits=4)
        made.append(Case(layer, make_rows(rows, columns)))
    return [(case, case.expected()) for case in made]


@pytest.fixture(scope="module")
def sanitized(pytestconfig):
    probe = subprocess.run(
        ["g++", *SANITIZERS[1:2], "-x", "c++", "-", "-o", "/dev/null"],
        input=b"int main() {}",
        capture_output=True,
        check=False,
    )
    if platform.machine() != "x86_64" or probe.returncode:
        pytest.skip("this machine's g++ can't link the sanitizers")
    return program(pytestconfig, "sanitized", "g++", SANITIZERS, EMULATED)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("variant", ["portable", "avx2", "avxvnni", "vnni", "amx"])
def test_no_error_and_the_reference_bits(variant, sanitized, cases):
    if variant not in ("vnni", "amx") and cpu_library.supported(variant) is not None:
        pytest.skip(cpu_library.supported(variant))
    chosen = cases[16:] if variant == "amx" else cases  # emulated products take long; AVX-512 does the rest of a call
    found = run_driver([sanitized], [case for case, _ in chosen], variant=variant, threads=2)
    for (case, expected), result in zip(chosen, found, strict=True):
        compare(case, result, expected)


def run_alone(command, name="prepack_driver"):
    command[-1] = str(Path(command[-1]).with_name(name))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_prepacking_reads_no_byte_too_far(sanitized):
    run_alone([sanitized])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_fake_quantization_touches_no_byte_too_far(sanitized):
    run_alone([sanitized], "fake_quantize_driver")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_errors_of_ranges_are_those_of_the_definition_and_touch_no_byte_too_far(sanitized):
    run_alone([sanitized], "range_search_driver")


@pytest.mark.skipif(os.environ.get("QVGEN_LONG_TESTS") != "1", reason="half a minute: QVGEN_LONG_TESTS=1 asks for it")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_attention_is_the_same_on_every_backend_and_touches_no_byte_too_far(pytestconfig, sanitized):
    del sanitized  # skipped where the sanitizers can't be linked
    run_alone([program(pytestconfig, "attention", "g++", SANITIZERS, EMULATED, drivers=ATTENTION)], "attention_driver")


@pytest.fixture(scope="module")
def arm(pytestconfig):
    if shutil.which(CROSS) is None or shutil.which("qemu-aarch64") is None:
        pytest.skip(f"{CROSS} and qemu-aarch64 are not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    return program(pytestconfig, "arm", CROSS, ("-O2", "-static", "-Wall", "-Wextra", "-Werror"))


@pytest.mark.parametrize("variant", ["portable", "neon"])
def test_arm_gives_the_reference_bits(variant, arm, cases):
    found = run_driver(["qemu-aarch64", arm], [case for case, _ in cases], variant=variant, threads=2)
    for (case, expected), result in zip(cases, found, strict=True):
        compare(case, result, expected)


def test_arm_prepacks_the_same_bytes(arm):
    run_alone(["qemu-aarch64", arm])


def test_arm_fake_quantizes_without_an_error(arm):
    run_alone(["qemu-aarch64", arm], "fake_quantize_driver")


def test_arm_computes_errors_of_ranges(arm):
    run_alone(["qemu-aarch64", arm], "range_search_driver")


@pytest.fixture(scope="module")
def arm_attention(pytestconfig, arm):
    del arm  # skipped where there is no compiler
    flags = ("-O2", "-static", "-Wall", "-Wextra", "-Werror")
    return program(pytestconfig, "arm_attention", CROSS, flags, drivers=ATTENTION)


def test_arm_computes_attention(arm_attention):
    run_alone(["qemu-aarch64", arm_attention], "attention_driver")


def test_the_sources_never_contract_multiplications(arm):
    # 64-bit ARM has fused multiply-adds in its base set and compilers use them by default: here only where they are asked for
    objects = [str(Path(arm).with_name(name)) for name in ("neon.o", "fake_quantize.o")]
    text = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", *objects], capture_output=True, text=True, check=True
    ).stdout
    assert "sdot" in text
    assert not any(name in text for name in ("fmla", "fmls", "fmadd", "fmsub"))
