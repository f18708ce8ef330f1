"""A run's folder as other programs find it: finished, unfinished or damaged, and what it holds of settings and numbers.

Whatever is wrong with a folder is said of that run and costs no other: files of a run come from other machines and days.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qvgen.config.run_config import CONFIG_FILE, read_config
from qvgen.config.schema.may_differ import MayDiffer, keys_with
from qvgen.errors import UserError, one_line
from qvgen.evaluation.report.canvas import Series
from qvgen.evaluation.report.charts import read_history

REPORT_FILE = "report.json"

State = Literal["finished", "unfinished", "damaged"]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    Attributes:
        path: Its folder.
        name: A short name that no other of the compared runs has.
        state: Whether there is a whole report.
        why: The part that is missing or damaged; empty where nothing is.
        settings: Its configuration by dotted key, without keys that change no number.
        report: The content of report.json; empty without one.
        history: Its curves; empty without metrics.csv.
    """

    path: Path
    name: str
    state: State
    why: str
    settings: Mapping[str, Any]
    report: Mapping[str, Any]
    history: Mapping[str, Series]

    def value(self, *keys: str) -> Any:
        """The report's entry under nested keys; None where there is nothing."""
        entry: Any = self.report
        for key in keys:
            entry = entry.get(key) if isinstance(entry, Mapping) else None
        return entry

    def number(self, *keys: str) -> float | None:
        """Read a value of the report that is a number, also one written as "inf" or "nan"; None if it is anything else."""
        entry = self.value(*keys)
        if isinstance(entry, bool) or not isinstance(entry, int | float | str):
            return None
        try:
            return float(entry)
        except ValueError:
            return None

    def text(self, *keys: str) -> str | None:
        """Read a value of the report that is text; None if it is anything else."""
        entry = self.value(*keys)
        return entry if isinstance(entry, str) else None


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders that are named, or that lie in a folder that is named; each once.

    Raises:
        UserError: A folder is not there, or holds no run.
    """
    distinct: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no folder; name run folders, for example outputs/tiny-3-qvgen/*")
        runs = list(_runs_below(path))
        if not runs:
            raise UserError(f"{path} holds no run ({CONFIG_FILE}); name run folders, or a folder that holds some")
        for run in runs:
            distinct.setdefault(run.resolve(), run)
    return list(distinct.values())


def _runs_below(path: Path) -> Iterable[Path]:
    for folder, below, files in os.walk(path):
        below.sort()
        if CONFIG_FILE in files or REPORT_FILE in files:
            below.clear()
            yield Path(folder)


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read run folders, in their order; nothing that is wrong with one is an error."""
    return [_read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of runs: their paths below the folder that holds them all; a single run has its folder's name."""
    whole = [path.resolve() for path in paths]
    if len(whole) == 1:
        return [whole[0].name]
    common = common_parent(whole)
    return [path.relative_to(common).as_posix() for path in whole]


def common_parent(paths: Sequence[Path]) -> Path:
    """The innermost folder that holds all of some folders."""
    return Path(os.path.commonpath([path.resolve().parent for path in paths]))


def _read_run(path: Path, name: str) -> RunRecord:
    wrong: list[str] = []
    state: State = "finished"
    settings: dict[str, Any] = {}
    report: dict[str, Any] = {}
    if not path.is_dir():
        return _record(path, name, state="unfinished", wrong=["it was not begun"])
    try:
        config = read_config(path)
        settings = _flat(config, free=keys_with(MayDiffer.FREE, config, only_own=True))
    except (UserError, OSError, RecursionError) as error:
        state = "damaged"
        wrong.append(f"{CONFIG_FILE}: {_cause(error, path)}")
    history = {}
    try:
        history = read_history(path / "metrics.csv")
        if not history and (path / "metrics.csv").is_file():
            wrong.append("metrics.csv: none of its rows can be used")
    except (ValueError, OSError) as error:
        wrong.append(f"metrics.csv: {_cause(error, path)}")
    if not (path / REPORT_FILE).is_file():
        state = "unfinished" if state == "finished" else state
        wrong.append(_how_far(history, settings))
    else:
        try:
            report = _read_report(path / REPORT_FILE)
        except (ValueError, OSError) as error:
            state = "damaged"
            wrong.append(f"{REPORT_FILE}: {_cause(error, path)}")
    return _record(path, name, state=state, wrong=wrong, settings=settings, report=report, history=history)


def _record(path: Path, name: str, *, state: State, wrong: Sequence[str], **content: Any) -> RunRecord:
    empty: dict[str, Any] = {"settings": {}, "report": {}, "history": {}}
    return RunRecord(path=path, name=name, state=state, why="; ".join(wrong), **{**empty, **content})


def _cause(error: Exception, path: Path) -> str:
    return one_line(error).replace(f"{path}{os.sep}", "")


def _how_far(history: Mapping[str, Series], settings: Mapping[str, Any]) -> str:
    steps = [int(numbers[-1]) for numbers, _ in history.values()]
    where = f"step {max(steps) + 1} of {settings.get('steps', '?')}" if steps else "no step was done"
    return f"no {REPORT_FILE}: {where}"


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON file ({one_line(error)})") from error
    if not isinstance(report, dict) or not isinstance(report.get("relative_error"), dict):
        raise ValueError("it holds no report of a run")
    return report


def _flat(value: Mapping[str, Any], *, free: frozenset[str], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys, without the keys ``free``."""
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        key = f"{prefix}{name}"
        if key in free:
            continue
        if isinstance(entry, Mapping) and entry:
            flat.update(_flat(entry, free=free, prefix=f"{key}."))
        else:
            flat[key] = entry
    return flat


def differing_settings(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs: key -> its value in each run, as text; a dash where it has none.

    A group's choice stands under the group's name; what follows from it or from ``bits`` is left out: the class, the widths,
    and a model's recipe, whose values stand under the keys that took them.
    """
    readable = [record for record in records if record.settings]
    keys = list(dict.fromkeys(key for record in readable for key in record.settings))
    values = {key: [_shown(record.settings.get(key, ...)) for record in readable] for key in keys}
    differing = {key for key, shown in values.items() if len(set(shown)) > 1}
    chosen = {key.removeprefix("names.") for key in differing if key.startswith("names.")}

    def follows(key: str) -> bool:
        group, _, rest = key.partition(".")
        if group in chosen and any(key not in record.settings for record in readable):
            return True  # an argument that only one of the choices has
        if key.endswith("._target_") or key.startswith("model.recipe."):
            return True
        return "bits" in differing and group == "profile" and rest in ("weight_bits", "activation_bits")

    wanted = [key for key in keys if key in differing and not follows(key)]
    return {key.removeprefix("names."): [_shown(record.settings.get(key, ...)) for record in records] for key in wanted}


def _shown(value: Any) -> str:
    if value is ...:
        return "\N{EN DASH}"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
