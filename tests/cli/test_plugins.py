"""Plug-ins that are broken or collide: named with what to do, and no command fails that does not use them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qvgen.cli import main
from qvgen.config.compose import compose_plain
from qvgen.config.leaf_file import group_targets, leaf_names
from qvgen.config.leaves import load_leaf
from qvgen.config.plugins import find_plugins
from qvgen.errors import UserError
from qvgen_kernels import LinearSpec, get_backend, registry, resolve_kernel

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes a distribution NAME: its metadata, and files of its package."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))

    def write(name: str, entry: str, files: dict[str, str], *, group: str = "qvgen.plugins") -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
        for file, text in files.items():
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()  # a folder's listing is remembered by its time, which is coarse

    find_plugins.cache_clear()
    registry._load_installed.cache_clear()
    yield write
    find_plugins.cache_clear()
    registry._load_installed.cache_clear()


RTN = "_target_: qvgen.initializers.rtn.RoundToNearest\n"


@pytest.mark.parametrize(
    ("entry", "files", "problem"),
    [
        (
            "a = no_such_package",
            {},
            "plug-in broken: its entry point a names the package 'no_such_package', which is not",
        ),
        ("a = one", {"one/__init__.py": ""}, "plug-in broken: the package one has no folder conf"),
        ("a = one:Thing", {"one/__init__.py": ""}, "plug-in broken: its entry point a = 'one:Thing' names an object"),
        ("a = bad.inner", {"bad/__init__.py": "1 / 0"}, "plug-in broken: division by zero; repair or uninstall it"),
        (
            "a = one",
            {"one/__init__.py": "", "one/conf/init/mse.yaml": RTN},
            "plug-in broken: its conf/init/mse.yaml has the name of a file of qvgen, which counts; rename it",
        ),
        (
            "a = one",
            {"one/__init__.py": "", "one/conf/init/other.yaml": "_target_: os.system\n"},
            "plug-in broken: init=other can't be used: .* names os.system, which is outside of its package one",
        ),
        (
            "a = one",
            {"one/__init__.py": "", "one/conf/init/other.yaml": "a: [\n"},
            "plug-in broken: init=other can't be used: .*other.yaml is no YAML file",
        ),
    ],
)
def test_a_broken_plug_in_is_warned_of_once_and_breaks_nothing(
    entry: str, files: dict[str, str], problem: str, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("broken", entry, files)
    assert compose_plain("ptq", ["init=mse"])["init"]["_target_"] == "qvgen.initializers.mse.MeanSquaredError"
    assert type(load_leaf("init", "mse")).__name__ == "MeanSquaredError"
    (found,) = find_plugins().problems
    assert re.match(problem, found)
    assert caplog.messages.count(found) == 1
    assert "os.system" not in group_targets("init")
    if "can't be used" in problem:
        for use in (lambda: compose_plain("ptq", ["init=other"]), lambda: load_leaf("init", "other")):
            with pytest.raises(UserError, match="init=other can't be used"):
                use()


def test_two_plug_ins_with_one_name_are_both_refused_by_it_alone(install: Install) -> None:
    for name in ("first", "second"):
        files = {
            f"{name}_p/__init__.py": "",
            f"{name}_p/conf/init/same.yaml": RTN,
            f"{name}_p/conf/init/{name}.yaml": RTN,
        }
        install(name, f"a = {name}_p", files)
    assert {"first", "second"} <= set(leaf_names("init"))
    assert "same" not in leaf_names("init")
    for use in (lambda: compose_plain("ptq", ["init=same"]), lambda: load_leaf("init", "same")):
        with pytest.raises(
            UserError, match="init=same is brought by the plug-ins first and second; uninstall one of them"
        ):
            use()
    assert compose_plain("ptq", ["init=second"])["names"]["init"] == "second"


def test_a_class_of_a_plug_in_that_cannot_be_imported_is_named(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("torn", "a = torn_p", {
        "torn_p/__init__.py": "", "torn_p/method.py": "import no_such_library",
        "torn_p/conf/init/torn.yaml": "_target_: torn_p.method.Method\n",
    })  # fmt: skip
    assert main(["ptq", "init=torn", "dry_run=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "init._target_=torn_p.method.Method: importing torn_p.method failed: ModuleNotFoundError" in line
    assert "no_such_library" in line


def test_a_broken_kernel_is_warned_of_and_refused_by_its_name_alone(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in (("bad_kernel", "1 / 0"), ("idle_kernel", ""), ("taken", "")):
        entry = f"{'portable' if name == 'taken' else name} = {name}_p"
        install(name, entry, {f"{name}_p.py": text}, group="qvgen_kernels.backends")
    spec = LinearSpec(in_features=8, out_features=8, weight_bits=4, activation_bits=4)
    assert resolve_kernel("reference", spec).name == "reference"
    assert resolve_kernel("auto", spec).name in registry._backends
    assert len(caplog.messages) == 3
    with pytest.raises(ValueError, match="kernel='bad_kernel' can't be used: package bad_kernel: ZeroDivisionError"):
        get_backend("bad_kernel")
    with pytest.raises(
        ValueError, match="kernel='idle_kernel' can't be used: .* idle_kernel_p registers no backend named"
    ):
        get_backend("idle_kernel")
    assert type(get_backend("portable")).__module__ == "qvgen_kernels.cpu"
