"""Training of a video VAE: its LightningModule, its metrics, and what is measured afterwards.

    z = mean + deviation * noise        mean, deviation: the encoder's, noise standard normal
    loss = mean |x - decode(z)| + kl_weight * mean KL,      KL = (mean^2 + deviation^2 - 1) / 2 - log deviation

Noise and left-right flips of a sample come from (seed, step, sample id), so that a resumed run has the same bits as one that
was never stopped.

Left out: several processes; an average of the weights over steps (the learning rate ends at 0); perceptual losses.
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from qvgen import stop_request
from qvgen.config.schema.sections import OptimConfig
from qvgen.data.datamodule import StepKeyedData
from qvgen.data.noise import sample_generator
from qvgen.data.pixel_clips import pixels_from_bytes
from qvgen.data.source import Split
from qvgen.evaluation.distance import psnr_db
from qvgen.training.callbacks.rules import CallbackRules
from qvgen.training.callbacks.steps import begin_table, log_for_callbacks, log_row
from qvgen.training.checkpoint.file import CHECKPOINT_DIRECTORY, RunMark, check_checkpoint, run_key
from qvgen.training.checkpoint_writer import CheckpointWriter, checkpoints
from qvgen.training.design.training_run import TrainingOutput
from qvgen.training.design.training_steps import TrainingSteps
from qvgen.training.optimizer_module import OptimizerModule
from qvgen.training.progress import progress_bar
from qvgen.training.trainer import Processes, build_trainer, fit, restored_settings, trainer_arguments

log = logging.getLogger(__name__)

AUTOENCODER_COLUMNS = (
    "step", "train/loss", "train/l1", "train/kl", "train/gradient_norm", "train/learning_rate", "train/seconds",
)  # fmt: skip
"""Columns of metrics.csv. train/l1 is in units of half the pixels' range, train/kl in nats per latent number,
train/seconds counts over all sessions."""

SMALLEST_DEVIATION = 1e-3
"""Of a latent channel: one that says nothing must not be blown up when latents are normalized."""


class LatentVideo(Protocol):
    """The part of a model family that measuring its VAE needs."""

    def encode_video(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] -> normalized latents."""

    def decode(self, latents: Tensor, *, num_frames: int | None = None) -> Tensor:
        """Latents [B, C, f, h, w] -> pixels [B, 3, F, H, W]."""


class AutoencoderTraining(OptimizerModule):
    """Trains a video VAE that has the interface of diffusers' autoencoders.

    Args:
        vae: Has ``encode``, ``decode`` and a module ``decoder`` that gives the frames part by part.
        kl_weight: Of the KL divergence per latent number.
        optim: Optimizer and schedule.
        num_steps: Optimizer steps of the whole run.
        seed: Of noise and flips.
    """

    def __init__(self, *, vae: nn.Module, kl_weight: float, optim: OptimConfig, num_steps: int, seed: int) -> None:
        super().__init__(optim=optim, num_steps=num_steps, seed=seed)
        self.vae, self.kl_weight = vae, kl_weight

    @property
    def trained(self) -> nn.Module:
        """The VAE."""
        return self.vae

    def losses(self, video: Tensor, sample_ids: Sequence[int], *, step: int) -> Tensor:
        """Loss, L1 and KL of clips uint8 [B, 3, F, H, W] in an optimizer step: float32 [3]."""
        generators = [sample_generator("autoencoder", self.seed, step, int(i)) for i in sample_ids]
        flips = [bool(torch.rand((), generator=generator) < 0.5) for generator in generators]
        pixels = torch.stack(
            [clip.flip(-1) if flip else clip for clip, flip in zip(pixels_from_bytes(video), flips, strict=True)]
        )
        posterior = self.vae.encode(pixels).latent_dist  # type: ignore[operator]
        # Autocast gives bfloat16 here; the sum of squares and the exponential need more.
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        latents = mean + (0.5 * log_variance).exp() * noise.to(mean.device)
        l1 = (decode_unclamped(self.vae, latents).float() - pixels).abs().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return torch.stack([l1 + self.kl_weight * kl, l1, kl])

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Loss of one micro-batch; one that is not finite stops the run before the step changes anything."""
        del batch_index
        losses = self.losses(batch["video"], batch["sample_id"].tolist(), step=self.global_step)
        self.step_losses.append(losses.detach())
        return losses[0]


def decode_unclamped(vae: nn.Module, latents: Tensor) -> Tensor:
    """Decode as the VAE does, without its clamp to [-1, 1], which has no gradient where a pixel overshoots.

    Args:
        vae: Its ``decode`` calls ``decoder`` for one latent frame after the other.
        latents: float [B, C, f, h, w].

    Returns:
        float [B, 3, F, H, W].
    """
    parts: list[Tensor] = []
    decoder: nn.Module = vae.decoder  # type: ignore[assignment]
    handle = decoder.register_forward_hook(lambda module, inputs, output: parts.append(output))  # noqa: ARG005
    try:
        vae.decode(latents)  # type: ignore[operator]
    finally:
        handle.remove()
    return torch.cat(parts, dim=2)


class AutoencoderMetrics(lightning.Callback):
    """One row per optimizer step: to metrics.csv, to the trainer's loggers and to the progress bar.

    Args:
        path: metrics.csv; rows from before a resume are kept up to the step that is resumed.
        num_steps: Optimizer steps of the run.
    """

    def __init__(self, path: Path, *, num_steps: int) -> None:
        self.path, self.num_steps = path, num_steps
        self._bar: tqdm[Any] | None = None
        self._last_step = 0
        self._started = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the table at the step that the run begins with."""
        del pl_module
        self._last_step, self._started = trainer.global_step, time.monotonic()
        self._started -= begin_table(self.path, AUTOENCODER_COLUMNS, step=trainer.global_step)
        self._bar = progress_bar(desc="train", unit="step", total=self.num_steps, initial=trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the row of an optimizer step that is complete."""
        del outputs, batch, batch_idx
        assert isinstance(pl_module, AutoencoderTraining)
        if trainer.global_step == self._last_step:
            return
        step, self._last_step = self._last_step, trainer.global_step
        assert pl_module.gradient_norm is not None
        loss, l1, kl = torch.stack(pl_module.step_losses).mean(dim=0).tolist()
        pl_module.step_losses.clear()
        values = (
            loss,
            l1,
            kl,
            float(pl_module.gradient_norm),
            pl_module.learning_rate,
            time.monotonic() - self._started,
        )
        row = dict(zip(AUTOENCODER_COLUMNS[1:], values, strict=True))
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, AUTOENCODER_COLUMNS, lineterminator="\n").writerow({"step": step, **row})
        log_for_callbacks(pl_module, row)
        if self._last_step % trainer.log_every_n_steps == 0:
            log_row(trainer, row, step=step)
        if self._bar is not None:
            self._bar.set_postfix({"l1": f"{l1:.4f}", "kl": f"{kl:.2f}"}, refresh=False)
            self._bar.update()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Close the bar, also after an error, so that its message stands on a line of its own."""
        del trainer, pl_module, stage
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def fit_autoencoder(
    vae: nn.Module, split: Split, *, kl_weight: float, steps: TrainingSteps, output: TrainingOutput
) -> None:
    """Train a VAE by one process, from the newest checkpoint of the run where there is one.

    Args:
        vae: Holds the start; holds the trained weights afterwards, in eval mode.
        split: Clips as bytes.
        kl_weight: Of the KL divergence per latent number.
        steps: The optimizer steps.
        output: The run's folder, its checkpoints and loggers.
    """
    num_steps, batch, run_dir = steps.num_steps, steps.batch, output.run_dir
    module = AutoencoderTraining(vae=vae, kl_weight=kl_weight, optim=steps.optim, num_steps=num_steps, seed=steps.seed)
    directory = run_dir / CHECKPOINT_DIRECTORY
    callbacks: list[lightning.Callback] = [
        AutoencoderMetrics(run_dir / "metrics.csv", num_steps=num_steps),
        *output.callbacks,
        CallbackRules(output.callbacks, first_step=output.trainer.min_steps or 0),
        RunMark(run_dir),
        CheckpointWriter(directory, config=output.checkpoint, num_steps=num_steps),
    ]
    data = StepKeyedData(split, batch_size=batch.size, accumulate=batch.accumulate, seed=steps.seed)
    vae.train()
    if found := checkpoints(directory):
        check_checkpoint(found[-1], run=run_key(run_dir))
    with restored_settings():
        trainer = build_trainer(
            steps=num_steps,
            accumulate=batch.accumulate,
            processes=Processes(),
            callbacks=callbacks,
            loggers=list(output.loggers),
            options=trainer_arguments(output.trainer, gradient_clip=steps.optim.gradient_clip, run_dir=run_dir),
        )
        fit(trainer, module, data, checkpoint=found[-1] if found else None)
    stop_request.check()  # asked for in the last moments
    vae.eval()


@torch.no_grad()
def latent_statistics(vae: nn.Module, clips: Dataset[Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over all clips, one clip at a time, summed in float64.

    Returns:
        Two lists of C numbers; a deviation is at least ``SMALLEST_DEVIATION``.
    """
    device = next(vae.parameters()).device
    count, total, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for index in range(len(clips)):  # type: ignore[arg-type] # a map-style data set has a length
        pixels = pixels_from_bytes(clips[index]["video"])[None].to(device)
        latents = vae.encode(pixels).latent_dist.mode()[0].double().flatten(1).cpu()  # type: ignore[operator]
        count += latents.shape[1]
        total, squares = total + latents.sum(1), squares + latents.square().sum(1)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    if silent := (deviation < SMALLEST_DEVIATION).nonzero().flatten().tolist():
        log.warning("latent channels %s say nothing: lower method.kl_weight", silent)
    return mean.tolist(), deviation.clamp_min(SMALLEST_DEVIATION).tolist()


@torch.no_grad()
def reconstruction_psnr_db(family: LatentVideo, clips: Dataset[Any]) -> float:
    """Mean PSNR in dB over clips of what the VAE makes of them, by the calls that training and sampling use."""
    values = []
    for index in range(len(clips)):  # type: ignore[arg-type]
        video = clips[index]["video"][None]
        decoded = family.decode(family.encode_video(pixels_from_bytes(video)), num_frames=video.shape[2])
        values.append(psnr_db(decoded.clamp(-1, 1).cpu(), pixels_from_bytes(video), max_value=2.0))
    return sum(values) / len(values)
