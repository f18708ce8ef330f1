"""A finetune's single .safetensors file, with diffusers' names or those of the model's own code."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qvgen.checksum import file_checksum
from qvgen.models.finetune.base import AGAIN, Finetune
from qvgen.models.folder.finite_weights import check_finite_weights
from qvgen.models.folder.safetensors_header import first_bytes, read_header
from qvgen.models.folder.transformer_build import build_empty, check_weights
from qvgen.models.folder.weight_set import PICKLES, quantized_already
from qvgen.models.original.names import ORIGINAL_NAMES, comfy_names
from qvgen.models.original.tensors import from_original

log = logging.getLogger(__name__)

_PREFIXES = ("model.diffusion_model.", "model.model.", "diffusion_model.", "transformer.", "module.", "model.")
_OTHER_PARTS = ("vae.", "first_stage_model.", "text_encoders.", "text_encoder.", "cond_stage_model.")
_SAT_SIGN = "attention.query_key_value.weight"
_BYTES_PER_TENSOR = 4096


@dataclass(frozen=True, kw_only=True)
class FinetuneFile(Finetune):
    """One .safetensors file.

    Attributes:
        path: The file.
        given: What the user wrote, for messages.
        kept: Name in the file -> name without prefix, of the transformer's own tensors.
        original: Class of diffusers of the model whose own code has these names; None: they are diffusers' names.
    """

    path: Path
    given: str
    kept: Mapping[str, str]
    original: str | None

    @classmethod
    def read(cls, path: Path, *, given: str) -> Self:
        """Tell from the header what the file holds.

        Raises:
            ValueError: It is no full-precision transformer; the message says what it is instead.
        """
        if path.name.endswith(".gguf"):
            raise ValueError(
                f"{given} is GGUF, whose weights are integers of blocks already: quantizing what they stand for would add "
                "one error to another, and training needs full precision; take the finetune's bf16 or fp16 file"
            )
        if path.name.endswith(PICKLES):
            raise ValueError(
                f"{given} is a pickle, which runs code when it is read and never is; save it as safetensors"
            )
        if not path.name.endswith(".safetensors"):
            raise ValueError(f"{given} is no .safetensors file; give a transformer's folder or its .safetensors file")
        try:
            _, entries = read_header(path)
        except ValueError as error:
            raise ValueError(f"{given} {error}; {AGAIN}") from error
        if reason := quantized_already(entries):
            raise ValueError(f"{given} {reason}")
        if any("lora" in name.lower() for name in entries):
            raise ValueError(f"{given} is a LoRA; write model.lora={path} beside the base model")
        kept = _without_prefix(entries)
        if any(name.endswith(_SAT_SIGN) for name in kept.values()):
            raise ValueError(
                f"{given} is in CogVideoX's original layout (SAT), for which diffusers has no converter of files; its script "
                "scripts/convert_cogvideox_to_diffusers.py makes a folder of the original checkpoint: give its transformer/"
            )
        signs = {one: (names.sign, *comfy_names(names.sign, names)) for one, names in ORIGINAL_NAMES.items()}
        known = (one for one, ends in signs.items() if any(name.endswith(ends) for name in kept.values()))
        return cls(path=path, given=given, kept=kept, original=next(known, None))

    def config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`Finetune`."""
        return dict(base)

    @property
    def revision(self) -> str:
        """See :class:`Finetune`."""
        digest, header = hashlib.sha256(), read_header(self.path)
        digest.update(header[0])
        for part in first_bytes(self.path, header, count=_BYTES_PER_TENSOR):
            digest.update(part)
        return digest.hexdigest()

    @property
    def checksum(self) -> str:
        """See :class:`Finetune`."""
        return file_checksum(self.path)

    def check(self, class_name: str, base: Mapping[str, Any]) -> None:
        """See :class:`Finetune`."""
        entries = read_header(self.path)[1]
        meta = {name: torch.empty(entries[key]["shape"], device="meta") for key, name in self.kept.items()}
        try:
            state = self._to_diffusers(meta, class_name, base)
            shapes = {name: tuple(value.shape) for name, value in state.items()}
            check_weights(class_name, base, shapes, size=self.path.stat().st_size)
        except ValueError as error:
            raise ValueError(f"{self.given} {error}; choose the model that it was made from") from error

    def load(self, class_name: str, base: Mapping[str, Any], *, dtype: torch.dtype) -> nn.Module:
        """See :class:`Finetune`."""
        self.check(class_name, base)
        try:
            stored = load_file(self.path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.given} can't be read ({' '.join(str(error).split())}); {AGAIN}") from error
        state = self._to_diffusers({name: stored.pop(key) for key, name in self.kept.items()}, class_name, base)
        import diffusers
        from accelerate import init_empty_weights

        transformer_class: Any = getattr(diffusers, class_name)
        with _default_dtype(dtype), init_empty_weights(include_buffers=False):
            model: nn.Module = transformer_class.from_config(
                {key: value for key, value in base.items() if not key.startswith("_")}
            )
        exact = set(transformer_class._keep_in_fp32_modules or ())  # as from_pretrained does
        for name in list(state):
            kind = torch.float32 if exact & set(name.split(".")) else dtype
            state[name] = state[name].to(kind, copy=True).contiguous()
        model.load_state_dict(state, strict=True, assign=True)
        check_finite_weights(model, files=[self.path], remedy=AGAIN)
        return model.requires_grad_(False).eval()

    def _to_diffusers(self, state: dict[str, Tensor], class_name: str, base: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors under diffusers' names; the message of a ValueError is a clause that follows on the file's name."""
        if self.original is None:
            return state
        names = ORIGINAL_NAMES[self.original]
        if class_name != self.original:
            raise ValueError(f"has the names of {names.code}'s own code, and the model is a {class_name}")
        return from_original(state, build_empty(class_name, base).state_dict(), names)


def _without_prefix(names: Iterable[str]) -> dict[str, str]:
    """Name in a file -> name without prefix, other parts of a pipeline left out."""
    names = list(names)
    own = [name for name in names if not name.startswith(_OTHER_PARTS)]
    prefix = next((prefix for prefix in _PREFIXES if own and all(name.startswith(prefix) for name in own)), "")
    if len(own) < len(names):
        log.info("%d tensors of a VAE or of text encoders in the file are not read", len(names) - len(own))
    return {name: name.removeprefix(prefix) for name in own}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tables that a class computes get this type, as in from_pretrained."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
