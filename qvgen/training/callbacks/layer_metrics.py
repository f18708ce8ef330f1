"""Numbers of every quantized layer at about twenty steps of a training, in RUN_DIR/layer_metrics.csv.

    step              optimizer step after which the layer was looked at, counted from 0
    layer             its name in the model
    weight_sqnr_db    10 log10(|W|^2 / |W - Q(W)|^2), of the weight that is quantized, without Phi; inf where nothing is lost
    clip_low          mean over the noise bands of the factor on the minimum of the layer's inputs
    clip_high         the same of the factor on the maximum
    phi_rank          components of Phi
    phi_gate          the smallest gate gamma of them
    phi_sigma_max     the largest singular value of L R, without gates
    phi_sigma_min     the smallest of the components in use

A number that a layer does not have (Phi is gone, the grid cuts no range) is empty. The means over all layers stand in
metrics.csv (:mod:`qvgen.training.student_metrics`), at more steps.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from qvgen.evaluation.layer_history import LAYER_COLUMNS, LAYER_FILE, read_layer_rows
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.swap import quantized_layers
from qvgen.lowrank.sharded import whole
from qvgen.quant.affine import fake_quantize
from qvgen.quantizers.activation_dynamic import ActivationDynamic
from qvgen.run_directory import set_aside
from qvgen.training.callbacks.steps import write_table
from qvgen.training.module import VideoTraining
from qvgen.training.student_metrics import is_looked_at, phi_singular_values
from qvgen.training.tracking.wandb_run import WandbRun

log = logging.getLogger(__name__)

POINTS = 20
"""About how many steps of a run are looked at: as many columns as a picture of all layers has."""

Row = dict[str, str | float | int]


class LayerMetrics(lightning.Callback):
    """Writes the table, and gives each of its steps to wandb, where a run is logged there.

    Args:
        run_dir: The run's folder.
        num_steps: Optimizer steps of the run.
    """

    def __init__(self, run_dir: Path, *, num_steps: int) -> None:
        self.path, self.num_steps = run_dir / LAYER_FILE, num_steps
        self._last_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the rows of the steps before the one that the session begins with; without quantized layers write nothing."""
        assert isinstance(pl_module, VideoTraining)
        self._last_step = trainer.global_step
        if not trainer.is_global_zero or not quantized_layers(pl_module.student):
            return
        rows, damaged = read_layer_rows(self.path)
        if damaged:
            log.warning("%s: what can't be read is kept in %s", self.path, set_aside(self.path).name)
        write_table(self.path, LAYER_COLUMNS, [row for row in rows if int(row["step"]) < trainer.global_step])

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at the layers after an optimizer step that is due; in all processes, since a sharded layer takes all."""
        del outputs, batch, batch_idx
        if trainer.global_step == self._last_step:
            return
        step, self._last_step = self._last_step, trainer.global_step
        if not is_looked_at(step, num_steps=self.num_steps, points=POINTS):
            return
        assert isinstance(pl_module, VideoTraining)
        rows = layer_numbers(pl_module.student)
        if not rows or not trainer.is_global_zero:
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, LAYER_COLUMNS, restval="", lineterminator="\n")
            writer.writerows({"step": step, **row} for row in rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.log_layers(rows, step=step)


@torch.no_grad()
def layer_numbers(student: nn.Module) -> list[Row]:
    """The numbers of each quantized layer, under the names of :data:`LAYER_COLUMNS`, in the model's order.

    A collective where the student is sharded, one layer after another. A device is waited for once for each kind of number,
    however many layers there are.
    """
    layers = quantized_layers(student)
    if not layers:
        return []
    rows: list[Row] = [{"layer": name} for name in layers]
    errors = torch.stack([_signal_and_error(layer) for layer in layers.values()]).cpu().double()
    for row, decibels in zip(rows, (10 * (errors[:, 0] / errors[:, 1]).log10()).tolist(), strict=True):
        row["weight_sqnr_db"] = decibels
    for side in ("low", "high"):
        clips = [(row, _mean_clip(layer, side)) for row, layer in zip(rows, layers.values(), strict=True)]
        _fill(f"clip_{side}", [(row, clip) for row, clip in clips if clip is not None])
    helped = [
        (row, layer.phi) for row, layer in zip(rows, layers.values(), strict=True) if layer.phi and layer.phi.rank
    ]
    _fill("phi_gate", [(row, whole(phi.rank_gate)[: phi.rank].min()) for row, phi in helped])
    values = phi_singular_values([phi for _, phi in helped])
    for (row, phi), of_layer in zip(helped, values, strict=True):
        row |= {"phi_rank": phi.rank, "phi_sigma_max": of_layer[-1], "phi_sigma_min": of_layer[0]}
    return rows


def _fill(column: str, found: Sequence[tuple[Row, Tensor]]) -> None:
    """Write one number of several layers into their rows; all come from the device at once."""
    if found:
        for (row, _), value in zip(found, torch.stack([value for _, value in found]).cpu().tolist(), strict=True):
            row[column] = value


def _signal_and_error(layer: FakeQuantLinear) -> Tensor:
    """|W|^2 and |W - Q(W)|^2 of the weight that a layer quantizes, float32 [2]; a collective where it is sharded."""
    weight, adapter = whole(layer.weight).float(), layer.adapter
    if adapter is not None:
        weight = weight + (adapter.unit * whole(adapter.left)) @ (adapter.unit * whole(adapter.right))
    scale, zero_point = (whole(value) for value in layer.weight_quantizer.qparams())
    error = weight - fake_quantize(weight, scale=scale, zero_point=zero_point, grid=layer.weight_quantizer.grid)
    return torch.stack([weight.square().sum(), error.square().sum()])


def _mean_clip(layer: FakeQuantLinear, side: str) -> Tensor | None:
    """Mean factor over the noise bands on one end of a layer's inputs, float32 []; None where it cuts no range there."""
    quantizer = layer.activation_quantizer
    logits = getattr(quantizer, f"clip_{side}") if isinstance(quantizer, ActivationDynamic) else None
    return None if logits is None else whole(logits).float().sigmoid().mean()
