"""The built wheel: checked against the source tree, and by running it from another folder."""

import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qvgen_kernels.cpu_library import missing_reason

ROOT = Path(__file__).resolve().parents[2]
HOMES = {"qvgen": "qvgen", "conf": "qvgen/conf", "kernels/qvgen_kernels": "qvgen_kernels"}


def test_the_wheel_carries_everything_and_runs_from_any_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    expected = {
        f"{home}/{file.relative_to(ROOT / source).as_posix()}"
        for source, home in HOMES.items()
        for file in (ROOT / source).rglob("*")
        if file.is_file() and file.suffix not in (".pyc", ".so")
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {name for name in packed if ".dist-info/" not in name} == expected
    program = (
        "import sys, qvgen, qvgen_kernels; from qvgen.cli import main; "
        f"assert all(module.__file__.startswith({str(tmp_path)!r}) for module in (qvgen, qvgen_kernels)); "
        "sys.exit(main(['train', '--cfg', 'job']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bits: 3" in done.stdout


@pytest.mark.skipif(missing_reason() is not None, reason="no C++ compiler")
def test_kernels_can_be_built_at_install_time(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, env=os.environ | {"QVGEN_BUILD_KERNELS": "1"})
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" not in wheel.name  # for this kind of machine alone
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "from qvgen_kernels import LinearSpec, resolve_kernel; from qvgen_kernels.cpu_build import library_path; "
        "print(library_path()); "
        "print(resolve_kernel('auto', LinearSpec(in_features=8, out_features=8, weight_bits=4, activation_bits=4)).name)"
    )
    # no compiler and an empty cache
    environment = {"PATH": str(tmp_path), "QVGEN_KERNEL_CACHE": str(tmp_path), "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    path, kernel = done.stdout.split()
    assert path.startswith(str(tmp_path / "site" / "qvgen_kernels" / "prebuilt"))
    assert kernel != "reference"


def test_another_value_of_the_setting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hook that both builds above run."""
    monkeypatch.setenv("QVGEN_BUILD_KERNELS", "yes")
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))["KernelBuildHook"]
    made = hook(str(ROOT), {}, None, None, str(tmp_path), "wheel")
    with pytest.raises(ValueError, match="QVGEN_BUILD_KERNELS='yes'; use 1"):
        made.initialize("standard", {})
