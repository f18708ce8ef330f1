"""Which keys of a configuration may be others when a run is continued, written once beside the type of each field.

    path: Annotated[str | None, MayDiffer.FREE] = None

A field without a mark stays as it is for as long as a run lasts. Marks are read from source text, as meanings and ranges are
(:mod:`qvgen.config.schema.field_docs`), so a class of anyone's own can declare them, and none is imported for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from qvgen.config.schema.field_docs import field_docs

TRAIN_CONFIG = "qvgen.config.schema.train.TrainConfig"


class MayDiffer(Enum):
    """Why a key, with all below it, may differ when a run is continued.

    Attributes:
        FREE: It changes no number that the run computes, or it is the place of something whose content is compared
            (:mod:`qvgen.run_identity`).
        WORLD: It says which processes share the run out. The state that the run goes on from is the same bit for bit; later
            sums are added in another order, so the run's record names the change.
        FOLLOWING: Its default follows from the number of processes, so it may differ together with that.
    """

    FREE = "free"
    WORLD = "world"
    FOLLOWING = "following"


def marks_of(plain: Mapping[str, Any], *, only_own: bool = False) -> dict[str, MayDiffer]:
    """The keys of a training's configuration that may differ when it is continued.

    Args:
        plain: The configuration; the classes that its leaves name are asked too.
        only_own: True asks qvgen's own classes alone: for a configuration that was read from a file, whose words make nothing
            be imported.

    Returns:
        Dotted key -> its mark; what lies below a marked key has none of its own.

    Example:
        >>> marks = marks_of({"devices": 2, "data": {"_target_": "qvgen.data.clip_source.ClipSource", "path": "clips"}})
        >>> [marks[key].name for key in ("devices", "accumulate", "data.path")], "data.fps" in marks
        (['WORLD', 'FOLLOWING', 'FREE'], False)
    """
    return dict(_marks_below(plain, target=TRAIN_CONFIG, prefix="", only_own=only_own))


def keys_with(mark: MayDiffer, plain: Mapping[str, Any], *, only_own: bool = False) -> frozenset[str]:
    """The dotted keys of :func:`marks_of` that have this mark."""
    return frozenset(key for key, found in marks_of(plain, only_own=only_own).items() if found is mark)


def _marks_below(
    plain: Mapping[str, Any], *, target: str | None, prefix: str, only_own: bool
) -> Iterator[tuple[str, MayDiffer]]:
    """Marks of the fields of a class, and of the sections and leaves below it."""
    is_asked = target is not None and (not only_own or target.startswith("qvgen."))
    docs = field_docs(target) if target is not None and is_asked else {}
    for name in dict.fromkeys((*docs, *plain)):
        doc, value = docs.get(name), plain.get(name)
        if doc is not None and doc.may_differ is not None:
            yield f"{prefix}{name}", MayDiffer(doc.may_differ)
            continue
        section = value.get("_target_") if isinstance(value, Mapping) else None
        section = section if isinstance(section, str) else doc and doc.section
        if isinstance(value, Mapping) or section is not None:
            below = value if isinstance(value, Mapping) else {}
            yield from _marks_below(below, target=section or None, prefix=f"{prefix}{name}.", only_own=only_own)
