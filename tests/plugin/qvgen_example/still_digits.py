"""A model family: the tiny one, whose reports sample digits that stand still."""

from __future__ import annotations

from qvgen.models.tiny import TinyVideoDiT


class StillDigits(TinyVideoDiT):
    """The tiny family under another name."""

    name = "still_digits"
