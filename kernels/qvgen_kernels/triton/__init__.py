"""Kernels for GPUs in Triton: quantized rows times packed weights, and the epilogue, to the bit of kernels/README.md.

    layout     how weights are packed, and what their bytes mean
    rotate     Hadamard transform of rows
    quantize   rows to signed bytes, scales and sums
    unpack     bytes of weights to operands, in registers
    gemm       the product, tile by tile
    epilogue   sums to outputs
    tiles      launch parameters by card, shape and bits
    tuned      those that were measured, and where they are kept
    tune       measures them
    backend    the registered backend ``triton``

Fused fake quantization for training (qvgen_kernels.fake_quantize):

    fake_quantize   the grid of rows; rows to the operand of a product
    fake_gradient   straight-through gradients, in the CPU's order of additions
    fake_output     scales around the product
    fake_operators  the registered operators; fake_backend registers them for CUDA devices

Importing the package does not import Triton: what is missing is said by ``refusal``. The kernels' modules import it, and
then see whether TRITON_INTERPRET=1 asks for its interpreter.
"""

from qvgen_kernels.registry import register_backend
from qvgen_kernels.triton import fake_backend  # noqa: F401 - registers the operators
from qvgen_kernels.triton.backend import TritonBackend

__all__ = ["TritonBackend"]

register_backend(TritonBackend())
