"""Which columns of a table hold the videos and the captions: those that the user names, or those that trainers use.

A name of the first group goes before all of the second: a table with ``caption`` and ``prompt`` is read as ``caption``.
Two names of one group are ambiguous. Upper and lower case, and blanks around a name, make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qvgen.errors import UserError, did_you_mean

VIDEO_COLUMNS = (
    ("file_name", "video"),  # Hugging Face, DiffSynth; OpenVid, DiffSynth
    (
        "video_path",
        "path",
        "video_file",
        "file_path",
        "filepath",
        "filename",
        "mp4",
    ),  # musubi; Open-Sora, FastVideo; ...
)
CAPTION_COLUMNS = (
    ("text", "caption"),
    ("prompt", "cap", "captions", "prompts", "description"),  # DiffSynth, CogKit; FastVideo; ...
)

KNOWN_COLUMNS = frozenset(name for groups in (VIDEO_COLUMNS, CAPTION_COLUMNS) for group in groups for name in group)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that the user names; None: whichever is known.

    Attributes:
        video: ``data.video_column``.
        caption: ``data.caption_column``.
    """

    video: str | None = None
    caption: str | None = None

    def refuse_any(self, *, path: object, what: str) -> None:
        """Raise UserError where a column is named and the form has none."""
        for key, value in (("video", self.video), ("caption", self.caption)):
            if value is not None:
                raise UserError(f"data.{key}_column={value}: {path} is {what}, which has no columns; leave the key out")

    def is_of_interest(self, name: str) -> bool:
        """Whether a column of this name can be one of the two."""
        return name in (self.video, self.caption) or _fold(name) in KNOWN_COLUMNS


def choose_columns(names: Sequence[str], *, wished: Columns, where: object) -> tuple[str, str]:
    """The columns of the videos and of the captions, named as in the table.

    Args:
        names: All columns, in the table's order.
        wished: The columns that the user names.
        where: The table, for messages.

    Raises:
        UserError: None, several or two of one name are there; the message has the keys to write.

    Example:
        >>> choose_columns(["", "Video", "caption", "fps"], wished=Columns(), where="t.csv")
        ('Video', 'caption')
    """
    video = _choose(names, wish=wished.video, groups=VIDEO_COLUMNS, key="data.video_column", where=where)
    return video, choose_caption(names, wished=wished, where=where)


def choose_caption(names: Sequence[str], *, wished: Columns, where: object) -> str:
    """The column of the captions alone; see :func:`choose_columns`."""
    return _choose(names, wish=wished.caption, groups=CAPTION_COLUMNS, key="data.caption_column", where=where)


def have_columns(names: Sequence[str], *, wished: Columns) -> bool:
    """Whether a table with these columns can be one of clips."""
    folded = {_fold(name) for name in names}
    return all(
        (wish in names or _fold(wish) in folded) if wish else any(folded.intersection(group) for group in groups)
        for wish, groups in ((wished.video, VIDEO_COLUMNS), (wished.caption, CAPTION_COLUMNS))
    )


def _choose(names: Sequence[str], *, wish: str | None, groups: Sequence[Sequence[str]], key: str, where: object) -> str:
    if wish is not None:
        found = [name for name in names if name == wish] or [name for name in names if _fold(name) == _fold(wish)]
        if not found:
            raise UserError(f"{where} has no column {key}={wish}{did_you_mean(wish, names)}; it has {_list(names)}")
    else:
        found = next(filter(None, ([name for name in names if _fold(name) in group] for group in groups)), [])
    if not found:
        known = " or ".join(groups[0])
        raise UserError(f"{where} has the columns {_list(names)}; one must be called {known}, or write {key}=NAME")
    if len(found) > 1:
        if len(set(found)) == 1:
            raise UserError(f"{where} has the column {found[0]} {len(found)} times; give each a name of its own")
        keys = " or ".join(f"{key}={name.strip()}" for name in dict.fromkeys(found))
        raise UserError(f"{where} has the columns {', '.join(found)}, of which one is meant; write {keys}")
    return found[0]


def _fold(name: str) -> str:
    return name.strip().lower()


def _list(names: Sequence[str]) -> str:
    shown = [name.strip() for name in names if name.strip()]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "") if shown else "(none)"
