"""One training is one run at Weights & Biases, over all its sessions; and it never costs the training anything.

    run_dir/wandb_run.json   id, name and group: every session continues this run
    run_dir/wandb/           what is sent, or would be: `wandb sync` sends it later

Where there is a key, the server is asked for it before the work begins. A server that can't be reached or refuses the key
makes the run an offline one, with a warning; whatever wandb raises later ends its logging, with a warning, and nothing else.
A disk that is full it does not mention: whether its folder can be written is tried from time to time.

A row of the history has the number of its optimizer step. After a kill, steps that are computed again have the same values;
wandb keeps the ones that it has. Offline sessions lie in folders of their own with one id and steps that go on.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import secrets
import ssl
import string
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from qvgen.config.sections import LoggerConfig
from qvgen.run_directory import atomic_write
from qvgen.training.run_label import RunLabel

log = logging.getLogger(__name__)

RECORD_FILE = "wandb_run.json"
PROBE_SECONDS = 8.0
"""How long the server may take to answer whether it knows the key."""

INIT_SECONDS, FINISH_SECONDS = 30.0, 60.0
"""How long wandb may take to begin, and to send what is left at the end; the rest stays on the disk."""

DISK_SECONDS, DISK_BYTES = 60.0, 2**16
"""How often it is tried whether wandb's folder can be written, and how much is written and deleted for it."""

_REFUSED = (401, 403)
_VIEWER = json.dumps({"query": "query { viewer { id } }"}).encode()
_ID_LETTERS = string.ascii_lowercase + string.digits


class WandbRun(Logger):
    """The run that is open in this session.

    Args:
        run: wandb's own object.
    """

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run: Any | None = run
        self._id = str(run.id)
        self._disk_checked, self._is_full = time.monotonic(), False

    @property
    def name(self) -> str:
        """Of the service."""
        return "wandb"

    @property
    def version(self) -> str:
        """The run's id."""
        return self._id

    def attempt(self, action: Callable[[Any], object]) -> None:
        """Do something with wandb's run; where that fails, warn and leave wandb alone from now on."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # the border to a service: nothing that it raises is worth a training
            log.warning("wandb failed, training goes on without it (%s: %s)", type(error).__name__, _first_line(error))
            self._run = None
            _leave_service()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration was given when the run was opened."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row of the history, at an optimizer step."""
        row = dict(metrics) if step is None else {**metrics, "trainer/global_step": step}
        self.attempt(lambda run: run.log(row, step=step))
        if time.monotonic() - self._disk_checked > DISK_SECONDS:
            self.attempt(self._check_disk)

    def summarize(self, report: Path) -> None:
        """Put every number of a report.json into the summary, under ``report/``."""
        self.attempt(lambda run: run.summary.update(flat_numbers(json.loads(report.read_text(encoding="utf-8")))))

    def finish(self) -> None:
        """End this session's part of the run; a second call does nothing."""
        self.attempt(self._check_disk)
        self.attempt(lambda run: run.finish())
        self._run = None

    def _check_disk(self, run: Any) -> None:
        """Warn once where wandb's folder can't be written: its process drops rows then, and says nothing."""
        self._disk_checked = time.monotonic()
        if self._is_full or (folder := getattr(run, "dir", None)) is None:
            return
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(DISK_BYTES))
        except OSError as error:
            self._is_full = True
            log.warning(
                "wandb can't write to %s (%s): rows are missing there; training goes on, and metrics.csv has all of them",
                folder, error.strerror,
            )  # fmt: skip


def _leave_service() -> None:
    """Have wandb forget its process: it would end ours with a traceback; a later run of this process gets another one."""
    import wandb

    def leave() -> None:
        with suppress(Exception):  # it is said already
            wandb.teardown()

    thread = threading.Thread(target=leave, name="leave_wandb", daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)


@contextmanager
def training_log(logger: LoggerConfig, run_dir: Path, label: RunLabel) -> Iterator[list[Logger]]:
    """The loggers of a training besides metrics.csv, while a block trains, packs and reports; report.json is summarized."""
    further = list(logger.further)
    run = _open(logger, run_dir, label) if logger.name == "wandb" else None
    if run is None:
        yield further
        return
    try:
        yield [run, *further]
        if (report := run_dir / "report.json").is_file():
            run.summarize(report)
    finally:
        run.finish()


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
        return f"it does not start ({_first_line(error)})"
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


def _open(logger: LoggerConfig, run_dir: Path, label: RunLabel) -> WandbRun | None:
    """Begin or continue the training's run; offline where it can't be online, None where it can't be at all."""
    mode = logger.mode
    if mode == "online" and wandb_problem() is not None:
        mode = "offline"
    modes = [mode, "offline"] if mode == "online" else [mode]
    for mode in modes:
        try:
            run = WandbRun(_begin(logger, run_dir, label, mode=mode))
        except Exception as error:  # see WandbRun.attempt
            log.warning("wandb (%s) does not begin: %s", mode, _first_line(error))
        else:
            run.attempt(
                lambda run, mode=mode: log.info("wandb (%s): %s", mode, run.url if mode == "online" else run.dir)
            )
            return run
    return None


def _begin(logger: LoggerConfig, run_dir: Path, label: RunLabel, *, mode: str) -> Any:
    import wandb  # takes seconds, and logger=csv does without

    record = _record(logger, run_dir, label)
    settings = wandb.Settings(
        silent=True,  # one line of our own in place of its banner
        console="off",
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )
    run = wandb.init(
        project=logger.project,
        id=record["id"],
        name=record["name"],
        group=record["group"],
        tags=list(dict.fromkeys([*label.tags, *logger.tags])),
        dir=run_dir,
        mode=mode,  # type: ignore[arg-type] # WANDB_MODE's values
        resume="allow",
        settings=settings,
        reinit="create_new",
    )
    run.config.update(dict(label.settings), allow_val_change=True)
    run.define_metric("trainer/global_step", hidden=True)
    run.define_metric("train/*", step_metric="trainer/global_step")
    return run


def _record(logger: LoggerConfig, run_dir: Path, label: RunLabel) -> dict[str, Any]:
    """The training's id, name and group: those of its first session."""
    path = run_dir / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(record[key], str) and record[key] for key in ("id", "name")) and "group" in record:
            return dict(record)
        log.warning("%s is damaged; wandb gets a new run", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s is damaged; wandb gets a new run", path)
    record = {
        "id": "".join(secrets.choice(_ID_LETTERS) for _ in range(8)),
        "name": f"{label.name} {run_dir.name}",
        "group": logger.group,
    }
    atomic_write(path, json.dumps(record).encode())
    return record


def flat_numbers(content: Any, prefix: str = "report") -> dict[str, float | bool]:
    """Every number in a report: ``a/b`` for ``{"a": {"b": 1}}``; entries of a list by their name, or their place.

    Example:
        >>> flat_numbers({"a": 1, "layers": [{"name": "to_q", "bytes": 8}], "seeds": [4], "b": {"c": "inf", "d": "text"}})
        {'report/a': 1, 'report/layers/to_q/bytes': 8, 'report/seeds/0': 4, 'report/b/c': inf}
    """
    if isinstance(content, Mapping):
        items = [(str(key), value) for key, value in content.items() if key != "name"]
    elif isinstance(content, list):
        keys = [str(entry.get("name", i)) if isinstance(entry, Mapping) else str(i) for i, entry in enumerate(content)]
        items = list(zip(keys, content, strict=True))
    elif isinstance(content, bool | int | float):
        return {prefix: content}
    elif content in ("inf", "-inf", "nan"):  # what JSON has no number for, see qvgen.evaluation.json_number
        return {prefix: float(content) if content != "nan" else math.nan}
    else:
        return {}
    return {key: value for name, entry in items for key, value in flat_numbers(entry, f"{prefix}/{name}").items()}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
