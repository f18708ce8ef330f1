"""What ``fold`` will do and ``generate`` will need, as lines of text; no weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qvgen.deploy.kernel_choice import kernel_line
from qvgen.deploy.manifest import WEIGHTS_FILE, read_manifest
from qvgen.evaluation.placement import sampling_device
from qvgen.models.named_family import NamedFamily
from qvgen.training.checkpoint.file import CHECKPOINT_DIRECTORY
from qvgen.training.checkpoint_writer import checkpoints
from qvgen.training.design.meta_model import build_student, build_teacher
from qvgen.training.design.student import StudentDesign
from qvgen.training.planning.host_memory import preparation_bytes
from qvgen.training.planning.layer_table import checkpoint_bytes, collapse, free_bytes, packed_bytes, state_bytes
from qvgen.training.planning.live_bytes import tensor_bytes
from qvgen.training.planning.memory import host_memory, teacher_dtype
from qvgen.training.planning.text import format_bytes, format_count
from qvgen.training.start.streamed_fold import folding_bytes, why_whole


def plan_fold(
    run_dir: Path, out: Path, *, model: NamedFamily, design: StudentDesign, steps: int
) -> tuple[list[str], bool]:
    """What folding a run's newest checkpoint reads, needs and writes.

    Args:
        run_dir: The run's folder.
        out: The packed directory.
        model: The model that was trained.
        design: The student's layers.
        steps: Of its training.

    Returns:
        Lines of text, and whether this host has the memory and the disk.
    """
    student, swapped = build_student(model.rebuild(), design, is_planned=True)
    groups = collapse(student, swapped.quantized)
    found = checkpoints(run_dir / CHECKPOINT_DIRECTORY)
    state, checkpoint = state_bytes(student), checkpoint_bytes(student)
    packed = packed_bytes(student, phi_kept_rank=design.phi_kept_rank)
    if why_whole(design, steps) is None:
        peak, held = folding_bytes(student), "what packing the largest layers takes; neither model is held"
    else:
        peak = max(preparation_bytes(model, design), state + checkpoint, 2 * state + packed)
        held = "student and checkpoint, or student, its copy and the codes"
    last = found[-1].name if found else "none yet: train first"
    available, free = host_memory()[1], free_bytes(out)
    lines = [
        f"fold of {run_dir}: model={model.name}, {design.profile.label} ({design.profile.name})",
        f"  checkpoint: {last} ({format_bytes(checkpoint)} with the optimizer's moments)",
        f"  layers: {len(swapped.quantized)} Linears, {format_count(sum(group.weights for group in groups))} weights, to "
        f"codes; {len(swapped.skipped)} Linears stay",
        f"  host memory: {format_bytes(peak)} ({held}); this host has {format_bytes(available)} left",
        f"  output: {out}, {format_bytes(packed)}; {format_bytes(free)} are free there",
    ]
    if peak > available:
        lines.append(
            f"DOES NOT FIT: {format_bytes(peak)} of host memory are needed, {format_bytes(available)} are left"
        )
    if packed > free:
        lines.append(f"DOES NOT FIT: {format_bytes(packed)} of disk are needed, {format_bytes(free)} are free")
    return lines, peak <= available and packed <= free


def plan_generate(family: Any, *, packed: Sequence[Path], kernel: str = "auto") -> tuple[list[str], bool]:
    """Memory that sampling needs: the transformer's, VAE's and text encoder's.

    The text encoder is given back before the transformer is called. Activations are not counted.

    Args:
        family: Of the model that is sampled.
        packed: Packed directories; empty for the full-precision transformer.
        kernel: Backend of the packed layers.

    Returns:
        Lines of text, and whether this machine's device has room for what is known.

    Raises:
        ValueError: A manifest is missing or damaged.
        RuntimeError: A kernel that was asked for by name does not run here.
    """
    lines, transformer = [], 0
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
        lines.append(f"{directory}: {kernel_line(manifest, kernel=kernel, device=sampling_device())}")
        transformer += size + codes
    if not packed:
        dtype = teacher_dtype(family)
        teacher = build_teacher(family, dtype=dtype, is_planned=True)
        transformer = tensor_bytes([*teacher.parameters(), *teacher.buffers()])
        lines.append(f"memory of the transformer: {format_bytes(transformer)} in {str(dtype).removeprefix('torch.')}")
    component_lines, sizes = _components(family)
    texts = {name: size for name, size in sizes.items() if name in _text_encoders(family)}
    needed = max(transformer + sum(sizes.values()) - sum(texts.values()), sum(texts.values()))
    available, device = _free_device_memory()
    if needed > available:
        component_lines.append(
            f"DOES NOT FIT: at least {format_bytes(needed)} are needed at once, {format_bytes(available)} are left on "
            f"{device}"
        )
    return [*lines, *component_lines], needed <= available


def _free_device_memory() -> tuple[int, str]:
    """Bytes that are free where videos are sampled, and its name."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    return host_memory()[1], "the CPU of this host"


def _text_encoders(family: Any) -> Sequence[str]:
    """Parts that are gone when a video is sampled."""
    return tuple(getattr(family, "text_encoders", ("text_encoder",)))


def _components(family: Any) -> tuple[list[str], dict[str, int]]:
    """Memory of VAE and encoders, from the files' sizes: lines of text, and bytes by name."""
    if not hasattr(family, "vae_dtype"):
        return ["memory of VAE and text encoder: none"], {}
    if family.folder is None:
        return ["memory of VAE and text encoder: not known without model.path"], {}
    lines, sizes = [], {}
    for component in ("vae", *getattr(family, "encoders", ("text_encoder",))):
        is_text = component in _text_encoders(family)
        dtype: torch.dtype = getattr(torch, family.text_encoder_dtype if is_text else family.vae_dtype)
        sizes[component] = family.folder.num_values(component) * dtype.itemsize
        lines.append(f"memory of {component}: {format_bytes(sizes[component])} in {str(dtype).removeprefix('torch.')}")
    return lines, sizes
