"""Writes all captions of the moving digits as a list of prompts, by which the error of a part of a list is measured.

    python -m tests.evaluation.digit_prompts FOLDER

FOLDER/digits.txt has a caption to a line, FOLDER/digits.json the same as VBench's list has its prompts: each motion in the
place of a dimension, so 9 dimensions of 60 prompts. docs/vbench.md says what was measured with them.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from qvgen.data.moving_digits import COLORS, DIGITS, MOTIONS, caption_of


def main(folder: Path) -> None:
    """Write both files."""
    numbers = itertools.product(range(len(DIGITS)), range(len(COLORS)), range(len(MOTIONS)))
    entries = [
        {"prompt_en": caption_of(digit=digit, color=color, motion=motion), "dimension": [tuple(MOTIONS)[motion]]}
        for digit, color, motion in numbers
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digits.json").write_text(json.dumps(entries, indent=1) + "\n")
    (folder / "digits.txt").write_text("".join(f"{entry['prompt_en']}\n" for entry in entries))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
