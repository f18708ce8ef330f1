"""Human action: whether UMT recognizes the action that the prompt asks for.

    16 frames, each the middle of a sixteenth -> UMT's 400 logits -> sigmoid -> the 5 largest, those of 0.85 or more
    1 if the action of the prompt ("a person is ACTION") is among them, else 0

A probability is rounded to four places before it is compared, as published. The action is what VBench reads from the name of
a video's file: the prompt in lower case, up to a hyphen, behind "person is ", up to an underline.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from qvgen.evaluation.metrics.base import Pair
from qvgen.evaluation.networks.umt import UmtSizes, load_umt
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.vbench import published_file
from qvgen.evaluation.vbench.dimension import NetworkDimension
from qvgen.evaluation.vbench.frame_preparation import middle_frames, umt_tensors

_LARGEST, _ENOUGH, _PLACES = 5, 0.85, 4


class HumanAction(NetworkDimension):
    """1 where the action is recognized, else 0.

    Attributes:
        sizes: The sizes of the network that the file has.
    """

    sizes: ClassVar[UmtSizes] = UmtSizes()
    name, sampling = "human_action", "16, the middle one of each sixteenth"
    title = "human action"
    source = "VBench, arXiv 2311.17982, human action (vbench/human_action.py), UMT ViT-L/16 on Kinetics-400"
    high = 1.0
    files = (published_file.UMT, published_file.KINETICS_ACTIONS)

    def measure(self, pair: Pair) -> float:
        """See the module.

        Raises:
            ValueError: Nobody said what the video's prompt is, or the list of actions is another one.
        """
        if pair.caption is None:
            raise ValueError(f"{self.name} needs the prompts of the videos; write prompts=FILE, or leave it out")
        actions = read_actions(self.path(published_file.KINETICS_ACTIONS), count=self.sizes.classes)
        network = load_umt(self.path(published_file.UMT), self.sizes)
        frames = umt_tensors(middle_frames(pair.video.frames, self.sizes.frames), side=self.sizes.side)
        logits = network(frames.transpose(0, 1)[None].to(sampling_device())).cpu()[0]
        return float(asked_action(pair.caption) in [actions[number] for number in recognized(logits)])


def recognized(logits: Tensor) -> list[int]:
    """Numbers of the actions among the 5 largest of float [actions] whose probability is 0.85 or more."""
    values, numbers = torch.topk(logits.sigmoid(), min(_LARGEST, len(logits)))
    found = zip(values.tolist(), numbers.tolist(), strict=True)
    return [number for value, number in found if round(value, _PLACES) >= _ENOUGH]


def asked_action(prompt: str) -> str:
    """The action of a prompt.

    >>> asked_action("A person is riding a bike")
    'riding a bike'
    """
    return prompt.lower().split("-")[0].split("person is ")[-1].split("_")[0].strip()


@cache
def read_actions(path: Path, *, count: int) -> list[str]:
    """Names of the actions in the order of the logits, from lines "name TAB number", in any order.

    Raises:
        ValueError: A line has another form, or a number is missing or comes twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        pairs = [line.split("\t") for line in lines]
        found = {int(number): action.lower() for action, number in pairs}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no list of actions with a tab and a number each ({error})") from error
    if len(pairs) != count or sorted(found) != list(range(count)):
        raise ValueError(
            f"{path} has {len(pairs)} actions, numbered {min(found, default=None)} to "
            f"{max(found, default=None)}; the network has {count}, numbered from 0"
        )
    return [found[number] for number in range(count)]
