"""Operators that compute nothing: their results have the right shapes, strides and dtypes, and memory that nobody writes to.

A result's memory is asked for and never touched, so that the host has no page of it to provide. All else about a tensor is as
if operators computed: its device, its storage and who shares it, what autograd saves, which kernel torch chooses.

    a view, a change in place    is done, on the tensors themselves: it computes nothing, or its result is its argument
    any other operator           is asked once, on the meta device, what it makes of such arguments; then that is known

torch's FakeTensorMode does the same at five times the cost: it builds a Python object with a device of its own for each
result, and asks each operator through several layers of Python.

Places that are not zero, as Mochi's attention asks for those of a caption's mask, are taken to be all: the most there can be.
So are places of a mask that others are picked by, and those of its complement to be none: HunyuanVideo 1.5 sorts tokens so. A
tensor's truth value is taken to be true, as it is where that model asks whether an image is missing.

Left out, and refused with :class:`UnknownResultError`: operators that return numbers, others whose shapes depend on values,
and memory that the host does not even promise (a tensor larger than all of it, ``vm.overcommit_memory=2``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as shape_config
from torch.utils.weak import WeakIdKeyDictionary


class UnknownResultError(RuntimeError):
    """What an operator returns can't be told from the shapes of its arguments, or no memory is promised for it."""


_OWN_KINDS = {
    torch.ops.aten._local_scalar_dense.default: "truth",
    torch.ops.aten.bitwise_not.default: "complement",
    torch.ops.aten.index.Tensor: "picked",
}
"""Operators whose results depend on a mask's values -> what is made of them."""

_Shape = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class ShapeOperators:
    """Stands in for operators: called as ``operators(func, args, kwargs)`` inside a ``__torch_dispatch__``.

    Attributes:
        sees_fused: Whether layers run their fused operators under it.
    """

    sees_fused = False

    def __init__(self) -> None:
        self._kinds: dict[Any, str] = {}
        self._known: dict[Any, list[_Shape | None]] = {}
        self._none: WeakIdKeyDictionary = WeakIdKeyDictionary()  # masks that are true nowhere

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operator returns, with unknown values.

        Raises:
            UnknownResultError: See the module.
        """
        kind = self.kind(func)
        if kind == "view":
            return func(*args, **kwargs)
        if kind == "in place":
            return args[0]
        if kind == "out":
            out: Tensor = kwargs["out"]
            if self._results(func, args, kwargs) != [(tuple(out.shape), out.stride(), out.dtype)]:
                raise UnknownResultError(f"{func} resizes its out")
            return out
        if kind == "truth":
            if args[0].dtype != torch.bool:
                raise UnknownResultError(f"{func} returns a number")
            return True
        if kind == "picked" and isinstance(mask := args[1][0], Tensor) and mask in self._none:
            return args[0].new_empty(0, *args[0].shape[mask.ndim :])
        made = self.made(func, args, kwargs)
        if kind == "complement":
            self._none[made[0]] = True
            return made[0]
        if kind in ("one", "picked"):
            return made[0]
        return made if kind == "list" else tuple(made)

    def kind(self, func: Any) -> str:
        """What an operator does (see ``_kind``)."""
        return self._kinds.get(func) or self._kinds.setdefault(func, _kind(func))

    def made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor | None]:
        """New tensors as the operator returns them, with memory that nobody writes to."""
        shapes = self._results(func, args, kwargs)
        return [None if shape is None else _promised(func, shape) for shape in shapes]

    def _results(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Shape | None]:
        key = (func, _described(args), _described(tuple(kwargs.items())))
        if key not in self._known:
            self._known[key] = _shapes(func, args, kwargs)
        return self._known[key]


def _kind(func: Any) -> str:
    """What an operator does: a view, a change in place or of its out, or new tensors (one, a list, or several)."""
    if func in _OWN_KINDS:
        return _OWN_KINDS[func]
    schema = func._schema
    types = [str(value.type) for value in schema.returns]
    if not types or not set(types) <= {"Tensor", "List[Tensor]", "Optional[Tensor]"}:
        raise UnknownResultError(f"{func} returns {', '.join(types) or 'nothing'}")
    written = [value.alias_info is not None and value.alias_info.is_write for value in schema.arguments]
    if any(written):
        if sum(written) == 1 and schema.arguments[-1].name == "out" and types == ["Tensor"]:
            return "out"
        if written != [True] + [False] * (len(written) - 1) or len(types) > 1:
            raise UnknownResultError(f"{func} writes to another argument than its first")
        return "in place"
    if any(value.alias_info is not None for value in schema.returns):
        return "view"
    return {("Tensor",): "one", ("List[Tensor]",): "list"}.get(tuple(types), "several")


def _described(value: Any) -> Any:
    """All of an argument that a result's shape may depend on; hashable."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple([_described(item) for item in value])
    return (type(value), value)


def _shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Shape | None]:
    """Of each tensor that an operator returns, from one run on the meta device."""
    try:
        with shape_config.patch(meta_nonzero_assume_all_nonzero=True):
            made = func(*_on_meta(args), **_on_meta(kwargs))
    except (NotImplementedError, RuntimeError) as error:  # shapes that depend on values among them
        raise UnknownResultError(f"{func}: {error}") from error
    results = [made] if isinstance(made, Tensor) else list(made)
    return [None if result is None else (tuple(result.shape), result.stride(), result.dtype) for result in results]


def _on_meta(value: Any) -> Any:
    """An operator's arguments with tensors, and the device where new ones are made, on the meta device."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, dict):
        return {name: _on_meta(item) for name, item in value.items()}
    return type(value)(map(_on_meta, value)) if isinstance(value, list | tuple) else value


def _promised(func: Any, shape: _Shape) -> Tensor:
    """A tensor whose memory is asked for and never touched."""
    size, stride, dtype = shape
    try:
        return torch.empty_strided(size, stride, dtype=dtype, device="cpu")
    except RuntimeError as error:
        raise UnknownResultError(f"{func}: {error}") from error
