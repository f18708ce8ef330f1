"""Two text files of one line per clip: the names and the captions, as finetrainers and CogVideoX-Factory have them.

    videos.txt     videos/00000.mp4        or video.txt
    prompts.txt    a red boat, at sea      or prompt.txt, captions.txt, caption.txt

Line i of one belongs to line i of the other, so both must have as many. ``data.video_column=videos.txt
data.caption_column=prompt.txt``, as finetrainers has them, choose among several.
"""

from __future__ import annotations

from pathlib import Path

from qvgen.data.tables.columns import Columns
from qvgen.data.tables.rows import Rows, as_name, as_text
from qvgen.data.tables.text_file import read_lines
from qvgen.errors import UserError

NAME_FILES = ("videos.txt", "video.txt")
CAPTION_FILES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")


def are_in(folder: Path) -> bool:
    """Whether a folder has both files."""
    return all(any((folder / name).is_file() for name in names) for names in (NAME_FILES, CAPTION_FILES))


def read(folder: Path, *, wished: Columns) -> Rows:
    """Read both files.

    Raises:
        UserError: One of them is missing, or there are several; or they have not the same number of lines.
    """
    name_file = _find(folder, wish=wished.video, names=NAME_FILES, key="data.video_column")
    caption_file = _find(folder, wish=wished.caption, names=CAPTION_FILES, key="data.caption_column")
    names, captions = read_lines(name_file), read_lines(caption_file)
    if len(names) != len(captions):
        raise UserError(
            f"{name_file} has {len(names)} lines and {caption_file.name} has {len(captions)}; line i of one belongs to "
            "line i of the other: write a line for each clip in both"
        )
    return Rows(
        names=[
            as_name(text.strip(), where=f"{name_file}, line {i}", column="the line") for i, text in enumerate(names, 1)
        ],
        captions=[
            as_text(text, where=f"{caption_file}, line {i}", column="the line").strip()
            for i, text in enumerate(captions, 1)
        ],
        what=f"{name_file.name} and {caption_file.name}, a line for each clip",
        folder=folder,
    )


def _find(folder: Path, *, wish: str | None, names: tuple[str, ...], key: str) -> Path:
    if wish is not None:
        if not (folder / wish).is_file():
            raise UserError(f"{key}={wish} is no file in {folder}, which has lists of names and captions; give one")
        return folder / wish
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has no {' or '.join(names)}; write one with a line for each clip")
    if len(found) > 1:
        raise UserError(f"{folder} has {' and '.join(found)}; write {' or '.join(f'{key}={name}' for name in found)}")
    return folder / found[0]
