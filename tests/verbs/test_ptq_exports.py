"""`export=` of ptq and train: from full-precision weights to a target in one command; checked against `qvgen export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import qvgen
from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config.run_exports import with_profile
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import read_manifest
from qvgen.errors import UserError
from qvgen.layers.swap import packed_layers
from tests.models.hub_folders import TEXT_SIZE, make_cogvideox_folder, make_wan_folder
from tests.runs import SHORT, UNSEEN, shallow
from tests.verbs.test_hub_models import tiny_keys


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder whose transformer has one block of width 128, as the targets' kernels want it."""
    folder = make_wan_folder(tmp_path_factory.mktemp("wan") / "model")
    torch.manual_seed(0)
    for file in (folder / "transformer").iterdir():
        file.unlink()
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=TEXT_SIZE, freq_dim=32,
        ffn_dim=256, num_layers=1, rope_max_seq_len=32,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    return folder


def ptq(folder: Path, run_dir: Path, *words: str) -> int:
    return main(
        [
            "ptq", *tiny_keys("wan", folder), "logger=csv", "evaluation.samples=0", "calibration.videos=1",
            "model.include=[blocks.*]", "calibration.steps=2", f"calibration.cache={run_dir.parent / 'statistics'}",
            f"run_dir={run_dir}", *words,
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "profile", "exact"),
    [
        (["init=rtn", "bits=w4a8", "export=[comfy,int8]", "export.dtype=null"], "convrot", ("comfy", "int8")),
        (["init=svdquant", "init.rank=8", "bits=4", "export=cache_dit", "export.rank=16"], "svdq_g64", ()),
        (["init=mse", "bits=w3a8", "export=[hub,int8]"], "int8", ("hub", "int8")),
        (["init=smoothquant", "bits=4", "export=[bf16,diffusers]"], "paper", ("diffusers",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_command_from_weights_to_targets(
    wan: Path, tmp_path: Path, words: list[str], profile: str, exact: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    assert ptq(wan, run_dir, *words) == DONE
    targets = next(word for word in words if word.startswith("export=")).removeprefix("export=").strip("[]").split(",")
    assert sorted(path.name for path in (run_dir / "exported").iterdir()) == sorted(targets)
    manifest = read_manifest(run_dir / "packed")
    assert {layer.form.profile.name for layer in manifest.layers} == {profile}
    for target in targets:
        content = json.loads((run_dir / "exported" / target / "parity.json").read_text())
        assert content["source"]["sha256"] == manifest.sha256
        assert content["exact"] is (target in exact)
        assert not any(layer["weight_reasons"] or layer["input_reasons"] for layer in content["layers"])
    if "cache_dit" in targets:  # the key of the target's own came through
        assert (run_dir / "exported" / "cache_dit" / "svdq" / "svdq_int4_r16.safetensors").is_file()
    if "comfy" in targets:  # export.dtype counts for both
        for target in targets:
            tensors = load_file(run_dir / "exported" / target / "diffusion_model.safetensors")
            assert tensors["blocks.0.self_attn.q.bias"].dtype == torch.float32
    if "hub" in targets:
        text = (run_dir / "exported" / "hub" / "README.md").read_text()
        assert "none: post-training quantization alone" in text
        loaded = WanTransformer3DModel.from_pretrained(run_dir / "exported" / "hub")
        assert len(packed_layers(loaded)) == len(packed_layers(load_packed(run_dir / "packed")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export=[comfy,cache_dit]", "bits=4"], "no common profile: comfy needs convrot, cache_dit needs svdq_g64"),
        (["export=comfy", "bits=w4a6"], "profile=convrot is for ComfyUI"),
        (["export=comfy", "profile=paper", "bits=4"], "export=comfy would not carry profile=paper w4a4"),
        (["export=comfy", "init=smoothquant", "bits=4"], "init=smoothquant multiplies inputs by a vector"),
        (["export=cache_dit", "init=svdquant", "bits=4"], "more than export.rank=0; write 32"),
        (["export=comfi", "bits=4"], "unknown export=comfi; did you mean 'comfy'?"),
        (["export=comfy", "export.rank=3", "bits=4"], "unknown key 'export.rank'"),
        (["export=hub", "export.upload=true", "bits=4"], "export.upload=true needs a repository"),
        (["export=hub", "export.repo=a/b/c", "bits=4"], "export.repo=a/b/c is no ORG/NAME"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_a_target_will_not_carry_is_refused_before_anything_is_computed(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    run_dir = tmp_path / "run"
    assert ptq(wan, run_dir, *words) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not run_dir.exists()


def test_a_family_that_the_runtime_does_not_have_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_cogvideox_folder(tmp_path / "model")
    words = [*tiny_keys("cogvideox", folder), "init=rtn", "bits=w4a8", "export=int8", "evaluation.samples=0"]
    assert main(["ptq", *words, "logger=csv", f"run_dir={tmp_path / 'run'}"]) == BAD_INPUT
    assert "qvgen knows none for 'cogvideox'; choose a target with diffusers' names" in capsys.readouterr().err


def test_a_kept_phi_counts_as_a_branch(wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [*tiny_keys("wan", wan), "model.include=[blocks.*]", f"data.path={tmp_path}", "logger=csv", "bits=4"]
    words = [*keys, "phi.rank=32", "phi.keep=true", "phi.keep_rank=16", "export=cache_dit", "dry_run=true"]
    (tmp_path / "metadata.csv").write_text("video,caption\n")
    assert main(["train", *words, f"run_dir={tmp_path / 'run'}"]) == BAD_INPUT
    assert "has rank 16, more than export.rank=0; write 16" in capsys.readouterr().err


def test_a_dry_run_says_where_exports_go(wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ptq(wan, tmp_path / "run", "init=rtn", "bits=4", "export=comfy", "dry_run=true") == DONE
    shown = capsys.readouterr().out
    assert "w4a4 (convrot)" in shown
    assert f"export: comfy, exactly, to {tmp_path / 'run' / 'exported' / 'comfy'}" in shown
    assert not (tmp_path / "run").exists()


def test_training_exports_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [*SHORT, *UNSEEN, "steps=1", "method=lsq", "evaluation.samples=2", *shallow(1)]
    assert main(["train", *short, "bits=w4a8", "export=hub", "export.repo=me/tiny", f"run_dir={tmp_path / 'run'}"]) == 0
    folder = tmp_path / "run" / "exported" / "hub"
    text, report = (folder / "README.md").read_text(), json.loads((tmp_path / "run" / "report.json").read_text())
    assert f"| packed | {report['relative_error']['packed']:.4g} |" in text
    assert 'from_pretrained("me/tiny"' in text
    assert qvgen.load_packed(folder) is not None
    capsys.readouterr()
    assert main(["train", "method=pretrain", "export=hub", f"run_dir={tmp_path / 'other'}"]) == BAD_INPUT
    assert "export=hub has nothing to write: method=pretrain quantizes nothing" in capsys.readouterr().err
    assert main(["benchmark", "ptq", "export=hub"]) == BAD_INPUT
    assert "a benchmark exports nothing" in capsys.readouterr().err


def test_the_profile_is_chosen_only_where_none_is_named() -> None:
    assert with_profile("ptq", ["bits=4", "export=comfy"]) == ["bits=4", "export=comfy", "profile=convrot"]
    for words in (["export=comfy", "profile=int8"], ["export=bf16"], ["bits=4"], ["export=comfy,int8"], ["export=[]"]):
        assert with_profile("ptq", words) == words
    assert with_profile("export", ["export=comfy"]) == ["export=comfy"]
    for value, profile in (("true", "int8"), ("false", "paper")):  # a target's keys may decide what it carries
        words = ["export=sdnq", f"export.quantized_inputs={value}"]
        assert with_profile("ptq", words) == [*words, f"profile={profile}"]
    with pytest.raises(UserError, match=r"unknown export=comfi; did you mean 'comfy'"):
        with_profile("train", ["export=comfi"])
