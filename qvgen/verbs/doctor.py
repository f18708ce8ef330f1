"""Say what this machine has and which kernel each kind of layer gets, test the kernels, and time them beside bfloat16."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from qvgen import stop_request
from qvgen.config.schema.machine import DoctorConfig
from qvgen.errors import UnfitEnvironmentError
from qvgen.run_directory import atomic_write
from qvgen.verbs.diagnosis.attention import attention_checks, attention_speed, chosen_attention
from qvgen.verbs.diagnosis.layer_kind import LayerKind, chosen_kernels, layer_kinds, layer_shapes
from qvgen.verbs.diagnosis.machine import describe_device, describe_software, find_devices, without_paths
from qvgen.verbs.diagnosis.self_test import Check, self_test
from qvgen.verbs.diagnosis.speed import speed_rows

Shapes = Sequence[tuple[int, int]]


@torch.no_grad()
def run(config: DoctorConfig) -> None:
    """Print everything as it is found; nothing names a host, a person or a path.

    Raises:
        ValueError: A device that is not there, or a text that is no shape.
        RuntimeError: A kernel does not compute what it claims; everything was printed and written before.
    """
    shapes, devices, kinds = layer_shapes(config.shapes), find_devices(config.device), layer_kinds()
    found: dict[str, Any] = {
        "software": describe_software(),
        "devices": [describe_device(device) for device in devices],
    }
    for described in found["devices"]:
        print(", ".join(f"{name} {value}" for name, value in described.items() if value is not None))
    print("; ".join(f"{name} {version}" for name, version in found["software"].items()))
    if len(devices) == 1 and config.device is None:
        print("no GPU that this torch can use: the CPU's kernels alone are tested")
    found["kernels"] = [line for device in devices for line in _kernels(kinds, shapes, device)]
    found["attention"] = [_attention(device) for device in devices]
    if config.dry_run:
        print(f"would test {len(kinds)} kinds of layers at {len(shapes)} shapes and time them for {config.seconds:g} s")
        return
    checks = [check for device in devices for check in _tested(device, kinds, shapes)]
    found["checks"] = [check.to_json_dict() for check in checks]
    found["speed"] = [row for device in devices for row in _timed(device, kinds, shapes, config.seconds / len(devices))]
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(config.out, json.dumps(found, indent=1).encode())
    if failed := [check for check in checks if check.failure]:
        raise UnfitEnvironmentError(
            f"{len(failed)} of {len(checks)} checks failed, the first on {failed[0].device}: kernel={failed[0].kernel}, "
            f"{failed[0].kind}: {failed[0].failure}"
        )
    print("all that is claimed holds")


def _kernels(kinds: Sequence[LayerKind], shapes: Shapes, device: torch.device) -> list[dict[str, Any]]:
    """Print which kernel each kind of layer gets on a device, kinds of one answer on one line."""
    chosen = chosen_kernels(kinds, shapes, device)
    answers: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for kind, (kernel, refused) in chosen.items():
        why = tuple(f"{name}: {without_paths(reason)}" for name, reason in refused.items())
        answers.setdefault((kernel, why), []).append(kind)
    for (kernel, why), names in answers.items():
        print(f"kernel on {device}: {kernel} for {', '.join(names)}")
        for reason in why:
            print(f"  not {reason}")
    return [
        {"device": str(device), "kernel": kernel, "kinds": names, "refused": list(why)}
        for (kernel, why), names in answers.items()
    ]


def _attention(device: torch.device) -> dict[str, Any]:
    """Print which kernel attention in 8 bits gets on a device."""
    kernel, refused = chosen_attention(device)
    print(f"attention in 8 bits on {device}: {kernel}")
    for name, reason in refused.items():
        print(f"  not {name}: {reason}")
    return {"device": str(device), "kernel": kernel, "refused": [f"{name}: {why}" for name, why in refused.items()]}


def _tested(device: torch.device, kinds: Sequence[LayerKind], shapes: Shapes) -> list[Check]:
    start, checks = time.monotonic(), []
    for check in chain(self_test(device, kinds, shapes), attention_checks(device)):
        stop_request.note(f"after {len(checks)} checks on {device}")
        checks.append(check)
        if check.failure:
            print(
                f"FAILED on {device}: kernel={check.kernel}, {check.kind}, {check.shape}, {check.what}: {check.failure}"
            )
    good, kernels = sum(not check.failure for check in checks), dict.fromkeys(check.kernel for check in checks)
    seconds = time.monotonic() - start
    print(f"self-test on {device}: {good} of {len(checks)} checks hold, of {', '.join(kernels)}; {seconds:.0f} s")
    return checks


def _timed(device: torch.device, kinds: Sequence[LayerKind], shapes: Shapes, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for row in chain(attention_speed(device), speed_rows(device, kinds, shapes, seconds=seconds)) if seconds else ():
        if not rows:
            head = ("device", "layer", "kind", "kernel", "bf16 ms", "packed ms", "x bf16", "B/weight")
            print("{:<8}{:<20}{:<20}{:<12}{:>10}{:>11}{:>8}{:>10}".format(*head))
        rows.append(row)
        kept = "-" if row["bytes_per_weight"] is None else f"{row['bytes_per_weight']:.2f}"
        print(
            f"{row['device']:<8}{row['shape']:<20}{row['kind']:<20}{row['kernel']:<12}{row['bf16_ms']:>10.3f}"
            f"{row['packed_ms']:>11.3f}{row['times_bf16']:>8.2f}{kept:>10}"
        )
    return rows
