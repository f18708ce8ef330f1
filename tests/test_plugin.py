"""Addition: leaves and a kernel of somebody else's package are taken by all verbs and by the conformance suite.

tests/plugin holds the package and its metadata, as if it had been installed; nothing here or in qvgen names its classes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from qvgen.cli import main
from qvgen.config.leaf_file import group_targets
from qvgen.config.leaves import leaf_names, load_leaf
from qvgen.config.plugins import find_plugins
from qvgen.deploy.packed_fusion import fuse_packed_
from qvgen.layers import block_fusion
from qvgen.models.folder.published import known_models
from qvgen_kernels import kernel_names, registry
from tests.runs import UNSEEN, packed_bytes, shallow, train

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "tests" / "plugin"
BROUGHT = ("init=shrunk", "method=distilled", "model=still_digits", "kernel=in_blocks")


def forget() -> None:
    """What was found before; and the package's modules, so that its backend registers itself again."""
    for cached in (find_plugins, known_models, registry._load_installed):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "qvgen_example"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def installed() -> Iterator[None]:
    """The package on the path, with the metadata of a distribution."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PLUGIN)
        patch.setattr(registry, "_backends", dict(registry._backends))
        forget()
        yield
    forget()


@pytest.fixture(scope="module")
def run_dir(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all that the package brings."""
    folder = tmp_path_factory.mktemp("plugin") / "run"
    assert train(folder, *BROUGHT, "steps=2", *UNSEEN, *shallow(1), "model.notes=/somewhere/else") == 0
    return folder


@pytest.mark.usefixtures("installed")
def test_leaves_are_found_beside_ours() -> None:
    assert not find_plugins().problems
    assert {"shrunk", "rtn"} <= set(leaf_names("init"))
    assert "qvgen_example.shrunk.Shrunk" in group_targets("init")
    assert load_leaf("init", "shrunk", share=0.5).share == 0.5
    assert "in_blocks" in kernel_names()


@pytest.mark.usefixtures("installed")
def test_what_its_blocks_share_is_known_to_a_packed_model_that_names_no_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_fusion, "_loaders", {})
    forget()  # no command has imported the family's file yet
    fuse_packed_(nn.Linear(1, 1))
    assert "still_digits" in block_fusion._loaders


@pytest.mark.usefixtures("installed")
def test_help_lists_them_and_typing_errors_lead_to_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for choice in BROUGHT[:3]:
        group, _, name = choice.partition("=")
        (line,) = [line for line in shown.splitlines() if line.startswith(f"  {group}: ") and "," in line]
        assert name in line.partition(": ")[2].split(", ")
    assert main(["ptq", "init=shrunc"]) == 2
    assert "unknown init=shrunc; did you mean 'shrunk'" in capsys.readouterr().err
    assert main(["ptq", "init=shrunk", "init.share=2", "dry_run=true"]) == 2
    assert "init.share=2 is outside (0, 1]" in capsys.readouterr().err
    assert main(["benchmark", "ptq", "dry_run=true", "out=outputs/not-there"]) == 0
    assert "shrunk, smoothquant, smoothquant+r16" in capsys.readouterr().out


def test_a_run_is_trained_folded_and_packed_with_them(run_dir: Path, tmp_path: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    assert [report[key] for key in ("init", "method", "model")] == ["shrunk", "distilled", "still_digits"]
    assert report["packed_codes_equal"] is True
    facts = json.loads((run_dir / "identity.json").read_text())["facts"]
    assert facts["code.qvgen_example"].startswith("source ")
    manifest = (run_dir / "packed" / "manifest.json").read_text()
    assert "notes" not in json.loads(manifest)["base"]["arguments"]  # the family says that it is of one machine
    assert "somewhere" in (run_dir / "config.yaml").read_text()
    assert "somewhere" not in manifest
    # The package is installed, which the user did: a run's config.yaml may name its leaves again.
    assert main(["fold", f"run_dir={run_dir}", f"out={tmp_path / 'packed'}"]) == 0
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == packed_bytes(run_dir)


def test_verbs_that_read_what_was_made_find_the_family_by_its_name(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["num_steps=1", "kernel=in_blocks", "prompt=a red three standing still"]
    assert main(["generate", f"packed={run_dir / 'packed'}", f"out={tmp_path / 'videos'}", *keys]) == 0
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
    assert main(["inspect", f"packed={run_dir / 'packed'}"]) == 0
    assert "still_digits" in capsys.readouterr().out
    assert main(["compare", str(run_dir), str(run_dir), f"out={tmp_path / 'page'}"]) == 0


def test_the_conformance_suite_takes_them() -> None:
    paths = os.pathsep.join([str(PLUGIN), str(ROOT), str(ROOT / "kernels")])
    files = [f"tests/conformance/test_{name}.py" for name in ("initializers", "kernels", "leaves")]
    chosen = ["-k", "(shrunk and paper) or distilled or still_digits or in_blocks"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance_program", "-q", "-p", "no:cacheprovider", *files, *chosen],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    count = int(done.stdout.splitlines()[-1].split(" passed")[0].split()[-1])
    assert count >= 20, done.stdout[-500:]  # every test of an init, and those of the other leaves
