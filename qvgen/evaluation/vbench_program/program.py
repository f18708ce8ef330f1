"""VBench's own program in a Python environment of the user's, which lives beside ours and shares nothing with it.

    qvgen --- request, JSON on stdin --->  PYTHON child.py  --->  vbench.VBench(...).evaluate(...)
          <-- FOLDER/DIMENSION_eval_results.json, as VBench writes it

A process measures one dimension and ends. What it prints lies in FOLDER/log.txt; its last line is what an error says.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qvgen.errors import UnfitEnvironmentError, UserError, one_line

CHILD = Path(__file__).with_name("child.py")
LOG_FILE = "log.txt"
_FACTS_SECONDS = 120
_OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Variables that speak of this program's modules and processes, and not of the user's environment."""


class VBenchProgram:
    """VBench's package as a user installed it.

    Args:
        python: The environment's Python.
        cache: Folder of weights in place of ``~/.cache/vbench``, from which alone the package then reads; None: its own, and
            it fetches what is not there.
    """

    def __init__(self, python: Path, *, cache: Path | None) -> None:
        self._python, self._cache = python.expanduser().absolute(), cache
        self._named = f"vbench.python={python}"

    @cached_property
    def facts(self) -> Mapping[str, str | None]:
        """Package -> version; None: it is not there.

        Raises:
            UserError: There is no such Python, or it has no VBench.
        """
        if not self._python.is_file():
            raise UserError(f"{self._named} is no file; name the environment's Python, for example ENV/bin/python")
        try:
            done = subprocess.run(
                [str(self._python), str(CHILD), "facts"],
                env=self._environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=_FACTS_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"{self._named} can't be run: {one_line(error)}") from error
        try:
            found = json.loads(done.stdout.strip().rpartition("\n")[2])
            is_right = done.returncode == 0 and isinstance(found, dict) and "vbench" in found
        except (ValueError, RecursionError):
            is_right = False
        if not is_right:
            raise UserError(
                f"{self._named} is no Python from 3.8 on: it answers {_last_line(done.stderr or done.stdout)!r}"
            )
        if found["vbench"] is None:
            raise UserError(
                f"{self._named} (Python {found['python']}) has no package vbench; install it there, or name another one"
            )
        return {name: None if value is None else str(value) for name, value in found.items()}

    def evaluate(self, dimension: str, *, info: Path, videos: Path, folder: Path) -> Any:
        """Measure one dimension.

        Args:
            dimension: Its published name.
            info: The list of prompts, in the published form.
            videos: Folder of PROMPT-NUMBER.mp4.
            folder: Folder for the program's files; what an earlier call left there is replaced.

        Returns:
            The content of the file of results, whatever JSON it is.

        Raises:
            UnfitEnvironmentError: The program failed or was killed, with its last line.
        """
        from qvgen.config.hydra_program import follow_parent  # imports hydra

        result, log = folder / f"{dimension}_eval_results.json", folder / LOG_FILE
        result.unlink(missing_ok=True)
        request = {
            "dimension": dimension, "info": str(info.absolute()), "videos": str(videos.absolute()),
            "folder": str(folder.absolute()), "local": self._cache is not None,
        }  # fmt: skip
        with log.open("wb") as output:
            child = subprocess.Popen(
                [str(self._python), str(CHILD), "evaluate"],
                env=self._environment(), cwd=folder, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=follow_parent(),
            )  # fmt: skip
        try:
            with suppress(BrokenPipeError):  # it ended before it read, which its exit code and its log say
                child.communicate(json.dumps(request).encode())
            code = child.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        how = _ending(code)
        if how is None:
            try:
                return json.loads(result.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                how = f"left no result that can be read ({one_line(error)})"
        last = _last_line(log.read_text(encoding="utf-8", errors="replace"))
        raise UnfitEnvironmentError(
            f"VBench's program, {self._named}, {how} at {dimension}: {last} (see {log}); the same command goes on there, or "
            "leave the dimension out (suite.metrics)"
        )

    def _environment(self) -> dict[str, str]:
        found = {name: value for name, value in os.environ.items() if name not in _OURS}
        if self._cache is not None:
            found["VBENCH_CACHE_DIR"] = str(self._cache.expanduser().absolute())
        if torch.cuda.is_available():
            seen = [number for number in found.get("CUDA_VISIBLE_DEVICES", "").split(",") if number]
            number = torch.cuda.current_device()
            found["CUDA_VISIBLE_DEVICES"] = seen[number] if number < len(seen) else str(number)
        return found


def _ending(code: int) -> str | None:
    """How a process ended, where it was not well."""
    if code < 0:
        return f"was killed by signal {signal.Signals(-code).name}"
    return None if code == 0 else f"failed with exit code {code}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
