"""A product for Hopper (sm_90) in Gluon, beside the Triton kernels: it does not wait for the tensor cores in every chunk.

    layout     weights as signed bytes [N, K]
    ring       which stage of shared memory a chunk takes, and when it is free again
    gemm       the product: one warp copies chunks, eight multiply, the epilogue is Triton's
    tile       tiles that fit
    backend    the registered backend ``gluon``
    tune       measures its tiles

Compiled and looked at, its source run on the CPU by an emulation (tests/kernels/gluon_emulation.py), never on a card.
"""

from qvgen_kernels.gluon.backend import GluonBackend
from qvgen_kernels.registry import register_backend

__all__ = ["GluonBackend"]

register_backend(GluonBackend())
