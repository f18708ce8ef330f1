"""How good a full-precision model of moving digits is: its loss on held-out clips, and what its samples show."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from qvgen.evaluation.classifier import MovingDigitClassifier
from qvgen.evaluation.distance import flicker
from qvgen.evaluation.held_out import HeldOut
from qvgen.evaluation.sampling import generate_videos, held_out_items
from qvgen.evaluation.video_quality import attribute_labels
from qvgen.models.base import VideoDiT

NUM_VIDEOS = 256


def teacher_quality(
    family: VideoDiT, model: nn.Module, *, held_out: HeldOut, classifier: MovingDigitClassifier
) -> Mapping[str, float]:
    """Measure a model on ``NUM_VIDEOS`` held-out captions.

    Returns:
        ``held_out_loss`` (mean squared error of the velocity), ``digit_accuracy``, ``color_accuracy``,
        ``motion_accuracy`` of its samples, and ``flicker`` (levels of 255) of those that stand still.
    """
    items = held_out_items(held_out.split, NUM_VIDEOS)
    videos = generate_videos(family, model, [item["caption"] for item in items], range(NUM_VIDEOS))
    accuracy = classifier.accuracy(videos, attribute_labels(items))
    still = torch.tensor([index for index, item in enumerate(items) if "still" in item["caption"]])
    return {
        "held_out_loss": held_out.loss(model),
        **{f"{name}_accuracy": value for name, value in accuracy.items()},
        "flicker": flicker(videos[still]),
    }
