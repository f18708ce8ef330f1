"""Building the CPU library: cache, concurrent builds, no compiler, a compiler that fails, a library of another source."""

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qvgen_kernels import cpu_build, cpu_library

SMALL = 'extern "C" __attribute__((visibility("default"))) long qv_linear_size() { return 8; }\n'


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """A library of one line, so that a build takes no time."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.cpp").write_text(SMALL)
    monkeypatch.setattr(cpu_build, "SOURCE", source)
    monkeypatch.setenv("QVGEN_KERNEL_CACHE", str(tmp_path / "cache"))
    return source


def test_is_built_once_and_again_after_a_change(small_source):
    first = cpu_build.library_path()
    stamp = first.stat().st_mtime_ns
    assert cpu_build.library_path() == first
    assert first.stat().st_mtime_ns == stamp
    (small_source / "one.cpp").write_text(SMALL + "// changed\n")
    second = cpu_build.library_path()
    assert second != first
    left = [path.name for library in (first, second) for path in (library, cpu_build.checksum_path(library))]
    assert sorted(os.listdir(first.parent)) == sorted(left)  # nothing temporary is left


def test_processes_can_build_at_the_same_time(small_source, tmp_path):
    program = """
import importlib.util, pathlib, sys
found = importlib.util.spec_from_file_location("cpu_build", sys.argv[1])
module = importlib.util.module_from_spec(found)
found.loader.exec_module(module)
module.SOURCE = pathlib.Path(sys.argv[2])
print(module.build(pathlib.Path(sys.argv[3])))
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", program, cpu_build.__file__, str(small_source), str(tmp_path / "shared")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    made = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(made)) == 1
    name = Path(made[0]).name
    assert sorted(os.listdir(tmp_path / "shared")) == [name, f"{name}.sha256"]
    assert cpu_build.damage(tmp_path / "shared" / name) is None


def test_a_library_made_at_install_time_comes_first(small_source, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_build, "PREBUILT", tmp_path / "prebuilt")
    made = cpu_build.build(tmp_path / "prebuilt")
    assert cpu_build.library_path() == made
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("harm", ["a flipped bit", "cut", "empty", "no checksum", "another checksum"])
def test_a_damaged_library_in_the_cache_is_built_anew(small_source, harm, caplog):
    path = cpu_build.library_path()
    whole = path.read_bytes()
    if harm == "a flipped bit":
        path.write_bytes(whole[:2000] + bytes([whole[2000] ^ 4]) + whole[2001:])
    elif harm in ("cut", "empty"):
        path.write_bytes(whole[: len(whole) // 2 if harm == "cut" else 0])
    elif harm == "no checksum":
        cpu_build.checksum_path(path).unlink()
    else:
        cpu_build.checksum_path(path).write_text("0" * 64)
    assert cpu_build.library_path() == path
    assert path.read_bytes() == whole
    assert f"{path} is built anew: " in caplog.text
    caplog.clear()
    assert cpu_build.library_path() == path
    assert caplog.text == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_library_of_another_user_is_not_loaded(small_source, caplog):
    path = cpu_build.library_path()
    os.chown(path, 12345, -1)
    path.write_bytes(b"somebody else's code")
    cpu_build.checksum_path(path).write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    own = cpu_build.library_path()
    assert own == path.parent / f"user-{os.getuid()}" / path.name
    assert b"somebody" not in own.read_bytes()
    assert "is not used: user 12345 owns it" in caplog.text
    assert path.read_bytes() == b"somebody else's code"
    assert cpu_build.library_path() == own


def test_a_library_that_others_may_write_is_not_loaded(small_source, caplog):
    path = cpu_build.library_path()
    path.chmod(0o777)
    assert cpu_build.library_path().parent.name == f"user-{os.getuid()}"
    assert "others than its owner may write it (mode 777)" in caplog.text


def test_what_is_built_is_its_owners_to_write_whatever_the_umask(small_source):
    before = os.umask(0)
    try:
        path = cpu_build.library_path()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o755
    assert cpu_build.checksum_path(path).stat().st_mode & 0o777 == 0o644


def test_a_compiler_that_fails_is_quoted(small_source):
    (small_source / "one.cpp").write_text("int main( {}\n")
    with pytest.raises(cpu_build.BuildError, match=r"one\.cpp.* failed with 1:\n(.|\n)*error"):
        cpu_build.library_path()


def test_a_compiler_that_is_not_there_is_named(small_source, monkeypatch):
    monkeypatch.setenv("CXX", "nothing-of-that-name -O1")
    with pytest.raises(cpu_build.BuildError, match="CXX='nothing-of-that-name -O1' is not there"):
        cpu_build.library_path()


def test_a_folder_that_cant_be_written_is_named(small_source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QVGEN_KERNEL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(cpu_build.BuildError, match="can't be written .*; set QVGEN_KERNEL_CACHE"):
        cpu_build.library_path()


def test_a_library_of_another_structure_is_refused(small_source):
    path = cpu_build.library_path()
    with pytest.raises(cpu_build.BuildError, match="has a structure of 8 bytes, expected"):
        cpu_library.open_library(str(path))


def test_a_damaged_library_is_refused(tmp_path):
    (tmp_path / "damaged.so").write_bytes(b"no library")
    with pytest.raises(cpu_build.BuildError, match=r"damaged\.so can't be loaded"):
        cpu_library.open_library(str(tmp_path / "damaged.so"))


def test_without_a_compiler_the_reference_runs_and_one_warning_says_why(tmp_path):
    program = """
import logging, torch
logging.basicConfig()
from qvgen_kernels import LinearSpec, available_kernels, resolve_kernel
spec = LinearSpec(in_features=8, out_features=8, weight_bits=4, activation_bits=4)
print(resolve_kernel("auto", spec).name, available_kernels(spec))
try:
    resolve_kernel("portable", spec)
except RuntimeError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "PATH")}
    environment |= {"PATH": str(tmp_path), "QVGEN_KERNEL_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "reference ['reference', 'dequantize']"
    assert "kernel='portable' can't run this layer on cpu: no C++ compiler" in done.stdout
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "run on the reference" in warnings[0]
    assert "apt install g++" in warnings[0]


def test_a_refused_permission_is_logged(monkeypatch, caplog):
    class Refusing:
        @staticmethod
        def qv_supported(backend):
            return -2

    monkeypatch.setattr(cpu_library, "_load", lambda: (Refusing, ""))
    cpu_library.supported.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert "refused the use of AMX" in cpu_library.supported("amx")
    cpu_library.supported.cache_clear()
    assert "the next backend is taken" in caplog.text
