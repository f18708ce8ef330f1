"""Write the page that a packed model's README is: quality with intervals, size, speed, recipe and origin."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch.nn import functional

from qvgen.config.verb_schema import ReportCardConfig
from qvgen.deploy.kernel_choice import manifest_specs
from qvgen.deploy.manifest import Manifest, read_manifest
from qvgen.deploy.model_card import CARD_FILE, CardSources, card_of
from qvgen.evaluation.environment import collect_machine
from qvgen.evaluation.placement import sampling_device
from qvgen.run_directory import atomic_write
from qvgen.verbs.diagnosis.speed import ROWS, milliseconds, packed_call
from qvgen_kernels import LinearSpec


def run(config: ReportCardConfig) -> None:
    """Write the page and say where it is.

    Raises:
        ValueError: No packed directory, a page that is there already, or numbers of another model; nothing is timed then.
    """
    directory = config.packed
    if directory is None:
        assert config.run_dir is not None, "the configuration has one of the two"
        directory = config.run_dir / "packed"
    out = config.out or directory / CARD_FILE
    if out.is_dir():
        raise ValueError(f"out={out} is a folder; write out={out / CARD_FILE}")
    if out.exists() and not config.overwrite:
        raise ValueError(f"{out} is there already; write overwrite=true to replace it, or out=ANOTHER.md")
    sources = CardSources(report=config.report, evaluation=config.evaluation)
    card_of(
        directory, sources=sources, repository=config.repo
    )  # what is wrong with it is said before anything is timed
    if config.dry_run:
        print(f"would write {out}")
        return
    times = layer_times(read_manifest(directory), seconds=config.seconds) if config.seconds else ""
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, card_of(directory, sources=sources, repository=config.repo, times=times).encode())
    print(out)


def layer_times(manifest: Manifest, *, seconds: float) -> str:
    """Markdown: how long the model's kinds of layers take on this machine, beside bfloat16's, the most common ones first.

    Args:
        manifest: The packed model's.
        seconds: A kind of layer that would begin after so long is left out, and counted; the first never is.
    """
    device = sampling_device()
    rows, until, left_out = ROWS.get(device.type, 4096), time.monotonic() + seconds, 0
    lines = [
        "| layers | inputs and outputs | bits | kernel | bfloat16, ms | packed, ms | times bfloat16 |",
        "|---" * 7 + "|",
    ]
    for place, (spec, count) in enumerate(manifest_specs(manifest).most_common()):
        if place and time.monotonic() > until:
            left_out += count
        else:
            lines.append(f"| {count} | {_timed(spec, rows=rows, device=device)} |")
    machine = collect_machine()
    name = machine.cpu if device.type == "cpu" else torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' if count > 1 else ''}" if device.type == "cpu" else ""
    text = f"Medians of 7 calls on {name}{threads}, inputs of {rows} tokens in bfloat16; without low-rank branches."
    return "\n".join(lines) + f"\n\n{text}" + (f" {left_out} layers were not timed." if left_out else "")


def _timed(spec: LinearSpec, *, rows: int, device: torch.device) -> str:
    """The cells of a kind of layer."""
    spec = replace(spec, branch_rank=0, activation_range="dynamic")
    x = torch.randn(rows, spec.in_features, device=device).bfloat16()
    weight = torch.randn(spec.out_features, spec.in_features, device=device).bfloat16()
    full = milliseconds(lambda: functional.linear(x, weight), device)
    kernel, call, _ = packed_call(spec, x, device)
    packed = milliseconds(call, device)
    bits = f"W{spec.weight_bits}A{spec.activation_bits}"
    return f"{spec.in_features} to {spec.out_features} | {bits} | {kernel} | {full:.3g} | {packed:.3g} | {full / packed:.2f}"
