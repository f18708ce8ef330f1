"""Several layers at a time: order, errors, modes, and the bits of one after the other."""

import threading
from functools import partial

import pytest
import torch

from qvgen.config.leaves import load_leaf
from qvgen.initializers import prepare as preparation
from qvgen.initializers.prepare import PrepareConfig
from qvgen.layers import swap
from qvgen.layers.layer_threads import SCRATCH_BYTES, in_threads, num_threads
from qvgen.layers.swap import folded_copy
from tests.conformance.initializer_cases import make_statistics
from tests.layers.model import make_model
from tests.profiles import make_profile


def test_results_come_in_order_and_jobs_run_together():
    """Two jobs that wait for each other end only if both are begun."""
    meeting = threading.Barrier(2, timeout=60)
    jobs = [meeting.wait, meeting.wait, lambda: "third"]
    found = list(in_threads(jobs, threads=2))
    assert sorted(found[:2]) == [0, 1]
    assert found[2] == "third"


def test_jobs_are_taken_in_the_callers_thread_and_not_far_ahead():
    taken = []

    def jobs():
        for index in range(20):
            taken.append(threading.current_thread())
            yield partial(int, index)

    results = in_threads(jobs(), threads=2)
    assert next(results) == 0
    assert len(taken) == 4
    assert list(results) == list(range(1, 20))
    assert set(taken) == {threading.current_thread()}


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_is_raised_and_what_was_not_begun_never_is(threads):
    begun = []

    def job(index):
        begun.append(index)
        if index == 3:
            raise ValueError("layer 3 has no scale")

    with pytest.raises(ValueError, match="layer 3 has no scale"):
        list(in_threads((partial(job, index) for index in range(100)), threads=threads))
    assert len(begun) < 3 + 2 * threads + 1
    assert not any(thread.name.startswith("layers") for thread in threading.enumerate())


def test_a_thread_has_the_callers_gradient_mode():
    for has_gradients in (True, False):
        with torch.set_grad_enabled(has_gradients):
            assert list(in_threads([torch.is_grad_enabled] * 3, threads=2)) == [has_gradients] * 3


def test_device_cores_torchs_threads_and_memory_decide_how_many(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    weights = [torch.zeros(1024), torch.zeros(8)]
    assert num_threads(weights, scratch_per_weight=1) == 4
    assert num_threads(weights, scratch_per_weight=SCRATCH_BYTES // 1024 // 3) == 3
    assert num_threads(weights, scratch_per_weight=SCRATCH_BYTES) == 1
    assert num_threads([*weights, torch.zeros(8, device="meta")], scratch_per_weight=1) == 1


def set_up(init, *, threads, monkeypatch):
    """States of a model's layers as a method sets them up, and of the folded ones; how often progress was told."""
    for module in (preparation, swap):
        monkeypatch.setattr(module, "num_threads", lambda *_, **__: threads)
    model, calls = make_model(), []
    config = PrepareConfig(profile=make_profile("paper"), initializer=load_leaf("init", "rtn"), phi_rank=2)
    preparation.prepare(model, config)
    layers = swap.quantized_layers(model)
    preparation.initialize_(
        model,
        load_leaf("init", init),
        seed=1,
        statistics=lambda name: make_statistics(layers[name].in_features),
        done=lambda: calls.append(0),
    )
    states = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers.values()]
    for layer in layers.values():
        layer.phi = None
    packed = swap.packed_layers(folded_copy(model)).values()
    return [*states, *(layer.state_dict() for layer in packed)], len(calls)


@pytest.mark.parametrize("init", ["mse", "svdquant", "gptq"])
def test_a_start_and_its_fold_have_the_same_bits_with_any_number(init, monkeypatch):
    alone, together = (set_up(init, threads=threads, monkeypatch=monkeypatch) for threads in (1, 3))
    assert alone[1] == together[1] == len(alone[0]) / 2
    for one, other in zip(alone[0], together[0], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_method_that_does_not_say_that_it_can_is_run_layer_by_layer(monkeypatch):
    running = []

    class OneByOne:
        needs = frozenset()

        def initialize_(self, layer, *, statistics):
            running.append(threading.current_thread())
            return layer.weight.detach()

    monkeypatch.setattr(preparation, "num_threads", lambda *_, **__: 3)
    model = make_model()
    preparation.prepare(model, PrepareConfig(profile=make_profile("paper"), initializer=OneByOne()))
    assert set(running) == {threading.current_thread()}
