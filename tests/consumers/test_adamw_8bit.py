"""``optim=adamw_8bit`` with the torchao that it is written for, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def test_moments_of_8_bits_are_torchaos_and_a_run_goes_on_with_them(
    run_consumer: Callable[..., str], tmp_path: Path
) -> None:
    found = json.loads(run_consumer("torchao==0.18.0", "adamw_8bit_program.py", str(tmp_path)).splitlines()[-1])
    assert found.pop("dtypes") == ["torch.float32", "torch.uint8"]
    assert found.pop("codes stay codes") == "torch.uint8"
    assert found.pop("codes") > 4
    assert found
    assert all(value is True for value in found.values()), found
