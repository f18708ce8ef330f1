"""`qvgen benchmark ptq` on the real tiny model: rows with every value, a table with mean and spread, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvgen.cli import main
from qvgen.evaluation.environment import fast_bfloat16
from qvgen.verbs.benchmarks import clips, svdq_accumulation
from qvgen.verbs.benchmarks.base import load_benchmark
from qvgen_kernels.cpu_library import missing_reason
from tests.runs import shallow

SHORT = (
    "seeds=[1,2]", "widths=[8,w4a4]", "methods=[rtn,gptq+r16]", "videos=1", "evaluation.samples=4",
    "model.num_inference_steps=2", "calibration.videos=1", "calibration.steps=2", "logger=csv",
)  # fmt: skip


def test_every_cell_is_a_row_and_the_table_has_mean_and_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    keys = [*SHORT, *shallow(1), f"out={out}", f"calibration.cache={tmp_path / 'cache'}"]
    assert main(["benchmark", "ptq", *keys, "dry_run=true"]) == 0
    assert "8 cells" in capsys.readouterr().out
    assert not out.exists()
    assert main(["benchmark", "ptq", *keys]) == 0
    content = json.loads((out / "ptq-tiny.json").read_text())
    rows = content["rows"]
    assert [(row["seed"], row["bits"], row["method"]) for row in rows] == [
        (seed, bits, method) for seed in (1, 2) for bits in ("8", "4") for method in ("rtn", "gptq+r16")
    ]
    assert content["machine"]["cpu"]
    for row in rows:
        assert 0 < row["relative_error"] < 1
        assert row["psnr_db"] > 5
        assert row["bytes"] > 50_000
    error = {(row["method"], row["bits"], row["seed"]): row["relative_error"] for row in rows}
    assert error["rtn", "8", 1] < 0.1 * error["rtn", "4", 1]
    assert error["gptq+r16", "4", 1] < error["rtn", "4", 1]
    assert error["rtn", "4", 1] == error["rtn", "4", 2]  # the same inputs, and nothing else that depends on a seed
    assert error["gptq+r16", "4", 1] != error["gptq+r16", "4", 2]  # its calibration does
    values = [error["gptq+r16", "4", seed] for seed in (1, 2)]
    page = (out / "ptq-tiny.md").read_text()
    assert f"{sum(values) / 2:.5f} +- {abs(values[0] - values[1]) / 2:.5f}" in page
    assert "| method | W8A8 | W4A4 |" in page


def test_the_cost_of_a_method_is_extrapolated_from_distinct_shapes(tmp_path: Path) -> None:
    methods = "methods=[rtn,mse,gptq]"
    keys = ["model=tiny", "widths=[4]", methods, "timed_steps=1", f"out={tmp_path}", "calibration.memory_gib=0.0005"]
    assert main(["benchmark", "ptq_cost", *keys]) == 0
    content = json.loads((tmp_path / "ptq-cost-tiny.json").read_text())
    assert content["revision"] is None  # random weights
    rows = {row["method"]: row for row in content["rows"]}
    for row in rows.values():
        assert sum(shape["layers"] for shape in row["shapes"]) == row["layers"] == 36
        assert (
            len({(shape["in_features"], shape["out_features"]) for shape in row["shapes"]}) == len(row["shapes"]) == 5
        )
        for kind in ("", "cpu_"):
            total = sum(shape[f"{kind}seconds"] * shape["layers"] for shape in row["shapes"])
            assert row[f"{kind}seconds_extrapolated"] == pytest.approx(total)
            assert total > 0
    assert (rows["mse"]["statistics_bytes"], rows["mse"]["passes"]) == (0, 0)
    widths = [shape["in_features"] for shape in rows["gptq"]["shapes"] for _ in range(shape["layers"])]
    assert rows["gptq"]["statistics_bytes"] == sum(4 * width * (width + 50 + 512) for width in widths)
    assert rows["gptq"]["passes"] > 1
    assert rows["gptq"]["largest_pass_bytes"] <= 0.0005 * 2**30
    page = (tmp_path / "ptq-cost-tiny.md").read_text()
    assert "Extrapolated: one layer of every distinct shape is timed (median of 1)" in page
    assert "| gptq | inputs, second_moment | 0.01 |" in page
    other = [f"out={tmp_path / 'other'}", "calibration.memory_gib=0.00001"]
    assert main(["benchmark", "ptq_cost", *keys[:-2], *other]) == 2


def test_a_full_size_model_needs_no_weights(tmp_path: Path) -> None:
    keys = ["model=cogvideox", "widths=[4]", "methods=[rtn]", "timed_steps=1", f"out={tmp_path}"]
    assert main(["benchmark", "ptq_cost", *keys]) == 0
    (row,) = json.loads((tmp_path / "ptq-cost-cogvideox-2b.json").read_text())["rows"]
    assert (row["layers"], len(row["shapes"])) == (245, 9)


def test_a_training_step_is_cut_into_its_parts(tmp_path: Path) -> None:
    keys = ["widths=[4]", "timed_steps=2", "batch_size=8", "strategy.gradient_checkpointing=true", f"out={tmp_path}"]
    keys += shallow(1)
    assert main(["benchmark", "training", *keys]) == 0
    (row,) = json.loads((tmp_path / "training-tiny.json").read_text())["rows"]
    parts = sum(row[f"{part}_s"] for part in ("teacher", "student_forward", "backward"))
    assert row["micro_batch_s"] == pytest.approx(parts, rel=0.5)  # medians of two steps each, on a shared machine
    assert row["optimizer_s"] > 0
    assert row["micro_batch"] == 4  # a step of 8 has two parts at least
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert row["shares"]["attention"] > 0
    assert row["planned_bytes"] > 4 * 16 * 90_000  # masters, gradients, two moments
    assert "| micro-batch s | teacher |" in (tmp_path / "training-tiny.md").read_text()


def test_a_denoising_step_is_cut_into_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["what=denoising_step", "widths=[4]", "timed_steps=2", "blocks=2", f"out={tmp_path}", "logger=csv"]
    assert main(["benchmark", *keys, "widths=[4,w3a8]", "dry_run=true"]) == 0
    assert "denoising_step of tiny, 2 blocks: unquantized, 4, w3a8" in capsys.readouterr().out
    assert main(["benchmark", *keys, "profile.attention={kind:int8,rotation:auto}"]) == 2
    assert "auto, which calibration chooses; a benchmark of random weights has none" in capsys.readouterr().err
    keys.append("profile.attention=int8")
    assert main(["benchmark", *keys, "dry_run=true"]) == 0
    assert "denoising_step of tiny, 2 blocks: unquantized, 4, 4, int8 attention" in capsys.readouterr().out
    assert main(["benchmark", *keys]) == 0
    (page,) = tmp_path.glob("denoising-step-tiny-8-frames-int8-attention-*.md")  # at its end the kernel
    rows = {row["variant"]: row for row in json.loads(page.with_suffix(".json").read_text())["rows"]}
    full = "bfloat16" if fast_bfloat16() else "float32"
    assert set(rows) == {"4", "4, int8 attention", full}
    for name, row in rows.items():
        assert (row["tokens"], row["blocks_run"], row["blocks"]) == (128, 2, 3)
        assert row["step_s"] == pytest.approx(row["measured_s"] + row["measured_blocks_s"] / 2, rel=0.5)
        assert row["measured_blocks_s"] < row["measured_s"]
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert all(share > 0 for share in row["shares"].values())
        assert row["activation_peak_bytes"] > 128 * 64 * 2
        assert (row["quantize_s"] > 0) == (name != full)
    assert rows["4"]["bytes"] < 0.6 * rows[full]["bytes"]
    assert rows["4"]["load_s"] > 0
    assert rows["4"]["load_cpu_s"]["prepack"] > 0
    assert "| 4 | 1 |" in page.read_text()
    assert f"times {full}" in page.read_text()


def test_loading_is_cut_into_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["loading", "widths=[3,w8a4]", "timed_steps=2", "threads=[1,2]", f"out={tmp_path}", "logger=csv"]
    assert main(["benchmark", *keys, "dry_run=true"]) == 0
    assert "loading of tiny, 3 blocks: 3, w8a4" in capsys.readouterr().out
    assert main(["benchmark", *keys, "blocks=1"]) == 2
    assert "blocks=1 is no second size" in capsys.readouterr().err
    assert main(["benchmark", *keys]) == 0
    rows = json.loads((tmp_path / "loading-tiny.json").read_text())["rows"]
    assert [(row["threads"], row["variant"]) for row in rows] == [(1, "3"), (1, "w8a4"), (2, "3"), (2, "w8a4")]
    for row in rows:
        assert row["bytes"]["large"] > 1.3 * row["bytes"]["small"] > 20_000
        for size, own in row["loads"].items():
            assert len(own) == 2
            for load in own:
                parts = [load[part] for part in ("hash", "build", "map", "prepack", "other")]
                assert all(part > 0 for part in parts)
                assert load["cpu"] == pytest.approx(sum(parts))
                assert load["peak_above_final_bytes"] < 50_000_000
            assert row["median_s"][size]["cpu"] == pytest.approx((own[0]["cpu"] + own[1]["cpu"]) / 2)
        whole = row["fixed_s"]["cpu"] + row["s_per_gb"]["cpu"] * row["bytes"]["large"] / 1e9
        assert whole == pytest.approx(row["median_s"]["large"]["cpu"])
    assert rows[1]["bytes"]["large"] > 1.2 * rows[0]["bytes"]["large"]
    assert "| 3 | 1 |" in (tmp_path / "loading-tiny.md").read_text()


@pytest.mark.skipif(missing_reason() is not None, reason="no C++ compiler")
def test_fused_passes_are_measured_beside_torchs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["fake_quantization", "widths=[3]", "timed_steps=2", "threads=[1,2]", f"out={tmp_path}", "logger=csv"]
    assert main(["benchmark", *keys, "shapes=[64x32-16]", "dry_run=true"]) == 0
    assert "fake_quantization: shapes 64x32-16 at 3 on [1, 2] threads" in capsys.readouterr().out
    assert main(["benchmark", *keys, "shapes=[64x32-16-8]"]) == 2
    assert "shapes holds '64x32-16-8'; one layer is measured" in capsys.readouterr().err
    assert main(["benchmark", *keys, "shapes=[64x32-16,32x64-8]"]) == 0
    (page,) = tmp_path.glob("fake-quantization-cpu-*.md")
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    cells = [(row["shape"], row["threads"]) for row in rows]
    assert cells == [("64x32-16", 1), ("64x32-16", 2), ("32x64-8", 1), ("32x64-8", 2)]
    for row in rows:
        assert row["bits_equal"]
        assert all(len(times) == 2 for times in row["seconds"].values())
        for low, middle, high in row["speedup"].values():
            assert 0 < low <= middle <= high
        assert row["fused_ms"][0] == pytest.approx(500 * sum(times[0] for times in row["seconds"]["fused"]))
    assert "were equal in every round" in page.read_text()
    assert "| 64x32-16 | 3 | 2 |" in page.read_text()


@pytest.mark.skipif(missing_reason() is not None, reason="no C++ compiler")
def test_attention_is_measured_beside_torchs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["attention", "timed_steps=2", "threads=[1,2]", f"out={tmp_path}", "logger=csv"]
    assert main(["benchmark", *keys, "shapes=[70x64]", "dry_run=true"]) == 0
    assert "attention: shapes 70x64 on [1, 2] threads" in capsys.readouterr().out
    for shape, words in (("64x32-16", "write TOKENSxD"), ("9x6", "head_size=6 must be a multiple of 4")):
        assert main(["benchmark", *keys, f"shapes=[{shape}]"]) == 2
        assert words in capsys.readouterr().err
    assert main(["benchmark", *keys, "shapes=[70x64,9x8]"]) == 0
    (page,) = tmp_path.glob("attention-cpu-*.md")
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert [(row["shape"], row["threads"]) for row in rows] == [("70x64", 1), ("70x64", 2), ("9x8", 1), ("9x8", 2)]
    for row in rows:
        assert {"torch bfloat16", "torch float32"} < set(row["seconds"])
        assert all(len(times) == 2 for times in row["seconds"].values())
        assert row["speedup"]["torch bfloat16"] == [1.0, 1.0, 1.0]
        assert row["core_peak_gops"] > 0
    assert "| 70x64 | 2 | torch float32 |" in page.read_text()
    assert f"{rows[0]['core_peak_gops']:.0f} GOP/s of one core" in page.read_text()


@pytest.mark.parametrize("what", ["kernels", "attention", "fake_quantization", "training_ratios"])
def test_what_has_shapes_has_some_of_its_own(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", what, f"out={tmp_path}", "logger=csv", "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert load_benchmark(what).shapes
    assert all(shape in said for shape in load_benchmark(what).shapes)


def test_shapes_of_a_benchmark_without_any_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "ptq", f"out={tmp_path}", "logger=csv", "shapes=[70x64]"]) == 2
    assert "shapes=['70x64'] are not of what=ptq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("methods=[rtm]", "unknown init=rtm; did you mean 'rtn'"),
        ("methods=[gptq+rx]", "methods holds 'gptq+rx'"),
        ("widths=[9]", "bits=9 is outside 2..8"),
        ("threads=[0]", "threads=0"),
        ("seeds=[]", "seeds=[] is empty"),
        ("evaluation.samples=0", "evaluation.samples=0 measures nothing"),
        ("what=speed", "what=speed is unknown (there are: attention, clips, denoising_step, fake_quantization, "),
    ],
)
def test_what_can_not_be_measured_is_refused(
    key: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", *SHORT, f"out={tmp_path / 'out'}", key]) == 2
    assert message in capsys.readouterr().err


def test_sums_in_half_precision_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svdq_accumulation, "WIDTHS", (128, 512))
    words = [*shallow(1), "videos=1", "model.num_inference_steps=2", "logger=csv", f"out={tmp_path}"]
    assert main(["benchmark", "svdq_accumulation", *words]) == 0
    content = json.loads((tmp_path / "svdq-accumulation-tiny.json").read_text())
    rows = {(row["source"], row["inputs"], row["dtype"]): row for row in content["rows"]}
    assert len(rows) == 10
    for inputs in ("normal", "heavy-tailed"):
        narrow, wide, fine = (
            rows[f"K = {columns}", inputs, dtype]["sums_error"]
            for columns, dtype in ((128, "bfloat16"), (512, "bfloat16"), (512, "float16"))
        )
        assert 0 < fine < narrow < wide < 0.01
        assert 7 < wide / fine < 9  # three bits more
    model = rows["tiny", "its own", "float16"]
    assert 0 < model["sums_error"] < 0.001 < model["quantization_error"]
    assert 0 < model["model_sums_error"] < model["model_quantization_error"]
    assert "| tiny | its own | float16 |" in (tmp_path / "svdq-accumulation-tiny.md").read_text()


def test_clips_are_measured_at_random_and_on_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "WIDTHS", (64, 1024))
    monkeypatch.setattr(clips, "VALUES", 1 << 16)
    monkeypatch.setattr(clips, "FINE", clips.FINE[::4])
    monkeypatch.setattr(clips, "TABLE", {("gaussian", True): clips.TABLE["gaussian", True]})
    words = [*shallow(1), "widths=[3]", "calibration.videos=1", "calibration.steps=2", "model.num_inference_steps=2"]
    command = ["benchmark", "clips", *words, f"calibration.cache={tmp_path / 'cache'}", "logger=csv", f"out={tmp_path}"]
    assert main(command) == 0
    rows = json.loads((tmp_path / "clips-tiny.json").read_text())["rows"]
    table = [row for row in rows if row["part"] == "table"]
    assert len(table) == 7 * 5
    assert all(abs(row["best"] - row["table"]) <= 0.06 for row in table)  # few rows: the best one is not sharp
    for row in (row for row in rows if row["part"] == "random"):
        errors = row["errors"]
        assert 0 < errors["search"] < 1.03 * min(errors.values())
        if row["layer"] == "1024":
            assert errors["search"] < 0.98 * errors["few_columns"]
    model = {row["layer"]: row["errors"] for row in rows if row["part"] == "model"}
    assert {"blocks.attn1.to_q", "blocks.ffn.net.2", "proj_out"} <= set(model)
    assert "| gaussian, K = 64 | 3 |" in (tmp_path / "clips-tiny.md").read_text()


def test_ratios_of_a_step_are_to_the_plain_one_of_the_same_round(tmp_path: Path) -> None:
    keys = ["widths=[3]", "timed_steps=2", "batch_size=4", f"out={tmp_path}", "logger=csv", *shallow(1)]
    assert main(["benchmark", "training_ratios", *keys, "shapes=[64x64-32,block@8x16x16,step]"]) == 0
    (result,) = tmp_path.glob("training-ratios-tiny-*.json")
    rows = json.loads(result.read_text())["rows"]
    assert [row["subject"] for row in rows] == ["64x64-32", "block@8x16x16", "step"]
    for row in rows:
        seconds, saved = row["seconds"], row["saved_bytes"]
        assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
        assert row["ratios"]["plain"] == [1, 1, 1]
        for name in ("quantized", "with Phi"):
            found = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
            assert row["ratios"][name] == pytest.approx([min(found), sum(found) / 2, max(found)])
        assert saved["with Phi"] == saved["quantized"] >= saved["plain"] > 0
    # A plain Linear keeps x and what mean(y^2) asks for; a quantized one two extremes of each row besides, and its clips.
    saved = rows[0]["saved_bytes"]
    assert saved["plain"] == 64 * (64 + 32) * 4
    assert 64 * 2 * 4 <= saved["with Phi"] - saved["plain"] < 64 * 4 * 4
    assert "| block@8x16x16 | 3 | 1 |" in result.with_suffix(".md").read_text()


@pytest.mark.parametrize("shape", ["4096x1920-7680-1920", "block", "block@3x60", "steps"])
def test_a_subject_of_another_form_is_refused(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["widths=[3]", f"out={tmp_path}", "logger=csv", f"shapes=[{shape}]"]
    assert main(["benchmark", "training_ratios", *keys]) == 2
    assert f"shapes holds '{shape}'; write MxK-N, block@FxHxW or step" in capsys.readouterr().err


def test_a_block_of_a_size_that_the_model_does_not_take_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["widths=[3]", f"out={tmp_path}", "logger=csv", "shapes=[block@2x8x8]", *shallow(1)]
    assert main(["benchmark", "training_ratios", *keys]) == 2
    error = capsys.readouterr().err
    assert "shapes holds block@2x8x8, which model=tiny does not take" in error
    assert "its own is 8x16x16" in error
