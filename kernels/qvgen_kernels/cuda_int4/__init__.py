"""The backend ``cuda_int4``: 4-bit tensor cores of sm_75 and sm_8x, in CUDA C++ (csrc/cuda) that nvcc builds at first use."""

from qvgen_kernels.cuda_int4.backend import CudaInt4Backend
from qvgen_kernels.registry import register_backend

register_backend(CudaInt4Backend())
