"""Kernels of a fatbin through CUDA's driver, by ctypes: loaded once per device, launched on torch's current stream."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from qvgen_kernels.cuda_int4.build import fatbin_path
from qvgen_kernels.cuda_int4.structures import THREADS
from qvgen_kernels.errors import KernelUnavailableError

__all__ = ["launch"]

_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""

_WITHOUT_ASKING = 48 << 10
"""Bytes of shared memory that a block gets without having asked for them."""


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelUnavailableError(f"CUDA's driver can't be loaded ({error}); install NVIDIA's driver") from error


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"error {code}"
        raise RuntimeError(f"{what} of kernel=cuda_int4 failed: {reason}")


@cache
def _module(device: int) -> ctypes.c_void_p:
    """The kernels in the device's context, which is torch's own."""
    del device  # the key; the caller has made it the current one
    module = ctypes.c_void_p()
    image = fatbin_path().read_bytes()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), image), "loading the kernels")
    return module


@cache
def _function(device: int, name: str, shared: int) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    found = _driver().cuModuleGetFunction(ctypes.byref(function), _module(device), name.encode())
    _check(found, f"looking for {name}")
    if shared > _WITHOUT_ASKING:
        found = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared)
        _check(found, f"{shared} bytes of shared memory for {name}")
    return function


def launch(device: torch.device, name: str, argument: ctypes.Structure, *, blocks: int, shared: int) -> None:
    """Start a kernel on torch's current stream; nothing is waited for.

    Args:
        device: Whose memory the argument points into.
        name: The kernel's.
        argument: Its one parameter, which is copied.
        blocks: Number of blocks of :data:`~qvgen_kernels.cuda_int4.structures.THREADS` threads.
        shared: Bytes of shared memory of each.

    Raises:
        RuntimeError: the driver refused it.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        index = torch.cuda.current_device()
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        function = _function(index, name, shared)
        sizes = (blocks, 1, 1, THREADS, 1, 1, shared)
        _check(
            _driver().cuLaunchKernel(function, *sizes, ctypes.c_void_p(stream), parameters, None), f"starting {name}"
        )
