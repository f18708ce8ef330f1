"""What a logging service is told of a run, besides its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunLabel:
    """What a logging service is told of a run.

    Attributes:
        name: The run in words, without its folder.
        tags: Words that it can be found by.
        settings: Its configuration, plain values.
    """

    name: str
    tags: tuple[str, ...]
    settings: Mapping[str, Any]
