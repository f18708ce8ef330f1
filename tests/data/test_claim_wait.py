"""Waiting for what a process has claimed that was stopped: it is named, and waited for until ``hang_minutes``."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qvgen import work_item
from qvgen.data import claim_wait
from qvgen.data.claim_wait import ClaimWait
from qvgen.data.claims import Claims
from qvgen.errors import UnfitEnvironmentError

KEY = hashlib.sha256(b"clip").hexdigest()
HOLDER = (
    "import sys; from pathlib import Path; from qvgen.data.claims import Claims; "
    f"claims = Claims(Path(sys.argv[1]), key='out'); print(claims.take({KEY!r}), flush=True); sys.stdin.read()"
)


def test_the_process_that_holds_a_claim_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(claim_wait, "STOPPED_SECONDS", 0.0)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        Claims(tmp_path, key="out") as claims,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert (claims.take(KEY), claims.holder(KEY)) == (False, process.pid)
        waiting = ClaimWait(claims)
        for _ in range(3):
            waiting.wait(KEY)
        assert not caplog.messages  # it runs, and may take long
        process.send_signal(signal.SIGSTOP)
        while work_item.process_state(process.pid) != "T":
            pass
        waiting.wait(KEY)
        words = f"process {process.pid} on "
        assert words in caplog.messages[-1]
        assert "stopped by a signal has claimed in" in caplog.messages[-1]
        work_item.give_up_after(1e-9)
        try:
            with pytest.raises(
                UnfitEnvironmentError, match=words + r"\S+, stopped by a signal .*ended after hang_minutes="
            ):
                waiting.wait(KEY)
        finally:
            work_item.forget()
            process.kill()
    with Claims(tmp_path, key="out") as claims:
        assert claims.holder(KEY) is None
        assert claims.take(KEY)
