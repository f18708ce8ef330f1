"""ONNX Runtime's linears as peers of ``benchmark kernels``; float32 in and out, which its CPU operators ask for.

- ``MatMulNBits`` of com.microsoft with accuracy_level=4: weights of 4 bits with a symmetric scale for each block of K, inputs
  quantized to int8 for each block too, products in int8. (Without accuracy_level it dequantizes to float32.)
- ``DynamicQuantizeLinear`` + ``MatMulInteger`` + scales, which the runtime fuses into ``DynamicQuantizeMatMul``: 8-bit
  weights with a scale for each output channel, 8-bit inputs with one scale for all tokens. Signed weights: unsigned ones take
  twice as long on AVX-512 VNNI. Without VNNI sums of two products saturate, so weights have 7 bits there, as its manual
  advises (``reduce_range``): with 8 the error was twice as large (3.1 % for 1.6, tests/verbs/benchmarks/test_kernels.py).

Sessions have the threads of the benchmark, whose workers stop spinning when a call ends, and no arena, so that
each call's output is fresh memory as all others' are. Inputs and outputs are OrtValues: nothing is copied.

Sources: the operators' texts in https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md; threads:
https://onnxruntime.ai/docs/performance/tune-performance/threading.html.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qvgen.verbs.benchmarks.kernels.timing import Candidates

MODULES = ("onnxruntime", "onnx")
"""What is imported here; the first one knows its version."""
BLOCKS = (32, 128)
"""Weights of one scale in MatMulNBits: the usual size, and the fastest."""
OPSET = 21
"""Of the graphs; 20 has Gelu."""


def onnx_candidates(x: Tensor, weights: Sequence[Tensor], threads: int) -> Candidates:
    """ONNX Runtime's ways to this linear, or to this feed-forward with GELU (tanh).

    Args:
        x: bf16 [rows, in_features]; its candidates read a float32 copy.
        weights: bf16 [out_features, in_features] of each layer, one or two.
        threads: of each session.

    Raises:
        ImportError: onnxruntime or onnx is not installed.
    """
    import onnxruntime

    value = onnxruntime.OrtValue.ortvalue_from_numpy(x.float().numpy())
    candidates = {
        f"ONNX Runtime MatMulNBits W4A8 blocks of {block} (float32)": _session(
            [_Blocks(weight, block) for weight in weights], value, threads
        )
        for block in BLOCKS
    }
    candidates["ONNX Runtime dynamic W8A8 per tensor (float32)"] = _session(
        [_Dynamic(weight) for weight in weights], value, threads
    )
    return candidates


class _Blocks:
    """MatMulNBits. K is filled up with zeros to whole blocks."""

    def __init__(self, weight: Tensor, block: int) -> None:
        outputs, self.columns = weight.shape
        self.outputs, self.block = outputs, block
        padded = torch.nn.functional.pad(weight.float(), (0, -self.columns % block)).view(outputs, -1, block)
        # the element of the largest magnitude gets code 0 or, where it is zero, nothing does: all 16 codes are in use
        largest = padded.gather(2, padded.abs().argmax(2, keepdim=True))
        scale = largest / -8
        codes = torch.where(scale == 0, 8, (padded / scale).round() + 8).clamp(0, 15).to(torch.uint8)
        self.packed = codes[..., 0::2] | codes[..., 1::2] << 4
        self.scale = scale.squeeze(2)

    def nodes(self, source: str, target: str) -> tuple[list[Any], dict[str, Tensor]]:
        from onnx import helper

        attributes = {
            "K": self.columns,
            "N": self.outputs,
            "bits": 4,
            "block_size": self.block,
            "accuracy_level": 4,
        }
        names = {f"{target}_codes": self.packed, f"{target}_scale": self.scale}
        return [
            helper.make_node("MatMulNBits", [source, *names], [target], domain="com.microsoft", **attributes)
        ], names


class _Dynamic:
    """Per-tensor dynamic inputs, per-channel weights."""

    def __init__(self, weight: Tensor) -> None:
        wide = weight.float()
        self.scale = wide.abs().amax(1).clamp(min=1e-12) / (127 if torch.cpu._is_vnni_supported() else 63)
        self.codes = (wide / self.scale[:, None]).round().to(torch.int8).t().contiguous()

    def nodes(self, source: str, target: str) -> tuple[list[Any], dict[str, Tensor]]:
        from onnx import TensorProto, helper

        part = {
            name: f"{target}_{name}" for name in ("codes", "zero", "scale", "x", "x_scale", "x_zero", "sum", "f", "s")
        }
        nodes = [
            helper.make_node("DynamicQuantizeLinear", [source], [part["x"], part["x_scale"], part["x_zero"]]),
            helper.make_node("MatMulInteger", [part["x"], part["codes"], part["x_zero"], part["zero"]], [part["sum"]]),
            helper.make_node("Cast", [part["sum"]], [part["f"]], to=TensorProto.FLOAT),
            helper.make_node("Mul", [part["x_scale"], part["scale"]], [part["s"]]),
            helper.make_node("Mul", [part["f"], part["s"]], [target]),
        ]
        zero = torch.zeros((), dtype=torch.int8)
        return nodes, {part["codes"]: self.codes, part["zero"]: zero, part["scale"]: self.scale}


def _session(layers: Sequence[_Blocks | _Dynamic], x: Any, threads: int) -> Callable[[], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(_model(layers, x.shape()), options, providers=["CPUExecutionProvider"])

    def run() -> Tensor:
        (output,) = session.run_with_ort_values(None, {"x": x})
        return torch.from_dlpack(output)

    return run


def _model(layers: Sequence[_Blocks | _Dynamic], shape: Sequence[int]) -> bytes:
    """The graph x -> y: the layers with GELU between."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    tensors: dict[str, Tensor] = {}
    source = "x"
    for index, layer in enumerate(layers):
        if index > 0:
            nodes.append(helper.make_node("Gelu", [source], [f"gelu{index}"], approximate="tanh"))
            source = f"gelu{index}"
        target = "y" if layer is layers[-1] else f"layer{index}"
        added, parameters = layer.nodes(source, target)
        nodes += added
        tensors |= parameters
        source = target
    rows = shape[0]
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, None])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
