"""Write the page that a packed model's README is: quality with intervals, size, speed, recipe and origin."""

from __future__ import annotations

import time

import torch

from qvgen.config.schema.presentation import ReportCardConfig
from qvgen.deploy.kernel_choice import manifest_specs
from qvgen.deploy.manifest import Manifest, read_manifest
from qvgen.deploy.model_card import CARD_FILE, CardSources, card_of
from qvgen.evaluation.environment import collect_machine
from qvgen.evaluation.placement import sampling_device
from qvgen.run_directory import atomic_write
from qvgen.verbs.diagnosis.speed import ROWS, layer_time


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
            found = layer_time(spec, rows=rows, device=device)
            shape, bits = f"{spec.in_features} to {spec.out_features}", f"W{spec.weight_bits}A{spec.activation_bits}"
            times = [f"{found.full:.3g}", f"{found.packed:.3g}", f"{found.full / found.packed:.2f}"]
            lines.append(f"| {' | '.join([str(count), shape, bits, found.kernel, *times])} |")
    machine = collect_machine()
    name = machine.cpu if device.type == "cpu" else torch.cuda.get_device_name(device)
    used = torch.get_num_threads()
    threads = f", {used} thread{'s' if used > 1 else ''}" if device.type == "cpu" else ""
    text = f"Medians of 7 calls on {name}{threads}, inputs of {rows} tokens in bfloat16; without low-rank branches."
    return "\n".join(lines) + f"\n\n{text}" + (f" {left_out} layers were not timed." if left_out else "")
