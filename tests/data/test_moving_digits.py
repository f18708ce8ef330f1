"""Moving digits, against a rendering by hand: numpy's roll of scikit-learn's own images."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from qvgen.data import moving_digits
from qvgen.data.moving_digits import COLORS, DIGITS, MOTIONS, TRAIN_IMAGES, MovingDigits, caption_of

SIZE, FRAMES, STEP = 16, 8, 4


def _rolled(image: np.ndarray, *, color: int, motion: int) -> np.ndarray:
    """float64 [3, F, S, S] in [-1, 1]."""
    canvas = np.zeros((SIZE, SIZE))
    canvas[4:12, 4:12] = image / 16
    dy, dx = tuple(MOTIONS.values())[motion]
    frames = [np.roll(canvas, (frame * dy * STEP, frame * dx * STEP), (0, 1)) for frame in range(FRAMES)]
    rgb = np.array(tuple(COLORS.values())[color])
    return rgb[:, None, None, None] * np.stack(frames)[None] * 2 - 1


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_clips_are_rolled_images_of_their_own_split(split: str) -> None:
    digits = load_digits()
    part = slice(0, TRAIN_IMAGES) if split == "train" else slice(TRAIN_IMAGES, None)
    dataset = MovingDigits(split=split, seed=3)
    for index in range(20):
        item = dataset[index]
        candidates = digits.images[part][digits.target[part] == item["digit"]]
        video = item["video"].double().numpy()
        rolled = (_rolled(image, color=item["color"], motion=item["motion"]) for image in candidates)
        assert any(np.abs(video - other).max() < 1e-6 for other in rolled)  # float32 of values with 17 levels


def test_caption_says_what_is_shown() -> None:
    item = MovingDigits()[5]
    color, digit = tuple(COLORS)[item["color"]], DIGITS[item["digit"]]
    assert item["caption"] == f"a {color} {digit} {tuple(MOTIONS)[item['motion']]}"
    assert item["caption"] == caption_of(digit=item["digit"], color=item["color"], motion=item["motion"])


def test_clip_depends_on_seed_split_and_index_alone() -> None:
    first, again = MovingDigits(seed=1), MovingDigits(seed=1)
    again[7]  # another order of reading
    assert torch.equal(first[3]["video"], again[3]["video"])
    assert [first[i]["caption"] for i in range(30)] != [MovingDigits(seed=2)[i]["caption"] for i in range(30)]


def test_all_classes_appear_about_equally_often() -> None:
    items = [MovingDigits(length=3000)[index] for index in range(3000)]
    for name, size in (("digit", 10), ("color", 6), ("motion", 9)):
        counts = np.bincount([item[name] for item in items], minlength=size)
        # 4.5 standard deviations of a binomial count; the digits themselves are not quite balanced
        assert np.abs(counts - 3000 / size).max() < 4.5 * np.sqrt(3000 / size) + 3000 * 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split='test'"),
        ({"image_size": 7}, "image_size=7"),
        ({"length": 0}, "length=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MovingDigits(**options)


def test_index_outside_ends_a_loop() -> None:
    assert len(list(MovingDigits(length=3))) == 3


def test_without_scikit_learn_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving_digits, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="scikit-learn, whose digits the data set is made of, is not installed"):
        moving_digits._digits()


def test_digits_that_lie_elsewhere_are_asked_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    from_file = moving_digits._digits()
    monkeypatch.setattr(moving_digits, "_DIGITS_FILE", "elsewhere.csv.gz")
    assert np.array_equal(moving_digits._digits(), from_file)
