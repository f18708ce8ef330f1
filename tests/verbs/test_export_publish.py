"""Targets diffusers and hub: what lands in the folder, checked by loading it, by the hub's own parser and by a small hub."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from huggingface_hub import ModelCard
from safetensors import safe_open

import qvgen
from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.deploy.checkpoint import check_packed
from tests.deploy.exporters.packed_models import save, tiny_wan
from tests.models.hub_folders import make_wan_folder
from tests.runs import snapshot

PACKED_FILES = {
    "config.json", "diffusion_pytorch_model.safetensors.index.json", "manifest.json", "model.safetensors", "parity.html",
    "parity.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_wan(), tmp_path_factory.mktemp("packed") / "packed", profile="paper", bits="w4a4")


def export(packed: Path, out: Path, *words: str) -> int:
    return main(["export", f"packed={packed}", f"out={out}", *words])


def same_tensors(model: torch.nn.Module, packed: Path) -> bool:
    theirs = qvgen.load_packed(packed).state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


def test_diffusers_gets_a_clean_copy(packed: Path, tmp_path: Path) -> None:
    dirty = Path(shutil.copytree(packed, tmp_path / "packed"))
    (dirty / "notes.txt").write_text("mine")
    (dirty / "config.json").unlink()  # as folders of before are
    (dirty / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert export(dirty, tmp_path / "out", "target=diffusers") == DONE
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == PACKED_FILES
    for name in PACKED_FILES - {"parity.html", "parity.json"}:
        assert (out / name).read_bytes() == (packed / name).read_bytes(), name
    content = json.loads((out / "parity.json").read_text())
    assert content["exact"] is True
    assert content["model"] == {"relative_error": 0.0, "max_abs": 0.0}
    assert {layer["runs_as"] for layer in content["layers"]} == {"w4a4"}
    assert same_tensors(WanTransformer3DModel.from_pretrained(out), packed)


def hub_run(tmp_path: Path, variant: str, *words: str) -> tuple[Path, Path]:
    """A tiny folder of a whole pipeline and a packed model of its transformer."""
    base = make_wan_folder(tmp_path / "base", variant)
    family = "wan2.2-a14b" if variant == "a14b" else "wan"
    keys = [f"model={family}", f"model.path={base}", "init=rtn", "bits=4", "evaluation.samples=0", "logger=csv"]
    assert main(["ptq", *keys, *words, f"run_dir={tmp_path / 'run'}"]) == DONE
    return base, tmp_path / "run" / "packed"


def test_a_whole_pipeline_has_the_parts_of_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, packed = hub_run(tmp_path, "2.1")
    (base / "LICENSE").write_text("Apache")
    (base / ".cache").mkdir()
    (base / "text_encoder" / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"variant")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "_name_or_path": str(tmp_path)}))
    out = tmp_path / "out"
    assert export(packed, out, "target=hub", f"export.base={base}", "export.repo=me/wan-w4") == DONE
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"README.md", "LICENSE", "model_index.json", "transformer/manifest.json", "vae/config.json"} <= names
    assert not [name for name in names if name.endswith(".bin") or ".fp16." in name or name.startswith(".cache")]
    assert str(tmp_path) not in (out / "model_index.json").read_text() + (out / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(out)
    assert isinstance(pipe, WanPipeline)
    assert same_tensors(pipe.transformer, packed)
    assert 'WanPipeline.from_pretrained("me/wan-w4"' in (out / "README.md").read_text()
    capsys.readouterr()
    for breakage, message in (
        (lambda: shutil.rmtree(base / "vae"), "vae is missing"),
        (lambda: (base / "transformer" / "config.json").write_text(
            json.dumps({**json.loads((base / "transformer" / "config.json").read_text()), "num_layers": 7})
        ), "is of another model: its transformer has num_layers=7, the packed one num_layers=2"),
    ):  # fmt: skip
        breakage()
        assert export(packed, tmp_path / "other", "target=diffusers", f"export.base={base}") == BAD_INPUT
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


def test_two_experts_come_one_after_the_other(tmp_path: Path) -> None:
    base, packed = hub_run(tmp_path, "a14b", "model.expert=low")
    assert export(packed, tmp_path / "low", "target=diffusers", f"export.base={base}") == DONE
    assert (tmp_path / "low" / "transformer_2" / "manifest.json").is_file()
    high = tmp_path / "high"
    words = [f"model.path={base}", "init=rtn", "bits=3", "evaluation.samples=0", "logger=csv", f"run_dir={high}"]
    assert main(["ptq", "model=wan2.2-a14b", *words]) == DONE
    assert export(high / "packed", tmp_path / "both", "target=hub", f"export.base={tmp_path / 'low'}") == DONE
    for part, source in (("transformer", high / "packed"), ("transformer_2", packed)):
        assert check_packed(tmp_path / "both" / part).sha256 == check_packed(source).sha256
        assert same_tensors(WanTransformer3DModel.from_pretrained(tmp_path / "both", subfolder=part), source)


def test_the_card_shows_the_numbers_of_this_run_alone(
    short_run: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export(short_run / "packed", out, "target=hub", "export.repo=me/tiny-w3") == DONE
    report = json.loads((short_run / "report.json").read_text())
    text, card = (out / "README.md").read_text(), ModelCard.load(out / "README.md", ignore_metadata_errors=False)
    assert card.data.to_dict()["tags"] == ["qvgen", "quantized", "w3a3"]
    for name in ("rtn", "ptq", "qat", "packed"):
        assert f"| {report['relative_error'][name]:.4g} |" in text
    on = report["relative_error_measured_on"]
    assert f"on {on['num_samples']} samples ({on['split']}), seed {on['seed']}." in text
    assert "too small for its errors to be relied on" in text  # the report's own caution
    assert f"| optimizer steps | {report['steps']} |" in text
    assert "| rank of the helper Phi, at the end | 0 |" in text
    assert "| licence of the base model | unknown; see the base model |" in text
    assert len(text.partition("```python\n")[2].partition("```")[0].splitlines()) == 5
    capsys.readouterr()
    other = f"export.report={short_run / 'report.json'}"
    assert export(packed, tmp_path / "other", "target=hub", other) == BAD_INPUT
    assert "is the report of another model than" in capsys.readouterr().err
    moved = Path(shutil.copytree(packed, tmp_path / "run" / "packed"))
    shutil.copy(short_run / "report.json", tmp_path / "run" / "report.json")
    assert export(moved, tmp_path / "alone", "target=hub") == DONE
    assert "Nothing was measured" in (tmp_path / "alone" / "README.md").read_text()


class _Hub(BaseHTTPRequestHandler):
    """The few routes of the hub that an upload of small files takes."""

    received: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, object] = {"url": "https://huggingface.co/me/tiny", "id": "me/tiny", "name": "me/tiny"}
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            answer = {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }
        elif "/commit/" in self.path:
            for line in filter(None, body.splitlines()):
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.received[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            answer = {"commitUrl": "https://huggingface.co/me/tiny/commit/1", "commitOid": "1", "success": True}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/tiny", "siblings": [], "sha": "0", "private": True})

    def do_HEAD(self) -> None:
        self.send_response(404)  # no file is there yet
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def _answer(self, content: dict[str, object]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A hub on this machine; path -> bytes of what was uploaded to it."""
    _Hub.received = {}
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    files = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)  # of the functions that diffusers calls
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield _Hub.received
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_upload_sends_the_folder_as_it_is(packed: Path, tmp_path: Path, hub: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    assert export(packed, out, "target=hub", "export.repo=me/tiny", "export.upload=true") == DONE
    assert {name: hashlib.sha256(data).hexdigest() for name, data in hub.items()} == snapshot(out)


def test_diffusers_own_push_sends_what_it_loads_again(packed: Path, tmp_path: Path, hub: dict[str, bytes]) -> None:
    WanTransformer3DModel.from_pretrained(packed).push_to_hub("me/tiny")
    assert "README.md" in hub
    for name, data in hub.items():
        (tmp_path / name).write_bytes(data)
    assert same_tensors(WanTransformer3DModel.from_pretrained(tmp_path), packed)


def test_an_upload_without_token_or_network_says_what_to_do(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["target=hub", "export.repo=me/tiny", "export.upload=true"]
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert export(packed, tmp_path / "out", *words) == BAD_INPUT
    assert "needs a token of the hub and there is none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert export(packed, tmp_path / "out", *words) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert "is written, and could not be uploaded to me/tiny: " in line
    assert f"`hf upload me/tiny {tmp_path / 'out'} .`" in line
    assert (tmp_path / "out" / "parity.json").is_file()


def test_weights_beyond_a_size_are_shards(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target of one's own with smaller shards; diffusers loads them as it loads the one file."""
    (tmp_path / "sharded.py").write_text(
        "from qvgen.deploy.exporters.bf16 import Bf16\n"
        "from qvgen.deploy.exporters.diffusers_folder import diffusers_folder\n"
        "class Sharded(Bf16):\n"
        "    def files(self, model):\n"
        "        return diffusers_folder(model, model.all_tensors, shard_bytes=200_000)\n"
    )
    (tmp_path / "conf" / "export").mkdir(parents=True)
    text = "_target_: sharded.Sharded\ndtype: float32\nlayout: diffusers\n"
    (tmp_path / "conf" / "export" / "sharded.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    one, many = tmp_path / "one", tmp_path / "many"
    assert export(packed, one, "target=bf16", "export.dtype=float32") == DONE
    assert export(packed, many, "--config-dir", str(tmp_path / "conf"), "target=sharded") == DONE
    shards = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        with safe_open(many / shard, framework="pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118 - no mapping
        assert sum(sizes) <= 200_000 or len(sizes) == 1
    models = [WanTransformer3DModel.from_pretrained(folder).state_dict() for folder in (one, many)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    # Another export into the folder leaves no shard of this one.
    assert export(packed, many, "target=bf16", "overwrite=true") == DONE
    assert [path.name for path in many.glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]
