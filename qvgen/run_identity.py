"""What a run's numbers depend on besides its configuration: recorded when it begins, compared before it goes on.

    RUN_DIR/identity.json   {"facts": {"model.transformer": "9f3a...", "data.clips": "96 clips, 51c0...", ...},
                             "files": {"start.safetensors": SHA-256, "layers.json": SHA-256},
                             "run": KEY, "commit": COMMIT,
                             "changes": [{"step": 400, "name": "code.torch", "before": "2.9.0", "after": "2.9.1"}, ...]}

A fact is a text that is the same as long as what it speaks of is: a version, or a checksum of content, never a path or a
date. The first part of its name is its room: code, model, data, prompts, machine. What differs is refused with both
values; ``resume=force`` goes on, and the change stands in the record, and so in the report, from then on.

KEY is in every checkpoint: it depends on the configuration and on the facts that the run began with, so that a checkpoint
of another run is known as such, and a copy of the folder is the same run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from qvgen.config.run_comparison import lasting
from qvgen.errors import UserError
from qvgen.run_directory import atomic_write

log = logging.getLogger(__name__)

IDENTITY_FILE = "identity.json"

UNKNOWN = "not recorded"
"""Stands for the value of a fact that nothing is known of."""

_SHOWN = 6
"""Differences that a message lists."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A fact that changed while a run was stopped, and with which it went on all the same.

    Attributes:
        step: Optimizer steps that it had behind it.
        name: The fact's.
        before: Its value up to there.
        after: Its value since.
    """

    step: int
    name: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The content of identity.json.

    Attributes:
        run: KEY; None for a run that began without a record: its checkpoints have none.
        facts: What the run depends on now.
        commit: Of the source that the run began with; None outside of git. For people, it is not compared.
        files: Name of a file in the run's folder -> its SHA-256.
        changes: All that changed under ``resume=force``, oldest first.
    """

    run: str | None
    facts: Mapping[str, str]
    commit: str | None
    files: Mapping[str, str]
    changes: tuple[Change, ...]

    @classmethod
    def begin(cls, plain: Mapping[str, Any], facts: Mapping[str, str], *, commit: str | None) -> Self:
        """The record of a run that has computed nothing yet."""
        text = json.dumps([lasting(plain), dict(facts)], sort_keys=True)
        return cls(run=hashlib.sha256(text.encode()).hexdigest(), facts=facts, commit=commit, files={}, changes=())

    @classmethod
    def read(cls, run_dir: Path) -> Self | None:
        """The record of a run's folder; None where there is none.

        Raises:
            UserError: It is damaged.
        """
        path = run_dir / IDENTITY_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            run, commit = content["run"], content["commit"]
            if not all(isinstance(text, str | None) for text in (run, commit)):
                raise TypeError("run and commit are no texts")
            return cls(
                run=run,
                facts=_texts(content["facts"]),
                commit=commit,
                files=_texts(content["files"]),
                changes=tuple(Change(**change) for change in content["changes"]),
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}): nothing says any more what the run depends on; restore it, or "
                "delete it and continue with resume=force"
            ) from error

    def write(self, run_dir: Path) -> None:
        """Write identity.json, whole or not at all."""
        atomic_write(run_dir / IDENTITY_FILE, json.dumps(asdict(self), indent=1).encode())

    def with_files(self, checksums: Mapping[str, str]) -> Self:
        """The record with the checksums of some of the run's files."""
        return replace(self, files={**self.files, **checksums})

    def differences(self, facts: Mapping[str, str], *, counts: Callable[[str], bool] = bool) -> list[Change]:
        """Facts that are not as they were.

        Args:
            facts: As they are now.
            counts: Whether the fact of a name does; all do by default.
        """
        names = [*self.facts, *(name for name in facts if name not in self.facts)]
        return [
            Change(step=0, name=name, before=self.facts.get(name, "none"), after=facts.get(name, "none"))
            for name in names
            if self.facts.get(name) != facts.get(name) and counts(name)
        ]

    def check(
        self, facts: Mapping[str, str], *, run_dir: Path, remedy: str, counts: Callable[[str], bool] = bool
    ) -> None:
        """Raise UserError for facts that are not as they were: their names, both values, and what to do."""
        if changes := self.differences(facts, counts=counts):
            changed_code = any(change.name.startswith("code.qvgen") for change in changes)
            commit = f" (it began with commit {self.commit[:12]})" if changed_code and self.commit else ""
            raise UserError(
                f"run_dir={run_dir} depends on what is no longer the same: {shown(changes)}{commit}; {remedy}"
            )


def continue_run(
    run_dir: Path,
    facts: Mapping[str, str],
    *,
    force: bool,
    step: int,
    new_keys: Iterable[str] = (),
    world: Mapping[str, tuple[str, str]] | None = None,
) -> list[Change]:
    """Compare what a run depends on before it goes on; with ``force`` what differs is recorded and goes.

    Args:
        run_dir: A claimed folder of a run that has computed something.
        facts: As they are now.
        force: ``resume=force``.
        step: Optimizer steps that the run has behind it.
        new_keys: Of the configuration, which another version began the run without, or with.
        world: Keys of the configuration that say which processes share the run out -> values before and now.

    Returns:
        What changed since it was stopped, which ``force`` allowed, or which may: the world.

    Raises:
        UserError: A fact differs, or nothing is known of the run, and force is not given.
    """
    known = RunIdentity.read(run_dir)
    if known is None:
        if not force:
            raise UserError(
                f"run_dir={run_dir} has no {IDENTITY_FILE}: nothing says which code, models and data it began with (it was "
                "lost, or the run began with an older version); if they are still the same continue with resume=force, "
                "which its report will say"
            )
        unknown = Change(step=step, name="all", before=UNKNOWN, after="recorded from here on")
        RunIdentity(run=None, facts=facts, commit=None, files={}, changes=(unknown,)).write(run_dir)
        log.warning("%s: nothing was recorded of its code, models and data; going on as told", run_dir)
        return [unknown]
    if not force:
        known.check(
            facts,
            run_dir=run_dir,
            remedy="bring back what was there, choose another run_dir, or write resume=force, which the report will say",
        )
    others = _other_processes(run_dir, world or {}, step=step)
    changes = [replace(change, step=step) for change in known.differences(facts)]
    changes += [
        Change(step=step, name=f"config.{key}", before="another version's", after="this one's") for key in new_keys
    ]
    if changes:
        log.warning("%s goes on at step %d with other facts, as told: %s", run_dir, step, shown(changes))
    if changes or others:
        replace(known, facts=facts, changes=(*known.changes, *others, *changes)).write(run_dir)
    return [*others, *changes]


def _other_processes(run_dir: Path, world: Mapping[str, tuple[str, str]], *, step: int) -> list[Change]:
    """Say with which other processes a run goes on."""
    others = [
        Change(step=step, name=f"config.{key}", before=before, after=after) for key, (before, after) in world.items()
    ]
    if others:
        log.warning(
            "%s goes on at step %d with other processes: %s; it begins with the same bits, and adds in another order",
            run_dir, step, shown(others),
        )  # fmt: skip
    return others


def read_changes(run_dir: Path) -> tuple[Change, ...]:
    """What changed in a run under ``resume=force``; empty where nothing did or nothing is recorded."""
    known = RunIdentity.read(run_dir)
    return () if known is None else known.changes


def shown(changes: Iterable[Change]) -> str:
    """Changes as a part of one line, checksums cut to 12 digits."""
    texts = [f"{change.name} was {_short(change.before)} and is {_short(change.after)}" for change in changes]
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more


def _short(value: str) -> str:
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,52}\b", r"\1", value)


def _texts(values: Any) -> dict[str, str]:
    def checked() -> Iterator[tuple[str, str]]:
        for name, value in values.items():
            if not isinstance(value, str):
                raise TypeError(f"{name} is no text")
            yield name, value

    return dict(checked())
