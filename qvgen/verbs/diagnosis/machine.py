"""What a machine has that decides which kernel runs: devices, drivers, versions, compilers.

Left out: anything that names a person, a host or a path.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from qvgen.errors import UserError
from qvgen.evaluation.environment import collect_machine, collect_versions, fast_bfloat16

_COMPILERS = ("c++", "g++", "clang++", "nvcc", "hipcc")
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[\\/~][\w.+~-]*(?:[\\/][\w.+~@-]+)+")


def without_paths(text: str) -> str:
    """A text with nothing left of a path but its last part, on one line."""
    return _PATH.sub(lambda found: re.split(r"[\\/]", found[0])[-1], " ".join(text.split()))


def find_devices(asked: str | None) -> list[torch.device]:
    """The devices to look at: the one that was asked for, or all kinds that torch sees, the CPU first.

    Raises:
        UserError: No device, or one that is not there.
    """
    there = [torch.device("cpu")]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        if module.is_available():
            names = {module.get_device_name(index): index for index in reversed(range(module.device_count()))}
            there += [torch.device(kind, index) for index in sorted(names.values())]
    if torch.backends.mps.is_available():
        there.append(torch.device("mps"))
    if asked is None:
        return there
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise UserError(f"device={asked!r} is no device; write cpu, cuda, cuda:1, xpu or mps") from error
    count = getattr(torch, device.type).device_count() if device.type in ("cuda", "xpu") else 1
    if device.type not in {found.type for found in there} or (device.index or 0) >= count:
        raise UserError(f"device={asked} is not there; torch sees {', '.join(map(str, there))}")
    return [device]


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, compute capability and memory of a device."""
    if device.type == "cpu":
        machine = collect_machine()
        flags = torch.backends.cpu.get_cpu_capability()
        return {
            "device": "cpu", "name": machine.cpu, "capability": flags, "memory_gib": machine.memory_gib,
            "cores": machine.num_cores, "threads": machine.num_threads, "bfloat16": fast_bfloat16(),
        }  # fmt: skip
    if device.type == "mps":
        memory = torch.mps.recommended_max_memory() / 2**30
        return {"device": "mps", "name": "Apple GPU", "capability": None, "memory_gib": round(memory, 1)}
    properties = getattr(torch, device.type).get_device_properties(device)
    capability = getattr(properties, "gcnArchName", None) if torch.version.hip else None
    if device.type == "cuda" and capability is None:
        capability = f"sm_{properties.major}{properties.minor}"
    memory = properties.total_memory / 2**30
    return {"device": str(device), "name": properties.name, "capability": capability, "memory_gib": round(memory, 1)}


def describe_software() -> dict[str, str]:
    """Versions, drivers and compilers by name; "none" where there is none."""
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        **collect_versions(("qvgen", "torch", "triton", "diffusers")),
        "CUDA of torch": torch.version.cuda or "none",
        "HIP of torch": torch.version.hip or "none",
        "NVIDIA driver": driver or "none",
        "system": collect_machine().system,
        **{name: _version(name) for name in _COMPILERS},
        **({"CXX": _version(os.environ["CXX"])} if os.environ.get("CXX") else {}),
    }


def _version(compiler: str) -> str:
    """The version that a compiler says of itself."""
    lines = _run(compiler, "--version").splitlines()
    found = [number for line in lines for number in re.findall(r"\d+\.\d+(?:\.\d+)?", line)]
    return found[0] if found else "none"


def _first_line(*command: str) -> str:
    return without_paths((_run(*command).splitlines() or [""])[0])


def _run(*command: str) -> str:
    program = shutil.which(command[0])
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [str(Path(program)), *command[1:]], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
