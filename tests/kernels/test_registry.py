"""The registry: names, priorities, refusals; an explicit name never falls back."""

import pytest
import torch

import qvgen_kernels
from qvgen_kernels import (
    LinearSpec,
    available_kernels,
    describe_choice,
    get_backend,
    refusals,
    register_backend,
    registry,
    resolve_kernel,
)

SPEC = LinearSpec(in_features=8, out_features=8, weight_bits=4, activation_bits=4)


class Fast:
    """A backend of four bits on the CPU; it is never run here."""

    name = "fast"
    priority = 1000

    def refusal(self, spec, *, device):
        if device.type != "cpu":
            return f"it needs a CPU, not {device}"
        return None if spec.weight_bits == 4 else f"weight_bits={spec.weight_bits}, it runs 4 only"


@pytest.fixture
def fast(monkeypatch):
    others = {
        name: backend for name, backend in registry._backends.items() if name not in ("triton", "gluon", "cuda_int4")
    }
    monkeypatch.setattr(registry, "_backends", others)  # whose refusals depend on the machine
    backend = Fast()
    register_backend(backend)
    return backend


def test_reference_runs_everything():
    for device in ("cpu", "cuda", "meta"):
        assert "reference" in available_kernels(SPEC, device=device)
    assert resolve_kernel("reference", SPEC).name == "reference"


def test_auto_takes_the_best_that_accepts(fast):
    three = LinearSpec(in_features=8, out_features=8, weight_bits=3, activation_bits=4)
    assert resolve_kernel("auto", SPEC, device=torch.device("cpu")) is fast
    assert resolve_kernel("auto", three) is not fast
    assert available_kernels(SPEC)[0] == "fast"
    assert "fast" not in available_kernels(SPEC, device="cuda")


def test_an_explicit_name_never_falls_back(fast):
    assert resolve_kernel("fast", SPEC) is fast
    with pytest.raises(RuntimeError, match="kernel='fast' can't run this layer on cuda: it needs a CPU"):
        resolve_kernel("fast", SPEC, device="cuda")


def test_unknown_and_taken_names(fast):
    with pytest.raises(ValueError, match=r"kernel='triton9' is unknown; use auto or one of .*reference"):
        resolve_kernel("triton9", SPEC)
    with pytest.raises(ValueError, match="'fast' is taken"):
        register_backend(fast)
    with pytest.raises(ValueError, match="resolved once, before prepacking"):
        get_backend("auto")


def test_what_runs_what_it_costs_and_why_nothing_faster_does_is_one_line(fast):
    fast.refusal = lambda spec, *, device: None if device.type == "cpu" else f"no {device.type} driver"
    line = describe_choice({SPEC: 3}, device="cuda")
    assert line.startswith("kernel=auto on cuda: dequantize (about bfloat16's time plus unpacking, packed memory; ")
    assert line.endswith("; faster ones refuse: fast: no cuda driver")
    assert "\n" not in line
    assert describe_choice({SPEC: 3}) == "kernel=auto on cpu: fast"
    slow = describe_choice({SPEC: 3}, kernel="reference", device="cuda")
    assert slow.startswith("kernel=reference on cuda: reference (an exact oracle, many times bfloat16's time")
    fast.refusal = lambda spec, *, device: "four bits only" if spec.weight_bits != 4 else None
    three = LinearSpec(in_features=8, out_features=8, weight_bits=3, activation_bits=4)
    mixed = describe_choice({SPEC: 3, three: 2}, device="cuda")
    assert mixed.startswith("kernel=auto on cuda: fast for 3 layers, dequantize for 2 layers (about")
    assert mixed.endswith("fast: four bits only")


def test_kernels_of_other_devices_are_no_reason(fast):
    assert "vnni" not in refusals(SPEC, device="cuda")
    fast.device_types = ("cpu",)
    assert refusals(SPEC, device="cuda") == {}
    assert describe_choice({SPEC: 1}, device="cuda").endswith("; no faster one is written for this device")


def test_auto_on_an_accelerator_says_once_what_it_falls_to(fast, caplog):
    fast.refusal = lambda spec, *, device: f"{device.type} and w{spec.weight_bits}: an old driver"
    registry._say_once.cache_clear()
    for _ in range(3):
        assert resolve_kernel("auto", SPEC, device="cuda").name == "dequantize"
    assert [record.getMessage() for record in caplog.records] == [describe_choice({SPEC: 1}, device="cuda")]
    caplog.clear()
    resolve_kernel("auto", SPEC, device="cpu")
    resolve_kernel("dequantize", SPEC, device="cuda")  # it was asked for
    fast.refusal = lambda spec, *, device: None
    resolve_kernel("auto", SPEC, device="cuda")
    assert not caplog.records


def test_public_names_exist():
    assert all(hasattr(qvgen_kernels, name) for name in qvgen_kernels.__all__)
