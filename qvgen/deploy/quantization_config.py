"""The quantization method "qvgen" of diffusers: its configuration. Importing this module makes it known to diffusers.

from_pretrained(FOLDER)                        config.json holds a QvgenConfig with the packed layers: they are loaded
from_pretrained(..., quantization_config=      a full-precision folder: its Linears are quantized when its weights are
    QvgenConfig(bits=4, init="mse"))           loaded, by a method that needs no data
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import import_module
from typing import Any, Self

from diffusers.quantizers import auto
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

METHOD = "qvgen"


class QvgenMethod(str, Enum):  # noqa: UP042 - diffusers' own methods are of these two types
    """Name of the method, as diffusers asks for it: a string and a member of an enumeration."""

    QVGEN = METHOD


class QvgenConfig(QuantizationConfigMixin):  # type: ignore[misc] # diffusers has no types
    """How diffusers quantizes a transformer, or what is packed in a folder.

    Args:
        bits: 2..8, or "wXaY" for weights and activations apart.
        profile: Name of a file of conf/profile, or a :class:`~qvgen.quant.grid.Profile` (then without ``bits``).
        init: Name of a file of conf/init, or an object of one's own; a method that needs no calibration.
        include: Name patterns (fnmatch) of the Linears to quantize; None: those in the model's repeated blocks.
        exclude: Name patterns of those to leave alone.
        num_noise_bands: Equal bands of the timestep with clip factors of their own.
        manifest: The packed layers of a folder; diffusers gives it, nobody writes it by hand.

    Raises:
        ValueError: Neither bits, nor a profile with bits, nor a manifest.
    """

    def __init__(
        self,
        *,
        bits: int | str | None = None,
        profile: Any = "paper",
        init: Any = "mse",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        num_noise_bands: int = 50,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        if manifest is None and bits is None and isinstance(profile, str):
            raise ValueError(
                "QvgenConfig needs bits; write for example QvgenConfig(bits=4) or QvgenConfig(bits='w4a8')"
            )
        self.quant_method = QvgenMethod.QVGEN
        self.bits, self.profile, self.init = bits, profile, init
        self.include, self.exclude, self.num_noise_bands = include, exclude, num_noise_bands
        self.manifest = manifest

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the ``quantization_config`` of a config.json; nothing else than what :meth:`to_dict` writes is taken.

        Raises:
            ValueError: An unknown key, or what the class refuses.
        """
        values = {key: value for key, value in config_dict.items() if key != "quant_method"}
        known = {"bits", "profile", "init", "include", "exclude", "num_noise_bands", "manifest"}
        if unknown := sorted(map(str, set(values) - known)):
            raise ValueError(f"quantization_config has {unknown[0]!r:.80}, which the method {METHOD!r} does not have")
        if values.get("manifest") is None and values.get("bits") is None:
            raise ValueError("quantization_config of config.json has no packed layers; export the checkpoint again")
        config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json; an object of one's own is written as its repr, for the record."""
        if self.manifest is not None:
            return {"quant_method": METHOD, "manifest": json.loads(json.dumps(self.manifest))}
        named = {key: value if isinstance(value, str) else repr(value) for key, value in self._parts().items()}
        return {
            "quant_method": METHOD, "bits": self.bits, **named, "num_noise_bands": self.num_noise_bands,
            "include": None if self.include is None else list(self.include), "exclude": list(self.exclude),
        }  # fmt: skip

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: every value is worth reading."""
        return self.to_dict()

    def _parts(self) -> dict[str, Any]:
        return {"profile": self.profile, "init": self.init}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing changes one; diffusers copies a model's configuration again and again

    def __repr__(self) -> str:
        if isinstance(self.manifest, Mapping):  # which diffusers may print before anyone has checked it
            return f"QvgenConfig(manifest={sorted(map(str, self.manifest))})"
        return f"QvgenConfig(bits={self.bits!r}, profile={self.profile!r}, init={self.init!r})"


class _LazyQuantizer:
    """Stands for the quantizer in diffusers' dictionary until one is made: its imports are those of the whole room."""

    def __new__(cls, quantization_config: QvgenConfig, **kwargs: Any) -> Any:
        return import_module("qvgen.deploy.quantizer").QvgenQuantizer(quantization_config, **kwargs)


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QvgenConfig
auto.AUTO_QUANTIZER_MAPPING[METHOD] = _LazyQuantizer
