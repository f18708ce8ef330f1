"""cache-dit's svdq_int4 directory, and the folded diffusers folder that its tensors are loaded into.

    svdq/svdq_int4_rR.safetensors   NAME.{qweight, wscales, smooth_factor, smooth_factor_orig, proj_down, proj_up, bias}; its
                                    header says cache_dit_svdq_ptq = JSON {format, version 2, quant_type, rank, layers}
    svdq/quant_config.json          {format "cache_dit_svdq_quant_config", version 2, ...}
    transformer/                    config.json and weights: training changed norms and biases too, so the published folder
                                    would be another model; the layers above replace the quantized ones in it

In Python: ``cache_dit.load(WanTransformer3DModel.from_pretrained("OUT/transformer"), "OUT/svdq")``. Tensors, tiles and
arithmetic are :mod:`qvgen.deploy.exporters.svdq_layer`'s. Runs on sm_80, 86, 89 and Blackwell, not on Hopper.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from qvgen.deploy.exporters.base import DTYPES, ExportedModel, ExportFile, Fit
from qvgen.deploy.exporters.diffusers_folder import diffusers_folder
from qvgen.deploy.exporters.plain_weight import plain_weight
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
from qvgen.deploy.exporters.svdq_tiles import unpack_vector
from qvgen.layers.packed_linear import PackedLinear

FOLDED = "folded_weight"
"""End of the name of a layer's dequantized weight, which goes into the folder of the transformer."""


@dataclass(frozen=True, kw_only=True)
class CacheDit:
    """The target; it implements :class:`qvgen.deploy.exporters.base.Exporter`.

    Attributes:
        dtype: Precision of scales, branches, biases and of all other weights: bfloat16 or float16.
        rank: Rank of the branch of every layer, 0 or a multiple of 16 that is no less than the trained one.
    """

    dtype: str
    rank: int

    runtime: ClassVar[str] = "cache-dit (svdq_int4)"
    profiles: ClassVar[tuple[str, ...]] = ("svdq_g64",)
    needs_original_names: ClassVar[bool] = False
    bound: ClassVar[str] = BOUND

    def __post_init__(self) -> None:
        check_half_dtype(self.dtype)
        check_rank(self.rank, lowest=0)

    def fit(self, layer: PackedLinear) -> Fit:
        """Whether the layer's codes and inputs are the kernels'."""
        check_branch(layer, rank=self.rank)
        return svdq_fit(layer, dtype=self.dtype)

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The kernels' tensors, and the dequantized weight for the folder."""
        tensors = SvdqForm(dtype=self.dtype, rank=self.rank).tensors(layer)
        tensors["smooth_factor_orig"] = tensors["smooth_factor"].clone()
        return {**tensors, FOLDED: plain_weight(layer).to(DTYPES[self.dtype])}

    def output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See :mod:`qvgen.deploy.exporters.svdq_layer`."""
        return svdq_output(tensors, x)

    def half_output(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See :mod:`qvgen.deploy.exporters.svdq_layer`."""
        return svdq_half_output(tensors, x)

    def files(self, model: ExportedModel) -> list[ExportFile]:
        """The directory's two files and those of the folder."""
        quant_type, names = f"svdq_int4_r{self.rank}", list(model.layers)
        packed = {
            f"{name}.{end}": tensor
            for name, ends in model.layers.items()
            for end, tensor in ends.items()
            if end != FOLDED
        }
        header = {"format": "cache_dit_svdq_ptq", "version": 2, "quant_type": quant_type, "rank": self.rank}
        header |= {"precision": "int4", "quantized_layer_names": names, "svdq_kwargs": {}}
        weights = f"{quant_type}.safetensors"
        config: dict[str, Any] = {
            "format": "cache_dit_svdq_quant_config",
            "version": 2,
            "backend": "cache_dit",
            "quant_type": quant_type,
            "rank": self.rank,
            "checkpoint_path": weights,
            "exclude_layers": [],
            "regional_quantize": False,
            "repeated_blocks": None,
            "verbose": False,
            "svdq_kwargs": {},
        }
        return [
            *diffusers_folder(model, self._folded(model), below="transformer/"),
            ExportFile(
                path=f"svdq/{weights}",
                content=packed,
                metadata={"cache_dit_svdq_ptq": json.dumps(header, sort_keys=True)},
            ),
            ExportFile(path="svdq/quant_config.json", content=(json.dumps(config, indent=2) + "\n").encode()),
        ]

    @staticmethod
    def _folded(model: ExportedModel) -> dict[str, Tensor]:
        """All weights of the ordinary transformer; biases of quantized layers are taken over from what was packed."""
        folded = dict(model.rest)
        for name, ends in model.layers.items():
            folded[f"{name}.weight"] = ends[FOLDED]
            if "bias" in ends:
                folded[f"{name}.bias"] = unpack_vector(ends["bias"])[: ends[FOLDED].shape[0]]
        return folded
