"""Where the hub's client keeps what it downloaded without ``--local-dir``; read as it lies on the disk, never the network.

    ROOT/models--ORG--NAME/refs/main               the hash that main was at when it was last asked for
    ROOT/models--ORG--NAME/snapshots/HASH/...      the repository's files, links into ../../blobs

ROOT is $HF_HUB_CACHE, or hub/ in $HF_HOME.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants

_PREFIX = "models--"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def cache_root() -> Path:
    """The cache of this process's environment."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def is_repository(text: str) -> bool:
    """Whether a text could be ORG/NAME of a repository."""
    return bool(_REPOSITORY.fullmatch(text)) and not text.startswith(".")


def cached_snapshot(repository: str, *, root: Path | None = None) -> Path | None:
    """The folder of a repository in a cache.

    Args:
        repository: ORG/NAME.
        root: the cache; None: this process's.

    Returns:
        The snapshot of main; where nobody asked for main, the only one that there is. None where there is none.
    """
    return _snapshot((root or cache_root()) / (_PREFIX + repository.replace("/", "--")))


def snapshot_below(folder: Path, *, repository: str) -> Path | None:
    """The snapshot that a folder of a cache stands for.

    Args:
        folder: a repository's folder models--ORG--NAME or snapshots/ in it, a cache's root, or the folder $HF_HOME that
            holds hub/.
        repository: ORG/NAME of the repository that a root stands for.

    Returns:
        The snapshot, or None where the folder is none of these or lacks it.
    """
    place = folder.parent if folder.name == "snapshots" else folder
    if place.name.startswith(_PREFIX):
        return _snapshot(place)
    snapshots = (cached_snapshot(repository, root=root) for root in (folder, folder / "hub"))
    return next((snapshot for snapshot in snapshots if snapshot is not None), None)


def cached_repositories(folder: Path) -> list[str]:
    """Names of the models in a cache's root, or in hub/ below it; empty where it is no cache."""
    names = [path.name for root in (folder, folder / "hub") for path in root.glob(f"{_PREFIX}*--*")]
    return sorted(name.removeprefix(_PREFIX).replace("--", "/", 1) for name in names)


def cache_of(snapshot: Path) -> tuple[str, Path] | None:
    """Repository and cache root of a snapshot; None for a folder that is no snapshot."""
    place = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not place.name.startswith(_PREFIX):
        return None
    return place.name.removeprefix(_PREFIX).replace("--", "/", 1), place.parent


def _snapshot(place: Path) -> Path | None:
    try:
        named = place / "snapshots" / (place / "refs" / "main").read_text(encoding="utf-8").strip()
        if named.parent.name == "snapshots" and named.is_dir():
            return named
    except (OSError, UnicodeDecodeError):
        pass  # nobody asked for main
    others = sorted(path for path in place.glob("snapshots/*") if path.is_dir())
    return others[0] if len(others) == 1 else None
