"""The dequantized model as an ordinary one: it runs anywhere, for comparison. Inputs are not quantized there.

    layout=diffusers   config.json and diffusion_pytorch_model.safetensors or its shards, as ``from_pretrained`` loads them
    layout=original    one file with the names of the model's own code

A transformer that is a class of qvgen (Open-Sora's) is no diffusers folder: it is config.json and model.safetensors as its
authors publish them, which their code reads, and ``model.path`` as its folder ``transformer``.

Rotation, smoothing and branch are undone (:mod:`qvgen.deploy.exporters.plain_weight`), so a layer is y = x W^T + bias.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qvgen.deploy.exporters.base import (
    ExportedModel,
    ExportFile,
    Fit,
    add_bias,
    bias_tensor,
    cast,
    check_dtype,
)
from qvgen.deploy.exporters.diffusers_folder import diffusers_folder
from qvgen.deploy.exporters.original_file import original_file
from qvgen.deploy.exporters.plain_weight import plain_weight, weight_changes
from qvgen.deploy.transformer_class import transformer_class
from qvgen.errors import UserError
from qvgen.layers.packed_linear import PackedLinear

LAYOUTS = ("diffusers", "original")


@dataclass(frozen=True, kw_only=True)
class Bf16:
    """The target; it implements :class:`qvgen.deploy.exporters.base.Exporter`.

    Attributes:
        dtype: Precision of all weights: float32, bfloat16 or float16; None: as in the packed checkpoint, and float32 for the
            layers that were quantized.
        layout: ``diffusers`` (a folder; of a class of qvgen in the form of its authors), or ``original`` (one file with the
            names of the model's own code).
    """

    dtype: str | None
    layout: str

    takes_own_classes: ClassVar[bool] = True
    profiles: ClassVar[tuple[str, ...]] = ()
    bound: ClassVar[str] = "Inputs are not quantized: it shows what the weights alone cost."

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.layout not in LAYOUTS:
            raise UserError(f"export.layout={self.layout} is not among {', '.join(LAYOUTS)}")

    @property
    def runtime(self) -> str:
        """See :class:`qvgen.deploy.exporters.base.Target`."""
        return "diffusers" if self.layout == "diffusers" else "the model's own code (export.layout=original)"

    @property
    def needs_original_names(self) -> bool:
        """Whether its file has the names of the model's own code."""
        return self.layout == "original"

    def fit(self, layer: PackedLinear) -> Fit:
        """Every layer with one weight; of one whose widths change while sampling, the profile's own is written."""
        weight = ("weights whose widths change while sampling",) if weight_changes(layer) else ()
        return Fit(weight=weight, inputs=(), runs_as=f"w{layer.profile.weight.bits}", quantizes_inputs=False)

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The weight, dequantized, and the bias."""
        return {"weight": cast(plain_weight(layer), self.dtype), **bias_tensor(layer, self.dtype)}

    def output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """A plain product in float32."""
        return add_bias(x @ tensors["weight"].float().t(), tensors)

    def files(self, model: ExportedModel) -> list[ExportFile]:
        """The folder's files, or one."""
        if self.layout == "original":
            return [original_file(model, model.all_tensors)]
        kind = transformer_class(model.manifest.transformer)
        if (published := getattr(kind, "published_config", None)) is None:
            return diffusers_folder(model, model.all_tensors)
        config = published(model.manifest.transformer_config)
        text = json.dumps(config, indent=2) + "\n"
        weights = ExportFile(path="model.safetensors", content=model.all_tensors, metadata={"format": "pt"})
        return [ExportFile(path="config.json", content=text.encode()), weights]
