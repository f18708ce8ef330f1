"""`qvgen benchmark kernels` with and without its optional peers; every candidate's product against float64; its ratios."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qvgen.cli import main
from qvgen.evaluation.environment import fast_bfloat16
from qvgen.verbs.benchmarks.base import cpu_kernel
from qvgen.verbs.benchmarks.kernels import rows as kernels
from qvgen.verbs.benchmarks.kernels import timing
from qvgen.verbs.benchmarks.kernels.page import kernel_table

KIND = "bf16" if fast_bfloat16() else "float32"
VNNI = torch.cpu._is_vnni_supported()
TORCHAO = (
    *([f"torchao W8A8 per token ({KIND}), eager"] if VNNI else []),
    f"torchao W8A8 per token ({KIND}), compiled",
    f"torchao W8A8 per tensor ({KIND}), X86InductorQuantizer",
    f"torchao W4A8 groups of 32 ({KIND}), compiled",
)
ONNX = (
    "ONNX Runtime MatMulNBits W4A8 blocks of 32 (float32)",
    "ONNX Runtime MatMulNBits W4A8 blocks of 128 (float32)",
    "ONNX Runtime dynamic W8A8 per tensor (float32)",
)


def _rows(folder: Path) -> list[dict]:
    return json.loads((folder / f"kernels-cpu-{cpu_kernel()}.json").read_text())["rows"]


def test_without_peers_the_table_says_so(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("torchao", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises ImportError
    keys = ["widths=[4,w4a8]", "timed_steps=3", "threads=[1,2]", "shapes=[65x96-64,65x96-128-96]", f"out={tmp_path}"]
    assert main(["benchmark", "kernels", *keys, "dry_run=true"]) == 0
    assert "65x96-64" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    before = torch.get_num_threads()
    with caplog.at_level(logging.WARNING, logger=kernels.__name__):
        assert main(["benchmark", "kernels", *keys]) == 0
    assert torch.get_num_threads() == before
    left_out = [record.message for record in caplog.records if "left out" in record.message]
    assert [text.split()[0] for text in left_out] == ["torchao", "onnxruntime"]
    assert all("make peers" in text for text in left_out)
    rows = _rows(tmp_path)
    assert rows[0] == {"peers": {"torchao": None, "onnxruntime": None}}
    limits = [row["limits"] for row in rows if "limits" in row]
    assert [row["threads"] for row in limits] == [1, 2]
    assert 0.1 < limits[0]["tile_gops_of_one_core"]["portable"] < 10_000
    cells = [(row["threads"], row["shape"], row["candidate"]) for row in rows if "shape" in row]
    assert len(set(cells)) == len(cells)
    for threads in (1, 2):
        for name in ("F.linear bf16", "F.linear float32", "packed 4", "packed w4a8"):
            assert (threads, "65x96-64", name) in cells
        for shape in ("65x96-64", "65x96-128-96"):
            assert ((threads, shape, "prepacked bf16") in cells) == fast_bfloat16()
        assert (threads, "65x96-128-96", "packed 4, GELU inside, 512 rows a block") in cells
    for row in rows:
        if "shape" in row:
            assert row["gops"] > 0
            assert {"F.linear bf16", "F.linear float32"} <= set(row["times"])
            if row["candidate"] in row["times"]:
                assert row["times"][row["candidate"]] == 1.0
            assert len(row["seconds"]) in (2, 3)
            assert (row["scaling"] is None) == (row["threads"] == 1)
            assert row["clock"] == ("thread" if row["threads"] == 1 else "wall")
    page = (tmp_path / f"kernels-cpu-{cpu_kernel()}.md").read_text()
    tables = page.split("## More threads")
    assert tables[0].count("\n| 65x96") == len(cells)
    assert tables[1].count("\n| 65x96") == len(cells) // 2
    assert "Not measured, because not installed (`make peers` in a clone): torchao and onnxruntime." in page
    assert "<svg" in (tmp_path / f"kernels-cpu-{cpu_kernel()}.svg").read_text()


def test_peers_are_rows_of_the_same_table(tmp_path: Path) -> None:
    pytest.importorskip("torchao", exc_type=ImportError)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    keys = ["widths=[4]", "timed_steps=2", "threads=[1]", "shapes=[33x96-64]", f"out={tmp_path}"]
    assert main(["benchmark", "kernels", *keys]) == 0
    rows = _rows(tmp_path)
    assert all(rows[0]["peers"].values())
    measured = {row["candidate"]: row for row in rows if "shape" in row}
    for name in (*TORCHAO, *ONNX):
        assert measured[name]["times"]["F.linear bf16"] > 0
    page = (tmp_path / f"kernels-cpu-{cpu_kernel()}.md").read_text()
    assert f"Peers: torchao {rows[0]['peers']['torchao']} and onnxruntime {rows[0]['peers']['onnxruntime']}." in page
    assert "Not measured" not in page
    assert "More threads" not in page
    picture = (tmp_path / f"kernels-cpu-{cpu_kernel()}.svg").read_text()
    for name in (*TORCHAO, *ONNX, *(["torch._int_mm (codes to int32 alone)"] if VNNI else [])):
        assert f"<!-- {name} -->" in picture


def _layer(outputs: int, columns: int, generator: torch.Generator) -> Tensor:
    """Rows of different magnitude: a mixed-up scale is an error of a third at least."""
    return (
        torch.randn(outputs, columns, generator=generator) * torch.rand(outputs, 1, generator=generator).exp()
    ).bfloat16()


def _error(output: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative error of all, and of the worst output channel (its root mean square over the rows)."""
    difference = output.double() - expected
    columns = difference.norm(dim=0) / expected.norm(dim=0)
    return float(difference.norm() / expected.norm()), float(columns.max())


# Of a linear on Gaussian values of K = 160: 8-bit codes err by their range / 255 / sqrt(12) each, 4 to 8 standard deviations
# wide: 0.5 to 0.9 % of a side; 4-bit ones 15 steps in 4 standard deviations (32 weights): 8 %, in 5 (128): 10 %, in 6: 11 %.
EIGHT, FOUR = (0.003, 0.02), (0.05, 0.13)
BOUNDS = {
    "F.linear bf16": (0.0, 0.005),
    "prepacked bf16": (0.0, 0.005),
    "F.linear float32": (0.0, 1e-6),
    "quantized.linear_dynamic (per tensor, float32)": EIGHT,
    "int4 weight-only": FOUR,
    **{name: FOUR if "W4" in name else EIGHT for name in (*TORCHAO, *ONNX)},
}
if not VNNI:  # seven bits on one side; torchao's compiled products saturate
    BOUNDS["quantized.linear_dynamic (per tensor, float32)"] = BOUNDS[ONNX[2]] = (0.003, 0.025)
    BOUNDS[TORCHAO[0]] = BOUNDS[TORCHAO[1]] = (0.003, 0.2)


def _check(candidates: timing.Candidates, x: Tensor, weights: list[Tensor], *, looser: float = 1.0) -> None:
    """Within the bounds, from below too: a path that computes in floating point is not the one that its name says."""
    expected = x.double() @ weights[0].double().t()
    for weight in weights[1:]:
        expected = functional.gelu(expected, approximate="tanh") @ weight.double().t()
    for name, call in candidates.items():
        with torch.no_grad():
            output = call()
        kind = torch.float32 if "float32" in name else torch.bfloat16
        assert output.dtype == kind, name
        low, high = BOUNDS[name]
        total, worst = _error(output, expected)
        assert low <= total <= high * looser, (name, total)
        assert worst <= 2 * high * looser, (name, worst)
        other = call()
        assert other.data_ptr() != output.data_ptr(), name  # a fresh output while the first one is alive


def test_torchs_products_are_right() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(70, 160, generator=generator).bfloat16(), _layer(96, 160, generator)
    candidates = kernels._torch_linears(x, weight)
    product = candidates.pop("_int_mm (codes to int32 alone)", None)
    assert (product is not None) == VNNI
    if product is not None:
        step = x.double().abs().max() * weight.double().abs().max() / 127**2
        assert _error(product() * step, x.double() @ weight.double().t())[0] < 0.02
    _check(candidates, x, [weight])


PEERS = [
    pytest.param(name, threads, id=f"{name}-{threads}")
    for name, threads in (("torchao", 1), ("onnxruntime", 1), ("onnxruntime", 2))
]


@pytest.mark.parametrize(("peer", "threads"), PEERS)
def test_a_peers_products_are_right(peer: str, threads: int) -> None:
    ours, build = kernels.PEERS[peer]
    for module in ours.MODULES:
        pytest.importorskip(module, exc_type=ImportError)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(70, 160, generator=generator).bfloat16()
    weights = [_layer(96, 160, generator), _layer(64, 96, generator)]
    before = torch.get_num_threads()
    try:
        torch.compiler.reset()
        candidates = build(x, weights[:1], threads)
        assert tuple(candidates) == (TORCHAO if peer == "torchao" else ONNX)
        _check(candidates, x, weights[:1])
        _check(
            build(x, weights, threads), x, weights, looser=1.6
        )  # the errors of two products and what GELU makes of them
    finally:
        torch.set_num_threads(before)


def test_every_round_runs_every_candidate_on_every_number_of_threads() -> None:
    calls: list[tuple[str, int]] = []
    cost = {timing.BF16: 1.0, "quick": 0.5, "slow": timing.SLOW}

    def recorder(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            calls.append((name, torch.get_num_threads()))
            return torch.zeros(1)

        return call

    def measure(call: Callable[[], object]) -> timing.Sample:
        call()
        seconds = cost[calls[-1][0]]
        return timing.Sample(thread=seconds, process=seconds, busiest=seconds, wall=seconds)

    before = torch.get_num_threads()
    try:
        candidates = {name: recorder(name) for name in cost}
        samples = timing.interleaved({1: candidates, 2: candidates}, rounds=4, measure=measure)
    finally:
        torch.set_num_threads(before)
    warm, measured = calls[:6], calls[6:]
    assert warm == [(name, threads) for threads in (1, 2) for name in candidates]
    pairs = list(zip(measured[0::2], measured[1::2], strict=True))
    assert all(pair == ((pair[0][0], 1), (pair[0][0], 2)) for pair in pairs)  # one right after the other
    order = [first[0] for first, _ in pairs]
    assert [sorted(order[:3]), sorted(order[3:6])] == 2 * [sorted(candidates)]
    assert [sorted(order[6:8]), sorted(order[8:])] == 2 * [sorted([timing.BF16, "quick"])]
    assert order[:3] != order[3:6]
    assert {cell: len(runs) for cell, runs in samples.items()} == {
        (threads, name): 2 if name == "slow" else 4 for threads in (1, 2) for name in candidates
    }
    assert samples[2, "slow"][0].thread == timing.SLOW


def test_more_threads_are_compared_by_rounds() -> None:
    few = [timing.Sample(thread=9.0, process=9.0, busiest=9.0, wall=wall) for wall in (10.0, 12.0, 11.0, 30.0, 20.0)]
    more = [
        timing.Sample(thread=4.0, process=2 * wall, busiest=5.0, wall=wall) for wall in (5.0, 4.0, 11.0, 10.0, 20.0)
    ]
    # ratios of wall times 2, 3, 1, 3, 1
    assert timing.scaling(few, more) == {
        "median": 2.0, "quartiles": [1.0, 3.0], "best": 2.5, "by_processor_time": 1.8, "processors": 2.0,
    }  # fmt: skip
    assert timing.scaling(few[:2], more[:2])["quartiles"] == [2.0, 3.0]
    assert timing.seconds(few, 1) == [9.0] * 5
    assert timing.seconds(more, 2) == [5.0, 4.0, 11.0, 10.0, 20.0]


def test_a_sample_is_what_each_clock_went_forward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of scripted clocks: nothing here depends on how busy the machine is."""
    for task in ("11", "12"):
        (tmp_path / task).mkdir()
    now = {"thread": 5.0, "process": 7.0, "wall": 100.0, 11: 2.0, 12: 4.0}

    def call() -> None:
        for name, seconds in {"thread": 0.5, "process": 1.25, "wall": 2.0, 11: 0.5, 12: 0.75}.items():
            now[name] += seconds
        (tmp_path / "13").mkdir()  # a thread that the call started
        now[13] = 0.25

    clocks = {name: lambda name=name: now[name] for name in ("thread", "process", "wall")}
    monkeypatch.setattr(timing, "TASKS", tmp_path)
    monkeypatch.setattr(timing.time, "thread_time", clocks["thread"])
    monkeypatch.setattr(timing.time, "process_time", clocks["process"])
    monkeypatch.setattr(timing.time, "perf_counter", clocks["wall"])
    monkeypatch.setattr(timing.time, "clock_gettime", lambda clock: now[~clock >> 3])
    assert timing.sample(call) == timing.Sample(thread=0.5, process=1.25, busiest=0.75, wall=2.0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has clocks of other threads")
def test_every_thread_of_this_process_has_a_clock() -> None:
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(threading.get_native_id).result()
        times = timing._processor_times()
        assert {worker, threading.get_native_id()} <= times.keys()
    assert min(times.values()) >= 0


def test_the_page_names_the_peers_that_are_there() -> None:
    head = {"machine": {"cpu": "a CPU"}, "versions": {"torch": "2"}, "command": "qvgen"}
    limits = {
        "tile_gops_of_one_core": {"portable": 5.0},
        "copy_gb_s": 1.0,
        "huge_pages": "",
        "THP_MEM_ALLOC_ENABLE": "",
        "kernel": "portable",
        "vnni": False,
    }
    row = {
        "shape": "1x2-3", "threads": 1, "candidate": "packed 4", "seconds": [1.0], "median_ms": 1.0, "gops": 1.0,
        "times": {"F.linear bf16": 2.0, "F.linear float32": 1.5}, "scaling": None,
    }  # fmt: skip
    page = "\n".join(kernel_table(head, [{"peers": {"torchao": None, "onnxruntime": "1.2"}}, {"limits": limits}, row]))
    assert "Peers: onnxruntime 1.2." in page
    assert "no VNNI" in page
    assert "not installed (`make peers` in a clone): torchao." in page
    assert "| times F.linear bf16 | times F.linear float32 |" in page
    assert "| 1x2-3 | 1 | packed 4 | 1.0 | 1 | 20% | 2.00 | 1.50 |" in page
    assert "(kernels-cpu-portable.svg)" in page
