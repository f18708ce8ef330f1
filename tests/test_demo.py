"""The demo as a user runs it: `python train.py` in a process of its own, with fewer steps and fewer videos.

The bounds are the demo's promises: W3A3 training reaches at most 0.4 of round-to-nearest's held-out error, what was packed is
what was trained, and the packed videos are the fake-quantized ones. The whole demo reaches 0.22, 24 steps 0.35; they are
enough for all of them, and its other settings are the defaults.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORTER = ("steps=24", "evaluation.samples=32", "evaluation.videos=1", "evaluation.quality_videos=1")


def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), f"run_dir={run_dir}", *SHORTER],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    error = report["relative_error"]
    assert error["packed"] <= 0.4 * error["rtn"]
    assert error["packed"] < error["ptq"]
    assert report["packed_codes_equal"] is True
    assert report["packed_vs_fake_max_abs"] == 0.0  # integer zero points in float32: bit for bit
    assert float(report["trajectory_psnr_db"]) >= 50
    assert report["phi_rank_final"] == 0
    assert report["bytes"]["packed"] < 0.5 * report["bytes"]["bf16"]
    for name in ("config.yaml", "metrics.csv", "report.html", "packed/manifest.json", "packed/model.safetensors"):
        assert (run_dir / name).stat().st_size > 0
    assert len(list((run_dir / "videos").glob("*.mp4"))) == 4
    assert list((run_dir / "wandb").iterdir())
    # The last lines say where the report is, and the numbers that matter.
    for pattern in (
        r"report: .*report\.html",
        r"error of PTQ \(mse\): 0\.\d+",
        r"error of QAT, packed: 0\.\d+",
        r"size: \d+ KiB",
    ):
        assert re.search(pattern, done.stdout), done.stdout
    # The bar: step, loss, rank, gamma and the time that is left.
    assert re.search(r"\d+/\d+ \[\d+:\d+<\d+:\d+, .*loss=\d\.\d+, rank=\d+, gamma=", done.stderr)
