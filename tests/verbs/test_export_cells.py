"""Every target of `qvgen export` for the families that no other file exports: written whole, or refused in one line.

Each model has the profile that the target names first. Wan, CogVideoX, LTX-Video and HunyuanVideo are in test_export.py,
test_export_originals.py, test_deployment_page.py and the consumers' tests.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config.leaf_file import leaf_names
from tests.deploy.exporters.packed_models import save, tiny_latte, tiny_mochi

MAKE = {"latte": tiny_latte, "mochi": tiny_mochi}
SOME = {"latte": "", "mochi": "cache_dit nunchaku_lite humming comfy"}
"""Targets of a family; empty: all. Mochi's smallest transformer that suits them all takes three times as long."""
NO_NAMES = "have the names of the model's own code, and qvgen knows none for"
CELLS = {
    "diffusers": ("paper", "w3a3", True),
    "hub": ("paper", "w3a3", True),
    "cache_dit": ("svdq_g64", "w4a4", True),
    "nunchaku_lite": ("svdq_g64", "w4a4", True),
    "humming": ("w4a8_row", "w4a8", True),
    "sdnq export.quantized_inputs=true": ("int8", "w4a8", True),
    "sdnq": ("paper", "w3a3", False),  # weights alone
    "torchao": ("paper", "w3a3", False),
    "bf16": ("paper", "w3a3", False),
    "comfy": ("int8", "w4a8", None),  # refused whatever the profile
    "int8": ("int8", "w4a8", None),
    "bf16 export.layout=original": ("paper", "w3a3", None),
}
"""Words of the target -> profile and widths of the model, and whether the export is exact; None where it is refused."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    @functools.cache
    def make(family: str, profile: str, bits: str) -> Path:
        folder = tmp_path_factory.mktemp("packed") / "packed"
        return save(MAKE[family](), folder, profile=profile, bits=bits, name=family)

    return make


def test_the_cells_are_of_all_targets() -> None:
    assert {words.split()[0] for words in CELLS} == set(leaf_names("export"))


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi turns it off, in its own way
@pytest.mark.parametrize("family", MAKE)
def test_a_family_and_its_targets(
    family: str, packed: Callable[[str, str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, (words, (profile, bits, exact)) in enumerate(CELLS.items()):
        target, *keys = words.split()
        if target not in (SOME[family] or words):
            continue
        out = tmp_path / str(index)
        code = main(["export", f"packed={packed(family, profile, bits)}", f"target={target}", f"out={out}", *keys])
        said = capsys.readouterr().err.splitlines()
        if exact is None:
            assert code == BAD_INPUT
            assert len(said) == 1, words
            assert f"{NO_NAMES} {family!r}" in said[0]
            assert not out.exists()
            continue
        assert (code, said) == (DONE, []), words
        content = json.loads((out / "parity.json").read_text())
        assert content["exact"] is exact, words
        assert content["model"] is not None, words
