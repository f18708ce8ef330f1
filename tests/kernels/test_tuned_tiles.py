"""Measured tiles: which one a call takes, what a table may hold, and how one is made, with times that a test hands in."""

import json
import logging
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from qvgen.cli import main
from qvgen.config.bits import Bits
from qvgen.verbs.benchmarks.kernels import BENCHMARK
from qvgen.verbs.benchmarks.kernels.tiles import measured_rows, tile_table
from qvgen_kernels import LinearSpec
from qvgen_kernels.gluon import tile as gluon_tile
from qvgen_kernels.gluon.tune import GLUON
from qvgen_kernels.triton import tiles, tune, tuned
from qvgen_kernels.triton.tiles import Card, rule, tile_of
from qvgen_kernels.triton.tuned import Tile, TunedTile, nearest, read_tiles, save_tiles, tuned_tiles, user_table
from tests.kernels.triton_interpreter import _quiet_numpy

__all__ = ["_quiet_numpy"]

HOPPER = Card((9, 0), 132, "NVIDIA H200")
TILE = Tile(128, 64, 4, 3)


def entry(**changed):
    values = {
        "kernel": "triton",
        "card": HOPPER.name, "rows": 17776, "columns": 1920, "outputs": 1920, "weight_bits": 4, "activation_bits": 4,
        "tail": False, "tile": TILE, "ms": 0.1, "bf16_ms": 0.2,
    }  # fmt: skip
    return TunedTile(**values | changed)


def spec(columns=1920, outputs=1920, weight=4, activation=4, **options):
    return LinearSpec(
        in_features=columns, out_features=outputs, weight_bits=weight, activation_bits=activation, **options
    )


@pytest.fixture(autouse=True)
def _own_table(monkeypatch, tmp_path):
    """An empty cache of the user's, and tables that are read anew."""
    monkeypatch.setenv("QVGEN_KERNEL_CACHE", str(tmp_path / "cache"))
    tiles.forget()
    gluon_tile.forget()
    yield
    tiles.forget()
    gluon_tile.forget()


def test_the_package_has_no_measured_tile_and_says_so():
    assert read_tiles(tuned.PACKAGED, triton=None) == []
    assert "No card was measured" in json.loads(tuned.PACKAGED.read_text())["note"]


def test_a_call_takes_the_nearest_shape():
    near, far = entry(rows=4096), entry(rows=32760, outputs=5760)
    assert nearest([far, near], spec(), rows=4096, tail=False) is near
    assert nearest([far, near], spec(outputs=5000), rows=30000, tail=False) is far
    assert nearest([far, near], spec(), rows=8192, tail=False) is near  # twice the rows
    assert nearest([near], spec(), rows=4 * 4096, tail=False) is near  # the farthest
    assert nearest([near], spec(), rows=4 * 4096 + 64, tail=False) is None
    assert nearest([near], spec(outputs=1920 * 4), rows=8192, tail=False) is None
    small, large = entry(rows=1024), entry(rows=4096)
    assert nearest([small, large], spec(), rows=2048, tail=False) is large  # as near: the one with more rows
    assert nearest([large, small], spec(), rows=2048, tail=False) is large


def test_a_call_takes_no_tile_of_other_bits_of_another_tail_or_with_groups():
    table = [entry()]
    assert nearest(table, spec(), rows=17776, tail=False) is table[0]
    assert nearest(table, spec(weight=3), rows=17776, tail=False) is None
    assert nearest(table, spec(activation=8), rows=17776, tail=False) is None
    assert nearest(table, spec(), rows=17776, tail=True) is None
    assert nearest(table, spec(weight_group_size=64), rows=17776, tail=False) is None


def test_a_saved_tile_is_what_calls_get_and_replaces_the_one_before():
    before = tile_of(spec(), rows=17776, card=HOPPER)
    assert before == rule(spec(), rows=17776, card=HOPPER) != TILE
    save_tiles([entry()])
    tiles.forget()
    assert tile_of(spec(), rows=17776, card=HOPPER) == TILE
    assert tile_of(spec(), rows=17776, card=replace(HOPPER, name="NVIDIA H100")) == before
    other = Tile(64, 128, 4, 2)
    save_tiles([entry(tile=other), entry(weight_bits=3)])
    tiles.forget()
    assert tile_of(spec(), rows=17776, card=HOPPER) == other
    assert tile_of(spec(weight=3), rows=17776, card=HOPPER) == TILE
    assert len(tuned_tiles(HOPPER.name)) == 2


def test_functions_count_as_tails():
    save_tiles([entry(tail=True)])
    tiles.forget()
    assert tile_of(spec(function="gelu_tanh"), rows=17776, card=HOPPER) == TILE
    assert tile_of(spec(), rows=17776, card=HOPPER, tail=True) == TILE
    assert tile_of(spec(), rows=17776, card=HOPPER) != TILE


def test_a_tile_that_does_not_fit_the_card_gives_way_to_the_rule():
    ada = Card((8, 9), 128, "NVIDIA L40")
    save_tiles([entry(card=ada.name, tile=Tile(256, 256, 8, 8))])
    tiles.forget()
    assert tile_of(spec(), rows=17776, card=ada) == rule(spec(), rows=17776, card=ada)


DAMAGED = {
    "nothing": "it is no JSON",
    "half": "it is no JSON",
    "version": "it is no qvgen-tiles file of version 1",
    "list": "it is no qvgen-tiles file of version 1",
    "triton": "it was measured with Triton '1.0'",
    "no tiles": "it has no list of tiles",
    "key": "entry 0 must have exactly the keys",
    "tile key": "the tile of entry 0 must have exactly the keys of a tile",
    "rows": "entry 0: tile.rows=100 must be one of 16, 32, 64, 128, 256",
    "stages": "entry 0: tile.stages=99 must be one of",
    "text": "entry 0: rows='17776' must be a whole number above 0",
    "true": "entry 0: tile.warps=True must be a whole number above 0",
    "negative": "entry 0: columns=-1920 must be a whole number above 0",
    "bits": "entry 0: weight_bits=9 must be from 2 to 8",
    "time": "entry 0: ms=nan must be a time above 0",
    "tail": "entry 0: tail=1 must be true or false",
    "kernel": "entry 0: kernel='mine' must be one of triton, gluon",
}


def damage(kind, content):
    (found,) = content["tiles"]
    tile = found["tile"]
    if kind == "nothing":
        return ""
    if kind == "half":
        return json.dumps(content)[:-20]
    if kind == "list":
        return "[1]"
    changes = {
        "version": (content, "version", 2), "triton": (content, "triton", "1.0"), "no tiles": (content, "tiles", 3),
        "key": (found, "code", "import os"), "tile key": (tile, "more", 1), "rows": (tile, "rows", 100),
        "stages": (tile, "stages", 99), "text": (found, "rows", "17776"), "true": (tile, "warps", True),
        "negative": (found, "columns", -1920), "bits": (found, "weight_bits", 9), "time": (found, "ms", float("nan")),
        "tail": (found, "tail", 1), "kernel": (found, "kernel", "mine"),
    }  # fmt: skip
    where, key, value = changes[kind]
    where[key] = value
    return json.dumps(content)


@pytest.mark.parametrize(("kind", "reason"), DAMAGED.items(), ids=list(DAMAGED))
def test_a_table_that_is_no_good_is_left_out_with_one_warning(caplog, kind, reason):
    save_tiles([entry()])
    user_table().write_text(damage(kind, json.loads(user_table().read_text())))
    tiles.forget()
    for rows in (17776, 17770):
        assert tile_of(spec(), rows=rows, card=HOPPER) == rule(spec(), rows=rows, card=HOPPER)
    (record,) = caplog.records
    assert reason in record.message
    assert str(user_table()) in record.message
    assert "qvgen benchmark kernels tune=true" in record.message


def test_a_table_that_is_no_good_is_replaced_by_the_next_measurement(caplog):
    user_table().parent.mkdir(parents=True)
    user_table().write_text("{")
    save_tiles([entry()])
    assert "it is no JSON" in caplog.text
    assert tuned_tiles(HOPPER.name) == (entry(),)
    assert [path.name for path in user_table().parent.iterdir()] == [user_table().name]


def test_a_huge_file_is_not_read():
    user_table().parent.mkdir(parents=True)
    with user_table().open("w") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="1073741824 bytes, and no table has more"):
        read_tiles(user_table(), triton=None)


def test_where_bfloat16_wins_the_log_says_so_once(caplog):
    save_tiles([entry(ms=0.3, bf16_ms=0.25), entry(rows=512, ms=0.1, bf16_ms=0.2)])
    tiles.forget()
    with caplog.at_level(logging.WARNING):
        for rows in (512, 17776, 17700, 17776):
            tile_of(spec(), rows=rows, card=HOPPER)
    assert [record.message for record in caplog.records] == [
        "bfloat16 is faster than triton on NVIDIA H200 for 17776 x 1920 -> 1920 at w4a4: 0.3 ms packed, 0.25 ms in bfloat16"
    ]


def test_candidates_fit_the_card_and_hold_the_rules_tile():
    for card in (HOPPER, Card((8, 9), 128), Card((8, 0), 108)):
        found = tune.candidates(spec(), rows=17776, card=card, tail=False)
        assert found[0] == rule(spec(), rows=17776, card=card)
        assert len(found) == len(set(found)) > 10
        assert all(tiles.fits_card(tile, spec(), card=card) for tile in found)
        for tile in found:
            entry(tile=tile)  # a table may hold it
    assert max(tile.rows for tile in tune.candidates(spec(), rows=64, card=HOPPER, tail=False)) == 64


class Clock:
    """A timer whose times are given; it makes the calls that it is told to make."""

    def __init__(self, times, *, calls=()):
        self.times, self.calls, self.asked = times, calls, []

    def __call__(self, name, call):
        self.asked.append(name)
        if name in self.calls:
            call()
        if self.times(name) is None:
            raise RuntimeError("out of resource: shared memory")
        return self.times(name)


def test_the_card_waits_while_a_call_is_prepared(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, last):
            return 0.25 * order.count("call")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    assert tune.call_ms(lambda: order.append("call")) == 0.25
    assert order == ["sleep", "record", "call", "record", "wait"]
    order.clear()
    assert tune.card_timer(3)("any", lambda: order.append("call")) == 1.0  # the second of three, after two that warm up
    assert order[:2] == ["call", "call"]


def test_the_fastest_tile_that_runs_is_kept():
    small = spec(64, 64, 3, 3)
    card = Card((9, 0), 1, "NVIDIA H200")
    quick, broken = "64x64, 4 warps, 3 stages", "64x64, 4 warps, 2 stages"
    times = {quick: 1.0, broken: None, "bf16": 1.5}
    clock = Clock(lambda name: times.get(name, 2.0), calls=(quick, "bf16"))
    found, shown = tune.fastest(small, rows=80, tail=True, card=card, device=torch.device("cpu"), timer=clock)
    assert (found.tile, found.ms, found.bf16_ms) == (Tile(64, 64, 4, 3), 1.0, 1.5)
    assert (shown[quick], shown[broken]) == (1.0, None)
    assert clock.asked[-1] == "bf16"
    assert found == entry(
        rows=80,
        columns=64,
        outputs=64,
        weight_bits=3,
        activation_bits=3,
        tail=True,
        tile=found.tile,
        ms=1.0,
        bf16_ms=1.5,
    )


def test_the_benchmark_fills_the_users_table_and_its_page():
    config = SimpleNamespace(shapes=("100x64-64", "100x64-128-64"), widths=(Bits.parse("4"),))
    clock = Clock(lambda name: {"bf16": 1.0}.get(name, 3.0 if "4 warps" in name else 0.5))
    rows = list(measured_rows(config, done={("none",)}, device=torch.device("cpu"), card=HOPPER, timer=clock))
    measured = [(row["layer"], row["bits"], row["tail"]) for row in rows]
    assert measured == [
        ("100x64-64", "4", False), ("100x64-64", "4", True),
        ("100x64-128", "4", True), ("100x128-64", "4", True),
    ]  # fmt: skip
    assert len(tuned_tiles(HOPPER.name)) == 4
    assert tile_of(spec(64, 128), rows=100, card=HOPPER, tail=True).warps == 8
    head = {"versions": {"torch": "2.13"}, "timed_steps": 5, "command": "qvgen benchmark kernels tune=true"}
    page = "\n".join(tile_table(head, json.loads(json.dumps(rows))))
    assert "# Tiles of the GPU kernels on NVIDIA H200" in page
    assert page.count("| 0.500 |") == 4
    assert page.count("| 2.00 |") == 4
    again = list(measured_rows(config, done={("100x64-64",)}, device=torch.device("cpu"), card=HOPPER, timer=clock))
    assert len(again) == 2


def test_every_kernel_that_runs_is_measured_for_the_same_layers():
    config = SimpleNamespace(shapes=("1000x64-128-64",), widths=(Bits.parse("3"),))
    clock = Clock(lambda name: {"bf16": 1.0, "128x128, 8 warps, 4 stages": 0.25}.get(name, 0.5))
    given = {"device": torch.device("cpu"), "card": HOPPER, "timer": clock, "kernels": (tune.TRITON, GLUON)}
    rows = list(measured_rows(config, done=set(), **given))
    assert [(row["layer"], row["kernel"]) for row in rows] == [
        ("1000x64-128", "triton"), ("1000x64-128", "gluon"), ("1000x128-64", "triton"), ("1000x128-64", "gluon"),
    ]  # fmt: skip
    found = {(one.kernel, one.columns): one.tile for one in tuned_tiles(HOPPER.name)}
    assert found["gluon", 64] == Tile(128, 128, 8, 4)
    assert all(gluon_tile.fits(tile) for (kernel, _), tile in found.items() if kernel == "gluon")
    assert gluon_tile.tile_of(spec(64, 128, 3, 3), rows=1000, card=HOPPER, tail=True) == Tile(128, 128, 8, 4)


def test_where_no_tile_runs_nothing_is_kept():
    clock = Clock(lambda name: None)
    config = SimpleNamespace(shapes=("100x64-128-64",), widths=(Bits.parse("4"),))
    rows = list(measured_rows(config, done=set(), device=torch.device("cpu"), card=HOPPER, timer=clock))
    assert [set(row["times"].values()) for row in rows] == [{None}, {None}]
    assert not user_table().exists()
    head = {"versions": {"torch": "2.13"}, "timed_steps": 5, "command": "qvgen"}
    assert "none runs" in "\n".join(tile_table(head, rows))


def test_a_dry_run_says_what_would_be_measured():
    config = SimpleNamespace(tune=True, shapes=("1024x1920-1920",), widths=(Bits.parse("3"),))
    assert (
        BENCHMARK.describe(config) == "kernels: tiles of the GPU kernels for 1024x1920-1920 at 3, for this GPU's table"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path, capsys):
    keys = ["benchmark", "kernels", "tune=true", f"out={tmp_path}"]
    assert main(keys) == 2
    assert (
        "tune=true times tiles of GPU kernels, and there is no card for them: torch finds no GPU"
        in capsys.readouterr().err
    )
    assert main(["benchmark", "ptq", "tune=true", f"out={tmp_path}"]) == 2
    assert "tune=true is of what=kernels, not of what=ptq" in capsys.readouterr().err


def test_entries_survive_the_file():
    entries = [entry(), entry(rows=512, ms=1, bf16_ms=2)]
    found = read_tiles(save_tiles(entries), triton=None)
    assert [asdict(one) for one in found] == [asdict(one) for one in entries]
