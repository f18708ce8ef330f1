"""diffusers, with qvgen installed: the packed folder as it is (:mod:`qvgen.deploy.exporters.packed_copy`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qvgen.deploy.exporters.packed_copy import PackedCopy


@dataclass(frozen=True, kw_only=True)
class Diffusers(PackedCopy):
    """The target; it implements :class:`qvgen.deploy.exporters.base.PackedTarget`."""

    runtime: ClassVar[str] = "diffusers with qvgen"
    takes_own_classes: ClassVar[bool] = True  # qvgen brings them along
