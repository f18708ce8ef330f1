"""A program that gives an export to humming's schemas, packer and reference quantizer, on the CPU; prints JSON.

humming_program.py PACKED OUT WORKING_FOLDER

Its package can't be imported whole without a GPU's libraries (triton, cuda-bindings), and its operators are GPU kernels. So
it is entered without ``__init__``, with an empty ``humming.ops``; what is used here calls none of them: the two schemas, the
layer's configuration, the check and padding of tensors before the kernels, and the reference of the input quantizer. The
packing of codes is a function of C++ in its sources that has nothing of a GPU: it is compiled for the CPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qvgen.deploy.checkpoint import load_packed
from qvgen.layers.swap import packed_layers

SPEC = importlib.util.find_spec("humming")
assert SPEC is not None
assert SPEC.submodule_search_locations is not None
FOLDER = Path(SPEC.submodule_search_locations[0])

PACKER = """
#include <cstdint>
#include <cstddef>
#define CUDA_INLINE static inline
#define PRAGMA_UNROLL
#define PRAGMA_UNROLL_COUNT(n)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define __global__ static
struct Index { unsigned x; };
static Index blockIdx, threadIdx;
#include <humming/kernel/pack_weight.cuh>
extern "C" void pack(uint32_t *codes, uint32_t *words, int64_t count) {
  for (int64_t i = 0; i < count; i += 32) common_pack_weight<BITS>(codes + i, words + i / 32 * BITS);
}
"""


def enter_package() -> None:
    """Make ``humming`` importable without what needs a GPU."""
    package, operators, testing = (ModuleType(name) for name in ("humming", "humming.ops", "humming.testing"))
    package.__path__, testing.__path__ = [str(FOLDER)], [str(FOLDER / "testing")]
    package.ops = operators  # type: ignore[attr-defined]
    sys.modules |= {module.__name__: module for module in (package, operators, testing)}
    from humming.device import current_device

    current_device._value = SimpleNamespace(is_ppu=False, sm_version=90, sm_major=9, sm_minor=0, index=0)


def packed_by_humming(codes: Tensor, bits: int, working: Path) -> Tensor:
    """Words of unsigned codes [N, K] by humming's own function."""
    stub = working / "humming" / "utils"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "all.cuh").write_text("")
    source, library = working / f"pack{bits}.cpp", working / f"pack{bits}.so"
    source.write_text(PACKER)
    includes = [f"-I{working}", f"-I{FOLDER / 'include'}"]
    command = [
        "g++",
        "-O1",
        "-std=c++17",
        "-shared",
        "-fPIC",
        f"-DBITS={bits}",
        *includes,
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    given, words = codes.to(torch.int32).contiguous(), torch.zeros(codes.numel() * bits // 32, dtype=torch.int32)
    pack = ctypes.CDLL(str(library)).pack
    pack(ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(words.data_ptr()), ctypes.c_int64(codes.numel()))
    return words.reshape(codes.shape[0], -1)


def layer_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration of one layer, as vLLM and SGLang derive it from the whole one."""
    for pattern, changes in config.get("dynamic", {}).items():
        if pattern.startswith("+:") and re.match(pattern[2:], name):
            return {**config, **changes}
    return config


def is_skipped(config: dict[str, Any], name: str) -> bool:
    """Whether they leave a module as it is."""
    negative = [pattern[2:] for pattern in config.get("dynamic", {}) if pattern.startswith("-:")]
    return any(part in name for part in config["modules_to_not_convert"]) or any(re.match(p, name) for p in negative)


KERNEL_STEPS = (
    "fmaxf(maximum / target_maximum<TargetType>(), 1e-30f)",
    "dynamic_multiplier = 1.f / scale;",
    "values[value] *= dynamic_multiplier;",
    "cvt.rni.s32.f32",  # rounds to nearest, halves to even
    "cvt.pack.sat.s8.s32",
)
"""The steps of humming's input quantizer, as its kernel writes them; it is compiled without fast mathematics."""


def kernel_steps() -> bool:
    """Whether the kernel of the input quantizer has all of them."""
    kernel = (FOLDER / "include" / "humming" / "kernel" / "process_input" / "quantization.cuh").read_text()
    compiled = (FOLDER / "kernel" / "process_input.py").read_text()
    return all(step in kernel for step in KERNEL_STEPS) and "disable_fast_math: ClassVar[bool] = True" in compiled


def same_inputs(x: Tensor, codes: Tensor) -> dict[str, Any]:
    """Our codes of inputs against humming's reference, which divides where its kernel multiplies by 1 / scale."""
    from humming.testing import process_input

    theirs, _, scale = process_input.quant_input_ref(x, "dynamic_token", "int8")
    return {
        "scales": torch.equal(scale, x.abs().amax(-1, keepdim=True) / torch.tensor(127.0)),
        "codes_of_the_kernels_steps": torch.equal((x * (1 / scale)).round().clamp(-128, 127).to(torch.int8), codes),
        "codes_differ": float((theirs != codes).float().mean()),
        "codes_by": int((theirs.int() - codes.int()).abs().max()),
    }


def main(packed: Path, out: Path, working: Path) -> dict[str, Any]:
    """Take all layers through humming's loading."""
    from humming.config import LayerConfig
    from humming.schema import BaseInputSchema, BaseWeightSchema
    from humming.transform import check_and_pad_tensors

    tensors = load_file(out / "diffusion_pytorch_model.safetensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    model = load_packed(packed, kernel="reference")
    layers = dict(packed_layers(model))
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found: dict[str, Any] = {"layers": 0, "words_equal": True, "padded": True, "compatible": True}
    found |= {"inputs": [], "dtypes": set(), "kernel_steps": kernel_steps()}
    found["skipped"] = [name for name in layers if is_skipped(config, name)]
    found["not_skipped"] = [name for name in linears if not is_skipped(config, name)]
    for name, layer in layers.items():
        own = layer_config(config, name)
        weight, inputs = BaseWeightSchema.from_config(own), BaseInputSchema.from_config(own)
        mine = {end: tensors[f"{name}.{end}"] for end in ("weight", "weight_scale", "bias")}
        rows, columns = layer.out_features, layer.in_features
        weight.validate_tensors(mine, rows, columns, torch.bfloat16, has_bias=True)
        assert weight.infer_shape(mine) == (rows, columns, None, True)
        layout = LayerConfig(
            sm_version=89, shape_n=rows + -rows % 256, shape_k=columns + -columns % 128, pad_shape_n=-rows % 256,
            pad_shape_k=-columns % 128, a_dtype=inputs.a_dtype, b_dtype=weight.b_dtype, c_dtype="bfloat16",
            bs_dtype=weight.bs_dtype, as_dtype=inputs.input_scale_dtype, input_quant_mode=inputs.input_quant_mode,
            input_scale_group_size=inputs.input_scale_group_size, weight_scale_type=weight.weight_scale_type,
            weight_scale_group_size=weight.weight_scale_group_size, has_zero_point=weight.has_zero_point, has_bias=True,
        )  # fmt: skip
        padded = check_and_pad_tensors(layout, mine)
        bits = layer.profile.weight.bits
        unsigned = layer.integer_codes().to(torch.int16) + 2 ** (bits - 1)
        found["words_equal"] &= torch.equal(mine["weight"], packed_by_humming(unsigned, bits, working))
        found["compatible"] &= weight.is_compatible_with(inputs, torch.bfloat16)
        found["padded"] &= list(padded["weight"].shape) == [layout.shape_n, layout.shape_k * bits // 32]
        found["dtypes"].add(
            (str(layout.a_dtype), str(layout.b_dtype), str(layout.bs_dtype), layout.input_quant_mode.value)
        )
        x = torch.randn(1, 64, columns, generator=torch.Generator().manual_seed(columns)).bfloat16().float()
        found["inputs"].append(same_inputs(x[0], layer.input_codes(x)))
        found["layers"] += 1
    return {**found, "dtypes": sorted(found["dtypes"])}


if __name__ == "__main__":
    enter_package()
    with torch.no_grad():
        print(
            json.dumps(
                [main(Path(a), Path(b), Path(sys.argv[1])) for a, b in zip(sys.argv[2::2], sys.argv[3::2], strict=True)]
            )
        )
