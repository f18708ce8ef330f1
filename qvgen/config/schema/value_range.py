"""The range of a number, written once beside the type of its field: checked from there, and shown from there.

    tail_share: Annotated[float, Range("[0, 1)", write="0.1")]

:func:`check_ranges` refuses a value outside of it when the object is constructed; ``--help`` and docs/configuration.md read
the same text. ``None`` is in every range: whether it is allowed, the type says.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from qvgen.errors import UserError

_INTERVAL = re.compile(r"(?P<opening>[\[(])(?P<low>[^,]+), (?P<high>[^,]+)(?P<closing>[\])])")
_BOUND = re.compile(r"(?P<sign>>=|>) (?P<low>\S+)")
_WHOLE = re.compile(r"(?P<low>-?\d+)\.\.(?P<high>-?\d+)")


@dataclass(frozen=True)
class Range:
    """Where a number may lie.

    Attributes:
        text: ``> 0``, ``>= 0``, ``2..8`` (both ends belong to it), ``(0, 1]`` or ``[0, 1)``.
        write: A good value, which the message of a bad one proposes; empty: it proposes none.

    Raises:
        ValueError: ``text`` has none of these forms.
    """

    text: str
    write: str = ""

    def __post_init__(self) -> None:
        self._ends()

    def __contains__(self, value: float) -> bool:
        """Whether a number lies in the range; NaN never does."""
        low, low_belongs, high, high_belongs = self._ends()
        above = low <= value if low_belongs else low < value
        return above and (value <= high if high_belongs else value < high)

    def check(self, value: float | None, *, key: str) -> None:
        """Raise UserError for a number outside of the range.

        Args:
            value: The number; None is never refused.
            key: Its name on the command line, for example ``phi.tail_share``.
        """
        if value is None or value in self:
            return
        wrong = f"is outside {self.text}"
        if self.text == "> 0":
            wrong = "must be greater than 0"
        elif self.text == ">= 0" and value < 0:
            wrong = "is negative"
        raise UserError(f"{key}={value} {wrong}{self.write and f'; write for example {key}={self.write}'}")

    def _ends(self) -> tuple[float, bool, float, bool]:
        """Low end, whether it belongs to the range, high end, and whether that does."""
        if match := _BOUND.fullmatch(self.text):
            return float(match["low"]), match["sign"] == ">=", math.inf, False
        if match := _WHOLE.fullmatch(self.text):
            return float(match["low"]), True, float(match["high"]), True
        if match := _INTERVAL.fullmatch(self.text):
            return float(match["low"]), match["opening"] == "[", float(match["high"]), match["closing"] == "]"
        raise ValueError(f"range {self.text!r} has no known form; write '> 0', '>= 0', '2..8', '(0, 1]' or '[0, 1)'")


def check_ranges(config: object, *, section: str = "") -> None:
    """Raise UserError for the first field of a dataclass that lies outside of the range beside its type.

    Args:
        config: Any object of a class whose annotations may be ``Annotated[..., Range(...)]``. Of a list each entry is
            checked.
        section: What stands before the fields' names on the command line: ``phi`` for ``phi.rank``; empty: nothing.
    """
    kind: Any = type(config)
    for name, limits in _ranges(kind).items():
        value = getattr(config, name)
        values: Iterable[Any] = value if isinstance(value, tuple | list) else (value,)
        for entry in values:
            limits.check(entry, key=f"{section}.{name}" if section else name)


@cache
def _ranges(kind: type) -> dict[str, Range]:
    """Field -> its range, for the fields that have one."""
    ranges = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for extra in getattr(hint, "__metadata__", ()):
            if isinstance(extra, Range):
                ranges[name] = extra
    return ranges
