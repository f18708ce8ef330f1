"""The report: complete, valid, self-contained, safe, and showing the very videos and numbers that it was given.

Checked with Python's own HTML and JSON parsers, which know nothing of the templates, and by decoding the videos
out of the page.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from qvgen.evaluation.quality_data import VariantQuality
from qvgen.evaluation.report.charts import read_history
from qvgen.evaluation.report.json_content import to_json_dict
from qvgen.evaluation.report.writer import render_html, write_report
from tests.evaluation.report.example_report import INJECTION, METRICS_CSV, frames, report_data


class Page(HTMLParser):
    """All elements with their attributes, and the text of script and style."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.raw:
            self.raw[self._inside].append(data)
        else:
            self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    (path / "metrics.csv").write_text(METRICS_CSV)
    assert write_report(path, report_data()) == path / "report.html"
    return path


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def strict_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_holds_every_key_of_the_contract(run_dir: Path) -> None:
    report = strict_json((run_dir / "report.json").read_text(encoding="utf-8"))
    assert {key: report[key] for key in ("model", "bits", "profile", "method", "init", "seed", "steps")} == {
        "model": "tiny",
        "bits": "w3a4",
        "profile": "paper",
        "method": "qvgen",
        "init": "mse",
        "seed": 17,
        "steps": 4,
    }
    assert report["layers_quantized"] == ["blocks.0.to_q", "blocks.0.ffn"]
    assert report["layers_skipped"] == ["proj_out"]
    assert report["relative_error"] == {"rtn": 0.2718, "ptq": 0.2214, "qat": 0.0502, "packed": 0.0503}
    assert report["packed_codes_equal"] is True
    assert report["packed_vs_fake_max_abs"] == 3.1e-6
    assert report["bytes"] == {"bf16": 1_000_000, "packed": 250_000}
    assert {"init": 1.0, "train": 20.0, "fold": 0.5, "generate": 3.0}.items() <= report["seconds"].items()
    assert report["phi_rank_final"] == 0
    assert report["versions"]["torch"] == "2.13.0"
    assert report["git_sha"] == "0123456789abcdef0123456789abcdef01234567"
    assert report["command"].endswith(INJECTION)


def test_the_verdict_follows_the_videos_and_is_the_same_in_both_files(page: Page, run_dir: Path) -> None:
    report = strict_json((run_dir / "report.json").read_text(encoding="utf-8"))
    verdict = report["verdict"]
    assert verdict["level"] == "fair"
    assert verdict["variants"]["packed"] == {
        "level": "fair",
        "metrics": {"psnr_db": "fair", "ssim": "good", "lpips": "good", "flicker": "good"},
    }
    assert verdict["variants"]["ptq-start"]["level"] == "poor"
    assert "SSIM from 0.85 good, from 0.6 fair" in verdict["rule"]
    [shown] = [
        a["class"]
        for a in page.attributes("p")
        if (a.get("class") or "").startswith("value ") and "small" not in str(a)
    ]
    assert shown == "value fair"
    assert "Visibly different from the teacher's videos" in page.text
    marks = [a["class"] for a in page.attributes("span") if (a.get("class") or "").startswith("mark")]
    # PTQ start and packed of PSNR, SSIM, LPIPS, flicker; then the verdicts of the table below.
    assert marks == [
        f"mark {level}" for level in ["poor", "fair", "poor", "good", "poor", "good", "poor", "good", "poor", "fair"]
    ]


def test_a_small_error_does_not_make_far_videos_green() -> None:
    variants = tuple(
        dataclasses.replace(one, compared={**one.compared, "ssim": 0.389}, flicker=8.5) if one.name == "packed" else one
        for one in report_data().quality.variants
    )
    data = report_data(quality=dataclasses.replace(report_data().quality, variants=variants), videos=())
    page = render_html(data, {})
    assert "Far from the teacher&#39;s videos" in page
    assert "8.50 (17\N{MULTIPLICATION SIGN})" in page
    assert pills(page) == ["pill good", "pill plain", "pill good"]  # size, error, checks
    assert to_json_dict(data)["verdict"]["level"] == "poor"


def test_seconds_and_memory_stand_in_both_files(page: Page, run_dir: Path) -> None:
    text = re.sub(r"\s+", " ", page.text)
    for shown in (
        "3.00\N{MULTIPLICATION SIGN} as fast as full precision",
        "4.20 s",
        "1.40 s",
        "8 MB",
        "5.3 MB",
        "kernel vnni",
    ):
        assert shown in text, shown
    assert "torch, bfloat16" in text
    sampling = strict_json((run_dir / "report.json").read_text(encoding="utf-8"))["sampling"]
    assert sampling["device"] == "2 CPU threads"
    assert sampling["variants"]["packed"] == {
        "dtype": "float32",
        "kernels": ["vnni"],
        "seconds_per_video": 1.4,
        "weight_bytes": 300_000,
        "peak_bytes": 5_300_000,
    }


def test_what_is_missing_is_said_with_its_reason() -> None:
    quality = dataclasses.replace(
        report_data().quality, left_out={"lpips": "its weights were not fetched"}, start_absent="nothing was trained"
    )
    variants = tuple(
        dataclasses.replace(one, compared={"psnr_db": 20.0}) for one in quality.variants if one.name != "ptq-start"
    )
    videos = tuple(dataclasses.replace(video, start=None) for video in report_data().videos)
    data = report_data(quality=dataclasses.replace(quality, variants=variants), videos=videos)
    page = Page(render_html(data, {}))
    assert "No LPIPS: its weights were not fetched." in page.text
    assert "No videos of the PTQ start: nothing was trained." in page.text
    assert len(page.attributes("video")) == 6
    assert to_json_dict(data)["quality"]["left_out"] == {"lpips": "its weights were not fetched"}
    assert to_json_dict(data)["quality"]["variants"]["packed"]["lpips"] is None


def test_json_tells_infinite_from_unknown(run_dir: Path) -> None:
    report = strict_json((run_dir / "report.json").read_text(encoding="utf-8"))
    assert float(report["trajectory_psnr_db"]) == math.inf
    assert report["flipped_codes"] is None
    assert report["quality"]["variants"]["teacher"]["psnr_db"] is None
    checks = dataclasses.replace(report_data().checks, packed_vs_fake_max_abs=math.nan)
    assert math.isnan(float(to_json_dict(report_data(checks=checks))["packed_vs_fake_max_abs"]))


def test_page_loads_nothing_from_anywhere(page: Page, run_dir: Path) -> None:
    loading = ("src", "href", "poster", "srcset", "data", "action", "formaction", "background", "cite", "xlink:href")
    targets = [
        (tag, attributes[name])
        for tag, attributes in page.elements
        for name in loading
        if attributes.get(name) is not None
    ]
    assert targets
    for tag, target in targets:
        assert target.startswith(("data:", "#")), (tag, target[:80])
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "base", "form", "img", "image"}
    styles = page.raw["style"] + [attributes.get("style") or "" for _, attributes in page.elements]
    for style in styles:
        assert "@import" not in style
        assert re.findall(r"url\((?!['\"]?(?:#|data:))", style) == []
    for call in ("fetch(", "XMLHttpRequest", "import(", "WebSocket", "sendBeacon", "http:", "https:"):
        assert call not in page.raw["script"][0]
    # Addresses remain as names of XML namespaces only: nothing is loaded from those.
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s<>)]+", text)) <= namespaces


def test_policy_admits_the_pages_own_script_alone(page: Page) -> None:
    [policy] = [a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    [script] = page.raw["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == f"'sha256-{digest}'"
    assert directives["media-src"] == "data:"


def test_users_text_is_only_text(page: Page) -> None:
    assert len(page.attributes("script")) == 1
    assert page.attributes("img") == []
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []
    assert page.text.count(INJECTION) == 3  # prompt, command, configuration: shown as they are
    labels = [attributes["aria-label"] for attributes in page.attributes("video")]
    assert f"Teacher: {INJECTION}" in labels


def test_page_shows_the_videos_that_it_was_given(page: Page) -> None:
    videos = page.attributes("video")
    assert len(videos) == 8
    for attributes, shift in zip(videos, [0, 3, 1, 2] * 2, strict=True):  # the PTQ start's stands in every row
        assert {"autoplay", "loop", "muted", "playsinline"} <= attributes.keys()
        kind, _, content = (attributes["src"] or "").partition(";base64,")
        assert kind == "data:video/mp4"
        with av.open(io.BytesIO(base64.b64decode(content))) as container:
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert decoded.shape == (4, 256, 256, 3)
        centres = decoded[:, 8::16, 8::16].astype(int)
        # crf 20 leaves a few levels of noise; another video of the row would be off by 200 in the moved column.
        assert np.abs(centres - frames(shift)).max() <= 24
        kind, _, content = (attributes["poster"] or "").partition(";base64,")
        assert kind == "data:image/jpeg"
        assert base64.b64decode(content)[:2] == b"\xff\xd8"


def test_page_shows_the_numbers(page: Page) -> None:
    text = re.sub(r"[ \n]+", " ", page.text)
    for shown in (
        "tiny at W3A4",
        "0.221",  # PTQ
        "0.0502",  # QAT
        "0.221 → 0.0503",
        "0.227\N{MULTIPLICATION SIGN} of PTQ",  # 0.0503 / 0.2214
        "250 kB from 1 MB in bf16",
        "4.00\N{MULTIPLICATION SIGN} smaller",
        "256 samples",
        "noise seed 5",
        "\N{INFINITY} (identical)",
        "3 of 6\N{NARROW NO-BREAK SPACE}144 colour values differ",
        "64 per model, seeds 0..63, 20 sampling steps, guidance 3.",
        "384 \N{MULTIPLICATION SIGN} 80",
        "excluded by 'proj_*'",
        "0123456789abcdef0123456789abcdef01234567 with changes",
        "26.5 s",  # all stages
    ):
        assert shown in text, shown
    assert text.count("✓") == 3
    assert "3 of 3 checks hold" in text
    assert "✗" not in text


@pytest.mark.parametrize(
    "change",
    [
        {"packed_codes_equal": False},
        {"trajectory_psnr_db": 49.9},
        {"trajectory_psnr_db": math.nan},
        {"phi_rank_final": 1},
    ],
)
def test_a_failed_check_is_shown_as_failed(change: dict[str, Any]) -> None:
    text = Page(
        render_html(report_data(checks=dataclasses.replace(report_data().checks, **change), videos=()), {})
    ).text
    assert (text.count("✓"), text.count("✗")) == (2, 1)
    assert "2 of 3 checks hold" in text


def pills(page: str) -> list[str]:
    """Classes of the coloured labels: size, training, checks."""
    return [a["class"] or "" for a in Page(page).attributes("span") if "pill" in (a.get("class") or "")]


def test_training_that_made_it_worse_is_not_praised() -> None:
    def pill(packed: float) -> str:
        error = dataclasses.replace(report_data().relative_error, packed=packed)
        return pills(render_html(report_data(relative_error=error, videos=()), {}))[1]

    assert pill(0.1) == "pill plain"  # a small error of the transformer alone is no praise: the videos are
    assert pill(0.3) == "pill poor"
    assert pill(math.nan) == "pill poor"


def test_a_bare_run_still_gives_a_page() -> None:
    variants = (VariantQuality(name="packed", compared={"psnr_db": math.nan}, flicker=None, accuracy={}),)
    quality = dataclasses.replace(report_data().quality, variants=variants)
    environment = dataclasses.replace(report_data().environment, git_sha=None, git_dirty=None)
    data = report_data(videos=(), skipped=(), quality=quality, environment=environment, sampling=None)
    text = " ".join(Page(render_html(data, {})).text.split())
    assert "This run generated no videos." in text
    assert "There is no metrics.csv" in text
    assert "Every Linear of the transformer is quantized." in text
    assert "no commit" in text
    assert "Not measured" in text
    assert to_json_dict(data)["sampling"] is None
    assert (
        to_json_dict(data)["verdict"]["level"] == "poor"
    )  # a PSNR that is no number is no measurement to be lenient about
    assert "accuracy" not in text.lower()


def test_same_input_same_bytes(run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert render_html(report_data(), read_history(run_dir / "metrics.csv")) == page


def test_a_failure_leaves_the_old_report(tmp_path: Path) -> None:
    write_report(tmp_path, report_data(videos=()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = dataclasses.replace(report_data().videos[0], packed=np.zeros((1, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        write_report(tmp_path, report_data(videos=(broken,)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": {"init": 1.0, "train": 2.0, "generate": 1.0}}, "lacks fold"),
        ({"layers": ()}, "at least one quantized layer"),
    ],
)
def test_incomplete_data_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report_data(**changes)


def test_variants_must_be_judged_by_the_same_attributes() -> None:
    variants = report_data().quality.variants
    other = dataclasses.replace(variants[2], accuracy={"digit": 0.5})
    with pytest.raises(ValueError, match="different variants"):
        report_data(quality=dataclasses.replace(report_data().quality, variants=(variants[0], other)))
