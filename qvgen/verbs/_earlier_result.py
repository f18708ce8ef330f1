"""What an earlier call left in the folder that a verb writes to: refused, unless it is to be replaced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def refuse_earlier(out: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Raise ValueError where some of the files that a verb is about to write are there.

    Args:
        out: The folder.
        names: Of all files that will be written to it.
        overwrite: They may be replaced.
    """
    earlier = [name for name in names if (out / name).exists()]
    if earlier and not overwrite:
        raise ValueError(
            f"out={out} holds {len(earlier)} of the {len(names)} files that would be written, from an earlier call "
            f"(first: {earlier[0]}); write out=ANOTHER, or overwrite=true to replace them"
        )
