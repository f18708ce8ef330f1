"""The workspace of `qvgen dashboard`, held against an offline run, the package that sends it, and the docs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.training.callbacks.steps import METRIC_COLUMNS
from qvgen.training.tracking.sections import SECTIONS, panel_name
from qvgen.training.tracking.service import wandb_problem
from qvgen.training.tracking.workspace import PANELS, workspace
from tests.training.tracking.dashboard_checks import MEDIA

PAGE = Path(__file__).resolve().parents[3] / "docs" / "wandb.md"


def test_every_column_and_every_medium_has_its_panel() -> None:
    shown = {name for panels in PANELS.values() for panel in panels for name in panel.names}
    columns = {panel_name(column) for column in METRIC_COLUMNS if column != "step"}
    assert columns <= shown, columns - shown
    assert MEDIA.keys() <= shown
    for section, panels in PANELS.items():
        assert section in SECTIONS
        own = [name for panel in panels for name in panel.names if panel.kind != "number"]
        assert all(name.startswith(f"{section}/") for name in own)


def test_the_package_takes_the_panels_with_their_axes() -> None:
    model = workspace(entity="me", project="videos", name="mine")._to_model()
    content = json.loads(model.model_dump_json())
    sections = {entry["name"]: entry for entry in content["spec"]["section"]["panel_bank_config"]["sections"]}
    assert [name for name in sections if name in SECTIONS] == [name for name in SECTIONS if name in PANELS]
    lines = {name: [panel["config"] for panel in section["panels"]] for name, section in sections.items()}
    loss = lines["train"][0]
    assert (loss["metrics"], loss["x_axis"], loss["y_log_scale"]) == (["train/loss"], "trainer/global_step", True)
    assert {panel["x_axis"] for panel in lines["video"] if "x_axis" in panel} == {"video/step"}
    assert (content["entity"], content["project"], content["display_name"]) == ("me", "videos", "mine")


def test_the_page_of_the_docs_shows_each_panel() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for section, panels in PANELS.items():
        for panel in panels:
            (row,) = [line for line in text.splitlines() if line.startswith(f"| {section} | {panel.title} |")]
            assert f"`{panel.names[0]}`" in row


class Refusing(BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    wandb_problem.cache_clear()
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
    wandb_problem.cache_clear()


def test_what_is_missing_is_said_in_one_line(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dashboard", "project=videos"]) == BAD_INPUT
    assert f"{address} refuses WANDB_API_KEY (HTTP 401)" in capsys.readouterr().err
    monkeypatch.delenv("WANDB_API_KEY")
    assert main(["dashboard", "project=videos"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "qvgen dashboard: a workspace is written to Weights & Biases, which needs a key; set WANDB_API_KEY"
    )
    assert main(["dashboard", "dry_run=true"]) == DONE
    assert "  Training loss: train/loss" in capsys.readouterr().out.splitlines()
