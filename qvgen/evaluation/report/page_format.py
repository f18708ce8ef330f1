"""Numbers as pages show them: three digits, a unit, a dash for what was not measured."""

from __future__ import annotations

import math

_DASH = "\N{EN DASH}"


def format_number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, a dash for None.

    >>> format_number(0.05), format_number(1234.6), format_number(0.0000213), format_number(0.0)
    ('0.0500', '1235', '2.13e-05', '0')
    """
    if value is None:
        return _DASH
    if not math.isfinite(value) or value == 0:
        return "\N{INFINITY}" if value == math.inf else f"{value:g}"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:#.{digits}g}".removesuffix(".")


def format_db(value: float | None) -> str:
    """Decibels with one decimal; infinity is spelled out.

    >>> format_db(31.26), format_db(float("inf")), format_db(None)
    ('31.3 dB', '∞ (identical)', '–')
    """
    if value is None:
        return _DASH
    return "\N{INFINITY} (identical)" if value == math.inf else f"{value:.1f} dB"


def format_bytes(value: float | None) -> str:
    """Bytes in the largest decimal unit that keeps the number above 1.

    >>> format_bytes(512), format_bytes(493_056), format_bytes(3.4e9), format_bytes(None)
    ('512 B', '493 kB', '3.4 GB', '–')
    """
    if value is None:
        return _DASH
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def format_share(value: float | None) -> str:
    r"""Per cent with one decimal; a share that is not zero never reads 0.0 %.

    >>> format_share(0.9844), format_share(0.00001), format_share(0.0), format_share(None)
    ('98.4\u202f%', '0.001\u202f%', '0\u202f%', '–')
    """
    if value is None:
        return _DASH
    percent = 100 * value
    number = f"{percent:.2g}" if 0 < percent < 0.05 else "0" if percent == 0 else f"{percent:.1f}"
    return f"{number}\N{NARROW NO-BREAK SPACE}%"


def format_factor(value: float, reference: float) -> str:
    """Ratio of two numbers with a multiplication sign; a dash if the reference is 0 or one is not finite.

    >>> format_factor(0.05, 0.2)
    '0.250×'
    """
    if not (math.isfinite(value) and math.isfinite(reference)) or reference == 0:
        return _DASH
    return f"{format_number(value / reference)}\N{MULTIPLICATION SIGN}"


def format_count(value: int) -> str:
    """Whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def format_seconds(value: float | None) -> str:
    """Seconds in the unit that reads best.

    >>> format_seconds(0.0123), format_seconds(2.5), format_seconds(4000.0), format_seconds(None)
    ('12.3 ms', '2.50 s', '66.7 min', '–')
    """
    if value is None:
        return _DASH
    for limit, factor, unit in ((1.0, 1e3, "ms"), (600.0, 1.0, "s"), (36_000.0, 1 / 60, "min")):
        if value < limit:
            return f"{format_number(value * factor)} {unit}"
    return f"{format_number(value / 3600)} h"
