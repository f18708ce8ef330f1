"""README.md of a packed folder: every line comes from the run, and the hub reads its header."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from huggingface_hub import ModelCard

import qvgen
from qvgen.config.leaf_file import installed_names
from qvgen.deploy.card_facts import LICENSES, base_repository
from qvgen.deploy.model_card import CardSources, Measured, model_card, takes_image, write_model_card
from tests.deploy.test_packed_fusion import make_fake


def test_a_run_gives_its_card(short_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(short_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "videos")))
    file = write_model_card(run / "packed", repository="me/tiny-w3")
    assert file == run / "packed" / "README.md"
    card, text = ModelCard.load(file), file.read_text()
    assert card.data.library_name == "diffusers"
    assert card.data.tags == ["qvgen", "quantized", "w3a3"]
    assert card.data.license is None  # nobody knows that of a model trained here
    report = json.loads((run / "report.json").read_text())
    assert "3-bit weights and 3-bit activations in 36 Linears" in text
    assert f"| packed | {report['relative_error']['packed']:.4g} |" in text
    assert f"seeds {report['quality']['seeds']}" in text
    assert "| data | moving_digits |" in text
    assert "| method | qvgen |" in text
    assert f"| steps | {report['steps']} |" in text
    assert "arXiv:2505.11497" in text
    assert str(short_run) not in text
    assert str(tmp_path) not in text
    shutil.move(run / "packed", tmp_path / "alone")  # without the run: no numbers, and none made up
    alone = write_model_card(tmp_path / "alone", out=tmp_path).read_text()
    assert "Nothing was measured" in alone
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is no report of a run"):
        write_model_card(tmp_path / "alone", sources=CardSources(report=tmp_path / "other.json"))
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        write_model_card(tmp_path)


def test_the_lines_that_load_it_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_fake("wan")
    qvgen.fold(model)
    manifest = qvgen.save_packed(
        model,
        tmp_path / "me" / "wan-w4",
        base_name="wan",
        base_revision="sha256:abc",
        training={"init": "gptq", "seed": 3},
    )
    text = model_card(manifest, Measured(), repository="me/wan-w4", size=12_345_678)
    header = ModelCard(text).data
    assert (header.license, header.base_model) == ("apache-2.0", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert header.to_dict()["base_model_relation"] == "quantized"
    assert "arXiv:2210.17323" in text
    assert "| seed | 3 |" in text
    assert "0.012 GB" in text
    assert header.to_dict()["pipeline_tag"] == "text-to-video"
    of_image = model_card(replace(manifest, base_name="wan2.2-i2v-5b"), Measured(), repository="me/wan-w4", size=1)
    assert ModelCard(of_image).data.to_dict()["pipeline_tag"] == "image-to-video"  # no channel more than for text
    assert "WanImageToVideoPipeline.from_pretrained" in of_image
    assert not takes_image(replace(manifest, base_name="hunyuanvideo1.5", transformer_config={"in_channels": 65}))
    lines = text.partition("```python\n")[2].partition("```")[0].splitlines()
    assert len(lines) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec("\n".join(lines[:4]), names)  # the fifth downloads the base model
    loaded = names["model"]
    assert isinstance(loaded, WanTransformer3DModel)
    assert torch.equal(
        loaded.state_dict()["blocks.0.attn1.to_q.codes"], model.state_dict()["blocks.0.attn1.to_q.codes"]
    )


def test_every_model_with_a_repository_has_its_licence() -> None:
    repositories = [base for name in installed_names("model") if (base := base_repository(name))]
    assert len(repositories) >= 7
    for base in repositories:
        assert any(base.startswith(start) for start in LICENSES), base
