"""The facts of a run: everything that its bits depend on besides its configuration; what is done with them: run_identity.py.

    code.qvgen      version, and a checksum of all sources: an edited checkout is another code, another folder is not
    code.NAME       version of a library that takes part in the arithmetic; a checksum of the sources of a package or file of
                    somebody else's that a leaf comes from
    model.PART      checksums of what the family computes with, LoRAs included
    data.PART       checksums of the samples, and of what the cache has for them
    prompts.USE     captions that calibration, or the report's videos, sample from
    callbacks.NAME  a checksum of the sources that a callback of somebody else's comes from
    machine.device  the processor or GPU that trains: others add in another order
    machine.settings    variables of the environment that change the arithmetic of a library

The number of threads is part of the configuration (``strategy.threads``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qvgen import __version__
from qvgen.config.prompts.image_prompt import facts_of
from qvgen.data.pixel_clips import PixelClips
from qvgen.data.source import DataSource
from qvgen.errors import OWN_PACKAGES, UserError
from qvgen.evaluation.environment import collect_machine, collect_versions, git_revision
from qvgen.evaluation.validation_files import DIRECTORY as VALIDATION_DIRECTORY
from qvgen.methods.base import Method
from qvgen.models.base import VideoDiT
from qvgen.run_directory import RunDirectory
from qvgen.run_identity import RunIdentity, continue_run
from qvgen.training.checkpoint.file import CHECKPOINT_DIRECTORY, checkpoint_step
from qvgen.training.checkpoint_writer import checkpoints
from qvgen.training.source_checksum import foreign_sources, sources_checksum
from qvgen.training.start.file import START_FILE

_LIBRARIES = ("torch", "lightning", "diffusers", "transformers", "peft", "numpy")


_SETTINGS = (
    "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip


def claim_run(
    path: Path, settings: Mapping[str, Any], *, facts: Callable[[], Mapping[str, str]], resume: bool | str
) -> RunDirectory:
    """Take the run's folder; record what a run that begins depends on, and compare it in a run that goes on.

    Args:
        path: The folder.
        settings: The run's configuration as plain values, all of it.
        facts: Collects the facts (:func:`collect_facts`); called when the folder is taken.
        resume: True continues the run that is there, ``force`` also where facts are no longer the same.

    Raises:
        UserError: See :meth:`qvgen.run_directory.RunDirectory.claim`; or something that the run depends on is no longer the
            same. Nothing in the folder was changed then.
    """
    force = resume == "force"
    run_dir = RunDirectory.claim(path, settings, resume=bool(resume), force=force)
    try:
        _identify(run_dir, settings, facts(), force=force)
    except BaseException:
        run_dir.release()
        raise
    return run_dir


def _identify(run_dir: RunDirectory, settings: Mapping[str, Any], facts: Mapping[str, str], *, force: bool) -> None:
    found = checkpoints(run_dir.path / CHECKPOINT_DIRECTORY)
    started = run_dir.load_stage("start") is not None or (run_dir.path / START_FILE).exists()
    if not found and not started:  # nothing that was computed stands there yet
        commit, _ = git_revision(Path(__file__))
        RunIdentity.begin(settings, facts, commit=commit).write(run_dir.path)
        return
    step = checkpoint_step(found[-1]) if found else 0
    changes = continue_run(run_dir.path, facts, force=force, step=step, new_keys=run_dir.new_keys, world=run_dir.world)
    if any(change.name.startswith("model.") for change in changes):  # its validation videos are another model's
        shutil.rmtree(run_dir.path / VALIDATION_DIRECTORY / "teacher", ignore_errors=True)


def check_fold(run_dir: Path, settings: Mapping[str, Any], *, family: VideoDiT, force: bool) -> None:
    """Raise UserError where a run is to be folded with other code or from another model than it was trained with.

    Nothing else takes part in folding: neither data nor machine, neither VAE nor text encoder.

    Args:
        run_dir: The run's folder.
        settings: The run's configuration as plain values.
        family: The model family.
        force: True checks nothing.
    """
    if force:
        return
    known = RunIdentity.read(run_dir)
    if known is None:
        raise UserError(
            f"{run_dir} has no record of the code and model that it was trained with; if they are the same write force=true"
        )
    transformer = family.identity(transformer_only=True)
    facts = {**code_facts(settings), **{f"model.{name}": value for name, value in transformer.items()}}
    remedy = "bring back what was there, or fold all the same with force=true"
    known.check(
        facts,
        run_dir=run_dir,
        remedy=remedy,
        counts=lambda name: name in facts or name.startswith("code.") or name == "model.lora",
    )


def check_worker(run_dir: Path, settings: Mapping[str, Any], *, family: VideoDiT, method: Method) -> None:
    """Raise UserError where a further process of a run sees other code or another model than rank 0 recorded.

    The checksums of large files are remembered, so that this costs milliseconds. Data is the same cache's: each sample is
    checked as it is read. A machine may have two kinds of GPU.
    """
    known = RunIdentity.read(run_dir)
    if known is not None:
        known.check(
            {**code_facts(settings), **_model_facts(family, method)},
            run_dir=run_dir,
            remedy="give all processes the same files and start again",
            counts=lambda name: name.startswith(("code.", "model.")),
        )


def collect_facts(
    settings: Mapping[str, Any],
    *,
    family: VideoDiT,
    method: Method,
    data: DataSource | None,
    prompts: Mapping[str, Sequence[Any]],
) -> dict[str, str]:
    """All facts of a run, on this machine and now.

    Args:
        settings: The run's configuration as plain values.
        family: The model family.
        method: The training method.
        data: The data; None for a run that reads none.
        prompts: Use, for example ``calibration`` -> what is sampled for it: dataclasses of plain values.

    Raises:
        ValueError: Data that is not ready, a model that is damaged.
    """
    return {
        **code_facts(settings),
        **_model_facts(family, method),
        **({} if data is None else _data_facts(data, family, method)),
        **{f"prompts.{use}": _listed(listed) for use, listed in prompts.items()},
        **_machine_facts(),
        **_callback_facts(settings),
    }


def code_facts(plain: Mapping[str, Any]) -> dict[str, str]:
    """Of the sources and libraries, and of the packages of others whose classes the sections of a configuration name."""
    names = (*_LIBRARIES, *(("torchao",) if plain.get("optim", {}).get("name") == "adamw_8bit" else ()))
    versions = collect_versions(names)
    libraries = {f"code.{name}": versions[name] for name in names}
    foreign = {f"code.{name}": f"source {checksum}" for name, checksum in foreign_sources(plain).items()}
    return {"code.qvgen": f"{__version__}, source {_own_sources()}", **libraries, **foreign}


def _model_facts(family: VideoDiT, method: Method) -> dict[str, str]:
    """Of the model; a transformer that is trained from scratch and a VAE that is are results and no facts."""
    made = () if method.quantizes else ("transformer", "lora")
    if method.trains == "autoencoder":
        return {}
    return {f"model.{name}": value for name, value in family.identity().items() if name not in made}


def _data_facts(source: DataSource, family: Any, method: Method) -> dict[str, str]:
    seen = PixelClips(family) if method.trains == "autoencoder" else family
    return {f"data.{name}": value for name, value in source.identity(seen).items()}


def _machine_facts() -> dict[str, str]:
    if torch.cuda.is_available():
        versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        device = f"{torch.cuda.get_device_name()}, {versions}"
    else:
        device = f"{collect_machine().cpu}, {torch.backends.cpu.get_cpu_capability()}"
    given = [f"{name}={os.environ[name]}" for name in _SETTINGS if name in os.environ]
    return {"machine.device": device, "machine.settings": ", ".join(given) or "none"}


def _callback_facts(plain: Mapping[str, Any]) -> dict[str, str]:
    """Of the user's callbacks, which may change what is trained; folding does not need them."""
    sources = foreign_sources(plain, groups=["callbacks"])
    return {f"callbacks.{name}": f"source {checksum}" for name, checksum in sources.items()}


def _listed(prompts: Sequence[Any]) -> str:
    """Prompts with all that they say: captions, negative prompts, seeds, checksums of images."""
    text = json.dumps([facts_of(prompt) for prompt in prompts])
    return f"{len(prompts)} prompts, {hashlib.sha256(text.encode()).hexdigest()}"


@cache
def _own_sources() -> str:
    """Checksum of the code that runs: once in a process, which does not load again what is edited meanwhile."""
    folders = {}
    for package in OWN_PACKAGES:
        found = importlib.util.find_spec(package)
        assert found is not None, f"{package} is not installed"
        assert found.origin is not None, f"{package} has no file"
        folders[package] = Path(found.origin).parent
    return sources_checksum(folders)
