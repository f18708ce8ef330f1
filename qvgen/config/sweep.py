"""Folders of a sweep's jobs: each has its own, named by what differs from the other jobs.

    python train.py -m bits=4,3 seed=1               outputs/sweep/<time>/bits-4   outputs/sweep/<time>/bits-3
    python train.py -m seed=1,2                      outputs/tiny-3-qvgen/<time>/seed-1                 .../seed-2
    python train.py -m bits=4,3 seed=1,2 run_dir=x   x/bits-4_seed-1   x/bits-4_seed-2   x/bits-3_seed-1   x/bits-3_seed-2
    python train.py -m bits=4,3 'run_dir=x/w${bits}' x/w4   x/w3, as written: they differ already

A name has no sign that hydra's grammar or a shell reads as more than a letter, so that it can be typed as ``run_dir=...``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from qvgen.config.command_line import hydra_value

FOLDER_KEYS: Mapping[str, str] = {
    "train": "run_dir",
    "ptq": "run_dir",
    "generate": "out",
    "evaluate": "out",
    "fold": "out",
}
"""Verb -> the key of the folder that a job writes to and shares with no other."""

MOST_CHARACTERS = 100
"""Longest name of a folder in characters; file systems take 255 bytes, and people do not read longer ones."""

_HASH_CHARACTERS = 8


def separate_folders(
    verb: str, plains: Sequence[dict[str, Any]], jobs: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Give each job of a sweep a folder of its own.

    Args:
        verb: The jobs' verb.
        plains: Their configurations.
        jobs: Their overrides, all of one length: the same keys in the same order.

    Returns:
        The configurations, with other folders where two would have shared one or none was typed.
    """
    key = FOLDER_KEYS.get(verb)
    if key is None or len(jobs) < 2:
        return list(plains)
    folders = [os.path.normpath(str(plain[key])) for plain in plains]
    if _repeated(folders):
        separated = _named(folders, jobs, without=key)
    elif key == "run_dir" and not any(_key(override) == key for override in jobs[0]):
        separated = _named([_common(folders)] * len(folders), jobs, without=key)
    else:
        return list(plains)
    return [{**plain, key: folder} for plain, folder in zip(plains, separated, strict=True)]


def folder_of_job(verb: str, plain: Mapping[str, Any]) -> dict[str, Path]:
    """Override that one job needs besides its own, so that alone it works in the folder that it has in the sweep."""
    key = FOLDER_KEYS.get(verb)
    return {} if key is None else {key: Path(str(plain[key]))}


def words_of_job(verb: str, job: Sequence[str], plain: Mapping[str, Any]) -> list[str]:
    """The overrides of a job that is a command of its own, with the folder that it has in the sweep."""
    changes = folder_of_job(verb, plain)
    return [
        *(word for word in job if _key(word) not in changes),
        *(f"{k}={hydra_value(v)}" for k, v in changes.items()),
    ]


def launch_folder() -> Path:
    """A folder of its own for what the jobs of a launcher leave beside their results."""
    return Path("outputs") / "launch" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{os.getpid()}"


def _named(bases: Sequence[str], jobs: Sequence[Sequence[str]], *, without: str) -> list[str]:
    """Folders below those that several jobs would share, named by what differs between these."""
    folders = list(bases)
    for base in dict.fromkeys(base.lower() for base in bases):
        sharing = [index for index, other in enumerate(bases) if other.lower() == base]
        if len(sharing) > 1:
            for index, name in zip(
                sharing, job_names([jobs[index] for index in sharing], without=without), strict=True
            ):
                folders[index] = f"{bases[index]}/{name}"
    return folders


def _common(folders: Sequence[str]) -> str:
    """One folder for jobs that would have had ``outputs/NAME/TIME`` each."""
    parents = {os.path.dirname(folder) for folder in folders}
    parent = parents.pop() if len(parents) == 1 else os.path.join(os.path.commonpath(parents), "sweep")
    return os.path.join(parent, os.path.basename(folders[0]))


def job_names(jobs: Sequence[Sequence[str]], *, without: str = "") -> list[str]:
    """A file name for each job, of the overrides that are not the same in all of them.

    Args:
        jobs: Overrides of each; all of one length.
        without: A key that names nothing.

    Returns:
        Names of at most ``MOST_CHARACTERS`` safe characters; no two are alike, small and capital letters being one.

    Example:
        >>> job_names([["bits=4", "seed=1", "optim.learning_rate=0.1"], ["bits=w3a4", "seed=1", "optim.learning_rate=0.2"]])
        ['bits-4_learning_rate-0.1', 'bits-w3a4_learning_rate-0.2']
    """
    places = [
        place
        for place in range(len(jobs[0]))
        if len({job[place] for job in jobs}) > 1 and _key(jobs[0][place]) != without
    ]
    labels = _labels([_key(jobs[0][place]) for place in places])
    texts = [
        "_".join(f"{label}-{_value(job[place])}" for label, place in zip(labels, places, strict=True)) for job in jobs
    ]
    names = [_shortened(_safe(text), whole=text) for text in texts]
    twice = _repeated(names)
    names = [_with_hash(name, whole=texts[index]) if index in twice else name for index, name in enumerate(names)]
    again = _repeated(names)  # jobs whose overrides are the same
    return [f"{name}-{index}" if index in again else name for index, name in enumerate(names)]


def _labels(keys: Sequence[str]) -> list[str]:
    """The last part of each dotted key; the whole key where two end alike."""
    ends = [re.split(r"[./@]", key)[-1] for key in keys]
    return [key if ends.count(end) > 1 else end for key, end in zip(keys, ends, strict=True)]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _value(override: str) -> str:
    return override.partition("=")[2]


def _safe(text: str) -> str:
    """Letters, digits and ``_.-`` of ASCII; what else there was becomes one dash."""
    return re.sub(r"-*[^A-Za-z0-9_.-]+-*", "-", text).strip("-.") or "job"


def _shortened(name: str, *, whole: str) -> str:
    return name if len(name) <= MOST_CHARACTERS else _with_hash(name, whole=whole)


def _with_hash(name: str, *, whole: str) -> str:
    digest = hashlib.sha256(whole.encode()).hexdigest()[:_HASH_CHARACTERS]
    return f"{name[: MOST_CHARACTERS - _HASH_CHARACTERS - 5]}-{digest}"


def _repeated(names: Iterable[str]) -> set[int]:
    """Places of names that stand more than once."""
    lower = [name.lower() for name in names]
    return {index for index, name in enumerate(lower) if lower.count(name) > 1}
