"""What ``fold`` will do and ``generate`` will need, as lines of text; no weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qvgen.config.schema import FoldConfig
from qvgen.deploy.manifest import WEIGHTS_FILE, read_manifest
from qvgen.training.fake_model import build_family, build_student, build_teacher
from qvgen.training.live_bytes import tensor_bytes
from qvgen.training.plan_layers import checkpoint_bytes, collapse, packed_bytes, state_bytes
from qvgen.training.plan_memory import host_memory, preparation_bytes, teacher_dtype
from qvgen.training.plan_text import format_bytes, format_count
from qvgen.training.session import CHECKPOINT_DIRECTORY
from qvgen.training.step_checkpoint import checkpoints


def plan_fold(config: FoldConfig) -> list[str]:
    """What folding a run's newest checkpoint reads, needs and writes.

    Raises:
        ValueError: The run has nothing to fold.
    """
    run = config.run
    if not run.method.quantizes:
        raise ValueError(f"{config.run_dir} is a run of method={run.names.method}: there is nothing to fold")
    student, swapped = build_student(run, build_family(run))
    groups = collapse(student, swapped.quantized)
    found = checkpoints(config.run_dir / CHECKPOINT_DIRECTORY)
    state, checkpoint, packed = state_bytes(student), checkpoint_bytes(student), packed_bytes(student)
    peak = max(preparation_bytes(run), state + checkpoint, 2 * state + packed)
    last = found[-1].name if found else "none yet: train first"
    return [
        f"fold of {config.run_dir}: model={run.names.model}, {run.profile.label} ({run.profile.name})",
        f"  checkpoint: {last} ({format_bytes(checkpoint)} with the optimizer's moments)",
        f"  layers: {len(swapped.quantized)} Linears, {format_count(sum(group.weights for group in groups))} weights, to "
        f"codes; {len(swapped.skipped)} Linears stay",
        f"  host memory: {format_bytes(peak)} (student and checkpoint, or student, its copy and the codes); this host has "
        f"{format_bytes(host_memory()[1])} left",
        f"  output: {config.out}, {format_bytes(packed)}",
    ]


def plan_generate(family: Any, *, packed: Sequence[Path]) -> list[str]:
    """Memory that sampling needs: the transformer's, VAE's and text encoder's.

    Args:
        family: Of the model that is sampled.
        packed: Packed directories; empty for the full-precision transformer.

    Raises:
        ValueError: A manifest is missing or damaged.
    """
    lines = []
    for directory in packed:
        manifest = read_manifest(directory)
        file = directory / WEIGHTS_FILE
        size = file.stat().st_size if file.is_file() else sum(layer.nbytes for layer in manifest.layers)
        codes = sum(
            layer.out_features * layer.in_features * sum(layer.form.weight_widths) // 8 for layer in manifest.layers
        )
        lines.append(
            f"memory of {directory}: {format_bytes(size)} in {len(manifest.layers)} packed layers and the rest, and "
            f"{format_bytes(codes)} or more for the kernel's own order of the codes"
        )
    if not packed:
        dtype = teacher_dtype(family)
        teacher = build_teacher(family, dtype=dtype)
        size = tensor_bytes([*teacher.parameters(), *teacher.buffers()])
        lines.append(f"memory of the transformer: {format_bytes(size)} in {str(dtype).removeprefix('torch.')}")
    return [*lines, *_components(family)]


def _components(family: Any) -> list[str]:
    """Memory of VAE and text encoder, from the files' sizes."""
    if not hasattr(family, "vae_dtype"):
        return ["memory of VAE and text encoder: none"]
    path = getattr(family, "path", None)
    if path is None:
        return ["memory of VAE and text encoder: not known without model.path"]
    lines = []
    for component in ("vae", "text_encoder"):
        files = sorted((Path(path).expanduser() / component).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        item = getattr(torch, getattr(family, f"{component}_dtype")).itemsize
        lines.append(f"memory of {component}: {format_bytes(size)} of files, loaded as numbers of {item} bytes")
    return lines
