"""Exports for humming, torchao, SDNQ and further consumers in the hands of those, in processes of their own, on the CPU.

Of humming, whose operators are GPU kernels, its schemas, its packer and its reference quantizer are run, not its products.
The last test goes from training over an export to a video of its consumer; docs/benchmarks/export-round-trip.md has all rows.
QVGEN_LONG_TESTS=1 asks for further rows: of consumers whose layers and whole model are held to be equal above, and in
test_exports.py and tests/deploy/test_diffusers.py.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from qvgen.cli import DONE, main
from tests.consumers.conftest import run_program
from tests.consumers.round_trip import PACKAGES, TRIPS, travel
from tests.deploy.exporters.packed_models import save, tiny_cogvideox, tiny_wan

NARROW = "blocks.0.ffn.net.2"
"""A layer with 3-bit weights among others of 4 bits."""
BY_TORCHAO = {"row w4|3a8": [["int3", True], ["int4", True]], "groups w4a4": [["int4", False]]}
"""Models that torchao reads, and the kinds of their layers."""

EXPECTED = {
    # (family, profile, target, dtype): lowest PSNR to our packed video, and to ours with its other weights rounded alike
    # The branch is two products of padded matrices, whose sums have other last bits on some processors: a code may differ.
    ("wan", "svdq_g64", "cache_dit", "bfloat16"): (40, 60),
    ("wan", "int8", "sdnq", "float32"): (60, 60),
    ("cogvideox-5b", "svdq_g64", "nunchaku_lite", "bfloat16"): (35, 60),
}
"""A model that forgets a branch, a rotation or a scale has less than 35 dB here."""
WHEN_ASKED = {
    # comfy-kitchen rotates by a product, which sums in another order: some inputs fall on the other side of a tie.
    ("wan", "convrot", "comfy", None): (60, 60),
    ("wan", "int8", "int8", None): (60, 60),
    ("wan", "w4a8_row", "torchao", "float32"): (40, 40),
    ("cogvideox-5b", "svdq_g64", "qvgen", None): (math.inf, math.inf),
    ("wan", "w4a8_row", "humming", "bfloat16"): (40, math.inf),
    ("cogvideox-5b", "w4a8_row", "humming", "bfloat16"): (40, math.inf),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed models by a name."""
    folder = tmp_path_factory.mktemp("packed")
    return {
        "row w4|3a8": save(tiny_wan(), folder / "mixed", profile="w4a8_row", bits="w4a8", narrow=NARROW),
        "paper w3a3": save(tiny_wan(), folder / "paper", profile="paper", bits="w3a3"),
        "groups w4a4": save(tiny_wan(), folder / "groups", profile="svdq_g64", bits="w4a4"),
    }


def exported(folder: Path, out: Path, *words: str) -> list[str]:
    """The two folders of an export, for a program."""
    assert main(["export", f"packed={folder}", f"out='{out}'", *words]) == DONE
    return [str(folder), str(out)]


def last_line(said: str) -> list[dict[str, Any]]:
    """What a program printed last; its packages say things before."""
    results: list[dict[str, Any]] = json.loads(said.splitlines()[-1])
    return results


def test_humming_takes_the_configuration_and_the_words(
    run_consumer: Any, packed: dict[str, Path], tmp_path: Path
) -> None:
    cog = save(tiny_cogvideox(), tmp_path / "cog", profile="w4a8_row", bits="w4a8", name="cogvideox-5b")
    sources = {"row w4|3a8": packed["row w4|3a8"], "cogvideox": cog}
    words = [str(tmp_path)]
    for name, folder in sources.items():
        out = tmp_path / name.replace("|", " ")
        words += exported(folder, out, "target=humming")
        parity = json.loads((out / "parity.json").read_text())
        assert parity["exact"] is True, name  # through humming's arithmetic, as far as it is in float32
    results = last_line(run_consumer("humming-kernels==0.1.20", "humming_program.py", *words))
    kinds = {"row w4|3a8": ["uint3", "uint4"], "cogvideox": ["uint4"]}
    for (name, types), result in zip(kinds.items(), results, strict=True):
        assert result["dtypes"] == [["int8", kind, "bfloat16", "dynamic_token"] for kind in types]
        assert result["layers"] == (8 if name == "cogvideox" else 10)
        for check in ("words_equal", "padded", "compatible", "kernel_steps"):
            assert result[check], (name, check)
        assert result["skipped"] == result["not_skipped"] == []
        for inputs in result["inputs"]:
            assert inputs["scales"], name
            assert inputs["codes_of_the_kernels_steps"], name
            # Its reference in Python divides by the scale, which its kernel does not do.
            assert inputs["codes_by"] <= 1, name
            assert inputs["codes_differ"] < 0.002, name


@pytest.fixture(scope="module")
def exports(packed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each of torchao and SDNQ the folders of its exports, in the order of ``packed``; then two for SDNQ's products."""
    folder = tmp_path_factory.mktemp("exports")
    words: dict[str, list[str]] = {"torchao": [], "sdnq": []}
    for name, source in packed.items():
        place = name.replace("|", " ")
        if name in BY_TORCHAO:
            words["torchao"] += exported(source, folder / "torchao" / place, "target=torchao")
        words["sdnq"] += exported(source, folder / "sdnq" / place, "target=sdnq", "export.dtype=float32")
    for bits in ("w4a8", "w8a8"):
        source = save(tiny_wan(), folder / bits, profile="int8", bits=bits)
        keys = ("target=sdnq", "export.dtype=float32", "export.quantized_inputs=true")
        words["sdnq"] += exported(source, folder / "sdnq" / bits, *keys)
    return words


@pytest.fixture(scope="module")
def answers(exports: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What torchao_program and sdnq_program say of each export, and the rows of round_trip.py; one process for all."""
    expected = EXPECTED | (WHEN_ASKED if os.environ.get("QVGEN_LONG_TESTS") == "1" else {})
    trips = [trip for trip in TRIPS if (trip.family, trip.profile, trip.target, trip.dtype) in expected]
    assert len(trips) == len(expected)
    results: dict[str, list[dict[str, Any]]] = {}

    def run(plan: Path) -> str:
        said = run_program(PACKAGES, "dequantizers_program.py", json.dumps(exports), str(plan))
        results.update(json.loads(said.splitlines()[-1]))
        return json.dumps(results["round_trip"])

    return {"rows": travel(trips, tmp_path_factory.mktemp("trips"), run, sampling_steps=2)} | results


def test_torchao_dequantizes_our_weights(answers: dict[str, list[dict[str, Any]]]) -> None:
    results = answers["torchao"]
    for (name, wanted), result in zip(BY_TORCHAO.items(), results, strict=True):
        assert result["layers"] == 10
        assert result["equal"], name
        assert result["output"] == 0.0, name
        assert [[kind.removeprefix("torch."), rows] for kind, rows in result["kinds"]] == wanted
    assert all(result["config"] for result in results)


def test_sdnq_dequantizes_our_weights_and_multiplies_in_8_bits_what_was_trained_so(
    answers: dict[str, list[dict[str, Any]]], packed: dict[str, Path], exports: dict[str, list[str]]
) -> None:
    for out in exports["sdnq"][-1:-4:-2]:
        assert json.loads((Path(out) / "parity.json").read_text())["exact"] is True
    results = answers["sdnq"]
    weights, multiplied = results[: len(packed)], results[len(packed) :]
    kinds = ["int3", "int4"], ["uint3"], ["int4"]
    for name, wanted, result in zip(packed, kinds, weights, strict=True):
        for way in ("loader", "diffusers"):
            assert result[way]["layers"] == 10
            assert result[way]["kinds"] == wanted, (name, way)
            # A zero point is stored times the scale: one more rounding of float32.
            assert result[way]["difference"] <= (2e-7 if name.startswith("paper") else 0.0), (name, way)
            assert result[way]["products"] is None
    for kind, result in zip(("int4", "int8"), multiplied, strict=True):
        for way in ("loader", "diffusers"):
            assert result[way]["kinds"] == [kind]
            assert result[way]["difference"] == 0.0
            assert result[way]["products"]["layers"] == 10
            # The same codes and integer sums; SDNQ adds the bias and multiplies with the scales in one step.
            assert result[way]["products"]["difference"] <= 1e-6, (kind, way)
            assert result[way]["products"]["inputs_count"] > 1e-3


def test_videos_of_the_consumers_are_the_packed_models(answers: dict[str, list[dict[str, Any]]]) -> None:
    for row in answers["rows"]:
        key = (row["family"], row["profile"], row["target"], row["dtype"])
        packed, rounded = (EXPECTED | WHEN_ASKED)[key]
        assert row["psnr_db"] >= packed, row
        assert row["same_rounding_db"] >= rounded, row
        assert row["packed_to_full_db"] < 60, row  # quantization changes the video
        if row["target"] in ("cache_dit", "nunchaku_lite"):
            assert 30 < row["half_sums_db"] < math.inf, row
