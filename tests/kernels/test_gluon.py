"""The Gluon product without a card: its source emulated on the CPU, its weights, what it refuses, when auto takes it.

The emulation holds sums, tiles, stages and barriers to numpy's product; test_triton_code.py looks at the machine code. What
neither shows, layouts in registers and swizzles in memory, is the compiler's. Nothing here ran on a card.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qvgen_kernels import LinearSpec, available_kernels, describe_choice, get_backend, resolve_kernel
from qvgen_kernels.triton import backend as triton_backend
from qvgen_kernels.triton import tiles
from qvgen_kernels.triton.layout import layout_of
from qvgen_kernels.triton.tiles import Card
from qvgen_kernels.triton.tuned import Tile, TunedTile, is_faster, save_tiles
from qvgen_kernels.weight import CanonicalWeight
from tests.kernels.layer import make_layer

pytest.importorskip("triton", minversion="3.9", reason="Triton 3.9 or newer is not installed here")

from qvgen_kernels.gluon import tile as gluon_tile
from tests.kernels import gluon_emulation

ROOT = Path(__file__).resolve().parents[2]
HOPPER = Card((9, 0), 132, "NVIDIA H200")
CUDA = torch.device("cuda", 0)
ORDERS = [(True, False), (False, True), (True, True)]


def operands(rows, outputs, columns, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(-128, 128, (side, columns), np.int8) for side in (outputs, rows)]


def form(rows=64, outputs=128, stages=3, band=2):
    return SimpleNamespace(outputs=outputs, rows=rows, stages=stages, band=band, warps=8, instruction=min(rows, 128))


@pytest.mark.parametrize("eager", ORDERS, ids=["copies early", "products early", "both early"])
@pytest.mark.parametrize(
    ("rows", "outputs", "columns", "stages", "programs"),
    [
        (64, 128, 128, 2, 1),  # one tile of one chunk
        (130, 300, 640, 3, 1),  # ragged, more chunks than stages
        (130, 300, 160, 4, 2),  # fewer chunks than stages: the ring goes on over tiles
        (700, 260, 288, 2, 5),  # the last program has less to do
        (1, 1, 32, 6, 1),
        (65, 129, 384, 6, 3),
    ],
)
def test_the_source_makes_every_sum_once(rows, outputs, columns, stages, programs, eager):
    w, x = operands(rows, outputs, columns)
    made, written = gluon_emulation.product(
        w, x, form=form(stages=stages), programs=programs, eager_copies=eager[0], eager_products=eager[1]
    )
    assert (written == 1).all()
    assert (made == w.astype(np.int32) @ x.astype(np.int32).T).all()


CHANGES = {
    "a stage given back with its own product": (
        "stage_before(step, form.stages)), count=1, pred=chunk > 0",
        "stage), count=1",
    ),
    "products that are waited for a chunk later": ("num_outstanding=1", "num_outstanding=2"),
    "no wait for full stages": ("mbarrier.wait(barriers[0].index(stage), phase)", "pass"),
    "no wait for empty stages": ("mbarrier.wait(barriers[1].index(stage), phase ^ 1)", "pass"),
    "sums that are not waited for": ("num_outstanding=0", "num_outstanding=1"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_emulation_notices(name):
    """Each of these is a race on a card; here it gives other sums, a wait without end, or a broken rule."""
    before, after = CHANGES[name]
    w, x = operands(130, 300, 640)
    expected = w.astype(np.int32) @ x.astype(np.int32).T
    seen = []

    def change(source):
        seen.append(before in source)
        return source.replace(before, after)

    noticed = False
    for eager in ORDERS:
        try:
            made, _ = gluon_emulation.product(
                w, x, form=form(stages=2), programs=1, eager_copies=eager[0], eager_products=eager[1], change=change
            )
        except (AssertionError, gluon_emulation.StuckError):
            noticed = True
        else:
            noticed = noticed or bool((made != expected).any())
    assert any(seen)
    assert noticed


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero_point", ["integer", "real", "none"])
def test_weights_are_codes_less_the_middle_and_all_else_is_tritons(bits, zero_point):
    layer = make_layer(
        in_features=200, out_features=9, weight_bits=bits, activation_bits=8, weight_zero_point=zero_point
    )
    made = get_backend("gluon").prepack(layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec)
    codes = made[0].int()
    assert codes.shape == (9, layout_of(layer.spec).columns)
    assert codes.shape[1] % 16 == 0  # what TMA asks of a row's bytes
    assert torch.equal(codes[:, :200], layer.codes.int() - 2 ** (bits - 1))
    assert not codes[:, 200:].any()
    theirs = get_backend("triton").prepack(
        layer.planes, scale=layer.scale, zero_point=layer.zero_point, spec=layer.spec
    )
    assert len(made) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(made[1:], theirs[1:], strict=True))
    assert sum(tensor.nbytes for tensor in made) == get_backend("gluon").prepacked_bytes(layer.spec)


def test_merged_layers_are_one():
    parts = [make_layer(out_features=n, seed=n, in_features=64) for n in (5, 9)]
    canonical = [CanonicalWeight(part.planes, part.scale, part.zero_point) for part in parts]
    whole = make_layer(out_features=14, in_features=64).spec
    made = get_backend("gluon").prepack_parts(canonical, spec=whole)
    alone = [
        get_backend("gluon").prepack(part.planes, scale=part.scale, zero_point=part.zero_point, spec=part.spec)
        for part in parts
    ]
    assert torch.equal(made[0], torch.cat([weight[0] for weight in alone]))
    assert torch.equal(made[1], torch.cat([weight[1] for weight in alone], 1))


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A function that lets torch see a card; the user's table is empty."""
    monkeypatch.setenv("QVGEN_KERNEL_CACHE", str(tmp_path))
    known = (triton_backend._missing, triton_backend._card)

    def forget():
        for answer in known:
            answer.cache_clear()
        tiles.forget()
        gluon_tile.forget()

    def see(capability, name):
        properties = type("Properties", (), {"multi_processor_count": 132, "name": name})()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        forget()

    forget()
    yield see
    forget()


def test_refusals_name_what_is_missing(card, monkeypatch):
    backend, spec = get_backend("gluon"), make_layer(in_features=64).spec
    assert "runs on CUDA devices, not on cpu" in backend.refusal(spec, device=torch.device("cpu"))
    card((8, 9), "NVIDIA L40")
    assert backend.refusal(spec, device=CUDA) == (
        "NVIDIA L40 has compute capability 8.9; it must be 9.0 (H100, H200); use triton"
    )
    card((9, 0), HOPPER.name)
    assert backend.refusal(spec, device=CUDA) is None
    grouped = make_layer(in_features=64, weight_group_size=32).spec
    assert "no groups of 32 columns; use kernel=triton" in backend.refusal(grouped, device=CUDA)
    monkeypatch.setattr("triton.__version__", "3.7.1")
    assert "Triton is 3.7.1; Gluon's names are those of 3.9" in backend.refusal(spec, device=CUDA)


def entry(kernel, ms, **changed):
    values = {
        "card": HOPPER.name, "rows": 4096, "columns": 64, "outputs": 128, "weight_bits": 4, "activation_bits": 4,
        "tail": False, "tile": Tile(128, 128, 8, 3), "bf16_ms": 1.0,
    }  # fmt: skip
    return TunedTile(kernel=kernel, ms=ms, **values | changed)


SPEC = LinearSpec(in_features=64, out_features=128, weight_bits=4, activation_bits=4)


def test_auto_takes_it_only_where_it_was_measured_to_be_faster(card):
    card((9, 0), HOPPER.name)
    assert available_kernels(SPEC, device=CUDA)[:2] == ["triton", "gluon"]
    save_tiles([entry("gluon", 0.4)])
    tiles.forget()
    assert resolve_kernel("auto", SPEC, device=CUDA).name == "triton"
    save_tiles([entry("triton", 0.5)])
    tiles.forget()
    assert resolve_kernel("auto", SPEC, device=CUDA).name == "gluon"
    assert resolve_kernel("auto", replace(SPEC, weight_bits=3), device=CUDA).name == "triton"
    assert resolve_kernel("auto", replace(SPEC, weight_group_size=32), device=CUDA).name == "triton"
    save_tiles([entry("triton", 1.0, rows=512), entry("gluon", 1.2, rows=512)])
    tiles.forget()
    assert resolve_kernel("auto", SPEC, device=CUDA).name == "triton"  # slower over both numbers of rows


def test_what_was_measured_for_one_kernel_alone_decides_nothing():
    own = [entry("gluon", 0.1), entry("triton", 0.2, rows=512), entry("triton", 0.3, tail=True)]
    assert not is_faster("gluon", "triton", own, SPEC)
    assert is_faster("gluon", "triton", [*own, entry("triton", 0.2)], SPEC)


def test_memory_of_prepacked_weights_is_counted_and_said(card):
    card((9, 0), HOPPER.name)
    specs = {replace(SPEC, in_features=5120, out_features=13824): 80}
    said = describe_choice(specs, kernel="gluon", device=CUDA)
    mib = 80 * 13824 * (5120 + 8) / 2**20
    assert said == f"kernel=gluon on cuda: gluon ({mib:.0f} MiB of prepacked weights)"


def test_where_bfloat16_wins_the_log_says_so(card, caplog):
    card((9, 0), HOPPER.name)
    save_tiles([entry("gluon", 1.5)])
    tiles.forget()
    gluon_tile.tile_of(SPEC, rows=4096, card=HOPPER)
    assert "bfloat16 is faster than gluon on NVIDIA H200 for 4096 x 64 -> 128 at w4a4: 1.5 ms packed" in caplog.text


def test_tiles_are_those_that_the_kernel_has(card):
    wide = replace(SPEC, in_features=1920, out_features=1920)
    assert gluon_tile.rule(wide, rows=17776, card=HOPPER) == Tile(128, 256, 8, 4)
    assert gluon_tile.rule(wide, rows=17776, card=HOPPER, tail=True) == Tile(128, 128, 8, 6)
    assert gluon_tile.rule(wide, rows=60, card=HOPPER).rows == 64
    for rows in (1, 64, 65, 1000, 20000):
        for outputs in (1, 100, 5760):
            found = gluon_tile.rule(replace(wide, out_features=outputs), rows=rows, card=HOPPER)
            assert gluon_tile.fits(found)
    mine = Tile(128, 64, 8, 3)
    save_tiles([entry("gluon", 0.1, columns=1920, outputs=1920, rows=17776, tile=mine)])
    tiles.forget()
    gluon_tile.forget()
    assert gluon_tile.tile_of(wide, rows=17776, card=HOPPER) == mine
    assert tiles.tile_of(wide, rows=17776, card=HOPPER) != mine
    save_tiles([entry("gluon", 0.1, columns=1920, outputs=1920, rows=17776, tile=Tile(64, 64, 4, 2))])
    tiles.forget()
    gluon_tile.forget()
    assert gluon_tile.tile_of(wide, rows=17776, card=HOPPER) == Tile(128, 256, 8, 4)  # the kernel has no such tile


@pytest.mark.skipif(
    os.environ.get("QVGEN_LONG_TESTS") != "1", reason="two kernels are compiled for 6 seconds: QVGEN_LONG_TESTS=1"
)
def test_what_calls_launch_compiles(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_calls_program", "gluon"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line]
    assert [line[0] for line in lines] == ["quantize_kernel", "multiply_kernel"]
    assert int(lines[1][2]) <= gluon_tile.MEMORY
    assert lines[1][1] == "12"  # eight warps that multiply, one that copies, three idle
