"""qvgen doctor: what it finds on this machine, and that a kernel which computes something else is not passed over."""

import getpass
import json
import socket
from pathlib import Path

import pytest
import torch

from qvgen.cli import main
from qvgen.verbs.diagnosis.layer_kind import GRIDS, layer_shapes
from qvgen.verbs.diagnosis.machine import find_devices, without_paths
from qvgen_kernels import get_backend, register_backend, registry
from qvgen_kernels.attention import attention
from qvgen_kernels.dequantize import DequantizeBackend

SMALL = ("doctor", "shapes=[64x32,256x48]")


class Faulty:
    """Computes what the reference does, but for one thing; auto would take it."""

    name = "faulty"
    priority = 1000

    def __init__(self, fault):
        self.fault, self.prepack = fault, get_backend("reference").prepack

    def refusal(self, spec, *, device):
        return None

    def linear(self, x, weight, *, tensors, spec):
        y = get_backend("reference").linear(x, weight, tensors=tensors, spec=spec)
        return self.fault(y)


@pytest.fixture
def with_backend(monkeypatch):
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    return register_backend


def test_a_sound_machine_is_described_tested_and_timed(tmp_path, capsys):
    out = tmp_path / "there" / "doctor.json"
    assert main([*SMALL, "device=cpu", "seconds=0.001", f"out={out}"]) == 0
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    assert shown.endswith("all that is claimed holds\n")
    assert found["devices"][0]["device"] == "cpu"
    assert found["software"]["torch"] == torch.__version__
    assert found["software"]["nvcc"] == "none" or found["software"]["nvcc"][0].isdigit()
    kinds = [" ".join(grid) for grid in GRIDS]
    assert sorted(kind for line in found["kernels"] for kind in line["kinds"]) == sorted(kinds)
    checks = found["checks"]
    assert {check["kind"] for check in checks} == {*kinds, "attention int8", "attention int8_qk"}
    assert {check["shape"] for check in checks if check["kind"] == "attention int8"} == {
        f"5x130x{size}" for size in (64, 72, 128)
    }
    assert f"attention in 8 bits on cpu: {found['attention'][0]['kernel']}" in shown
    assert {"portable", "dequantize"} <= {check["kernel"] for check in checks}
    assert {check["what"] for check in checks} == {"accumulators", "outputs of float32", "outputs of bfloat16"}
    assert {check["shape"] for check in checks if check["kind"] == "paper 4"} == {"64x32", "256x48"}
    assert not any(check["failure"] for check in checks)
    assert f"{len(checks)} of {len(checks)} checks hold" in shown
    assert found["speed"][0].keys() >= {"kernel", "bf16_ms", "packed_ms", "bytes_per_weight"}
    assert [row["kind"] for row in found["speed"][:2]] == ["attention int8", "attention int8_qk"]
    text = shown + out.read_text()
    for private in (socket.gethostname(), str(Path.home()), str(Path.cwd()), str(tmp_path)):
        assert private not in text
    assert getpass.getuser() not in text.split()


def test_without_a_gpu_it_says_so(capsys):
    if len(find_devices(None)) > 1:
        pytest.skip("there is a GPU")
    assert main([*SMALL, "dry_run=true"]) == 0
    shown = capsys.readouterr().out
    assert "no GPU that this torch can use: the CPU's kernels alone are tested" in shown
    assert "would test 8 kinds of layers at 2 shapes and time them for 120 s" in shown
    assert "self-test" not in shown


def one_wrong_output(y):
    return torch.where(y == y.max(), y + 1, y)


def test_a_kernel_that_computes_something_else_fails_it(with_backend, capsys):
    with_backend(Faulty(one_wrong_output))
    assert main([*SMALL, "device=cpu", "seconds=0"]) == 2
    done = capsys.readouterr()
    assert (
        "FAILED on cpu: kernel=faulty, paper 4, 64x32, accumulators: 1 of 160 outputs differ, by 1 at most" in done.out
    )
    assert "checks failed, the first on cpu: kernel=faulty, paper 4: " in done.err
    assert done.err.count("\n") == 1


def test_attention_that_computes_something_else_fails_it(monkeypatch, capsys):
    def faulty(q, k, v, *, kernel="auto", **options):
        y = attention(q, k, v, kernel=kernel, **options)
        return one_wrong_output(y) if kernel == "portable" else y

    monkeypatch.setattr("qvgen.verbs.diagnosis.attention.attention", faulty)
    assert main([*SMALL, "device=cpu", "seconds=0"]) == 2
    done = capsys.readouterr()
    assert "FAILED on cpu: kernel=portable, attention int8_qk, 5x130x64, outputs of float32: " in done.out
    assert "checks failed, the first on cpu: kernel=portable, attention int8: " in done.err


def test_a_kernel_that_stops_fails_it(with_backend, capsys):
    def no_driver(y):
        raise RuntimeError("no driver\nin /usr/lib/x.so")

    with_backend(Faulty(no_driver))
    assert main([*SMALL, "device=cpu", "seconds=0"]) == 2
    assert "accumulators: RuntimeError: no driver in x.so" in capsys.readouterr().out


def test_a_kernel_that_rounds_is_held_to_its_distance(with_backend, capsys):
    class Coarse(DequantizeBackend):
        name = "coarse"

        def linear(self, x, weight, *, tensors, spec):
            return super().linear(x, weight, tensors=tensors, spec=spec) * 1.02

    with_backend(Coarse())
    assert main([*SMALL, "device=cpu", "seconds=0"]) == 2
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert {line.split(": ")[1].split(",")[0] for line in failed} == {"kernel=coarse"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["shapes=[1920]"], "shapes holds '1920'; write KxN for K inputs and N outputs, as 1920x7680"),
        (["shapes=[]"], "shapes=[] is empty"),
        (["device=tpu9"], "device='tpu9' is no device; write cpu, cuda, cuda:1, xpu or mps"),
        (["device=cuda:99"], "device=cuda:99 is not there; torch sees cpu"),
        (["seconds=-1"], "seconds=-1"),
    ],
)
def test_bad_input(keys, message, capsys):
    assert main(["doctor", *keys]) == 2
    assert message in capsys.readouterr().err


def test_the_shapes_are_those_of_the_models():
    shapes = layer_shapes(None)
    for shape in ((1920, 1920), (1920, 7680), (12288, 3072), (1536, 8960), (3072, 14336), (13824, 5120)):
        assert shape in shapes
    assert [columns * outputs for columns, outputs in shapes] == sorted(
        columns * outputs for columns, outputs in shapes
    )


def test_paths_are_left_out():
    text = (
        "no compiler in /home/anna/bin/gcc-12:\n see ~/.cache/qvgen/log.txt or C:\\Users\\anna\\x.log, 3/4 and a/b stay"
    )
    assert without_paths(text) == "no compiler in gcc-12: see log.txt or x.log, 3/4 and a/b stay"
