"""diffusers' nunchaku_lite (0.42): a folder that ``from_pretrained`` of the class loads, for SVDQuant's W4A4 kernels.

    config.json     the transformer's own, with "quantization_config": {"quant_method": "nunchaku_lite", "compute_dtype",
                    "svdq_w4a4": {"precision": "int4", "group_size": 64, "rank": R, "targets": [names of layers]}}
    diffusion_pytorch_model.safetensors
                    NAME.{qweight, wscales, smooth_factor, proj_down, proj_up, bias}, and all other weights

Rows and columns are multiples of 128: nothing is padded in this format. R is 16 at least, a branch of zeros where there is
none. Tensors, tiles and arithmetic are :mod:`qvgen.deploy.exporters.svdq_layer`'s. diffusers refuses it on Hopper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from qvgen.deploy.exporters.base import ExportedModel, ExportFile, Fit
from qvgen.deploy.exporters.diffusers_folder import diffusers_folder
from qvgen.deploy.exporters.svdq_layer import (
    BOUND,
    SvdqForm,
    check_branch,
    check_half_dtype,
    check_rank,
    svdq_fit,
    svdq_half_output,
    svdq_output,
)
from qvgen.deploy.exporters.svdq_tiles import FRAGMENT, GROUP, TILE
from qvgen.errors import UserError
from qvgen.layers.packed_linear import PackedLinear


@dataclass(frozen=True, kw_only=True)
class NunchakuLite:
    """The target; it implements :class:`qvgen.deploy.exporters.base.Exporter`.

    Attributes:
        dtype: Precision of scales, branches, biases and of all other weights: bfloat16 or float16.
        rank: Rank of the branch of every layer, a multiple of 16 that is no less than the trained one.
    """

    dtype: str
    rank: int

    runtime: ClassVar[str] = "diffusers (nunchaku_lite)"
    profiles: ClassVar[tuple[str, ...]] = ("svdq_g64",)
    needs_original_names: ClassVar[bool] = False
    bound: ClassVar[str] = BOUND

    def __post_init__(self) -> None:
        check_half_dtype(self.dtype)
        check_rank(self.rank, lowest=FRAGMENT)

    def fit(self, layer: PackedLinear) -> Fit:
        """Whether the layer's codes and inputs are the kernels'."""
        check_branch(layer, rank=self.rank)
        if layer.in_features % TILE or layer.out_features % TILE:
            shape = f"{layer.out_features} x {layer.in_features}"
            raise UserError(
                f"its shape {shape} is no multiple of {TILE}; leave it out of model.include, or use cache_dit"
            )
        return svdq_fit(layer, dtype=self.dtype)

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The kernels' tensors."""
        return SvdqForm(dtype=self.dtype, rank=self.rank).tensors(layer)

    def output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See :mod:`qvgen.deploy.exporters.svdq_layer`."""
        return svdq_output(tensors, x)

    def half_output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See :mod:`qvgen.deploy.exporters.svdq_layer`."""
        return svdq_half_output(tensors, x)

    def files(self, model: ExportedModel) -> list[ExportFile]:
        """The folder's two files."""
        scheme: dict[str, Any] = {"precision": "int4", "group_size": GROUP, "rank": self.rank}
        quantization = {
            "quant_method": "nunchaku_lite",
            "compute_dtype": self.dtype,
            "svdq_w4a4": {**scheme, "targets": list(model.layers)},
        }
        return diffusers_folder(model, model.all_tensors, quantization=quantization)
