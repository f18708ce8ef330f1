"""`bits`: one number for weights and activations, or wXaY."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qvgen.errors import UserError

MIN_BITS, MAX_BITS = 2, 8
_FORM = re.compile(r"w(\d+)a(\d+)")


@dataclass(frozen=True, kw_only=True)
class Bits:
    """The two bit-widths of a quantized Linear.

    Attributes:
        weight: Bits of a weight code, 2..8.
        activation: Bits of an activation code, 2..8.
    """

    weight: int
    activation: int

    @property
    def label(self) -> str:
        """``3`` where both are equal, else ``w4a8``: the form that :meth:`parse` reads."""
        return str(self.weight) if self.weight == self.activation else f"w{self.weight}a{self.activation}"

    @classmethod
    def parse(cls, value: object) -> Bits:
        """Read ``3``, ``"3"`` or ``"w4a8"``.

        Raises:
            UserError: Another form, or a width outside 2..8.

        Example:
            >>> Bits.parse(3).label, Bits.parse("w4a8"), Bits.parse("w4a4").label
            ('3', Bits(weight=4, activation=8), '4')
        """
        text = str(value)
        match = _FORM.fullmatch(text)
        if match:
            weight, activation = int(match[1]), int(match[2])
        elif text.isascii() and text.isdigit():
            weight = activation = int(text)
        else:
            raise UserError(
                f"bits={text} is neither {MIN_BITS}..{MAX_BITS} nor wXaY; write for example bits=3 or bits=w4a8"
            )
        for width in (weight, activation):
            if not MIN_BITS <= width <= MAX_BITS:
                raise UserError(f"bits={text} is outside {MIN_BITS}..{MAX_BITS}; write for example bits=3 or bits=w4a8")
        return cls(weight=weight, activation=activation)
