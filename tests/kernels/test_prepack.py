"""Prepacking on the CPU: every byte against codes minus zero points in numpy's integers, of one layer and of several as one.

The oracle unpacks nothing: it starts from the codes that the planes were made of.
"""

import itertools

import numpy as np
import pytest
import torch

from qvgen.quant.packing import pack_codes
from qvgen_kernels import LinearSpec, cpu_prepack, get_backend
from qvgen_kernels.cpu_library import BACKENDS, missing_reason, supported
from qvgen_kernels.weight import CanonicalWeight
from tests.kernels.layer import make_layer

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=f"no CPU library: {missing_reason()}")
VARIANTS = [name for name in BACKENDS if missing_reason() is None and supported(name) is None]
SIZES = [(1, 1), (7, 33), (8, 16), (63, 5), (64, 32), (65, 48), (129, 17), (136, 16), (200, 100)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def canonical(layer):
    return CanonicalWeight(layer.planes, layer.scale, layer.zero_point)


def expected(layers, spec, k_unit):
    """What the module's header of cpu_prepack says, from the layers' codes."""
    bits, kind = spec.weight_bits, spec.weight_zero_point
    rows = [layer.codes.numpy().astype(np.int64).reshape(len(layer.codes), spec.num_groups, -1) for layer in layers]
    zeros = [None if layer.zero_point is None else layer.zero_point.numpy() for layer in layers]
    base = {"none": 2 ** (bits - 1), "real": 0, "integer": 0}[kind] if bits < 8 else 128
    if kind == "integer" and bits < 8:
        values = [row - zero.astype(np.int64).reshape(len(row), -1, 1) for row, zero in zip(rows, zeros, strict=True)]
    else:
        values = [row - base for row in rows]
    values = np.concatenate(values)
    outputs, groups, columns = values.shape
    padded = np.zeros((-(-outputs // 32) * 32, groups, -(-columns // k_unit) * k_unit), np.int64)
    padded[:outputs, :, :columns] = values
    order = padded.reshape(len(padded) // 16, 16, -1, 4).transpose(0, 2, 1, 3)
    found = [order, padded.sum(2).T, side_by_side([layer.scale.numpy() for layer in layers], len(padded))]
    if kind == "real":
        found.append(side_by_side(zeros, len(padded)))
    if bits == 8 and kind != "none":
        own = [128 - (zero.astype(np.int64) if kind == "integer" else np.zeros_like(zero)) for zero in zeros]
        found.append(side_by_side(own, len(padded)))
    return found


def side_by_side(parts, padded_out):
    stacked = np.concatenate([part.reshape(len(part), -1) for part in parts])
    return np.pad(stacked, ((0, padded_out - len(stacked)), (0, 0))).T


def check(found, wanted):
    assert [tensor.dtype for tensor in found[:3]] == [torch.int8, torch.int32, torch.float32]
    assert len(found) == len(wanted)
    for tensor, array in zip(found, wanted, strict=True):
        assert tuple(tensor.shape) == array.shape
        assert np.array_equal(tensor.numpy(), array)


def arranged(parts, spec, k_unit, variant):
    return cpu_prepack.arrange(parts, spec=spec, k_unit=k_unit, backend=BACKENDS[variant])


@pytest.mark.parametrize("kind", ["integer", "real", "none"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_byte_of_every_backend(bits, kind):
    for seed, (columns, outputs) in enumerate(SIZES):
        sizes = [0, *(size for size in (columns // 2, 8, 5, 1) if size and columns % size == 0)]
        for group, k_unit in itertools.product(sizes, (4, 64)):
            layer = make_layer(
                seed=seed,
                in_features=columns,
                out_features=outputs,
                weight_bits=bits,
                weight_zero_point=kind,
                weight_group_size=group,
            )
            wanted = expected([layer], layer.spec, k_unit)
            for variant in VARIANTS:
                check(arranged([canonical(layer)], layer.spec, k_unit, variant), wanted)


@pytest.mark.parametrize("kind", ["integer", "real", "none"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("group", [0, 68])
@pytest.mark.parametrize("outputs", [(16, 32, 16), (5, 1, 30), (3,), (40, 7)])
def test_merged_parts_are_the_concatenated_layer(bits, kind, group, outputs, threads):
    options = {"in_features": 136, "weight_bits": bits, "weight_zero_point": kind, "weight_group_size": group}
    layers = [make_layer(seed=seed, out_features=count, **options) for seed, count in enumerate(outputs)]
    spec = make_layer(out_features=sum(outputs), **options).spec
    codes = torch.cat([layer.codes for layer in layers])
    scale = torch.cat([layer.scale for layer in layers])
    zero_point = None if kind == "none" else torch.cat([layer.zero_point for layer in layers])
    for name in ("reference", *{name for name in ("vnni", "avx2", "neon", "portable") if name in VARIANTS}):
        backend = get_backend(name)
        whole = backend.prepack(pack_codes(codes, bits=bits), scale=scale, zero_point=zero_point, spec=spec)
        for count in (1, 3):
            threads(count)
            merged = backend.prepack_parts([canonical(layer) for layer in layers], spec=spec)
            assert len(merged) == len(whole)
            assert all(torch.equal(a, b) for a, b in zip(merged, whole, strict=True))
    for variant in VARIANTS:
        check(
            arranged([canonical(layer) for layer in layers], spec, 64, variant),
            expected(layers, spec, 64),
        )


def test_a_large_weight_lies_on_huge_pages_and_is_the_small_ones(threads):
    # 4.7 MB: whole huge pages, the rest behind them, and more panels than threads
    layer = make_layer(in_features=1920, out_features=2450, weight_bits=3)
    wanted = expected([layer], layer.spec, 64)
    for count, variant in itertools.product((1, 2, 5), VARIANTS):
        threads(count)
        found = arranged([canonical(layer)], layer.spec, 64, variant)
        assert found[0].data_ptr() % cpu_prepack.HUGE_PAGE == 0
        check(found, wanted)


def test_planes_are_read_where_they_lie():
    # rows of a file begin at any byte, and a view may have strides
    layer = make_layer(in_features=200, out_features=32, weight_bits=3)
    wanted = expected([layer], layer.spec, 4)
    for variant in VARIANTS:
        moved = []
        for plane in layer.planes:
            memory = torch.empty(plane.numel() + 3, dtype=torch.uint8)
            moved.append(memory[3:].view(plane.shape).copy_(plane))
        check(arranged([CanonicalWeight(moved, layer.scale, layer.zero_point)], layer.spec, 4, variant), wanted)
        wide = [torch.cat([plane, plane], 1)[:, : plane.shape[1]] for plane in layer.planes]
        check(arranged([CanonicalWeight(wide, layer.scale, layer.zero_point)], layer.spec, 4, variant), wanted)


def test_parts_that_do_not_fit_are_named():
    layers = [make_layer(out_features=count) for count in (7, 9)]
    parts = [canonical(layer) for layer in layers]
    spec = make_layer(out_features=17).spec
    for name in ("reference", "portable"):
        with pytest.raises(ValueError, match=r"parts of \[7, 9\] outputs do not make out_features=17"):
            get_backend(name).prepack_parts(parts, spec=spec)
        damaged = [parts[0], parts[1]._replace(scale=parts[1].scale * 0)]
        with pytest.raises(ValueError, match="not finite and positive"):
            get_backend(name).prepack_parts(damaged, spec=make_layer(out_features=16).spec)
    other = LinearSpec(in_features=32, out_features=16, weight_bits=3, activation_bits=3)
    with pytest.raises(ValueError, match=r"\(7, 8\)"):
        get_backend("portable").prepack_parts(parts, spec=other)
