"""What is copied from an earlier composition, against what hydra composes for the same words, its own section included."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from qvgen.config import composition, conf_folder
from qvgen.config.compose import compose_plain
from qvgen.config.composition import choices_of, compose_known
from qvgen.config.conf_folder import conf_directory
from qvgen.config.override import parse_override
from qvgen.config.resolvers import register_resolvers
from qvgen.config.search_path import register_folders


@pytest.fixture
def composing() -> Iterator[None]:
    register_resolvers()
    register_folders()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_directory())):
        yield


def known(verb: str, words: list[str]) -> dict[Any, Any]:
    overrides = [parse_override(word) for word in words]
    keys = [override.key_or_group for override in overrides]
    groups = [key for key in keys if key.isidentifier() and choices_of(key)]
    found = OmegaConf.to_container(compose_known(verb, overrides, groups=groups))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("train", []),
        ("train", ["steps=12", "model=wan", "phi.rank=4", "run_dir='/tmp/x=y'", "model.height=64", "logger=csv"]),
        ("train", ["phi={rank: 4, tail_share: 0.2}", "phi.ranks=[4,2]", "training.hang_minutes=null"]),
        ("train", ["experiment=tiny_teacher", "steps=2", "steps=3", "run_dir=${hydra:runtime.cwd}/x"]),
        ("ptq", ["init=gptq", "bits=w4a8", "model.prompts=[a red boat,two dogs run]"]),
        ("generate", ["packed=/a", "prompt='a b'"]),
    ],
)
def test_a_copy_is_what_hydra_composes(verb: str, words: list[str], composing: None) -> None:
    wanted = OmegaConf.to_container(compose(verb, words, return_hydra_config=True))
    assert known(verb, words) == wanted
    known(verb, [*words, "debug=true"])
    assert known(verb, words) == wanted, "another composition has changed what is copied"


def test_choices_are_those_that_hydra_lists(composing: None) -> None:
    loader = GlobalHydra.instance().config_loader()
    groups = [path.name for path in conf_directory().iterdir() if path.is_dir()]
    assert len(groups) > 8
    assert {group: choices_of(group) for group in groups} == {
        group: loader.get_group_options(group) for group in groups
    }
    assert choices_of("steps") == []


def test_where_it_was_composed_is_no_part_of_what_is_kept(
    composing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known("train", [])["hydra"]["runtime"]["cwd"] == os.getcwd()
    monkeypatch.chdir(tmp_path)
    assert known("train", [])["hydra"]["runtime"]["cwd"] == str(tmp_path)


def test_a_file_that_was_written_since_then_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(conf_directory(), conf)
    for module in (conf_folder, composition):
        monkeypatch.setattr(module, "conf_directory", lambda: conf)
    monkeypatch.setattr("qvgen.config.compose.conf_directory", lambda: conf)
    assert compose_plain("train", [])["optim"]["eps"] != 0.125
    file = conf / "optim" / "adamw.yaml"
    file.write_text(file.read_text().replace("eps: 1e-8", "eps: 0.125"))
    assert compose_plain("train", [])["optim"]["eps"] == 0.125
