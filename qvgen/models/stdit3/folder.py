"""The folder of an Open-Sora 1.2: four parts of three repositories, put beside each other.

    FOLDER/transformer     hpcai-tech/OpenSora-STDiT-v3: config.json, model.safetensors
    FOLDER/vae             hpcai-tech/OpenSora-VAE-v1.2: likewise
    FOLDER/text_encoder    T5 v1.1 XXL and its tokenizer, in safetensors, as PixArt's repository has them
    FOLDER/tokenizer

The authors publish no model_index.json and no scheduler. Transformer and VAE are classes of qvgen, so their configurations
are read as they were published, and whatever code those name (``auto_map``) is not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import nn

from qvgen.models.folder.finite_weights import check_finite_weights
from qvgen.models.folder.foreign_code import check_config
from qvgen.models.folder.hub_folder import HubFolder
from qvgen.models.stdit3.configuration import SHIFT, own_config, own_vae_config

_VAE = "VideoAutoencoderPipeline"
_OWN: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "transformer": ("STDiT3", own_config),
    "vae": (_VAE, own_vae_config),
}
"""Part -> its class's name, and how its published configuration becomes arguments."""
TEXT_REPOSITORY = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"
_REPOSITORIES = {"transformer": "hpcai-tech/OpenSora-STDiT-v3", "vae": "hpcai-tech/OpenSora-VAE-v1.2"}


def how_to_download(folder: str | Path) -> str:
    """The commands that fill a folder, as the end of a message."""
    own = [f"`hf download {name} --local-dir {folder}/{part}`" for part, name in _REPOSITORIES.items()]
    text = f"`hf download {TEXT_REPOSITORY} --include 'text_encoder/*' 'tokenizer/*' --local-dir {folder}`"
    return f"download its parts with {', '.join([*own, text])} and write model=opensora model.path={folder}"


@dataclass(frozen=True, kw_only=True)
class OpenSoraFolder(HubFolder):
    """See the head of this file."""

    @classmethod
    def find(cls, path: str | Path, *, repository: str, model: str) -> Self:
        """The folder that ``model.path`` means.

        Raises:
            ValueError: It has no transformer/config.json.
        """
        folder = Path(path).expanduser()
        if not (folder / "transformer" / "config.json").is_file():
            empty = not folder.is_file() and not (folder.is_dir() and any(folder.iterdir()))
            raise ValueError(
                f"model.path={path} is no folder with transformer/config.json; "
                f"{how_to_download(path if empty else 'FOLDER')}"
            )
        return cls(path=folder, repository=repository, model=model)

    def remedy(self, part: str) -> str:
        """The remedy when something of a part, such as vae, is not there, for messages."""
        name, _, files = part.partition("/")
        if name in _REPOSITORIES:
            return f"get it with `hf download {_REPOSITORIES[name]} --include '{files}' --local-dir {self.path / name}`"
        return f"get it with `hf download {TEXT_REPOSITORY} --include '{part}' --local-dir {self.path}`"

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a configuration; that of an own part as arguments of its class, with its name as ``_class_name``."""
        if name == "model_index.json" and not (self.path / name).is_file():
            return {"_class_name": "OpenSora"}
        content = super().read_json(name)
        kind, read_arguments = _OWN.get(name.removesuffix("/config.json"), (None, None))
        named = content.get("_class_name") or (content.get("architectures") or [None])[0]
        if kind is None or read_arguments is None or named != kind:
            return content
        try:
            arguments = read_arguments({key: value for key, value in content.items() if not key.startswith("_")})
        except ValueError as error:
            raise ValueError(f"{self.path / name}: {error}") from error
        return {"_class_name": kind, **arguments}

    def read_config(self, component: str) -> dict[str, Any]:
        """A component's configuration; the scheduler's is none of a folder's, and the VAE's has its channels."""
        if component == "scheduler":
            return {}
        config = super().read_config(component)
        if config.get("_class_name") == _VAE:
            config["latent_channels"] = len(config.get("latent_shift", SHIFT))
        return config

    def _check(self, content: Mapping[str, Any], *, name: str) -> None:
        if name.removesuffix("/config.json") in _OWN:
            content = {key: value for key, value in content.items() if key != "auto_map"}
            check_config(content, file=self.path / name)
        else:
            super()._check(content, name=name)

    def load(self, component: str, model_class: type[Any], *, dtype: torch.dtype) -> nn.Module:
        """Load a component's weights strictly; see the base class. An own part's tensors have the published names."""
        if component not in _OWN:
            return super().load(component, model_class, dtype=dtype)
        remedy = self.remedy(f"{component}/*")
        config = self.read_json(f"{component}/config.json")
        if (named := config.pop("_class_name", None)) != model_class.__name__:
            raise ValueError(f"{self.path / component} holds a {named}, needed is a {model_class.__name__}; {remedy}")
        files = self.weight_files(component)
        with torch.device("meta"):
            model: nn.Module = model_class(**config)
        kept = tuple(f"{name}." for name in getattr(model_class, "_keep_in_fp32_modules", None) or ())
        state = {name: value for file in files for name, value in load_file(file).items()}
        expected = model.state_dict()
        for what, names in (
            ("missing", expected.keys() - state.keys()),
            ("unexpected", state.keys() - expected.keys()),
        ):
            if names:
                raise ValueError(
                    f"{self.path / component}: {len(names)} tensors are {what}, the first is {min(names)}; {remedy}"
                )
        for name, value in state.items():
            if value.shape != expected[name].shape:
                raise ValueError(
                    f"{self.path / component}: {name} has shape {list(value.shape)}, the model's is "
                    f"{list(expected[name].shape)}; {remedy}"
                )
            state[name] = value.to(torch.float32 if name.startswith(kept) else dtype)
        model.load_state_dict(state, strict=True, assign=True)
        check_finite_weights(model, files=files, remedy=remedy)
        return model.requires_grad_(False).eval()
