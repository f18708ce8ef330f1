"""Sensitivities and allocations in files, torn lines included, and what the report shows of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qvgen.evaluation.mixed_precision_files import (
    ALL_WINDOWS,
    DIRECTORY,
    Allocation,
    Sensitivity,
    SensitivityStore,
    combined_scores,
    read_allocation,
    write_allocation,
)
from qvgen.evaluation.report.mixed_precision_section import (
    build_bit_section,
    draw_sensitivity,
    relative_scores,
    write_heat_maps,
)
from qvgen.evaluation.report.writer import write_report
from tests.evaluation.report.example_report import report_data

UNITS = (("ffn", "blocks.0"), ("ffn", "blocks.1"), ("other", "<b>proj"))


def row(index: int, *, bits: int = 4, window: int = 0, side: str = "weight", score: float = 0.1) -> Sensitivity:
    group, block = UNITS[index]
    return Sensitivity(
        group=group, block=block, side=side, bits=bits, window=window, output_error=1 / 3, scores={"ssim": score},
        seconds=0.25,
    )  # fmt: skip


def allocation(**changes) -> Allocation:
    rows = tuple(
        row(index, bits=bits, window=window, score=10.0**-bits * (index + 1))
        for index in range(3)
        for bits in (4, 8)
        for window in (0, 1)
    )
    made = Allocation(
        sensitivities=rows,
        bits={
            "a": {0: (8, 4), 1: (8, 6)},
            "b": {0: (8, 4), 1: (8, 6)},
            "c": {0: (4, 8), 1: (4, 8)},
            "d": {0: (4, 4), 1: (4, 4)},
        },
        units={"a": UNITS[0], "b": UNITS[0], "c": UNITS[1], "d": UNITS[2]},
        window_of_band=(1, 0),
        budget={"weight": "mean 6 bits", "activation": "mean 6 bits"},
        mean_bits={"weight": 5.75, "activation": 6.0},
        weight_bytes=4321,
        metrics={"ffn": "ssim", "other": "output error"},
    )
    return replace(made, **changes)


def test_what_was_written_is_read(tmp_path):
    assert read_allocation(tmp_path) is None
    write_allocation(tmp_path, allocation())
    assert read_allocation(tmp_path) == allocation()
    head, first, *_ = (tmp_path / DIRECTORY / "sensitivity.csv").read_text().splitlines()
    assert head == "group,block,side,bits,window,output_error,seconds,ssim"
    assert first == "ffn,blocks.0,weight,4,0,0.3333333333333333,0.25,0.0001"
    stored = json.loads((tmp_path / DIRECTORY / "allocation.json").read_text())
    assert stored["bits"]["a"] == {"0": [8, 4], "1": [8, 6]}
    (tmp_path / DIRECTORY / "allocation.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no allocation of bits"):
        read_allocation(tmp_path)


def test_rows_are_kept_as_they_come_and_a_torn_one_is_measured_again(tmp_path):
    store = SensitivityStore(tmp_path / "deep" / "rows.jsonl")
    assert store.read() == {}
    rows = [row(index) for index in range(3)]
    for entry in rows[:2]:
        store.add(entry)
    assert list(store.read().values()) == rows[:2]
    with store.path.open("ab") as file:  # killed in the middle of a line
        file.write(b'{"group": "ffn", "blo')
    assert list(store.read().values()) == rows[:2]
    store.add(rows[2])
    assert list(store.read().values()) == rows
    assert store.path.read_bytes().count(b"\n") == 3
    changed = replace(rows[0], scores={"ssim": 7.0})
    store.add(changed)  # the later one counts
    assert store.read()[changed.key] == changed


@pytest.mark.parametrize(
    "line",
    ["damaged", "[]", "7", "null", '{"group": "ffn"}', "[" * 100_000, None],
    ids=["text", "list", "number", "null", "fields", "deep", "types"],
)
def test_a_damaged_row_is_measured_again_and_the_others_are_kept(tmp_path, line, caplog):
    store = SensitivityStore(tmp_path / "rows.jsonl")
    rows = [row(index) for index in range(3)]
    for entry in rows:
        store.add(entry)
    lines = store.path.read_text().splitlines()
    if line is None:
        line = json.dumps({**json.loads(lines[1]), "scores": {"ssim": "none"}})
    store.path.write_text("\n".join([lines[0], line, lines[2]]) + "\n")
    assert list(store.read().values()) == [rows[0], rows[2]]
    assert f"{store.path}, line 2 is damaged; what it said is measured again" in caplog.text
    store.add(rows[1])
    assert set(store.read()) == {entry.key for entry in rows}


def test_groups_are_drawn_against_their_own_largest_value():
    rows = [row(0, score=2.0), row(1, score=0.5), row(2, score=1e-9), row(2, bits=8, score=0.0)]
    scores = combined_scores(rows)
    keys = [entry.key for entry in rows]
    shares = relative_scores(scores, rows=keys)
    assert [shares[key] for key in keys] == [1.0, 0.25, 1.0, 0.0]
    assert list(relative_scores(scores, rows=keys[1:2]).values()) == [1.0]
    assert relative_scores({keys[0]: 0.0}, rows=keys[:1]) == {keys[0]: 0.0}


def test_a_group_s_several_metrics_count_alike_whatever_their_unit():
    """Every metric adds 1 per measurement on average; another unit of one of them changes nothing."""

    def rows(unit: float, *, window: int = ALL_WINDOWS):
        values = [(0.1, 3.0), (0.3, 1.0), (0.2, 5.0)]
        return [
            replace(row(0, bits=bits, window=window), scores={"lpips": a, "raft": b * unit})
            for bits, (a, b) in zip((4, 6, 8), values, strict=True)
        ]

    combined = combined_scores(rows(1.0))
    assert list(combined.values()) == pytest.approx([0.5 + 1, 1.5 + 1 / 3, 1 + 5 / 3])
    assert list(combined_scores(rows(1e-4)).values()) == pytest.approx(list(combined.values()))
    windows = [*rows(1.0), *(replace(entry, scores={"lpips": 0.2, "raft": 6.0}) for entry in rows(1.0, window=0))]
    both = combined_scores(windows)  # divided by the means over all windows, also in one of them
    assert {key: both[key] for key in combined} == combined
    assert [both[entry.key] for entry in windows[3:]] == pytest.approx([3.0] * 3)
    still = [replace(entry, scores={"lpips": 1.0, "raft": 0.0}) for entry in rows(1.0)]
    assert set(combined_scores(still).values()) == {1.0}  # nothing moves: no division by 0
    other = replace(row(1), side="activation", scores={"lpips": 50.0, "raft": 1.0})
    assert combined_scores([*rows(1.0), other])[other.key] == 2.0  # sides apart


def test_several_metrics_are_columns_and_empty_where_a_group_has_another(tmp_path):
    rows = (replace(row(0), scores={"lpips": 0.5, "raft": 0.25}), row(2))
    made = allocation(sensitivities=rows, metrics={"ffn": "lpips + raft", "other": "ssim"})
    write_allocation(tmp_path, made)
    assert read_allocation(tmp_path) == made
    head, first, second = (tmp_path / DIRECTORY / "sensitivity.csv").read_text().splitlines()
    assert head.endswith("seconds,lpips,raft,ssim")
    assert first.endswith(",0.25,0.5,0.25,")
    assert second.endswith(",0.25,,,0.1")


def test_the_report_shows_map_bits_and_budgets(tmp_path):
    write_report(tmp_path, report_data(videos=()))
    assert "Mixed precision" not in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["mixed_precision"] is None
    write_allocation(tmp_path, allocation())
    page = write_report(tmp_path, report_data(videos=())).read_text()
    for shown in (
        "Sensitivity to quantized weights",
        "mean 6 bits",
        "ffn by ssim",
        "4/6",
        "12 measurements",
        "&lt;b&gt;proj",
    ):
        assert shown in page
    assert "Sensitivity to quantized activations" not in page  # not measured
    assert "<b>proj" not in page
    content = json.loads((tmp_path / "report.json").read_text())["mixed_precision"]
    assert content["measurements"] == 12
    assert content["units"][0] == {
        "group": "ffn", "block": "blocks.0", "layers": 2, "weight_bits": "8", "activation_bits": "4/6",
    }  # fmt: skip
    section = build_bit_section(allocation())
    assert len(section.charts) == 1
    assert build_bit_section(None) is None
    assert build_bit_section(allocation(sensitivities=())).charts == ()


def test_a_cell_has_the_colour_of_its_value(tmp_path):
    """As many different colours as different shares; what is 0 has none."""
    chart = draw_sensitivity(allocation(), side="weight")
    assert chart == draw_sensitivity(allocation(), side="weight")
    for unit in ("ffn blocks.0", "ffn blocks.1"):
        assert unit in chart.svg
    nothing = tuple(replace(entry, scores={"ssim": 0.0}) for entry in allocation().sensitivities)
    assert draw_sensitivity(allocation(sensitivities=nothing), side="weight").svg != chart.svg
    assert draw_sensitivity(allocation(), side="activation") is None
    write_allocation(tmp_path, allocation())
    write_heat_maps(tmp_path, allocation())
    assert [path.name for path in (tmp_path / DIRECTORY).glob("*.svg")] == ["heat_map_weight.svg"]
    import xml.etree.ElementTree as ElementTree

    assert ElementTree.parse(tmp_path / DIRECTORY / "heat_map_weight.svg").getroot().tag.endswith("svg")
