"""Training in full precision, a branch of the verb ``train``: from scratch, or a few-step student of another model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvgen.config.schema.train import TrainConfig
from qvgen.data.moving_digits import MovingDigits
from qvgen.evaluation.classifier import CLASSIFIER_FILE, dataset_accuracy, load_classifier, train_classifier
from qvgen.evaluation.digit_quality import NUM_VIDEOS, teacher_quality
from qvgen.evaluation.environment import collect_environment
from qvgen.evaluation.held_out import HeldOut
from qvgen.evaluation.prompts import evaluation_prompts
from qvgen.models.folder_family import FolderFamily
from qvgen.models.guidance import texts_to_encode
from qvgen.models.named_family import NamedFamily
from qvgen.models.small_folder import write_small_folder
from qvgen.models.tiny_family import TinyFamily
from qvgen.models.weight_file import check_state, save_weights
from qvgen.run_identity import read_changes
from qvgen.training.callbacks.steps import total_seconds
from qvgen.training.start.file import has_start, load_start, save_start
from qvgen.training.whole_run import trained
from qvgen.verbs._autoencoder import MODEL_DIRECTORY
from qvgen.verbs._deliver import rerun_command
from qvgen.verbs._parts import claim, open_log, step_batch, training_output, training_run
from qvgen.verbs.precompute import fill_missing

log = logging.getLogger(__name__)

CLASSIFIER_STEPS = 600


def pretrain(config: TrainConfig) -> None:
    """Train a full-precision model, and write its weights with a card that says how good it is.

    What is made is made in the run's folder; shipping it is moving it to where ``model.weights`` or ``model.path`` points.

    Raises:
        ValueError: The model is none that this project trains from scratch.
    """
    if not hasattr(config.model, "initial_transformer"):
        raise ValueError(f"model={config.names.model} can't be pretrained; model=tiny, tiny_wide and small can")
    fill_missing(config, texts=texts_to_encode(config.model, evaluation_prompts(config.evaluation, config.model)))
    student, teacher = full_precision_start(config)
    held_out = HeldOut(
        config.model,
        config.data.open(config.model, split="held_out"),
        num_samples=config.evaluation.samples,
        batch_size=step_batch(config).micro_batch_size,
    )
    log.info("%s: %d parameters", config.names.model, sum(p.numel() for p in student.parameters()))
    with claim(config) as run_dir:
        held_out.warn_if_few()
        if run_dir.load_stage("start") is None or not has_start(run_dir.path):
            save_start(student, run_dir.path)
            run_dir.save_stage("start", {})
        load_start(student, run_dir.path)
        with (
            open_log(config, run_dir.path) as loggers,
            trained(
                training_run(config),
                training_output(config, run_dir.path, loggers=loggers),
                student=student,
                teacher=teacher,
                settings=config.plain,
                hang_minutes=config.training.hang_minutes,
            ) as steps,
        ):
            pass  # what follows is rank 0's
        card: dict[str, Any] = {
            "command": rerun_command(config),
            "seed": config.seed,
            "steps": steps,
            "seconds": round(total_seconds(run_dir.path / "metrics.csv")),
            "environment": {"machine": collect_environment().machine.to_json_dict()},
            "changes": [asdict(change) for change in read_changes(run_dir.path)],
        }
        if isinstance(config.model, TinyFamily):
            config.model.round_to_stored(student)  # what is measured is what is stored
        quality = {"held_out_loss": held_out.loss(student)}
        if isinstance(held_out.split.samples, MovingDigits):
            quality = _digit_quality(config, student, run_dir.path, held_out=held_out, card=card)
        path = _save(config, student, run_dir.path, card={**card, "quality": quality})
    print(f"weights: {path}")
    for name, value in quality.items():
        print(f"{name}: {value:.4f}")


def full_precision_start(config: TrainConfig) -> tuple[nn.Module, nn.Module | None]:
    """A transformer to train in full precision, and what teaches it: random weights and nothing, or a source's, twice.

    Raises:
        ValueError: The source has other sizes than the model.
    """
    source = config.method.taught_by
    if source is None:
        return config.model.initial_transformer(config.seed), None
    taught_by = NamedFamily.load(source)
    teacher = taught_by.family.load_teacher(dtype=torch.float32)
    student = config.model.build(config.model.transformer_config)
    check_state(student, teacher.state_dict(), path=f"of method.source={source}")
    student.load_state_dict(teacher.state_dict())
    return student, teacher


def _save(config: TrainConfig, student: nn.Module, path: Path, *, card: Mapping[str, Any]) -> Path:
    """A weights file, or for a family whose models are folders a complete folder."""
    if isinstance(config.model, FolderFamily):
        source = config.model.folder.path
        return write_small_folder(path / MODEL_DIRECTORY, source_folder=source, transformer=student, card=card)
    assert isinstance(config.model, TinyFamily)  # no other family has an initial transformer
    return config.model.save_teacher(student, path, card=card)


def _digit_quality(
    config: TrainConfig, student: nn.Module, path: Path, *, held_out: HeldOut, card: Mapping[str, Any]
) -> Mapping[str, float]:
    """What samples of moving digits show, by a classifier that is trained for it and kept in the run's folder, or shipped."""
    if config.method.taught_by is not None:  # judged by the classifier that judges the model it was made from
        classifier = load_classifier()
    else:
        clips = config.data.open(config.model, split="train").samples
        classifier = train_classifier(clips, steps=CLASSIFIER_STEPS, seed=config.seed)
        accuracy = dataset_accuracy(classifier, held_out.split.samples, count=NUM_VIDEOS)
        save_weights(classifier.state_dict(), path / CLASSIFIER_FILE, card={**card, "held_out_accuracy": accuracy})
    return teacher_quality(config.model, student, held_out=held_out, classifier=classifier)
