"""A model family: the tiny one, whose reports sample digits that stand still."""

from __future__ import annotations

from typing import Any, ClassVar

from qvgen.layers.block_fusion import BlockFusion, register_fusion
from qvgen.models.tiny import TinyVideoDiT


class StillDigits(TinyVideoDiT):
    """The tiny family under another name.

    Args:
        notes: A folder of the user's own, which no packed model names.
        arguments: Those of the tiny family.
    """

    name = "still_digits"
    local_arguments: ClassVar[tuple[str, ...]] = ("notes",)

    def __init__(self, *, notes: str | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.notes = notes


register_fusion("still_digits", BlockFusion)  # its transformer is Wan's, whose own file says all that its blocks share
