"""DOVER's two branches with their heads, and the two views of a video that they look at.

    aesthetic    32 frames spread over the video, resized to 224 x 224     -> ConvNeXt  -> head -> mean over places
    technical    3 clips of 32 frames, every second one, each a mosaic of
                 7 x 7 fragments of 32 x 32 pixels at full resolution      -> Swin      -> head -> mean over places and clips

    head         W2 gelu(W1 x + b1) + b2 at every place

Source: VQAssessment/DOVER (dover.yml, dover/models, dover/datasets). Its program draws where fragments and clips begin from a
generator that nobody seeds; here the generator has one seed for every video, so that a score is the same each time. Levels
are those of its program: of uint8 in, rounded after a resize without antialiasing, cut after an enlargement.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from qvgen.evaluation.networks.dover.convnext import ConvNext, ConvNextSizes
from qvgen.evaluation.networks.dover.swin import VideoSwin, VideoSwinSizes
from qvgen.evaluation.networks.published_tensors import fill_, read_tensors
from qvgen.evaluation.placement import sampling_device

Branch = Literal["aesthetic", "technical"]
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SEED = 42
_DERIVED = (r"\.relative_position_index$",)
_INTERVAL = 2


@dataclass(frozen=True, kw_only=True)
class DoverSizes:
    """The sizes of the published network, and of smaller ones of the same kind.

    Attributes:
        convnext: Sizes of the aesthetic branch.
        swin: Sizes of the technical branch.
        hidden: Width of a head.
        frames: Frames of a clip.
        clips: Clips of the technical branch.
        fragment: Sides of a fragment in pixels; a clip has as many rows and columns of them as a window has places.
    """

    convnext: ConvNextSizes = field(default_factory=ConvNextSizes)
    swin: VideoSwinSizes = field(default_factory=VideoSwinSizes)
    hidden: int = 64
    frames: int = 32
    clips: int = 3
    fragment: int = 32

    @property
    def grid(self) -> int:
        """Rows and columns of fragments."""
        return self.swin.window[1]

    @property
    def side(self) -> int:
        """Sides of a view in pixels."""
        return self.grid * self.fragment


class _Head(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc_hid, self.fc_last = nn.Conv3d(width, hidden, 1), nn.Conv3d(hidden, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc_last(functional.gelu(self.fc_hid(x)))
        return y


class Dover(nn.Module):
    """The network; :meth:`load` gives it weights."""

    def __init__(self, sizes: DoverSizes) -> None:
        super().__init__()
        self.aesthetic_backbone, self.technical_backbone = ConvNext(sizes.convnext), VideoSwin(sizes.swin)
        self.aesthetic_head = _Head(sizes.convnext.widths[-1], sizes.hidden)
        self.technical_head = _Head(sizes.swin.outputs, sizes.hidden)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def score(self, view: Float[Tensor, "B 3 F H W"], branch: Branch) -> float:
        """A branch's own number of a video, before it is normalized; float64 mean over places and clips."""
        backbone, head = getattr(self, f"{branch}_backbone"), getattr(self, f"{branch}_head")
        return float(torch.cat([head(backbone(clip)) for clip in view.split(1)]).double().mean())


@cache
def load_dover(path: Path, *, sizes: DoverSizes) -> Dover:
    """The network of a file, read once, on the device that measures.

    Raises:
        ValueError: It is damaged, or a tensor is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        network = Dover(sizes)
    fill_(network, read_tensors(path), path=path, derived=_DERIVED)
    return network.to(sampling_device())


def view_of(frames: UInt8[Tensor, "F H W 3"], branch: Branch, *, sizes: DoverSizes) -> Float[Tensor, "B 3 T S S"]:
    """The clips that a branch looks at, normalized.

    Raises:
        ValueError: The video is too small for fragments.
    """
    generator = torch.Generator().manual_seed(SEED)
    if branch == "aesthetic":
        chosen = frame_numbers(len(frames), parts=sizes.frames, length=1, generator=generator)
        pixels = functional.interpolate(
            frames[chosen].permute(0, 3, 1, 2).float(),
            size=(sizes.side, sizes.side),
            mode="bilinear",
            align_corners=False,
        ).round()
        clips = pixels.transpose(0, 1).unsqueeze(0)
    else:
        chosen = frame_numbers(len(frames), parts=sizes.clips, length=sizes.frames, generator=generator)
        clips = torch.stack(
            [
                fragments(frames[part].permute(3, 0, 1, 2), sizes=sizes, generator=generator)
                for part in chosen.view(sizes.clips, sizes.frames)
            ]
        )
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    return (clips - mean) / std


def frame_numbers(count: int, *, parts: int, length: int, generator: torch.Generator) -> Int[Tensor, " parts*length"]:
    """Frames of parts of a video, ``length`` of each, every second one, from a place in the part that is drawn.

    The place is the part's first frame where the part is no longer than what is taken. Behind the last frame comes the first
    one again; a video of fewer frames than parts gives its first frame to all of them.

    Args:
        count: Frames of the video.
        parts: Equal parts that it is cut into.
        length: Frames of each.
        generator: Draws.
    """
    size = count // parts
    room = size - length * _INTERVAL
    starts = torch.arange(parts) * size
    if room > 0:
        starts = starts + torch.randint(room, (parts,), generator=generator)
    return ((starts[:, None] + _INTERVAL * torch.arange(length)[None, :]) % count).flatten()


def fragments(
    clip: UInt8[Tensor, "3 T H W"], *, sizes: DoverSizes, generator: torch.Generator
) -> Float[Tensor, "3 T S S"]:
    """The mosaic of a clip: one fragment of each cell of a grid over the frame, of one place in all frames.

    Frames with a side shorter than the mosaic's are enlarged first.

    Args:
        clip: Levels.
        sizes: Grid and fragments.
        generator: Draws where in its cell a fragment lies.
    """
    shortest = min(clip.shape[-2:])
    levels = clip.float()
    if shortest < sizes.side:
        levels = functional.interpolate(levels / 255, scale_factor=sizes.side / shortest, mode="bilinear") * 255
        levels = levels.clamp(0, 255).floor()
    height, width = levels.shape[-2:]
    rooms = [max(0, length // sizes.grid - sizes.fragment) for length in (height, width)]
    drawn = [
        torch.randint(room, (sizes.grid, sizes.grid), generator=generator)
        if room
        else torch.zeros(sizes.grid, sizes.grid, dtype=torch.int64)
        for room in rooms
    ]
    rows = []
    for row in range(sizes.grid):
        top = min(height // sizes.grid * row, height - sizes.fragment)
        parts = []
        for column in range(sizes.grid):
            left = min(width // sizes.grid * column, width - sizes.fragment)
            y, x = top + int(drawn[0][row, column]), left + int(drawn[1][row, column])
            parts.append(levels[..., y : y + sizes.fragment, x : x + sizes.fragment])
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows, -2)
