"""Packed models moved to a device that is not the CPU, by ``to`` and by the offloading of accelerate and diffusers.

What is held: outputs are those of the model that lives there, to the bit; the codes go with the model; backends' copies are
made there, once, all or none, and go when the model leaves. The device is the stand-in of tests/stand_in_device.py;
tests/layers/test_other_device.py runs this file in a process of its own.
"""

import logging
import os

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model

import qvgen
from qvgen.deploy.packed_fusion import kernel_names
from qvgen.deploy.prepacked_copies import copies_line, packed_bytes
from qvgen.layers.swap import packed_layers, quantized_layers
from qvgen.quant.width_table import WidthTable
from qvgen_kernels import registry
from qvgen_kernels.dequantize import DequantizeBackend
from qvgen_kernels.errors import KernelUnavailableError
from tests.deploy.test_packed_fusion import call, make_fake
from tests.stand_in_device import NAME, late_copies, reading_allowed, register, stand_in_device

register()


class OwnOrder(DequantizeBackend):
    """A backend of the stand-in device, with an order of bytes of its own, whose memory may end."""

    name = "own_order"
    priority = 50
    priority_on_cpu = 50
    device_types = (NAME,)
    left = 10**9

    def refusal(self, spec, *, device):
        del spec
        return None if device.type == NAME else f"it runs on {NAME}, not on {device}"

    def _arrange(self, parts, *, spec):
        OwnOrder.left -= 1
        if OwnOrder.left < 0:
            raise torch.OutOfMemoryError("out of memory")
        return [tensor.clone() for tensor in super()._arrange(parts, spec=spec)]


@pytest.fixture
def own_order(monkeypatch):
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(OwnOrder, "left", 10**9)
    registry.register_backend(OwnOrder())


@pytest.fixture(scope="module", params=["wan"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    made = tmp_path_factory.mktemp(name)
    model = make_fake(name)
    qvgen.fold(model)
    qvgen.save_packed(model, made)
    return made


@pytest.fixture
def device():
    """Return the device, with float64: diffusers' models have tables of it, but on Apple's."""
    with stand_in_device(float64=True) as made, reading_allowed():
        yield made


def output(name, model, device):
    return call(name, model, device=device).cpu()


def with_hook(model, device):
    model, hook = cpu_offload_with_hook(model, device)
    model.register_forward_hook(lambda *_: hook.offload())
    return model


def grouped(**options):
    def change(model, device):
        model.enable_group_offload(device, **options)
        return model

    return change


OFFLOADS = {
    "model": with_hook,
    "sequential with buffers": lambda model, device: cpu_offload(model, device, offload_buffers=True),
    "groups of blocks": grouped(offload_type="block_level", num_blocks_per_group=1),
    "groups of leaves": grouped(offload_type="leaf_level"),
}


@pytest.fixture(scope="module")
def lived(name, folder):
    """Return what a model gives that lives on the device."""
    with stand_in_device(float64=True) as device, reading_allowed():
        return output(name, qvgen.load_packed(folder).to(device), device)


@pytest.mark.parametrize(
    ("moved", "options"),
    [
        (False, {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": True, "record_stream": True}),
        (True, {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": True}),
        (True, {"offload_type": "leaf_level", "use_stream": True}),
        (True, {"offload_type": "leaf_level"}),
    ],
    ids=["blocks by a stream", "blocks of a model that was there", "its leaves", "its leaves without a stream"],
)
def test_groups_come_by_streams_and_leave_no_copies(name, folder, device, own_order, lived, moved, options):
    """Group offloading exchanges tensors without moving modules, also of a model that lived on the device before."""
    del own_order
    model = qvgen.load_packed(folder, device=device if moved else None)
    if moved:
        assert torch.equal(output(name, model, device), lived)
        assert packed_bytes(model)[device].copies > 0
    with late_copies():
        model.enable_group_offload(device, **options)
        for _ in range(2):  # the first call finds out the order, the second one fetches ahead
            assert torch.equal(output(name, model, device), lived)
            assert device not in {layer.codes.device for layer in packed_layers(model).values()}
            assert packed_bytes(model).get(device) is None or packed_bytes(model)[device].copies == 0
    assert "for each call" in copies_line(model)


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # a parameter of the model's own
def test_a_map_over_two_places_keeps_copies_of_the_layers_that_stay(name, folder, device, own_order, lived):
    del own_order
    model = qvgen.load_packed(folder)
    places = {part: device for part, _ in model.named_children() if part != "blocks"}
    places |= {"blocks.0": device, "blocks.1": "cpu", "scale_shift_table": device}
    dispatch_model(model, places, main_device=device)
    for _ in range(2):
        assert torch.equal(output(name, model, device), lived)
    stay = [layer for name, layer in packed_layers(model).items() if not name.startswith("blocks.1.")]
    assert not any(layer.visits for layer in stay)
    assert packed_bytes(model)[device].copies > 0


def test_a_copy_on_a_stream_is_late(device):
    with late_copies():
        stream = torch.get_device_module(NAME).Stream()
        with torch.get_device_module(NAME).stream(stream):
            made = torch.arange(3.0).to(device, non_blocking=True)
        assert made.tolist() != [0, 1, 2]
        stream.synchronize()
        assert made.tolist() == [0, 1, 2]


LONG = pytest.mark.skipif(
    os.environ.get("QVGEN_LONG_TESTS") != "1", reason="set QVGEN_LONG_TESTS=1 to move a model of another class too"
)


@pytest.mark.parametrize(
    ("name", "way"),
    [*(("wan", way) for way in OFFLOADS), pytest.param("cogvideox", "groups of leaves", marks=LONG)],
    indirect=["name"],
)
def test_offloading_computes_there_and_leaves_neither_codes_nor_copies(name, folder, device, way, own_order, caplog):
    del own_order
    there = qvgen.load_packed(folder).to(device)
    expected = output(name, there, device)
    model = OFFLOADS[way](qvgen.load_packed(folder), device)
    keys = list(model.state_dict())
    caplog.set_level(logging.INFO, "qvgen.deploy.prepacked_copies")
    for _ in range(2):
        assert torch.equal(output(name, model, device), expected)
        assert device not in {layer.codes.device for layer in packed_layers(model).values()}
        assert packed_bytes(model).get(device) is None or packed_bytes(model)[device].copies == 0
    assert list(model.state_dict()) == keys
    lines = [record.message for record in caplog.records if record.message.startswith("packed layers on")]
    assert len(lines) == 1  # and the second call says nothing new
    assert "prepacked for own_order" in lines[0]
    assert ("for each call" in lines[0]) == (way != "model")


def test_a_model_that_is_moved_takes_its_codes_along_and_its_kernel_is_chosen_anew(name, folder, device, own_order):
    del own_order
    model = qvgen.load_packed(folder)
    on_cpu, names = output(name, model, "cpu"), kernel_names(model)
    stored = packed_bytes(model)[torch.device("cpu")].stored
    model.to(device)
    assert kernel_names(model) == ()  # nothing of the CPU's is left
    assert packed_bytes(model) == {device: packed_bytes(model)[device]}
    assert (packed_bytes(model)[device].stored, packed_bytes(model)[device].copies) == (stored, 0)
    found = output(name, model, device)
    assert kernel_names(model) == ("own_order",)
    assert (found - on_cpu).abs().max() <= 1e-5 * on_cpu.abs().max()
    codes = sum(plane.numel() for layer in packed_layers(model).values() for plane in layer.planes)
    assert packed_bytes(model)[device].copies > codes
    assert f"{packed_bytes(model)[device].copies / 2**20:.1f} MiB prepacked beside them" in copies_line(model)
    made = OwnOrder.left
    assert torch.equal(output(name, model, device), found)
    assert OwnOrder.left == made  # once
    assert torch.equal(output(name, model.to("cpu"), "cpu"), on_cpu)
    assert kernel_names(model) == names


def test_a_kernel_of_another_device_is_prepared_there(name, folder, device, own_order, caplog):
    del own_order
    caplog.set_level(logging.INFO, "qvgen.deploy.checkpoint")
    model = qvgen.load_packed(folder, kernel="own_order")
    assert f"kernel=own_order prepares its weights at the first call on {NAME}; move the model there" in caplog.text
    assert kernel_names(model) == ()
    with pytest.raises(
        KernelUnavailableError, match=f"kernel='own_order' can't run this layer on cpu: it runs on {NAME}"
    ):
        output(name, model, "cpu")
    expected = output(name, model.to(device), device)
    assert kernel_names(model) == ("own_order",)
    loaded = qvgen.load_packed(folder, kernel="own_order", device=device)
    assert kernel_names(loaded) == ("own_order",)  # before the first call
    assert {value.device for value in loaded.state_dict().values()} == {device}
    assert torch.equal(output(name, loaded, device), expected)


def test_memory_that_ends_while_a_moved_model_is_prepared_leaves_none_of_it(
    name, folder, device, own_order, monkeypatch
):
    del own_order
    model = qvgen.load_packed(folder)
    on_cpu = output(name, model, "cpu")
    expected = output(name, qvgen.load_packed(folder, device=device), device)
    model.to(device)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for left in (0, 5):
        monkeypatch.setattr(OwnOrder, "left", left)
        with pytest.raises(torch.OutOfMemoryError):
            output(name, model, device)
        assert kernel_names(model) == ()
        assert packed_bytes(model)[device].copies == 0
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    monkeypatch.setattr(OwnOrder, "left", 10**9)
    assert torch.equal(output(name, model, device), expected)
    assert torch.equal(output(name, model.to("cpu"), "cpu"), on_cpu)


def test_weights_of_several_widths_are_offloaded_too(device, tmp_path):
    model = make_fake("wan")
    for layer in quantized_layers(model).values():
        layer.set_width_table_(WidthTable(bands=((8, 8),) * 25 + ((4, 4),) * 25))
    qvgen.fold(model)
    qvgen.save_packed(model, tmp_path)
    expected = output("wan", model.to(device), device)
    for way in ("sequential with buffers", "groups of leaves"):
        assert torch.equal(output("wan", OFFLOADS[way](qvgen.load_packed(tmp_path), device), device), expected)


def test_a_device_that_is_not_there_is_said(folder):
    with pytest.raises(ValueError, match="device='cuda:7' can't be used here"):
        qvgen.load_packed(folder, device="cuda:7")
    with pytest.raises(ValueError, match="device='nowhere' can't be used here"):
        qvgen.load_packed(folder, device="nowhere")
    with pytest.raises(RuntimeError, match="kernel='triton' can't run this layer on cuda: torch finds no GPU"):
        qvgen.load_packed(folder, kernel="triton")
