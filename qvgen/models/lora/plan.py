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

from qvgen.models.lora.file import LoraConfig, LoraFile, one_line
from qvgen.models.lora.key import LayerNames, LoraKey, Place

_PRODUCT = {"down", "up", "alpha", "bias"}
"""Kinds of keys that belong to B A."""

_ENDS = {"diff": "weight", "bias": "bias", "diff_b": "bias"}


@dataclass(frozen=True, kw_only=True)
class Addend:
    """The addition to one parameter, but for the LoRA's scale.

    Attributes:
        keys: Keys of B and A, whose product is added, or of one tensor.
        factor: alpha / rank, or 1 for a difference.
        place: Which rows of B, or of the one tensor, are added.
    """

    keys: tuple[str, ...]
    factor: float
    place: Place

    def value(self, stream: Any, *, shape: torch.Size) -> Tensor:
        """Read the addition: float32 of the parameter's shape, without the factor."""
        first, *second = (stream.get_tensor(key).float() for key in self.keys)
        first = self.place.take(first)
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

    def group(self, keys: Sequence[LoraKey]) -> dict[Place, dict[str, str]]:
        """Layer -> kind -> key; a key of a fused layer is of several.

        Raises:
            ValueError: a key matches no layer, a shape does not fit, a half is missing, or two keys mean the same.
        """
        groups: dict[Place, dict[str, str]] = defaultdict(dict)
        names, error = LayerNames(self.transformer), self.file.error
        taken: dict[str, tuple[Place, str]] = {}
        for parts in keys:
            places = names.find(parts)
            modules = [self._modules.get(place.name) for place in places]
            if not places or (
                parts.kind in _PRODUCT
                and not all(isinstance(one, nn.Linear | nn.Conv2d | nn.Conv3d) for one in modules)
            ):
                raise error(
                    f"{parts.key} matches no layer of {type(self.transformer).__name__}; use a LoRA of this model"
                )
            for place in places:
                as_before, other = taken.setdefault(place.name, (place, parts.key))
                if as_before != place or (other := groups[place].get(parts.kind, "")):
                    raise error(f"{parts.key} and {other} are both of {place.name}; keep one")
                groups[place][parts.kind] = parts.key
        for place, tensors in groups.items():
            if set(tensors) & _PRODUCT and not {"down", "up"} <= set(tensors):
                raise error(
                    f"{place.name} lacks its lora_{'B' if 'down' in tensors else 'A'}.weight; download it again"
                )
            for reason in self._misfits(place, tensors):
                raise error(f"{reason}; use a LoRA of this model")
        return dict(groups)

    def plan(self, groups: Mapping[Place, Mapping[str, str]], *, config: LoraConfig | None) -> MergePlan:
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
            for place, keys in groups.items():
                name = place.name
                if "down" in keys:
                    layers.append(name)
                    factor = self._factor(name, keys, config, stream)
                    if factor is None:
                        assumed.append(name)
                        factor = 1.0
                    addends[f"{name}.weight"].append(
                        Addend(keys=(keys["up"], keys["down"]), factor=factor, place=place)
                    )
                    if "bias" in keys:
                        addends[f"{name}.bias"].append(Addend(keys=(keys["bias"],), factor=factor, place=place))
                for kind in ("diff", "diff_b", "diff_m"):
                    if kind in keys:
                        addends[self._parameter(name, kind)].append(Addend(keys=(keys[kind],), factor=1.0, place=place))
        return MergePlan(addends=dict(addends), layers=layers, assumed=assumed)

    def _parameter(self, name: str, kind: str) -> str:
        """The parameter that a kind of tensor is added to: a layer's weight or bias, or a parameter of that very name."""
        return name if name in self._parameters else f"{name}.{_ENDS[kind]}"

    def _misfits(self, place: Place, tensors: Mapping[str, str]) -> Iterator[str]:
        """The reasons why a layer's tensors do not fit it."""
        shapes, name = self.file.entries, place.name

        def shape_there(parameter: nn.Parameter) -> list[int]:
            own = list(parameter.shape)
            return own if place.of_rows is None else [place.of_rows, *own[1:]]

        if "down" in tensors:
            weight = shape_there(self._parameters[f"{name}.weight"])
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
                elif shape_there(parameter) != list(shapes[key]):
                    yield f"{key} {list(shapes[key])} does not fit {target} {shape_there(parameter)}"

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
