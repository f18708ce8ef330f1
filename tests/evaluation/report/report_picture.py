"""Makes README's picture of a report, and tells whether it is current.

    python -m tests.evaluation.report.report_picture RUN      RUN: the folder of a finished run, for example of `make demo`

A headless Chromium (Debian: apt install chromium) draws the first screen of RUN/report.html into docs/images/report.png.
Beside it lies report.json with two checksums: of the page that the templates make of made-up data, and of the picture. A test
compares them, so that a change of the page without a new picture, or of the picture by other means, fails with this command.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qvgen.evaluation.report.writer import render_html
from tests.evaluation.report.example_report import report_data

IMAGES = Path(__file__).resolve().parents[3] / "docs" / "images"
PICTURE, STAMP = IMAGES / "report.png", IMAGES / "report.json"
COMMAND = "python -m tests.evaluation.report.report_picture RUN"
WIDTH, HEIGHT = 1400, 1250
"""Pixels: the answers, and the first two rows of videos."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def page_checksum() -> str:
    """sha256 of the page of made-up data; its videos are left out, whose bytes are the encoder's."""
    page = re.sub(r"base64,[A-Za-z0-9+/=]*", "base64,", render_html(report_data(), {}))
    return hashlib.sha256(page.encode()).hexdigest()


def stamp() -> dict[str, str]:
    """What lies beside the picture."""
    return {"page": page_checksum(), "picture": hashlib.sha256(PICTURE.read_bytes()).hexdigest(), "command": COMMAND}


def main(run_dir: Path) -> None:
    """Draw the picture and write its stamp."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(
            f"no browser to draw with (looked for {', '.join(BROWSERS)}); on Debian or Ubuntu: apt install chromium"
        )
    if not (run_dir / "report.html").is_file():
        sys.exit(f"{run_dir / 'report.html'} is missing; name the folder of a finished run")
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        still = Path(folder) / "report.html"
        # Without its video a tile shows the first frame: all are of the same moment, and of no other one next time.
        still.write_text(re.sub(r' src="data:video/mp4;base64,[^"]*"', "", page), encoding="utf-8")
        subprocess.run(
            [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
             f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=3000",
             f"--screenshot={PICTURE}", still.as_uri()],
            check=True, timeout=120, capture_output=True,
        )  # fmt: skip
    STAMP.write_text(json.dumps(stamp(), indent=2) + "\n")
    print(PICTURE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(COMMAND)
    main(Path(sys.argv[1]))
