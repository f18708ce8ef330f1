"""docs/deployment.md: its exports are made from a model of the profile that its table names for the target, and are exact."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path

import pytest

from qvgen.cli import DONE, main
from qvgen.config.leaf_file import leaf_names
from tests.deploy.exporters.packed_models import save, tiny_wan

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line
]
EXPORTS = [words for words in COMMANDS if words[0] == "export" and "export.upload=true" not in words]
ELSEWHERE = {
    "doctor": "tests/verbs/test_doctor.py",
    "benchmark": "tests/kernels/test_tuned_tiles.py",
    "export": "tests/verbs/test_export_publish.py",  # the upload, to a hub of the test's own
}
"""Where commands run that need a GPU, a network or a while."""


def targets_of_the_table() -> dict[str, tuple[str, str]]:
    """Words of a target -> profile and bits that the page says to train, the first of several."""
    found: dict[str, tuple[str, str]] = {}
    for row in re.findall(r"^\|(.+)\|$", PAGE.partition("No runtime but qvgen")[0], re.MULTILINE):
        _, _, targets, trained = (cell.strip() for cell in row.split("|"))
        asked = re.findall(r"`([^`]+)`", trained)
        words = asked[0].split() if asked else []
        named = dict(word.split("=") for word in words if "=" in word)
        for target in targets.split(";"):
            key = " ".join(re.findall(r"`([^`]+)`", target))
            found.setdefault(key, (named.get("profile", "paper"), named.get("bits", "3")))
    return found


TARGETS = targets_of_the_table()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A packed model of a profile and widths, made once."""

    @functools.cache
    def make(profile: str, bits: str) -> Path:
        return save(tiny_wan(), tmp_path_factory.mktemp("packed") / "packed", profile=profile, bits=bits)

    return make


def test_the_table_names_every_target() -> None:
    named = {key.split()[0] for key in TARGETS if key and not key.startswith("target")}
    assert named == set(leaf_names("export")) - {"hub"}  # which is the folder of diffusers with a card
    for words in COMMANDS:
        if words not in EXPORTS:
            assert f'"{words[0]}"' in (ROOT / ELSEWHERE[words[0]]).read_text(encoding="utf-8")


@pytest.mark.parametrize("words", EXPORTS, ids=" ".join)
def test_an_export_of_the_page(words: list[str], packed: object, tmp_path: Path) -> None:
    assert callable(packed)
    target = next(word.removeprefix("target=") for word in words if word.startswith("target="))
    options = [word for word in words if word.startswith("export.") and target != "hub"]
    profile, bits = TARGETS[" ".join([target, *options])] if target != "hub" else ("paper", "3")
    places = {"packed=outputs/run/packed": f"packed={packed(profile, bits)}", "out=exported": f"out={tmp_path / 'out'}"}
    assert main([places.get(word, word) for word in words]) == DONE
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert not [layer for layer in report["layers"] if layer["weight_reasons"] or layer["input_reasons"]]
