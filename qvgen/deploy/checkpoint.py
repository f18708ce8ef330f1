"""The packed checkpoint: model.safetensors (canonical codes, scales, all other weights) and manifest.json.

The directory says everything: loading takes no quantization flag, builds the transformer from the manifest, checks the file's
sha256 and every tensor's presence, dtype, shape and values, and never executes anything that the files hold. A manifest says
how large things are, but a file has to be as large before anything is built (:mod:`qvgen.deploy.packed_model`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qvgen import stop_request
from qvgen.deploy.delta_switch import check_switch
from qvgen.deploy.kernel_choice import kernel_line, waits_for_device
from qvgen.deploy.manifest import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Manifest,
    file_sha256,
    read_manifest,
)
from qvgen.deploy.packed_file import LoadSeconds, StageClock, file_checked, map_tensors
from qvgen.deploy.packed_fusion import fuse_packed_, prepack_
from qvgen.deploy.packed_model import build_packed, check_bytes, check_value, check_values, put_packed_layers_
from qvgen.deploy.packed_record import CONFIG_FILE, INDEX_FILE, config_json, describe, index_json, plain_config
from qvgen.deploy.prepacked_copies import copies_line
from qvgen.deploy.quantizer import become_packed_
from qvgen.deploy.tensor_file import TensorFile, TensorWriter
from qvgen.deploy.transformer_class import check_can_save
from qvgen.errors import one_line
from qvgen.layers.swap import packed_layers, quantized_layers
from qvgen.run_directory import atomic_write

log = logging.getLogger(__name__)

Put = Callable[[str, Tensor], None]
"""Takes the name and the values of a tensor that is to be written."""


def save_packed(
    model: nn.Module,
    directory: Path | str,
    *,
    base_name: str = "",
    base_revision: str = "",
    base_arguments: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a folded transformer.

    The manifest, which holds the weights' sha256, comes last: a directory whose manifest fits is whole. A request to stop
    finds the earlier pair of files in the directory, or the new one.

    Args:
        model: A folded transformer of diffusers.
        directory: Made if need be; a checkpoint that is there is replaced.
        base_name: Name of the model family's configuration; needed by ``qvgen generate``.
        base_revision: Revision or checksum that identifies the full-precision weights.
        base_arguments: Arguments of the family that ``qvgen generate`` needs again: sizes, sampling; no paths.
        training: How the model was made, for the record.

    Returns:
        The manifest that was written.

    Raises:
        ValueError: The model has layers that are not folded, or none that are, is of an unsupported class, or has a tensor
            whose values are not finite or not in its range; nothing is written then.
    """
    _check_folded(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    check_values(model, tensors, source=directory / WEIGHTS_FILE)
    record = partial(
        describe,
        model,
        base_name=base_name,
        base_revision=base_revision,
        base_arguments=base_arguments,
        training=training,
    )
    return _write_files(directory, tensors, record, write=lambda temporary: save_file(tensors, temporary))


def save_packed_parts(model: nn.Module, directory: Path, *, fill: Callable[[Put], None], **about: Any) -> Manifest:
    """Write a folded transformer whose tensors come one after another, and are nowhere all at once.

    The files are those of :func:`save_packed`, to the byte.

    Args:
        model: A folded transformer; its tensors may be on the meta device.
        directory: Made if need be; a checkpoint that is there is replaced.
        fill: Is called with a function that takes the name and the values of a tensor, and gives it every tensor of the
            state dict once, in any order, from any thread; behind it the packed layers know their errors.
        about: The other arguments of :func:`save_packed`.

    Returns:
        The manifest that was written.

    Raises:
        ValueError: What :func:`save_packed` refuses, or what ``fill`` does; nothing is written then.
    """
    _check_folded(model)
    directory.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()

    def write(temporary: Path) -> None:
        with TensorWriter(temporary, state) as file:

            def put(name: str, value: Tensor) -> None:
                check_value(model, name, value, source=directory / WEIGHTS_FILE)
                file.put(name, value)

            fill(put)

    return _write_files(directory, state, partial(describe, model, **about), write=write)


def _write_files(
    directory: Path, tensors: Mapping[str, Tensor], record: Callable[..., Manifest], *, write: Callable[[Path], None]
) -> Manifest:
    """Write weights and what ``record`` makes of their sha256; a request to stop ends the writing of weights."""
    manifests: list[Manifest] = []
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    with ExitStack() as together:

        def write_weights(temporary: Path) -> None:
            write(temporary)
            manifests.append(record(sha256=file_sha256(temporary)))
            together.enter_context(stop_request.undivided())

        atomic_write(directory / WEIGHTS_FILE, write_weights)
        atomic_write(directory / CONFIG_FILE, config_json(manifests[0]))
        atomic_write(directory / INDEX_FILE, index_json(sizes, file=WEIGHTS_FILE))
        atomic_write(directory / MANIFEST_FILE, manifests[0].to_json())
    return manifests[0]


def _check_folded(model: nn.Module) -> None:
    """Raise ValueError for a model that can't be written."""
    if unfolded := quantized_layers(model):
        raise ValueError(
            f"{next(iter(unfolded))} and {len(unfolded) - 1} other layers are not folded; fold the model first"
        )
    name = type(model).__name__
    if not packed_layers(model):
        raise ValueError(f"{name} has no packed layer; prepare, train and fold it first")
    check_can_save(model)
    check_switch(model)


def load_packed(
    directory: Path | str,
    model: nn.Module | None = None,
    kernel: str = "auto",
    *,
    fused_norms: bool = False,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Read a packed checkpoint into a transformer that runs in its ordinary diffusers pipeline.

    Args:
        directory: A folder that :func:`save_packed` wrote.
        model: A full-precision transformer of the same configuration to load into, in place; None builds one
            without ever allocating its full-precision weights.
        kernel: Backend that runs the packed layers; a name never falls back to another one. One that is written for another
            device prepares its weights when the model is called there.
        fused_norms: Compute LayerNorms in the packed layers behind them: fewer passes over a GPU's memory, and last bits that
            are not the fake-quantized model's, whose norms are torch's (docs/numerics.md). Slower on a CPU.
        device: Where the transformer goes; None: the CPU, or where ``model`` is.

    Returns:
        The transformer, in eval mode: its other weights have the dtype that they were trained in; ``.to(torch.bfloat16)``
        leaves codes and scales as they are. Moved, it prepares its weights anew where it is called.

    Raises:
        ValueError: Anything in the directory that is missing, damaged, of another version or shape.
        RuntimeError: A kernel that does not run here.
    """
    return load_timed(directory, model, kernel, fused_norms=fused_norms, device=device)[0]


def load_timed(
    directory: Path | str,
    model: nn.Module | None = None,
    kernel: str = "auto",
    *,
    fused_norms: bool = False,
    device: torch.device | str | None = None,
) -> tuple[nn.Module, LoadSeconds]:
    """Do what :func:`load_packed` does, and say where its time went."""
    clock = StageClock()
    directory = Path(directory)
    manifest = read_manifest(directory)
    if not (directory / CONFIG_FILE).exists():
        log.info("%s has no %s, which from_pretrained reads; qvgen.save_packed writes it", directory, CONFIG_FILE)
    place = _place(device, model)
    later = waits_for_device(manifest, kernel=kernel, device=place)
    with file_checked(directory, manifest, clock), clock.stage("build"):
        if model is not None and plain_config(model) != manifest.transformer_config:
            raise ValueError(
                f"the model that was given has another configuration than {directory / MANIFEST_FILE} says"
            )
        built = build_packed(directory, manifest, kernel=kernel, empty=model is not None)
    with clock.stage("map"):
        tensors = map_tensors(directory)
    check_values(built, tensors, source=directory / WEIGHTS_FILE)
    if model is None:
        model = built
    else:
        put_packed_layers_(model, manifest, kernel=kernel, source=directory / MANIFEST_FILE)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.to(place)
    model.requires_grad_(False).eval()
    fused = fuse_packed_(model, fused_norms=fused_norms)
    with clock.stage("prepack", all_threads=True):
        names = {kernel} if later else prepack_(model)
    become_packed_(model, manifest)
    seconds = clock.seconds()
    log.info("%s: %s", directory, kernel_line(manifest, kernel=kernel, device=later or place))
    log.info("%s: %s", directory, copies_line(model))
    if later:
        log.info("kernel=%s prepares its weights at the first call on %s; move the model there", kernel, later.type)
    log.info(
        "%s: %d packed layers on kernel %s; %d of them merged, %d feed-forwards by blocks, %d blocks gated%s; %.1f s",
        directory, len(manifest.layers), ", ".join(sorted(names)), fused.merged, fused.feed_forwards, fused.gated,
        ", with their norms" if fused_norms else "", seconds.wall,
    )  # fmt: skip
    return model, seconds


def _place(device: torch.device | str | None, model: nn.Module | None) -> torch.device:
    """Where a model goes; raises ValueError for what is no device of this machine."""
    if device is None:
        return torch.device("cpu") if model is None else next(model.parameters()).device
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each kind of device has its own
        raise ValueError(f"device={str(device)!r} can't be used here: {one_line(error)}; use device=cpu") from error


def check_packed(directory: Path | str) -> Manifest:
    """Check a packed checkpoint as loading it does, without a kernel, with one of its tensors in memory at a time.

    Returns:
        Its manifest.

    Raises:
        ValueError: Anything that :func:`load_packed` would refuse, or a layer whose bytes are not what the manifest says.
    """
    return open_packed(Path(directory))[0]


def open_packed(directory: Path) -> tuple[Manifest, nn.Module, TensorFile]:
    """Do what :func:`check_packed` does, for a caller who reads single tensors then.

    Returns:
        The manifest; the transformer, without any tensor's values; the file that has them.
    """
    manifest = read_manifest(directory)
    with file_checked(directory, manifest, StageClock()):
        built = build_packed(directory, manifest, kernel="auto", empty=True)
    file = TensorFile(directory / WEIGHTS_FILE)
    for name in file.names:
        check_value(built, name, file.whole(name), source=file.path)
    check_bytes(built, manifest, source=directory / MANIFEST_FILE)
    return manifest, built, file
