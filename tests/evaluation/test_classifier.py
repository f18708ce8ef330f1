"""The classifier that judges samples: it learns, it is deterministic, and the shipped one is as good as its card says."""

import json

import pytest
import torch

from qvgen.data.moving_digits import MovingDigits
from qvgen.evaluation import classifier
from qvgen.evaluation.classifier import (
    ATTRIBUTES,
    CLASSIFIER_FILE,
    dataset_accuracy,
    load_classifier,
    train_classifier,
)
from qvgen.models.weight_file import ASSETS_DIRECTORY


def test_a_few_steps_learn_colour_and_motion_and_the_same_seed_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In many small steps: a batch of 64 clips takes most of a second."""
    monkeypatch.setattr(classifier, "_BATCH_SIZE", 8)
    data = MovingDigits(length=500)
    first, again = (train_classifier(data, steps=2, seed=3) for _ in range(2))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    accuracy = dataset_accuracy(train_classifier(data, steps=60, seed=3), MovingDigits(split="held_out"), count=64)
    assert accuracy.keys() == set(ATTRIBUTES)
    assert accuracy["color"] > 0.35  # chance is 1/6; 0.58 was seen
    assert accuracy["motion"] > 0.35  # chance is 1/9; 0.69 was seen


def test_the_shipped_classifier_is_as_good_as_its_card_says() -> None:
    card = json.loads((ASSETS_DIRECTORY / CLASSIFIER_FILE).with_suffix(".json").read_text(encoding="utf-8"))
    accuracy = dataset_accuracy(load_classifier(), MovingDigits(split="held_out"), count=256)
    for name in ATTRIBUTES:
        assert abs(accuracy[name] - card["held_out_accuracy"][name]) < 0.01  # at most two clips on a rounding edge
    assert accuracy["color"] > 0.99
    assert accuracy["motion"] > 0.99
    assert accuracy["digit"] > 0.85


def test_accuracy_counts_each_attribute_by_itself() -> None:
    items = [MovingDigits(split="held_out")[index] for index in range(16)]
    videos = (
        ((torch.stack([item["video"] for item in items]) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    )
    labels = {name: torch.tensor([item[name] for item in items]) for name in ATTRIBUTES}
    judge = load_classifier()
    right = judge.accuracy(videos, labels)
    wrong = judge.accuracy(videos, labels | {"color": (labels["color"] + 1) % 6})
    assert right["color"] == 1.0
    assert wrong["color"] == 0.0
    assert wrong["motion"] == right["motion"]
