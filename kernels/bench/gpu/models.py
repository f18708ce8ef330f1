"""Shapes of the models' layers: read from conf/model, where the models' own configurations stand, without a YAML library.

A video of F frames, H x W, makes ((F - 1) / t + 1) (H / s / p) (W / s / p) tokens, with the VAE's compression t over time and
s over space and patches of p x p. CogVideoX puts the caption's tokens into the same sequence; Wan attends to them apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["NAMES", "Layer", "Model", "read_model"]

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("cogvideox", "wan", "wan-14b")
"""Models that are measured, as in ``model=NAME``."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear of a block.

    Attributes:
        name: What it does.
        rows: M.
        columns: K.
        outputs: N.
        count: How many of this shape and kind a block has.
        tail: What follows it in the same kernel: ``gelu``, ``gate`` (gate and residual) or nothing.
    """

    name: str
    rows: int
    columns: int
    outputs: int
    count: int = 1
    tail: str = ""

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.rows * self.columns * self.outputs


@dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes of a model at the video that it is sampled with.

    Attributes:
        name: As in ``model=NAME``.
        width: Channels of a token.
        heads: Attention heads.
        inner: Channels between the two linears of the feed-forward.
        blocks: Transformer blocks.
        tokens: Tokens of a block's rows.
        text_tokens: The caption's tokens, where they are attended to apart; 0 where they are among ``tokens``.
    """

    name: str
    width: int
    heads: int
    inner: int
    blocks: int
    tokens: int
    text_tokens: int

    @property
    def layers(self) -> list[Layer]:
        """The linears of a block; q, k and v are one, as they share their input."""
        M, D, F = self.tokens, self.width, self.inner
        cross = [
            Layer(name="cross q", rows=M, columns=D, outputs=D),
            Layer(name="cross kv", rows=self.text_tokens, columns=D, outputs=2 * D),
            Layer(name="cross out", rows=M, columns=D, outputs=D, tail="gate"),
        ]
        return [
            Layer(name="qkv", rows=M, columns=D, outputs=3 * D),
            Layer(name="out", rows=M, columns=D, outputs=D, tail="gate"),
            *(cross if self.text_tokens else []),
            Layer(name="ff1", rows=M, columns=D, outputs=F, tail="gelu"),
            Layer(name="ff2", rows=M, columns=F, outputs=D, tail="gate"),
        ]

    @property
    def attention_operations(self) -> float:
        """Multiplications and additions of both products of a block's attention."""
        return 4.0 * self.tokens * (self.tokens + self.text_tokens) * self.width

    def shrunk(self) -> Model:
        """A tiny model of the same kind, for a rehearsal."""
        return replace(
            self, width=64, heads=2, inner=128, blocks=1, tokens=24, text_tokens=8 if self.text_tokens else 0
        )


def read_model(name: str) -> Model:
    """The sizes of conf/model/NAME.yaml.

    Raises:
        ValueError: The file lacks one of them.
    """
    text = (ROOT / "conf" / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    values = {key: int(value) for key, value in re.findall(r"^ *(\w+): (\d+)\b(?!\.)", text, re.MULTILINE)}
    patch = re.search(r"^ *patch_size: (?:\[\d+, (\d+), \d+\]|(\d+))", text, re.MULTILINE)
    module = re.search(r"^_target_: qvgen\.models\.(\w+)\.", text, re.MULTILINE)
    needed = {"num_attention_heads", "attention_head_dim", "num_layers", "height", "width", "sampling_frames"}
    if patch is None or module is None or not needed <= values.keys():
        raise ValueError(f"conf/model/{name}.yaml lacks {sorted(needed - values.keys()) or 'patch_size or _target_'}")
    width = values["num_attention_heads"] * values["attention_head_dim"]
    over_time = values.get("scale_factor_temporal", values.get("temporal_compression_ratio", 4))
    step = values.get("scale_factor_spatial", 8) * int(patch[1] or patch[2])
    frames = (values["sampling_frames"] - 1) // over_time + 1
    tokens = frames * (values["height"] // step) * (values["width"] // step)
    caption = _caption_tokens(module[1])
    joint = "ffn_dim" not in values  # CogVideoX: one sequence, and a feed-forward of four times the width
    return Model(
        name=name,
        width=width,
        heads=values["num_attention_heads"],
        inner=values.get("ffn_dim", 4 * width),
        blocks=values["num_layers"],
        tokens=tokens + (caption if joint else 0),
        text_tokens=0 if joint else caption,
    )


def _caption_tokens(module: str) -> int:
    """The family's ``max_text_tokens``, out of its source: importing it would ask for diffusers."""
    source = (ROOT / "qvgen" / "models" / f"{module}.py").read_text(encoding="utf-8")
    found = re.search(r"max_text_tokens: ClassVar\[int\] = (\d+)", source)
    if found is None:
        raise ValueError(f"qvgen/models/{module}.py says no max_text_tokens")
    return int(found[1])
