"""A file of weights that a user has, as it is published: name, source, size, licence, checksum.

    FOLDER/PART/NAME.pth        where the publisher's own program keeps it
    FOLDER/NAME.pth             or flat
    FOLDER/NAME.safetensors     or the same tensors under the same names, as safetensors

No package registry carries such files and qvgen fetches none of them. A size, licence or checksum that could not be looked up
is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qvgen.deploy.manifest import file_sha256


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One file that a user downloads.

    Attributes:
        name: File name as published.
        folder: Folder below its own program's cache in which that keeps it; empty: none.
        source: Where it is published.
        licence: Licence of the weights; None: not known.
        megabytes: Size, rounded up; None: not known.
        sha256: Whole checksum, or the leading digits that its publisher states; None: none is stated.
    """

    name: str
    folder: str
    source: str
    licence: str | None
    megabytes: int | None
    sha256: str | None

    def find(self, weights: str | None) -> Path | None:
        """The file in a user's folder, or None.

        Args:
            weights: The folder, or the file itself; None: nobody named one.
        """
        if weights is None:
            return None
        given = Path(weights).expanduser()
        if given.is_file() and given.stem == Path(self.name).stem:
            return given
        names = (self.name, f"{Path(self.name).stem}.safetensors")
        places = [given / part / name for part in (self.folder, "") for name in names]
        return next((place for place in places if place.is_file()), None)

    def absent(self, weights: str | None, *, key: str) -> str | None:
        """Why the file can't be read, in one line; None: it is there, and has the published checksum where there is one.

        Args:
            weights: As :meth:`find` takes it.
            key: The key of the configuration that names it.
        """
        found = self.find(weights)
        if found is None:
            if weights is None:
                return f"{self.name} is not there: no folder was named ({key}=FOLDER)"
            return f"{Path(weights).expanduser() / self.name} is not there; it is published at {self.source}"
        if self.sha256 is not None and found.name == self.name and not checksum(found).startswith(self.sha256):
            return f"{found} has sha256 {checksum(found)[:16]}..., and the published file {self.sha256[:16]}...; get it again"
        return None


@cache
def _checksum(state: tuple[Path, int, int]) -> str:
    return file_sha256(state[0])


def checksum(path: Path) -> str:
    """The sha256 of a file, computed once for as long as its size and time of change stay."""
    state = path.stat()
    return _checksum((path, state.st_size, state.st_mtime_ns))
