"""Which tensor of a LoRA is added to which parameter of a transformer, found out from names and shapes alone.

Every key of the file is used, or the file is refused by the name of the key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.models.lora_file import LoraConfig, LoraFile, one_line
from qvgen.models.lora_key import LayerNames, LoraKey

_PRODUCT = {"down", "up", "alpha", "bias"}
"""Kinds of keys that belong to B A."""

_ENDS = {"diff": "weight", "bias": "bias", "diff_b": "bias"}


@dataclass(frozen=True, kw_only=True)
class Addend:
    """The addition to one parameter, but for the LoRA's scale.

    Attributes:
        keys: Keys of B and A, whose product is added, or of one tensor.
        factor: alpha / rank, or 1 for a difference.
    """

    keys: tuple[str, ...]
    factor: float

    def value(self, stream: Any, *, shape: torch.Size) -> Tensor:
        """Read the addition: float32 of the parameter's shape, without the factor."""
        first, *second = (stream.get_tensor(key).float() for key in self.keys)
        return (first.flatten(1) @ second[0].flatten(1) if second else first).reshape(shape)


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Where a LoRA goes in one transformer.

    Attributes:
        addends: name of a parameter -> what is added to it.
        layers: Linears and convolutions with a product.
        assumed: layers among these whose alpha is said nowhere and taken to be the rank.
    """

    addends: Mapping[str, Sequence[Addend]]
    layers: Sequence[str]
    assumed: Sequence[str]

    @property
    def differences(self) -> int:
        """Whole differences of weights, biases and modulations."""
        return sum(len(addend.keys) == 1 for addends in self.addends.values() for addend in addends)


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Matches a file's keys with a transformer.

    Attributes:
        transformer: A transformer of diffusers, on any device, ``meta`` too.
        file: the LoRA's file.
    """

    transformer: nn.Module
    file: LoraFile

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.transformer.named_modules())

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.transformer.named_parameters())

    def group(self, keys: Sequence[LoraKey]) -> dict[str, dict[str, str]]:
        """Layer -> kind -> key.

        Raises:
            ValueError: a key matches no layer, a shape does not fit, a half is missing, or two keys mean the same.
        """
        groups: dict[str, dict[str, str]] = defaultdict(dict)
        names, error = LayerNames(self.transformer), self.file.error
        for parts in keys:
            name = names.find(parts)
            module = self._modules.get(name or "")
            if name is None or (parts.kind in _PRODUCT and not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)):
                raise error(
                    f"{parts.key} matches no layer of {type(self.transformer).__name__}; use a LoRA of this model"
                )
            if parts.kind in groups[name]:
                raise error(f"{parts.key} and {groups[name][parts.kind]} are both of {name}; keep one")
            groups[name][parts.kind] = parts.key
        for name, tensors in groups.items():
            if set(tensors) & _PRODUCT and not {"down", "up"} <= set(tensors):
                raise error(f"{name} lacks its lora_{'B' if 'down' in tensors else 'A'}.weight; download it again")
            for reason in self._misfits(name, tensors):
                raise error(f"{reason}; use a LoRA of this model")
        return dict(groups)

    def plan(self, groups: Mapping[str, Mapping[str, str]], *, config: LoraConfig | None) -> MergePlan:
        """Decide what is added to which parameter; of the tensors only alphas are read.

        Args:
            groups: what :meth:`group` returned.
            config: what the file says about rank and alpha.

        Raises:
            ValueError: the configuration is not of these tensors.
        """
        addends: dict[str, list[Addend]] = defaultdict(list)
        layers, assumed = [], []
        with self.file.open() as stream:
            for name, keys in groups.items():
                if "down" in keys:
                    layers.append(name)
                    factor = self._factor(name, keys, config, stream)
                    if factor is None:
                        assumed.append(name)
                        factor = 1.0
                    addends[f"{name}.weight"].append(Addend(keys=(keys["up"], keys["down"]), factor=factor))
                    if "bias" in keys:
                        addends[f"{name}.bias"].append(Addend(keys=(keys["bias"],), factor=factor))
                for kind in ("diff", "diff_b", "diff_m"):
                    if kind in keys:
                        addends[self._parameter(name, kind)].append(Addend(keys=(keys[kind],), factor=1.0))
        return MergePlan(addends=dict(addends), layers=layers, assumed=assumed)

    def _parameter(self, name: str, kind: str) -> str:
        """The parameter that a kind of tensor is added to: a layer's weight or bias, or a parameter of that very name."""
        return name if name in self._parameters else f"{name}.{_ENDS[kind]}"

    def _misfits(self, name: str, tensors: Mapping[str, str]) -> Iterator[str]:
        """The reasons why a layer's tensors do not fit it."""
        shapes = self.file.entries
        if "down" in tensors:
            weight = list(self._parameters[f"{name}.weight"].shape)
            down, up = (list(shapes[tensors[kind]]) for kind in ("down", "up"))
            outputs, *inputs = weight
            if [*down[1:], *up] != [*inputs, outputs, *down[:1], *[1] * (len(inputs) - 1)]:
                yield f"A {down}, B {up} does not fit {name} {weight}"
            elif down[0] == 0:
                yield f"A {down} of {name} has rank 0"
        if (alpha := tensors.get("alpha")) and shapes[alpha] not in ((), (1,)):
            yield f"{alpha} {list(shapes[alpha])} is no number"
        for kind in ("bias", "diff", "diff_b", "diff_m"):
            if key := tensors.get(kind):
                target = self._parameter(name, kind)
                parameter = self._parameters.get(target)
                if parameter is None:
                    yield f"{key} is of {target}, which the model does not have"
                elif parameter.shape != shapes[key]:
                    yield f"{key} {list(shapes[key])} does not fit {target} {list(parameter.shape)}"

    def _factor(self, name: str, keys: Mapping[str, str], config: LoraConfig | None, stream: Any) -> float | None:
        """Factor of a layer, alpha / rank; None where nothing says its alpha."""
        rank = self.file.entries[keys["down"]][0]
        try:
            stated = None if config is None else config.factor(name, rank=rank)
        except ValueError as error:
            raise self.file.error(one_line(error)) from error
        if "alpha" not in keys:
            return stated
        own = float(stream.get_tensor(keys["alpha"]).float()) / rank
        if stated is not None and stated != own:
            raise self.file.error(f"{keys['alpha']} makes alpha / rank {own}, its configuration {stated}; get it again")
        return own
