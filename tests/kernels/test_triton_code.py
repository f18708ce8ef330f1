"""Machine code of the GPU kernels, compiled for cards that need not be here: kernels/bench/gpu_code.py, some of its rows.

It shows what the interpreter can't: which matrix instruction runs, that unpacking needs no byte permutations, that nothing
spills, that no product and sum are contracted. It does not show that the code runs: nothing here ran on a GPU.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.kernels.kept_build import kept_build

try:
    VERSION = version("triton")
except PackageNotFoundError:
    VERSION = "none"
pytestmark = pytest.mark.skipif(not VERSION.startswith("3.9."), reason=f"asserted for Triton 3.9, not {VERSION}")

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = (
    "80:w4a4", "89:w3a3", "90:w4a4", "90:w4a4-groups", "100:w4a4", "120:w8a8-symmetric",
    "90:gluon-w4a4-gelu-gate-residual", "942:w3a3", "90:quantize", "80:quantize-division",
    "90:norm-modulate-quantize", "80:gelu-quantize",
    "80:fake-quantize", "90:fake-gradient", "120:fake-gradient-weight",
    "80:attention-64", "90:attention-128", "80:attention-qk-128", "90:attention-qk-64",
    "80:attention-gradient-queries-64", "90:attention-gradient-keys-128",
)  # fmt: skip
INSTRUCTION = {80: "IMMA.16832.S8.S8", 89: "IMMA.16832.S8.S8", 90: "IGMMA.64x", 100: "UTCIMMA", 120: "IMMA.16832.S8.S8"}


def output_of(command, cache):
    """What a Python program prints in a process of its own: without the interpreter, with an empty cache of Triton's."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def measured(pytestconfig, tmp_path_factory):
    """Rows of the chosen kernels, kept for as long as neither Triton nor a file of the kernels has changed."""

    def make(folder):
        command = ["kernels/bench/gpu_code.py", "-", *CHOSEN]
        (folder / "rows.json").write_text(output_of(command, tmp_path_factory.mktemp("triton")))

    command = [sys.executable, f"triton {VERSION}", f"torch {version('torch')}", *CHOSEN]
    made = kept_build(pytestconfig, "triton_code", command=command, inputs=(ROOT / "kernels").rglob("*.py"), make=make)
    rows = json.loads((made / "rows.json").read_text())
    return {f"{row['capability']}:{row['kernel']}": row for row in rows}


PRODUCTS = [name for name in CHOSEN if ":w" in name.replace("gluon-", "") and not name.startswith("942")]


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_use_the_cards_instruction_for_signed_bytes(measured, name):
    row = measured[name]
    assert row["matrix_instruction"].startswith(INSTRUCTION[row["capability"]])
    assert "," not in row["matrix_instruction"]  # and no other one
    assert row["loop_products"] >= 4


@pytest.mark.parametrize("name", PRODUCTS)
def test_loops_neither_permute_bytes_nor_spill(measured, name):
    row = measured[name]
    assert (row["loop_permutes"], row["loop_local"], row["stack_bytes"]) == (0, 0, 0)
    if "groups" not in name:  # whose loop holds the scaling too
        assert row["loop_instructions"] <= 4 * row["loop_products"] + 160


@pytest.mark.parametrize("name", PRODUCTS)
def test_epilogues_contract_nothing_and_store_whole_lines(measured, name):
    row = measured[name]
    assert row["contractions"] == 0
    assert row["coalesced_stores"] > 0
    assert row["flushed"] == 0


def test_amds_matrix_instruction_takes_the_operands_too(measured):
    row = measured["942:w3a3"]
    assert row["matrix_instruction"].startswith("v_mfma_i32_")
    assert row["stack_bytes"] == 0


def test_hopper_waits_for_its_products(measured):
    """What the documentation says of Triton's product of integers; a kernel without these waits would be faster."""
    assert measured["90:w4a4"]["loop_waits"] > 0


@pytest.mark.parametrize("name", [name for name in CHOSEN if "gluon" in name])
def test_the_product_in_gluon_is_not_waited_for_in_every_chunk(measured, name):
    """A chunk's products go on while the next chunk is looked for, on eight warps beside the one that copies."""
    row = measured[name]
    assert row["loop_waits"] == 0
    assert row["loop_partial_waits"] == 1
    assert row["loop_copies_waited_for"] == 1
    assert row["loop_barriers"] == 1  # a stage is given back by both groups of four warps
    assert row["loop_instructions"] <= 7 * row["loop_products"] + 30
    assert (row["warps"], row["tma_copies"]) == (12, 2)
    assert row["registers"] * 32 * row["warps"] <= 65536
    assert row["shared_bytes"] <= 227 << 10


def test_quantizers_divide_as_ieee_says(measured):
    """The scale, its reciprocal and nothing else by rows; where codes are quotients, every element."""
    for name in ("90:quantize", "80:quantize-division"):
        row = measured[name]
        assert row["divisions_ieee"] >= 2
        assert (row["divisions_fast"], row["flushed"], row["stack_bytes"]) == (0, 0, 0)
    assert measured["80:quantize-division"]["divisions_ieee"] >= 32


def test_steps_before_the_quantizer_keep_a_row_in_registers(measured):
    """Divisions and roots as IEEE says, products and sums apart; but of torch's GELU, which has contracted ones."""
    row = measured["90:norm-modulate-quantize"]
    assert row["roots_ieee"] >= 1
    assert (row["roots_fast"], row["divisions_fast"], row["multiply_adds"], row["flushed"]) == (0, 0, 0, 0)
    assert measured["80:gelu-quantize"]["multiply_adds"] > 0
    for name in ("90:norm-modulate-quantize", "80:gelu-quantize"):
        row = measured[name]
        assert row["divisions_ieee"] >= 2
        assert (row["loop_local"], row["stack_bytes"]) == (0, 0)
        assert row["registers"] <= 128


@pytest.mark.parametrize("name", [name for name in CHOSEN if "fake" in name])
def test_fake_quantization_is_ieees_and_fits_into_registers(measured, name):
    """What is fused in the machine code are the steps of divisions, about seven each; the PTX before it has none."""
    row = measured[name]
    assert row["contractions"] <= 9 * row["divisions_ieee"]
    assert row["divisions_ieee"] >= 2
    assert (row["divisions_fast"], row["flushed"], row["multiply_adds"], row["stack_bytes"]) == (0, 0, 0, 0)
    assert row["coalesced_stores"] > 0
    assert row["registers"] <= 168  # three programs of four warps on a multiprocessor, at least


BOTH = [name for name in CHOSEN if name.endswith((":attention-64", ":attention-128"))]


@pytest.mark.parametrize("name", BOTH)
def test_attention_multiplies_integers_twice_and_keeps_probabilities_in_registers(measured, name):
    """A program multiplies 64 x D x 64 and 64 x 64 x D, an instruction 64 x 64 x 32, or 16 x 8 x 32 in each of four warps."""
    row = measured[name]
    head_size, per_warp = int(name.rsplit("-", 1)[1]), 1 if row["capability"] == 90 else 8
    assert all(part.startswith(INSTRUCTION[row["capability"]]) for part in row["matrix_instruction"].split(", "))
    assert row["loop_products"] == 2 * per_warp * head_size // 32
    scores = 32  # of a thread: 64 x 64 by 128 threads
    assert row["loop_permutes"] <= 0.75 * scores  # four codes into a register; none to move bytes between threads
    assert row["loop_instructions"] <= (17 + head_size // 8) * scores
    assert (row["loop_local"], row["stack_bytes"]) == (0, 0)


@pytest.mark.parametrize("name", BOTH)
def test_attention_fuses_what_its_contract_says(measured, name):
    """Multiply-adds of the loop, and again of the last block after it; the rest are divisions'.

    Four for each score, one of which clamps too; and, where the product is one with a power of two and therefore exact, one
    for each sum of a block and two for the exponent of each of a thread's two queries.
    """
    row = measured[name]
    scores, sums = 32, 64 * int(name.rsplit("-", 1)[1]) // 128
    fused = 4 * scores + sums + 4
    assert fused <= row["loop_contractions"] <= fused + 2
    assert row["loop_clamps"] == scores
    assert row["multiply_adds"] == 2 * fused
    assert row["contractions"] <= 2 * (fused + 2) + 12 * row["divisions_ieee"]
    assert row["divisions_ieee"] >= 1
    assert (row["divisions_fast"], row["flushed"]) == (0, 0)


@pytest.mark.parametrize("name", [name for name in CHOSEN if "-qk-" in name])
def test_attention_whose_values_are_plain_multiplies_them_as_bfloat16(measured, name):
    """One product of integers and one of bfloat16, which takes 16 units at a time; one multiply-add more for each score."""
    row = measured[name]
    head_size, is_ampere = int(name.rsplit("-", 1)[1]), row["capability"] == 80
    floats, integers = row["matrix_instruction"].split(", ")
    assert floats.startswith("HMMA.16816.F32.BF16" if is_ampere else "HGMMA.64x64x16.F32.BF16")
    assert integers.startswith(INSTRUCTION[row["capability"]])
    assert row["loop_products"] == 3 * head_size * (8 if is_ampere else 1) // 32
    scores, sums = 32, 64 * head_size // 128
    assert row["loop_contractions"] == 5 * scores + sums + 4
    assert row["multiply_adds"] == 2 * row["loop_contractions"]
    assert (row["loop_local"], row["stack_bytes"], row["divisions_fast"], row["flushed"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", [name for name in CHOSEN if "-gradient-" in name and "attention" in name])
def test_the_gradient_of_attention_is_made_by_matrix_units_and_fits_into_registers(measured, name):
    """Scores as integers again, all else by TF32, from which nothing of a loop is put away; divisions are IEEE's."""
    row = measured[name]
    assert {part.split(".")[0][-4:] for part in row["matrix_instruction"].split(", ")} <= {"HMMA", "IMMA", "GMMA"}
    assert "TF32" in row["matrix_instruction"]
    assert "S8.S8" in row["matrix_instruction"]
    assert (row["loop_local"], row["divisions_fast"], row["flushed"]) == (0, 0, 0)
    assert row["stack_bytes"] <= 40  # registers that are put away outside of its inner loop


@pytest.mark.skipif(
    os.environ.get("QVGEN_LONG_TESTS") != "1", reason="40 kernels are compiled for 35 seconds: QVGEN_LONG_TESTS=1"
)
def test_what_calls_launch_compiles(tmp_path):
    lines = output_of(["-m", "tests.kernels.triton_calls_program"], tmp_path).split("\n")
    names = [line.split()[0] for line in lines if line]
    plain, rotated = ["quantize_kernel", "gemm_kernel"], ["butterfly_kernel", "paley_kernel"]
    steps = [*plain, *["function_kernel"] * 3, *plain]  # modulated; and three ways of a function, none of which ran
    fake = ["fake_quantize_kernel", "fake_gradient_kernel", "scales_kernel"]
    around = ["scale_output_kernel", "scale_gradient_kernel"]
    key, value = ["sums_kernel", "means_kernel", "tokens_kernel"], ["sums_kernel", "means_kernel", "values_kernel"]
    attention = ["tokens_kernel", *key, *value, "attend_kernel"]
    attention += ["tokens_kernel", *key, "attend_kernel", *attention, "query_kernel", "key_kernel"]
    assert names == [*plain, *rotated, *plain, rotated[0], *plain, *steps, *fake, *fake[:2], *around, *attention]


def test_the_table_is_of_all_kernels_and_says_that_nothing_ran():
    text = (ROOT / "docs" / "benchmarks" / "gpu-code.md").read_text()
    assert "**Compiled only: nothing of this has run on a GPU.**" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| sm_", "| gfx"))]
    assert len(rows) == 6 * 32 + 6
    spilling = [(row[0].split()[1], row[1], row[6]) for row in rows if row[4].strip() and row[6] != "0"]
    masked, queries = "attention-qk-128-mask", "attention-gradient-queries-"
    assert spilling == [  # registers that are put away outside of a loop
        ("sm_80", f"{queries}64", "40"),
        ("sm_80", f"{queries}128", "8"),
        ("sm_89", masked, "16"),
        ("sm_89", f"{queries}128", "16"),
        ("sm_120", "attention-64", "8"),
        ("sm_120", masked, "32"),
        ("sm_120", f"{queries}64", "56"),
        ("sm_120", f"{queries}128", "16"),
        ("gfx942", f"{queries}128", "240"),
    ]
    loops = [row[8].strip(" |").split(" / ") for row in rows if "gluon" in row[1]]
    assert [loop[3] for loop in loops] == ["0"] * 6, "a product is waited for"
