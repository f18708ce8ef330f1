"""kernels/bench/gpu.sh without a GPU: its rehearsal on the CPU, what it writes, and the shapes that it measures.

The rehearsal runs with nothing installed but what the script asks for. Parts whose interpreted kernels take long are left to
a rehearsal by hand; here run correctness, attention, the training step and tiles.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu import __main__ as program
from gpu import clock, page, part, sanitizer
from gpu.models import NAMES, read_model
from gpu.setting import Setting

from qvgen.models.folder.published import known_models
from qvgen_kernels.triton.tuned import read_tiles

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "kernels" / "bench" / "gpu.sh"
ALLOWED = (
    "torch numpy safetensors triton torchgen functorch sympy mpmath networkx jinja2 markupsafe fsspec filelock setuptools "
    "typing_extensions pip qvgen qvgen_kernels"
)
"""What torch brings with it, the three others that the script names, and this checkout."""
BLOCKER = """
import os, sys, sysconfig
places = {{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}}
own = {{name.split(".")[0] for place in places for name in os.listdir(place) if not name.endswith((".dist-info", ".pth"))}}
own -= {{*{allowed!r}.split(), *(name for name in own if name.startswith("_"))}}
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in own:
            raise ModuleNotFoundError(f"No module named {{name!r}}: it is not among those that gpu.sh asks for", name=name)
sys.meta_path.insert(0, Nothing())
"""


def call(*words, path="", **environment):
    names = {"PYTHON": sys.executable, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, words)], env=os.environ | names, capture_output=True, text=True, check=False
    )


ONE_PROCESS = """
import sys
from gpu import __main__ as program, part

def here(chosen, out, count, seconds, *, rehearse):
    sys.argv = ["part", chosen.name, str(out), "--rehearse"]
    return "failed" if part.main() else "done"

program._processes = here
raise SystemExit(program.main())
"""
"""The script's program with all parts in its own process: each would import torch again."""


@pytest.fixture(scope="module")
def blocked(tmp_path_factory):
    """A folder that keeps other packages from a Python process which has it on its path."""
    pytest.importorskip("triton", minversion="3.6")
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(BLOCKER.format(allowed=ALLOWED))
    return folder


@pytest.fixture(scope="module")
def rehearsed(blocked):
    """The folder of a rehearsal of the cheap parts but the last, in a process that finds no other packages."""
    out = blocked / "out"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", SCRIPT.parent, blocked)))
    parts = ["--parts", "correctness,attention,attention_gradient,attention_times,fake_quantization"]
    names = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS, str(out), "--rehearse", *parts],
        env=os.environ | names, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return out


def rows_of(folder, name):
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["state"] == "done"
    return result["rows"]


def test_a_rehearsal_holds_the_kernels_to_the_reference_without_other_packages(rehearsed):
    rows = rows_of(rehearsed, "correctness")
    assert all(row["equal"] and row["steady"] and row["kernel"] == "triton" for row in rows)
    kinds = {row["case"].split()[0] for row in rows}
    assert kinds == {"real", "pair", "row", "largest", "smallest", "random"}


def test_a_rehearsal_holds_attention_to_the_reference_and_times_it(rehearsed):
    rows = rows_of(rehearsed, "attention")
    assert [row["kind"] for row in rows] == ["int8", "int8", "int8_qk"]
    gradients = rows_of(rehearsed, "attention_gradient")
    assert [(row["kind"], row["of"]) for row in gradients] == [
        (kind, of) for kind in ("int8", "int8_qk") for of in "qkv"
    ]
    assert all(row["equal"] and row["steady"] for row in [*rows, *gradients])
    timed = {row["candidate"] for row in rows_of(rehearsed, "attention_times") if "ms" in row}
    assert timed >= {"torch bf16, flash", "triton int8", "triton int8_qk", "quantize alone", "attend alone"}
    assert re.search(r"\| 20 tokens, 1 x 64 \| triton int8 \| \d", (rehearsed / "gpu.md").read_text())


def test_a_rehearsal_times_the_training_step_and_says_what_is_not_there(rehearsed):
    rows = rows_of(rehearsed, "fake_quantization")
    assert {row["candidate"] for row in rows} >= {"nn.Linear", "eager"}
    for row in rows:
        assert row["ms"] > 0
        assert ("not there" in row) != ("bits_equal" in row)


def test_the_script_measures_tiles_into_a_table_that_the_package_could_have(blocked):
    """The script itself, with a process for its part."""
    out = blocked / "of the script"
    done = call(out, "--rehearse", "--parts", "tiles", path=blocked)
    logs = "\n".join(path.read_text()[-2000:] for path in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + logs
    (entry,) = read_tiles(out / "tiles.json", triton=None)
    assert (entry.card, entry.kernel, entry.weight_bits) == ("rehearsal on the CPU", "triton", 4)
    assert "| qkv triton w4a4 |" in (out / "gpu.md").read_text()


def test_the_report_is_made_of_the_json(rehearsed):
    text = (rehearsed / "gpu.md").read_text()
    assert "# Kernels on rehearsal on the CPU" in text
    assert re.search(r"\| correctness \| done \| 0 of \d+ \|", text)
    assert "## Fake quantization" in text
    assert "## Wrong" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.sh", str(tmp_path / "out")])
    assert program.main() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "torch finds no GPU" in said
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.sh", str(tmp_path), "--parts", "table,speed"])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert "--parts holds speed; there are correctness, table, blocks" in capsys.readouterr().err


def test_a_part_that_takes_too_long_is_ended_and_keeps_its_rows(tmp_path, monkeypatch):
    """A shell that writes a row and waits stands for Python; what it started is ended with it."""
    shell = tmp_path / "python"
    shell.write_text("#!/bin/sh\necho '{}' > $4/slow.json; sleep 600 & echo $! > $4/child; wait\n")
    shell.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shell))
    state = program._processes(program.Part("slow", 1.0), tmp_path, 1, 1.0, rehearse=True)
    assert state == "cut off after 1 s"
    assert (tmp_path / "slow.json").read_text() == "{}\n"
    ended = time.monotonic() + 20
    while (alive := is_alive((tmp_path / "child").read_text().strip())) and time.monotonic() < ended:
        time.sleep(0.01)
    assert not alive


def is_alive(process):
    """Whether Linux lists a process that has not ended."""
    try:
        return "\nState:\tZ" not in Path("/proc", process, "status").read_text()
    except OSError:
        return False


def test_sizes_are_those_of_the_models_configurations():
    known = {model.name: model.sizes for model in known_models()}
    for name in NAMES:
        model, sizes = read_model(name), known[name]
        assert model.blocks == sizes["num_layers"]
        assert (model.heads, model.width) == (
            sizes["num_attention_heads"],
            sizes["num_attention_heads"] * sizes["attention_head_dim"],
        )
        assert model.inner == sizes.get("ffn_dim", 4 * model.width)
    assert [read_model(name).tokens for name in NAMES] == [17_776, 32_760, 32_760]
    assert [read_model(name).text_tokens for name in NAMES] == [0, 512, 512]
    weights = sum(layer.columns * layer.outputs for layer in read_model("wan-14b").layers)
    assert round(40 * weights / 1e9, 2) == 14.05  # all linears of Wan 14B's blocks


def test_a_case_that_raises_is_a_row_and_the_next_one_runs(tmp_path):
    def broken():
        yield {"first": 1}
        raise RuntimeError("out of\nmemory")

    def whole():
        yield {"second": 2}

    path = tmp_path / "part.json"
    assert part.run_part("any", iter([("a", broken), ("b", whole)]), Setting(True), path) == "done"
    rows = json.loads(path.read_text())["rows"]
    assert rows == [
        {"case": "a", "first": 1},
        {"case": "a", "error": "RuntimeError: out of memory"},
        {"case": "b", "second": 2},
    ]


def test_rows_are_in_the_file_before_the_part_ends(tmp_path):
    path = tmp_path / "part.json"
    seen = []

    def first():
        yield {"value": 1}

    def second():
        seen.append(json.loads(path.read_text()))
        yield {"value": 2}

    part.run_part("any", iter([("a", first), ("b", second)]), Setting(True), path)
    assert (seen[0]["state"], seen[0]["rows"]) == ("running", [{"case": "a", "value": 1}])


def test_candidates_are_timed_in_turn_and_a_broken_one_is_named():
    order, times = [], iter(range(1, 100))

    def timer(function):
        function()
        return float(next(times))

    def fails():
        raise RuntimeError("no such kernel")

    calls = {"a": lambda: order.append("a"), "bad": fails, "b": lambda: order.append("b")}
    found = clock.compare(calls, timer=timer, rounds=3)
    assert order == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 3
    assert found["a"] == {"ms": 5.0, "low_ms": 3.0, "high_ms": 7.0, "rounds": 3}
    assert found["bad"] == {"error": "RuntimeError: no such kernel"}
    assert found["b"]["ms"] == 6.0


def test_a_process_meets_the_shapes_of_all_models():
    """More than torch compiles of one function by default, where one too many is an error of a whole graph."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would leave it hidden
        double = Setting(True).compiled(lambda x: x * 2)
        for size in range(2, 14):
            assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))
    torch.compiler.reset()


def test_the_report_puts_measured_beside_predicted_and_names_what_differs(tmp_path):
    shape = {
        "case": "cogvideox qkv",
        "model": "cogvideox",
        "layer": "qkv",
        "rows": 17776,
        "columns": 1920,
        "outputs": 5760,
    }
    times = {"low_ms": 0.4, "high_ms": 0.6, "tops": 800.0}
    rows = [
        {**shape, **times, "candidate": "F.linear bf16", "ms": 0.5},
        {**shape, **times, "candidate": "triton w4a4", "ms": 0.25, "bytes_per_weight": 0.5},
        {**shape, "candidate": "fp8", "error": "not there"},
    ]
    wrong = {"case": "pair w3a3", "kernel": "triton", "equal": False, "steady": True}
    results = page.Results({"card": "NVIDIA H200"}, {"table": rows, "correctness": [wrong]})
    page.write_page(tmp_path / "gpu.md", results, {"table": "done", "correctness": "cut off after 120 s"})
    text = (tmp_path / "gpu.md").read_text()
    assert re.search(
        r"triton w4a4 \| 0.250 \(0.400 to 0.600\) \| 0.2\d\d \| 2.00 \| 800 \| 0.500 \| 1.25 reached", text
    )
    assert "| correctness | cut off after 120 s | 1 of 1 |" in text
    assert "| pair w3a3 | kernel=triton equal=False steady=True |" in text
    assert "| table | cogvideox qkv fp8 | not there |" in text
    assert results.wrong() == [wrong]


@pytest.mark.parametrize(
    ("line", "equal"), [("ERROR SUMMARY: 0 errors", True), ("ERROR SUMMARY: 3 errors", False), ("", False)]
)
def test_what_compute_sanitizer_says_is_read(monkeypatch, tmp_path, line, equal):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= {line}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (row,) = sanitizer._run(Setting(True), "memcheck")
    assert row["equal"] is equal


def test_an_interpreter_without_the_packages_is_named_with_what_to_write(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_text('#!/bin/sh\necho "No module named torch" >&2\nexit 1\n', encoding="utf-8")
    bare.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")],
        env={**os.environ, "PYTHON": str(bare)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    first, last = done.stderr.splitlines()
    assert first == "No module named torch"
    assert last.startswith(f"{bare} lacks what the line above names; name an interpreter that has it: PYTHON=")
    assert not (tmp_path / "out").exists()
