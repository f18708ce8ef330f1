"""Folders that name code of their own: refused by name before it is imported, and nobody is asked at the terminal.

The code that the folders bring leaves a file when it is imported; standard input is one that must not be read.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qvgen.cli import main
from qvgen.evaluation.text_similarity import TextSimilarity
from qvgen.models.folder.foreign_code import check_model_index
from qvgen.models.small_folder import load_text_encoder
from tests.models.hub_folders import make_wan_folder
from tests.models.lora_files import tiny_family
from tests.models.small_folders import make_text_encoder

IN_A_PIPELINE = {
    "vocoder": ["ltx2", "LTX2Vocoder"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}
AUTO = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("hub") / "wan")


class Terminal(io.StringIO):
    """Somebody who would answer yes."""

    asked = 0

    def readline(self, *arguments: Any) -> str:
        self.asked += 1
        return "y\n"

    read = readline


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdin", stream)
    return stream


@pytest.fixture
def folder(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a module evil in each of its folders, which could be imported from the path too."""
    copy = Path(shutil.copytree(hub, tmp_path / "wan"))
    for place in (copy, *(path for path in copy.iterdir() if path.is_dir()), tmp_path / "importable"):
        place.mkdir(exist_ok=True)
        (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path / "importable")
    return copy


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def check_untouched(folder: Path, terminal: Terminal) -> None:
    assert not (folder.parent / "ran").exists()
    assert "evil" not in sys.modules
    assert terminal.asked == 0


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "tokenizer": ("tokenizer/tokenizer_config.json", {"auto_map": AUTO, "tokenizer_class": "Evil"}, "auto_map"),
    "a known tokenizer": ("tokenizer/tokenizer_config.json", {"auto_map": AUTO}, "auto_map"),
    "text encoder": ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
    "within": ("text_encoder/config.json", {"sub": [{"auto_map": {"AutoModel": "evil.Evil"}}]}, "auto_map"),
    "attention": ("text_encoder/config.json", {"attn_implementation": "evil/kernel"}, "attn_implementation: evil/kernel"),
    "transformer": ("transformer/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
    "vae": ("vae/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
    "scheduler": ("scheduler/scheduler_config.json", {"auto_map": {"A": "evil.Evil"}}, "auto_map"),
    "library": ("model_index.json", {"tokenizer": ["evil", "Evil"]}, "says that tokenizer is evil.Evil, whose code is never"),
    "an unused part": ("model_index.json", {"extra": ["evil", "Evil"]}, "says that extra is evil.Evil"),
    "a dotted class": ("model_index.json", {"vae": ["diffusers", "os.system"]}, "says that vae is diffusers.os.system"),
    "pipeline": ("model_index.json", {"_class_name": ["pipeline", "Evil"]}, "a pipeline that diffusers does not have"),
    "custom pipeline": ("model_index.json", {"custom_pipeline": "evil"}, "code of its own .custom_pipeline: evil"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_code_is_refused_by_name(case: str, folder: Path, terminal: Terminal) -> None:
    file, changes, match = CASES[case]
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=rf"^{folder / file} .*{match}"):
        tiny_family("wan", folder)
    check_untouched(folder, terminal)


def test_a_part_of_any_name_is_looked_at(folder: Path, terminal: Terminal) -> None:
    """A second text encoder, an image encoder: whatever the folder has; what a download tool keeps beside them is no part."""
    for name in ("image_encoder", ".cache"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"auto_map": AUTO}))
    with pytest.raises(ValueError, match=r"image_encoder/config.json names code of its own \(auto_map"):
        tiny_family("wan", folder)
    shutil.rmtree(folder / "image_encoder")
    assert tiny_family("wan", folder).folder is not None
    check_untouched(folder, terminal)


def test_a_verb_ends_with_one_line(folder: Path, terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map=AUTO, tokenizer_class="Evil")
    assert main(["generate", "model=wan", f"model.path={folder}", "prompt=a dog", f"out={folder.parent / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "names code of its own (auto_map" in line
    check_untouched(folder, terminal)


def test_what_is_written_after_the_folder_was_looked_at_is_refused_as_it_is_loaded(
    folder: Path, terminal: Terminal
) -> None:
    family = tiny_family("wan", folder)
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map=AUTO, tokenizer_class="Evil")
    with pytest.raises(ValueError, match="names code of its own"):
        family.encode(["a"])
    check_untouched(folder, terminal)


def test_text_encoders_outside_of_a_model_s_folder(folder: Path, terminal: Terminal, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        encoder = make_text_encoder(tmp_path / name)
        edit(encoder / name, auto_map={"AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil"})
        shutil.copy(folder / "evil.py", encoder)
        (encoder / "preprocessor_config.json").write_text("{}")
        with pytest.raises(ValueError, match="names code of its own"):
            load_text_encoder(encoder, width=16)
        with pytest.raises(ValueError, match="names code of its own"):
            TextSimilarity(encoder)
    check_untouched(folder, terminal)


@pytest.mark.parametrize("part", IN_A_PIPELINE)
def test_a_part_that_diffusers_has_inside_of_a_pipeline_is_no_foreign_code(part: str, tmp_path: Path) -> None:
    library, kind = IN_A_PIPELINE[part]
    with pytest.raises(
        ValueError, match=f"the {part} of a WanPipeline is {kind}, .* pipeline {library} alone; no family"
    ):
        check_model_index({"_class_name": "WanPipeline", part: [library, kind]}, file=tmp_path / "model_index.json")
    with pytest.raises(ValueError, match="whose code is never run"):
        check_model_index(
            {"_class_name": "WanPipeline", part: ["../pipelines", kind]}, file=tmp_path / "model_index.json"
        )
