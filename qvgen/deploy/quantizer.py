"""The quantizer that diffusers calls while it loads a transformer: packed layers of a folder, or made on the fly.

    config.json --> skeleton of the class on the meta device (diffusers) --> packed layers in it, names, types and shapes
    compared with the headers of the files --> tensors, each as the file has it --> values checked --> blocks fused

diffusers casts floating tensors to ``torch_dtype`` before a quantizer sees them, which would round float32 scales; so the
tensors of packed layers are taken from the file's own mapping. What :func:`qvgen.load_packed` refuses is refused here. Once
this module is imported, the skeleton is built from numbers that :mod:`qvgen.deploy.skeleton_check` has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from qvgen.deploy.manifest import Manifest
from qvgen.deploy.on_the_fly import OnTheFly, quantize_
from qvgen.deploy.packed_file import TensorForm, read_header
from qvgen.deploy.packed_fusion import fuse_packed_, prepack_
from qvgen.deploy.packed_model import (
    AS_STORED,
    check_bytes,
    check_range,
    check_skipped,
    check_tensors,
    put_packed_layers_,
)
from qvgen.deploy.packed_record import (
    CONFIG_FILE,
    describe,
    from_quantization_config,
    plain_config,
    to_quantization_config,
)
from qvgen.deploy.prepacked_copies import watch_copies_
from qvgen.deploy.quantization_config import QvgenConfig
from qvgen.deploy.size_check import DAMAGED
from qvgen.deploy.skeleton_check import check_before_building
from qvgen.deploy.transformer_class import check_can_save
from qvgen.quant.finite import check_finite


class QvgenQuantizer(DiffusersQuantizer):  # type: ignore[misc] # diffusers has no types
    """The quantizer that diffusers calls, in this order: for arguments, files, layers, each tensor, and at the end.

    Attributes:
        use_keep_in_fp32_modules: diffusers keeps the modules in float32 that the class asks for, as without a quantizer.
    """

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: QvgenConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: list[Path] = []
        self._placed: set[str] = set()
        self._is_spread = False
        self._plan: OnTheFly | None = None
        if not self.pre_quantized:
            if quantization_config.manifest is not None:
                raise ValueError("this QvgenConfig is of a packed folder; write QvgenConfig(bits=...) for this one")
            self._plan = OnTheFly.of(quantization_config)
        elif quantization_config.manifest is None:
            raise ValueError(
                "the quantization_config of config.json has no packed layers; export the checkpoint again, or quantize a "
                "full-precision folder by from_pretrained(..., quantization_config=QvgenConfig(bits=4))"
            )

    def validate_environment(self, *, device_map: Any = None, torch_dtype: Any = None, **_: Any) -> None:
        """Refuse places that packed tensors can't be put in; called with what the user gave, and with what it came to.

        Raises:
            ValueError: A place on disk, or a dtype of 8 bits.
        """
        places = {str(place) for place in device_map.values()} if isinstance(device_map, Mapping) else set()
        if "disk" in places:
            raise ValueError(
                "device_map puts layers on disk, where diffusers would round their scales; raise max_memory, or load on the "
                "CPU and call enable_model_cpu_offload()"
            )
        if isinstance(torch_dtype, torch.dtype) and torch_dtype.itemsize < 2:
            raise ValueError(f"torch_dtype={torch_dtype} is no type to compute in; use torch.bfloat16")
        self._is_spread = len(places) > 1

    def adjust_target_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype by which ``device_map="auto"`` counts memory: codes and scales are counted as they are."""
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Take note of the files of weights; the names are compared with their headers later.

        Raises:
            ValueError: They are no safetensors files.
        """
        self._files = [Path(file) for file in checkpoint_files]
        other = [file for file in self._files if file.suffix != ".safetensors"]
        if other and self._plan is None:
            raise ValueError(f"{other[0]} is no safetensors file, the only kind that packed weights are read from")
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        if self._plan is not None:
            self._plan.check(model)
            return
        source = self._source
        header = _merged_headers(self._files)
        manifest = self._manifest(model)
        if type(model).__name__ != manifest.transformer:
            raise ValueError(
                f"{source} is of {manifest.transformer}, not of {type(model).__name__}; load it with that class"
            )
        put_packed_layers_(model, manifest, kernel="auto", source=source)
        check_tensors(model, header, source=self._files[0])
        check_skipped(model, manifest, source=source)
        check_bytes(model, manifest, source=source)

    @property
    def _source(self) -> Path:
        return self._files[0].parent / CONFIG_FILE if self._files else Path(CONFIG_FILE)

    def _manifest(self, model: nn.Module) -> Manifest:
        return from_quantization_config(self.quantization_config, plain_config(model), source=str(self._source))

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse what diffusers only warns of: a tensor that no file has would keep random values.

        Raises:
            ValueError: Names the first one.
        """
        del model, prefix
        if missing_keys and self._plan is None:
            raise ValueError(f"{self._source}: the weights lack the tensor {sorted(missing_keys)[0]!r}; {DAMAGED}")
        return missing_keys

    def check_if_quantized_param(self, *_: Any, **__: Any) -> bool:
        """Whether :meth:`create_quantized_param` places a tensor: all of a packed folder's."""
        return self._plan is None

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *further: Any, **options: Any
    ) -> None:
        """Put a tensor in its place: as the file has it in a packed layer, as diffusers casts it elsewhere.

        Raises:
            ValueError: Its values are not finite or not in their range.
        """
        stored: Tensor = further[0][param_name]
        prefix, _, name = param_name.rpartition(".")
        module = model.get_submodule(prefix)
        value = stored if isinstance(module, AS_STORED) or options.get("dtype") is None else param_value
        check_finite([(param_name, value)], source=str(self._source), remedy=DAMAGED)
        if isinstance(module, AS_STORED):
            check_range(module, name, value, shown=param_name, source=self._source)
        value = value.to(target_device)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[name] = value
        self._placed.add(param_name)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        if self._plan is not None:
            quantize_(model, self._plan)
            manifest = describe(model, training={"init": self._plan.init_name, "method": "ptq"})
        else:
            if left := sorted(set(model.state_dict()) - self._placed):
                raise ValueError(
                    f"{left[0]!r} went through a file on disk, which rounds scales; leave offload_state_dict out"
                )
            manifest = self._manifest(model)
        model.requires_grad_(False).eval()
        if not self._is_spread:  # the hooks of accelerate are on blocks that fusing would replace
            fuse_packed_(model)
            prepack_(model)
        become_packed_(model, manifest)
        self.quantization_config, self.pre_quantized = model.config["quantization_config"], True

    @property
    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the packed tensors, and config.json says what they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` takes the layers whole."""
        return True


check_before_building()


def become_packed_(model: nn.Module, manifest: Manifest) -> None:
    """Let a packed transformer be what diffusers calls quantized: ``save_pretrained`` writes what it is.

    Its ``is_quantized`` stays off: diffusers refuses ``.to(torch.bfloat16)`` by it, which packed layers stand.
    """
    config = to_quantization_config(manifest)
    watch_copies_(model)
    model.register_to_config(quantization_config=config)  # type: ignore[operator]
    model.is_quantized = False  # type: ignore[assignment]
    model.quantization_method = config.quant_method
    if not isinstance(getattr(model, "hf_quantizer", None), QvgenQuantizer):
        model.hf_quantizer = QvgenQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    for name in ("load_lora_adapter", "add_adapter"):
        if hasattr(model, name):
            setattr(model, name, _refuse_lora)


def say_packed_(model: nn.Module) -> None:
    """Do what :func:`become_packed_` does for a model that was folded here, where it is one of diffusers' own classes."""
    try:
        check_can_save(model)
    except ValueError:
        return  # a class of one's own: its save_pretrained, if it has any, is its own
    become_packed_(model, describe(model))


def _refuse_lora(*_: Any, **__: Any) -> None:
    raise ValueError(
        "a LoRA can't be put on packed layers, whose weights are integer codes; merge it into the full-precision weights and "
        "quantize those: qvgen ptq (or train) model=... model.path=... model.lora=FILE"
    )


def _merged_headers(files: list[Path]) -> dict[str, TensorForm]:
    """Names, types and shapes of all shards' tensors; raises ValueError where two of them have one name."""
    merged: dict[str, TensorForm] = {}
    for file in files:
        header = read_header(file)
        if twice := sorted(set(merged) & set(header)):
            raise ValueError(f"{file} holds {twice[0]!r}, which another shard beside it holds too; {DAMAGED}")
        merged |= header
    return merged
