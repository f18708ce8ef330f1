"""Video files are opened in a process of their own, with a time limit: a bad file can hang or crash a decoder.

    this process --request (JSON)--> worker: cut_clip or probe_video --answer (JSON) and frames (bytes)--> this process

One worker serves many files; it is started at the first one and again after it was lost. Before each file the worker sets
an alarm, and the kernel ends it when that rings. So a decoder that holds the interpreter's lock is ended too, and
no hanging worker outlives a parent that was killed. A lost worker costs one file, which is reported by name.

Left out: a memory limit. Reading clips ahead of their use is :mod:`qvgen.data.clips_ahead`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from fractions import Fraction
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from qvgen.data.clips import BadClip, Bucket, ClipCut, CutSettings, cut_clip
from qvgen.data.video import Frames
from qvgen.data.video_reader import VideoInfo, probe_video
from qvgen.errors import UnfitEnvironmentError, one_line
from qvgen.worker_signals import held_back

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""Seconds that one file may take; whole 4K clips took less than 10."""

_GRACE_S = 10.0
_START_S = 300.0
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from qvgen.data.clip_process import serve; "
    "serve({fd}, {answer!r}, {timeout_s!r})"
)


class TimedOut(BadClip):
    """A file whose worker did not answer in time: a busy machine or a hanging decoder."""


class ClipReader:
    """Reads video files in a worker process; a context manager that ends the worker.

    Args:
        timeout_s: Seconds that one file may take, > 0.
        answer: ``module:function`` of what the worker does: a request in, an answer and bytes out.
    """

    def __init__(self, *, timeout_s: float = TIMEOUT_S, answer: str = f"{__name__}:answer") -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s} must be positive")
        self.timeout_s = timeout_s
        self._answer = answer
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._stderr: IO[bytes] | None = None
        self._is_ended = False

    def probe(self, path: Path | str) -> VideoInfo:
        """Look at a video file.

        Raises:
            BadClip: It is none, is broken, or took the worker down.
            RuntimeError: The worker failed for another reason.
        """
        reply, _ = self.ask({"path": str(path)})
        times = reply["times_s"]
        exact = {"fps": Fraction(reply["fps"]), "pixel_aspect": Fraction(reply["pixel_aspect"])}
        return VideoInfo(**reply | exact | {"times_s": None if times is None else tuple(times)})

    def cut(self, path: Path | str, *, settings: CutSettings) -> tuple[ClipCut, Frames]:
        """Cut a clip in the worker, by :func:`qvgen.data.clips.cut_clip`.

        Returns:
            The cut and uint8 [F, H, W, 3].

        Raises:
            BadClip: The clip doesn't fit the settings, is broken, or took the worker down.
            RuntimeError: The worker failed for another reason.
        """
        reply, data = self.ask({"path": str(path), "settings": asdict(settings)})
        bucket = Bucket(**reply["bucket"])
        frames = np.frombuffer(data, dtype=np.uint8).reshape(bucket.frames, bucket.height, bucket.width, 3)
        lists = {"indices": tuple(reply["indices"]), "box": tuple(reply["box"])}
        return ClipCut(**reply | lists | {"bucket": bucket}), frames

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """One request and its answer.

        Raises:
            BadClip: The worker refused it or was lost over it.
            RuntimeError: The worker failed for a reason that is not the file's.
        """
        try:
            connection = self._started()
            if self._is_ended:  # also where end() came before there was a process to end
                raise BadClip("reading was ended")
            connection.send_bytes(json.dumps(request).encode())
            # The worker's own alarm rings first; this limit is for one that even the kernel can't end.
            if not connection.poll(self.timeout_s + _GRACE_S):
                self.close()
                raise TimedOut(f"not read within {self.timeout_s:g} s")
            reply = json.loads(connection.recv_bytes())
            if "refused" in reply:
                raise BadClip(reply["refused"])
            return reply, connection.recv_bytes()
        except (EOFError, ConnectionError):
            raise self._lost() from None

    def _started(self) -> Connection:
        if self._connection is None:
            self._connection, theirs = Pipe()
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 # close() closes it
            program = _PROGRAM.format(path=sys.path, fd=theirs.fileno(), answer=self._answer, timeout_s=self.timeout_s)
            with held_back():  # Ctrl-C is ours: it must not look like a decoder that died
                self._process = subprocess.Popen(
                    [sys.executable, "-c", program],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=self._stderr,  # a library's prints must not end up in our own output
                    stderr=self._stderr,
                )
            theirs.close()
            # The imports are no file's fault: the first file's time begins after them.
            if not self._connection.poll(_START_S):
                self.close()
                raise UnfitEnvironmentError(f"the process that reads video files did not start within {_START_S:g} s")
            self._connection.recv_bytes()
        return self._connection

    def _lost(self) -> Exception:
        """Why the worker is gone, as the error to raise."""
        assert self._process is not None
        assert self._stderr is not None
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        self.close()
        if code == -signal.SIGALRM:
            return TimedOut(f"not read within {self.timeout_s:g} s; its decoder hangs or the machine is very busy")
        if code < 0:
            return BadClip(f"its decoder was ended by {signal.Signals(-code).name}")
        return RuntimeError(f"the process that reads video files failed: {said[-1] if said else f'exit code {code}'}")

    def end(self) -> None:
        """End the worker from another thread while it serves a request; no further request may follow, only ``close()``."""
        self._is_ended = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the worker; the next request starts another, unless ``end()`` was called."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._stderr is not None:
            self._stderr.close()
        self._connection = self._process = self._stderr = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Do the worker's part with a file: cut it where the request has settings, else only look at it."""
    settings = request.get("settings")
    if settings is None:
        info = probe_video(request["path"])
        return asdict(info) | {"fps": str(info.fps), "pixel_aspect": str(info.pixel_aspect)}, b""
    buckets = tuple(Bucket(**bucket) for bucket in settings["buckets"])
    cut, frames = cut_clip(request["path"], settings=CutSettings(fps=settings["fps"], buckets=buckets))
    return asdict(cut), frames.tobytes()


def serve(descriptor: int, answer_name: str, timeout_s: float) -> None:
    """The worker's main loop: answer requests until the other side is gone."""
    module, _, name = answer_name.partition(":")
    function = getattr(importlib.import_module(module), name)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it does
    connection = Connection(os.dup(descriptor))
    os.close(descriptor)
    connection.send_bytes(b"ready")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            reply, data = function(request)
        except (ValueError, OSError) as error:
            reply, data = {"refused": one_line(error)}, None
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send_bytes(json.dumps(reply).encode())
            if data is not None:
                connection.send_bytes(data)
        except ConnectionError:
            return
