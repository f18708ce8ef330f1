"""`qvgen ptq` on complete tiny folders of further families, and what a verb says without one.

Runs that train are in tests/verbs/test_further_runs.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvgen.cli import main
from qvgen.config.leaves import load_leaf
from tests.models.further_folders import make_hunyuan15_folder, make_hunyuan_folder, make_mochi_folder
from tests.verbs.test_hub_models import tiny_keys

MODELS: dict[str, tuple[Any, list[str]]] = {
    "hunyuanvideo": (make_hunyuan_folder, ["model.vae_dtype=float32"]),
    "hunyuanvideo1.5": (make_hunyuan15_folder, ["model.vae_dtype=float32", "model.guidance_scale=1.0"]),
    "mochi": (make_mochi_folder, ["model.num_frames=7", "model.sampling_frames=7"]),
}
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's transformer turns it off, in its own way


@pytest.mark.parametrize(("name", "init"), [("hunyuanvideo", "dvd_quant"), ("mochi", "rtn")])
def test_ptq_needs_prompts_alone(name: str, init: str, tmp_path: Path) -> None:
    make, sizes = MODELS[name]
    folder, run_dir = make(tmp_path / "model"), tmp_path / "run"
    given = [
        *tiny_keys(name, folder), *sizes, "logger=csv", "bits=4", f"init={init}", "evaluation.samples=4",
        "evaluation.videos=0", "evaluation.quality_videos=1", f"run_dir={run_dir}",
    ]  # fmt: skip
    assert main(["ptq", *given]) == 0
    report = json.loads((run_dir / "report.json").read_text())
    assert 0 < report["relative_error"]["ptq"] < 1
    assert report["packed_codes_equal"] is True


@pytest.mark.parametrize("name", MODELS)
def test_without_weights_it_says_what_to_download(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["precompute", f"model={name}", "data.path=clips"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    repository = load_leaf("model", name).repository
    assert f"hf download {repository} --local-dir FOLDER` and write model={name} model.path=FOLDER" in line
