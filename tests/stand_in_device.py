"""A device that is not the CPU and needs no hardware: what a GPU refuses is an error on it, so faults show in CI.

    with stand_in_device() as device: ...        tensors on it hold CPU memory; every operator that touches one is looked at

Errors: an operator over tensors of both devices (but CPU tensors without dimensions, which a GPU takes too); a float64
tensor, which not every device has; reading a value back (item, bool, nonzero), where a GPU would wait, unless
``reading_allowed()``, or ``noted_reads()``, which says who does it. Copies between devices have to be asked for (``to``,
``copy_``); torch.tensor(..., device=...) is an error too, as it hides one.

With ``late_copies()`` the device has streams, and a copy that is begun on one without waiting arrives when that stream is
waited for; until then its bytes are wrong.

The device is torch's PrivateUse1, set up for Python. Arithmetic is the CPU's, so results are compared to the bit.
It has no autocast, and FakeTensorMode and torch.compile do not know it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.is_nonzero.default}
_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten._copy_from.default}
_state = {"reads": False, "ready": False, "inside": False, "float64": False}


class StandIn(torch.Tensor):
    """A tensor on the device; ``elem`` has its values, on the CPU."""

    @staticmethod
    def __new__(cls, elem, *, requires_grad=False):
        if isinstance(elem, StandIn) or elem.device.type != "cpu":  # a Parameter's class, called with a new value
            return torch.nn.Parameter(elem, requires_grad=requires_grad)
        return torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, elem, *, requires_grad=False):
        if not isinstance(elem, StandIn):
            self.elem = elem

    def data_ptr(self):
        return self.elem.data_ptr()

    def untyped_storage(self):
        return self.elem.untyped_storage()

    def __deepcopy__(self, memo):
        made = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol):  # a file holds it as a CPU's tensor
        return self.elem.detach().__reduce_ex__(protocol)

    def tolist(self):
        _note_read(_aten._local_scalar_dense.default)
        return self.elem.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Operators that make a tensor on the device of nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _leaves(value, found):
    """Everything in an operator's arguments; they are lists of lists at most, and torch's own function is slow."""
    if isinstance(value, list | tuple):
        for item in value:
            _leaves(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _leaves(item, found)
    else:
        found.append(value)
    return found


def _changed(value, function):
    """An operator's arguments or results with each tensor replaced by what a function makes of it."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([_changed(item, function) for item in value])
    if isinstance(value, dict):
        return {name: _changed(item, function) for name, item in value.items()}
    return value


def _run(func, args, kwargs):
    leaves = _leaves((args, kwargs), [])
    here = [leaf for leaf in leaves if isinstance(leaf, StandIn)]
    asked = kwargs.get("device")
    target = torch.device(asked) if asked is not None else None
    if not here and (target is None or target.type != NAME):
        return func(*args, **kwargs)
    strangers = [
        leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, StandIn) and leaf.ndim
    ]
    if here and strangers and func not in _COPIES:
        raise RuntimeError(f"{func} mixes {NAME} and cpu: {[list(leaf.shape) for leaf in strangers]} is on the cpu")
    if here and (func in _READS or (target is not None and target.type == "cpu")):
        _note_read(func)
    plain = {name: value for name, value in kwargs.items() if name != "device"}
    if target is not None:
        plain["device"] = torch.device("cpu") if target.type == NAME else target
    inner_args, inner = _changed((args, plain), lambda leaf: leaf.elem if isinstance(leaf, StandIn) else leaf)
    result = func(*inner_args, **inner)
    if func is _aten._to_copy.default and not here and kwargs.get("non_blocking"):
        _delay(result)
    if func is _aten.copy_.default:
        return args[0]
    leaves_here = target.type == NAME if target is not None else True
    if func._schema.is_mutable and isinstance(result, torch.Tensor) and here:
        for leaf in here:
            if leaf.elem is result:
                return leaf
    return _changed(result, lambda leaf: _wrapped(leaf, func)) if leaves_here else result


def _delay(made):
    """Let the bytes of a copy arrive when the current stream is waited for."""
    stream = _Module.current_stream()
    if stream is not None and made.ndim:
        values = made.clone()
        made.view(torch.uint8).fill_(127)  # as numbers huge, as codes wrong
        stream.copies.append((made, values))


def _note_read(func):
    """An error, or a note of which function of qvgen reads a value, or copies a tensor, to the host."""
    if func in _READS and _state["reads"] is False:
        raise RuntimeError(f"{func} reads a value of a tensor on {NAME}, where a GPU would wait")
    if isinstance(_state["reads"], Counter):
        frame = sys._getframe()
        while frame is not None and "/qvgen/" not in frame.f_code.co_filename:
            frame = frame.f_back
        place = "outside" if frame is None else frame.f_code.co_qualname
        _state["reads"][place] += 1


def _wrapped(leaf, func):
    if isinstance(leaf, StandIn):
        return leaf
    if leaf.dtype == torch.float64 and not _state["float64"]:
        raise RuntimeError(f"{func} makes a float64 tensor, which {NAME} does not have")
    return StandIn(leaf)


class Stream:
    """Work that is not done before it is waited for; here only copies to the device are late."""

    def __init__(self):
        self.copies = []

    def synchronize(self):
        for made, values in self.copies:
            made.copy_(values)
        self.copies.clear()


class _Module:
    """What torch asks a device's module for; outside of the context there is no such device."""

    streams: ClassVar[list[Stream]] = []

    @classmethod
    def current_stream(cls):
        return cls.streams[-1] if cls.streams else None

    @classmethod
    @contextlib.contextmanager
    def stream(cls, stream):
        cls.streams.append(stream)
        try:
            yield
        finally:
            cls.streams.pop()

    @staticmethod
    def is_available():
        return _state["inside"]

    is_initialized = is_available

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def device_count():
        return int(_state["inside"])

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def empty_cache():
        pass

    @staticmethod
    def synchronize(device=None):
        pass

    @staticmethod
    def get_rng_state(device=0):
        return torch.zeros(1, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state, device=0):
        pass

    @staticmethod
    def get_amp_supported_dtype():  # enabling it fails: torch has no rules for this device
        return [torch.bfloat16, torch.float16]


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self):
        return _state["inside"]

    def has_primary_context(self, index):
        return _state["inside"]

    def is_built(self):
        return True


def register():
    """Make the device known to torch, for the rest of the process and before its first backward pass."""
    if not _state["ready"]:
        _state["inside"] = True
        _setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module, hook=_Hook())
        _state["inside"] = False
        _state["ready"] = True


def _set_data(tensor, value):
    """Write ``tensor.data = value`` for tensors on two devices, which torch refuses where one of them is a Python class."""
    if type(tensor.detach()) is type(value.detach()):
        torch._C.TensorBase.data.__set__(tensor, value)
        return
    fresh = value.detach()  # the given tensor stays as it is
    fresh.requires_grad_(tensor.requires_grad)
    if isinstance(tensor, torch.nn.Parameter):
        fresh = torch.nn.Parameter(fresh, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, fresh)


@contextlib.contextmanager
def _settable_data():
    """Offloading of diffusers sets ``data`` of a tensor to one on another device, as real devices' tensors allow."""
    torch.Tensor.data = property(torch._C.TensorBase.data.__get__, _set_data)
    try:
        yield
    finally:
        del torch.Tensor.data


@contextlib.contextmanager
def stand_in_device(*, float64=False):
    """Inside, the device that is given can be used; with ``float64`` it has double precision, as NVIDIA's have."""
    register()
    _state.update(inside=True, float64=float64)
    try:
        with _Factories(), _settable_data():
            yield torch.device(NAME, 0)
    finally:
        _state.update(inside=False, float64=False)


@contextlib.contextmanager
def late_copies():
    """Inside, the device has streams, and the CPU memory that is pinned for them, which is no other here."""
    torch.Tensor.pin_memory, StandIn.record_stream = (lambda tensor: tensor), (lambda tensor, stream: None)
    _Module.Stream = Stream
    _Module.streams.append(Stream())
    try:
        yield
    finally:
        _Module.streams.clear()
        del torch.Tensor.pin_memory, StandIn.record_stream, _Module.Stream


@contextlib.contextmanager
def reading_allowed():
    """Inside, values may be read back."""
    before, _state["reads"] = _state["reads"], True
    try:
        yield
    finally:
        _state["reads"] = before


@contextlib.contextmanager
def noted_reads():
    """Inside, values may be read back; gives how often that happened, by function of qvgen. Copies to the host count."""
    before, _state["reads"] = _state["reads"], Counter()
    try:
        yield _state["reads"]
    finally:
        _state["reads"] = before
