"""The registry: names, priorities, refusals; an explicit name never falls back."""

import pytest
import torch

import qvgen_kernels
from qvgen_kernels import (
    LinearSpec,
    available_kernels,
    get_backend,
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
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
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


def test_public_names_exist():
    assert all(hasattr(qvgen_kernels, name) for name in qvgen_kernels.__all__)
