"""README's picture is of the page that the code makes now; the command that draws it is in the message."""

from __future__ import annotations

import json

from PIL import Image

from tests.evaluation.report.report_picture import COMMAND, HEIGHT, PICTURE, STAMP, WIDTH, stamp


def test_the_picture_in_the_readme_is_current() -> None:
    assert json.loads(STAMP.read_text()) == stamp(), (
        f"docs/images/report.png is not of this page; draw it again: {COMMAND}"
    )
    with Image.open(PICTURE) as picture:
        assert picture.size == (WIDTH, HEIGHT)
