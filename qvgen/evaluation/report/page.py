"""A page of one file that needs nothing else: templates, style, script, and the policy that keeps everything else out.

A Content-Security-Policy in the page forbids every network request and every script but the page's own (named by its
hash), so that a prompt, which is anybody's text, can neither load nor run anything; the templates escape it as well.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

import jinja2

from qvgen.evaluation.report.page_format import (
    format_bytes,
    format_count,
    format_db,
    format_factor,
    format_number,
    format_seconds,
    format_share,
)


def render_page(template: str, /, **values: Any) -> str:
    """Return a page as text.

    Args:
        template: a file of ``templates/`` that extends ``page.html.j2``.
        **values: what the template names; one that is missing is an error.
    """
    script = _template_text("page.js").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _templates().get_template(template)
    return page.render(script=script, script_hash=digest, style=_template_text("page.css"), **values)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qvgen.evaluation.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=format_number,
        db=format_db,
        size=format_bytes,
        share=format_share,
        factor=format_factor,
        count=format_count,
        seconds=format_seconds,
    )
    return environment


def _template_text(name: str) -> str:
    return resources.files("qvgen.evaluation.report").joinpath("templates", name).read_text(encoding="utf-8")
