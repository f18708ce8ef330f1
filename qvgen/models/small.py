"""A small latent video DiT for real clips: Wan's classes at a fiftieth of their size, with a causal VAE of its own.

    clip         17 frames of 128 x 128 pixels, 8 per second
    VAE          AutoencoderKLWan, base width 32, one residual block a level (10.1 M parameters): 4 x 8 x 8 -> 5 x 16 x 16
                 latents of 16 channels, Wan's own ratio. A finer VAE (4 x 4 x 4) would make 1280 tokens of a clip instead of
                 320, more than two CPU cores can train on
    text         all-MiniLM-L6-v2 (BertModel, 384 channels), its token states; padding is zeroed as WanPipeline does
    transformer  WanTransformer3DModel, 6 blocks of width 384 (13.3 M parameters), patches of 1 x 2 x 2
    objective    flow matching, shift 3, Euler steps

Weights of VAE and transformer in bfloat16: 47 MB. They don't come with the package: two commands train them
(:data:`TRAINING_REMEDY`), first the VAE (method=autoencoder), then the transformer on its latents (method=pretrain).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from qvgen.models.folder.hub_folder import HubFolder
from qvgen.models.wan_family import WanFamily

TRAINING_REMEDY = (
    "train it with `python train.py experiment=small_vae data.path=CLIPS run_dir=VAE` and then "
    "`python train.py experiment=small_teacher data.path=CLIPS model.path=VAE/model run_dir=TEACHER`, "
    "and write model=small model.path=TEACHER/model"
)

_GATE_ROWS = [2, 5]
"""Rows of a Wan block's modulation that gate its self-attention and its feed-forward layers."""

_START_LOG_VARIANCE = -6.0
"""Logarithm of the variance of the untrained VAE's posterior: a deviation of 0.05. At a deviation of 1, where it
would start otherwise, latents are mostly noise and the decoder first learns to ignore them: after 200 steps (clips of
5 x 32 x 32, one seed) the L1 error was .290 instead of .235."""


class TrainedFolder(HubFolder):
    """A model's folder that a training of this library wrote, in place of one that was downloaded."""

    @classmethod
    def whole_remedy(cls, path: str | Path, *, repository: str, model: str) -> str:
        """How to make the folder."""
        del path, repository, model
        return TRAINING_REMEDY

    def remedy(self, part: str) -> str:
        """How to make what is not there."""
        del part
        return TRAINING_REMEDY


@dataclass(kw_only=True, eq=False)
class Small(WanFamily):
    """The small family.

    Its keys are those of :class:`qvgen.models.wan_family.WanFamily`; ``path`` is a folder that the VAE's training wrote, to
    train the transformer, or that the transformer's training wrote.
    """

    repository: str = ""

    folder_class: ClassVar[type[HubFolder]] = TrainedFolder
    text_encoder_class: ClassVar[str] = "BertModel"
    max_text_tokens: ClassVar[int] = 128
    """Tokens that the text encoder was trained on at once; longer captions are cut."""

    def initial_transformer(self, seed: int) -> nn.Module:
        """Build an untrained transformer, the start of pretraining.

        Wan's modulation starts near 0, which all but closes the residual branches; their gates start at 1 here, as in
        :meth:`qvgen.models.tiny_family.TinyFamily.initial_transformer`.

        Args:
            seed: Seed of the random weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer: Any = self.build(self.transformer_config)
        for block in transformer.blocks:
            with torch.no_grad():
                block.scale_shift_table[:, _GATE_ROWS] = 1.0
        return transformer

    def initial_vae(self, seed: int) -> nn.Module:
        """Build an untrained VAE, float32, the start of its training; its posterior is narrow.

        Args:
            seed: Seed of the random weights.

        Raises:
            ValueError: the configuration has a key that the VAE does not have.
        """
        from diffusers import AutoencoderKLWan

        config = {key: value for key, value in self._vae_config.items() if not key.startswith("_")}
        known = inspect.signature(AutoencoderKLWan.__init__).parameters
        for key in config:
            if key not in known:
                raise ValueError(f"vae config has the unknown key {key!r}; AutoencoderKLWan has none such")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae: Any = AutoencoderKLWan(**config)
        with torch.no_grad():
            vae.quant_conv.bias[vae.config.z_dim :] = _START_LOG_VARIANCE  # the means come first
        return vae

    def write_skeleton(
        self, folder: Path, *, vae: nn.Module, latents: tuple[Sequence[float], Sequence[float]], text_folder: Path
    ) -> Path:
        """Write a model's folder without the transformer's weights; see :func:`qvgen.models.small_folder.write_skeleton`."""
        from qvgen.models.small_folder import write_skeleton

        self.scheduler()  # refuses one of another class: a configuration chooses among the family's
        configs = {"transformer": self.transformer_config, "scheduler": self.component_config("scheduler")}
        return write_skeleton(folder, vae=vae, latents=latents, text_folder=text_folder, configs=configs)

    def _require_folder(self) -> HubFolder:
        if self.folder is None:
            raise ValueError(f"model={self.name} comes without weights: {TRAINING_REMEDY}")
        return super()._require_folder()
