"""Every profile of conf/profile at any bit-widths, and the paper's real zero point."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml

from qvgen.config.leaves import build_leaf, conf_directory
from qvgen.quant.grid import Profile

REAL = "paper_real"
PROFILES = [*sorted(path.stem for path in (conf_directory() / "profile").glob("*.yaml")), REAL]
"""Names that :func:`make_profile` takes."""

COLUMNS = 128
"""A width that every profile's groups and rotation divide, with two groups of 64."""


@cache
def make_profile(name: str, *, weight_bits: int = 3, activation_bits: int = 3) -> Profile:
    """The profile of a file for rows of COLUMNS, with the two bit-widths in the place of what its interpolations ask for.

    It can't be changed, so that all who ask for the same may have the same one.
    """
    stem = "paper" if name == REAL else name
    spec: dict[str, Any] = yaml.safe_load((conf_directory() / "profile" / f"{stem}.yaml").read_text())
    spec |= {"weight_bits": weight_bits, "activation_bits": activation_bits}
    if name == REAL:
        spec["weight"]["zero_point"] = "real"
    profile: Profile = build_leaf(spec, key="profile")
    return profile.fitted([COLUMNS])
