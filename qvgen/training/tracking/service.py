"""Whether anything can be sent to Weights & Biases, found out before the work begins."""

from __future__ import annotations

import base64
import json
import logging
import os
import ssl
import threading
import urllib.error
import urllib.request
from functools import lru_cache

from qvgen.config.schema.sections import LoggerConfig

log = logging.getLogger(__name__)

PROBE_SECONDS = 8.0
"""How long the server may take to answer whether it knows the key."""

_REFUSED = (401, 403)
_VIEWER = json.dumps({"query": "query { viewer { id } }"}).encode()


def check_wandb(config: LoggerConfig) -> None:
    """Find out before the work begins whether wandb can be used as asked; warn where it will be offline."""
    if config.name == "wandb" and config.mode == "online":
        wandb_problem()


@lru_cache(maxsize=1)
def wandb_problem() -> str | None:
    """Why nothing can be sent to the server, or None; said in a warning, once in a process."""
    found: list[str | None] = [f"no answer within {PROBE_SECONDS:g} s"]
    # A thread, because looking up a name has no time limit.
    thread = threading.Thread(target=lambda: found.insert(0, _ask_server()), name="ask_wandb", daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if found[0] is not None:
        log.warning("wandb: %s; the run is logged offline, `wandb sync` sends it later", found[0])
    return found[0]


def _ask_server() -> str | None:
    """What is wrong with the server or the key; None where nothing certain is."""
    try:
        import wandb

        url = (os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)).rstrip("/")
    except Exception as error:  # wandb's own set-up, for example without a place to write to
        return f"it does not start ({first_line(error)})"
    login = base64.b64encode(f"api:{os.environ.get('WANDB_API_KEY', '')}".encode()).decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    try:
        request = urllib.request.Request(f"{url}/graphql", data=_VIEWER, headers=headers)
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as answer:
            content = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return f"{url} refuses WANDB_API_KEY (HTTP {error.code})" if error.code in _REFUSED else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError) or isinstance(error, json.JSONDecodeError):
            return None  # wandb has its own certificates, and a proxy's page says nothing about the key
        return f"{url} can't be reached ({reason})"
    data = content.get("data") if isinstance(content, dict) else None
    if isinstance(data, dict) and "viewer" in data and data["viewer"] is None:
        return f"{url} does not know WANDB_API_KEY"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
