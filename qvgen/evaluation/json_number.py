"""Numbers in JSON, which knows no infinity and no NaN."""

from __future__ import annotations

import math


def json_number(value: float | None) -> float | str | None:
    """Make a number fit for JSON: a non-finite one becomes "inf", "-inf" or "nan".

    >>> json_number(1.5), json_number(float("inf")), json_number(None)
    (1.5, 'inf', None)
    """
    if value is None or math.isfinite(value):
        return value
    return str(float(value))
