"""How well frames fit their caption: the cosine of a user's own text-image model (CLIP, SigLIP, ...), from a local folder.

No package registry carries such weights, so there is no default: the folder is what `hf download` leaves, read by
transformers from safetensors alone and without code of its own. Images are resized (shorter side), cut in the middle
and normalized as the folder's preprocessor_config.json says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

_FRAMES_AT_ONCE = 16


class TextSimilarity:
    """Cosines of frames and captions.

    Args:
        folder: Folder of the model, its tokenizer and preprocessor_config.json.

    Raises:
        ValueError: It holds no text-image model, or lacks a file.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        from qvgen.models.folder.foreign_code import check_config
        from qvgen.models.folder.tokenizer_folder import load_tokenizer

        folder = Path(folder).expanduser()
        try:
            check_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), file=folder / "config.json")
            prepared = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
            self.model = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
            ).eval()
            self.tokenizer = load_tokenizer(folder, remedy="download it again")
        except (OSError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise ValueError(f"{folder} holds no text-image model ({line}); give what `hf download` leaves") from error
        for name in ("get_text_features", "get_image_features"):
            if not hasattr(self.model, name):
                raise ValueError(
                    f"{folder} holds a {type(self.model).__name__}, which has no {name}; give a CLIP or SigLIP"
                )
        self.model.requires_grad_(False)
        self.side = _side(prepared.get("crop_size") or prepared["size"])
        self.mean, self.deviation = (
            torch.tensor(prepared.get(key, [0.5] * 3)).view(1, 3, 1, 1) for key in ("image_mean", "image_std")
        )
        digest = hashlib.sha256(json.dumps(prepared, sort_keys=True).encode())
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        self.revision = digest.hexdigest()
        """Content key of weights and preprocessing."""

    @torch.no_grad()
    def __call__(
        self, videos: UInt8[Tensor, "B F H W 3"], captions: Sequence[str], *, device: torch.device
    ) -> Float[Tensor, "B F"]:
        """Cosine of every frame and its video's caption, float32 [B, F] in [-1, 1], on the CPU."""
        self.model.to(device)
        tokens = self.tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").to(device)
        texts = _features(self.model.get_text_features(**tokens))
        rows = [
            self.image_features(video, device=device) @ text.cpu() for video, text in zip(videos, texts, strict=True)
        ]
        return torch.stack(rows)

    @torch.no_grad()
    def image_features(self, frames: UInt8[Tensor, "F H W 3"], *, device: torch.device) -> Float[Tensor, "F D"]:
        """The features of frames as unit vectors, float32 [F, D], on the CPU."""
        self.model.to(device)
        parts = frames.split(_FRAMES_AT_ONCE)
        images = [_features(self.model.get_image_features(pixel_values=self._prepare(p, device))) for p in parts]
        return torch.cat(images).cpu()

    def _prepare(self, frames: Tensor, device: torch.device) -> Tensor:
        """Frames uint8 [F, H, W, 3] as the image tower takes them, float32 [F, 3, side, side]."""
        pixels = frames.to(device).permute(0, 3, 1, 2).float() / 255
        factor = self.side / min(pixels.shape[-2:])
        size = [max(self.side, round(length * factor)) for length in pixels.shape[-2:]]
        pixels = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((length - self.side) // 2 for length in size)
        pixels = pixels[..., top : top + self.side, left : left + self.side]
        return (pixels - self.mean.to(device)) / self.deviation.to(device)


def _side(size: int | Mapping[str, Any]) -> int:
    """Side of the square that the image tower sees, of a preprocessor's ``size`` in any of its forms."""
    return int(size if isinstance(size, int) else size.get("height", size.get("shortest_edge")))


def _features(output: Any) -> Tensor:
    """A tower's features as unit vectors float32 [B, D]; newer versions of transformers wrap the tensor in an object."""
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return functional.normalize(pooled.float(), dim=-1)
