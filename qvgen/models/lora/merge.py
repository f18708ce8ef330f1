"""LoRAs that become part of a transformer's weights when they are loaded, before anything is quantized.

    W <- W + sum of  scale alpha / rank B A  +  scale D        b <- b + scale alpha / rank b_B  +  scale d

(arXiv 2106.09685, Eq. 3; D and d are whole differences, as few-step distillation stores them for norms, biases and
modulations.) Every tensor of a file is used, or the file is refused by the name of its key.

The arithmetic is float32 whatever the dtypes of transformer and LoRA, with one cast at the end over all LoRAs together; peft
alone would round A, B and the product to the transformer's dtype before it adds. One parameter at a time is in float32.

Where a file says no alpha, alpha is the rank, which is what diffusers and ComfyUI take; it is logged. CogVideo's own trainer
saves none though it trains with alpha 64 of rank 128: such a file needs a scale of 0.5.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from qvgen.models.lora.choice import read_choice
from qvgen.models.lora.file import LoraFile
from qvgen.models.lora.key import LoraKey, read_key
from qvgen.models.lora.plan import MergePlan, Planner
from qvgen.quant.finite import check_finite

log = logging.getLogger(__name__)

_OTHER_KINDS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LyCORIS", "lokr_": "LyCORIS", "oft_": "OFT",
    "lora_mid": "LyCORIS", "modules_to_save": "a layer that was trained whole",
}  # fmt: skip
"""Parts of keys that no plain LoRA has -> what the file holds in its place."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA and how much of it.

    Attributes:
        file: its weights.
        scale: factor of the whole LoRA; 0 leaves the weights as they are.
        components: the model's transformers, as its folder names them.
        trained: the transformer that is trained. A file whose keys name no expert is about one transformer: this one.
        component: the transformer that the file was given for by name; None: its keys say.

    Raises:
        ValueError: the file holds no LoRA, or not one of the transformer that it was given for.
    """

    file: LoraFile
    scale: float
    components: tuple[str, ...]
    trained: str
    component: str | None = None

    _said: set[str] = field(default_factory=set, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _ = self.keys  # raises

    @cached_property
    def keys(self) -> Mapping[str, Sequence[LoraKey]]:
        """The file's keys by transformer."""
        error, understood = self.file.error, []
        for key in sorted(self.file.entries):
            if (parts := read_key(key)) is not None:
                understood.append(parts)
            elif any("lora" in other or ".diff" in other for other in self.file.entries):
                kind = next((kind for mark, kind in _OTHER_KINDS.items() if mark in key), "no kind that is known")
                raise error(f"{key} is no LoRA's (but of {kind}); use an ordinary LoRA")
        if not understood:
            first = min(self.file.entries, default="none")
            raise error(f"it holds no LoRA keys (its first is {first}); write a LoRA's path")
        second = [parts for parts in understood if parts.second]
        if not second:
            return {self.component or self.trained: understood}
        if len(self.components) == 1:
            raise error(f"{second[0].key} is not of {self.components[0]}; use a LoRA of this model")
        first_name, second_name = self.components
        if len(second) < len(understood) and self.component is None:
            return {first_name: [parts for parts in understood if not parts.second], second_name: second}
        if len(second) < len(understood):
            raise error("it has keys of both transformers; write it as model.lora, which gives each its own")
        if (self.component or second_name) != second_name:
            raise error(f"it is of {second_name} alone; write model.lora_low={self.file.path}")
        return {second_name: understood}

    @property
    def revision(self) -> str:
        """Content key: which LoRA it is, how much of it and where it goes."""
        place = "" if self.component is None else f" {self.component}"
        return f"{self.file.revision} {float(self.scale)!r}{place}"

    @property
    def record(self) -> dict[str, Any]:
        """The LoRA as a manifest has it: content, scale and transformers; no path."""
        return {"sha256": self.file.revision, "scale": self.scale, "transformers": sorted(self.keys)}

    def plan(self, transformer: nn.Module, *, component: str) -> MergePlan | None:
        """Find out what goes where, checking all keys and shapes of the file.

        Args:
            transformer: A transformer of diffusers, on the meta device too; both experts have the same layers.
            component: which of the model's transformers it is.

        Returns:
            The plan; None for a transformer that is not trained and of which the file holds nothing.

        Raises:
            ValueError: the file is of another model, or of the partner of the transformer that is trained.
        """
        planner = Planner(transformer=transformer, file=self.file)
        groups = {name: planner.group(keys) for name, keys in self.keys.items()}
        if component not in groups:
            if component == self.trained and self.component is None:
                raise self.file.error(
                    f"it is of {', '.join(groups)}, {component} is trained; choose the expert that it is of"
                )
            return None
        own = self.keys[component][0].second
        return planner.plan(groups[component], config=self.file.config("transformer_2" if own else "transformer"))

    def say(self, plan: MergePlan, *, component: str) -> None:
        """Log once what is merged, and what was assumed."""
        if component in self._said:
            return
        self._said.add(component)
        name = f"{self.file.key}={self.file.path}"
        log.info(
            "%s: %d layers and %d differences are merged into %s at scale %g",
            name, len(plan.layers), plan.differences, component, self.scale,
        )  # fmt: skip
        if plan.assumed:
            log.warning(
                "%s says no alpha for %d of %d layers (the first is %s): alpha is taken to be the rank. CogVideo's own "
                "trainer saves none though it trains with half the rank; its files need a scale of 0.5",
                name, len(plan.assumed), len(plan.layers), plan.assumed[0],
            )  # fmt: skip


def read_loras(
    value: Any,
    *,
    scale: Any,
    components: tuple[str, ...],
    trained: str,
    component: str | None = None,
    key: str = "model.lora",
) -> list[Lora]:
    """The LoRAs that a key of the configuration names.

    Args:
        value: what the key holds; see :mod:`qvgen.models.lora.choice`.
        scale: ``model.lora_scale``.
        components: the model's transformers.
        trained: the one that is trained.
        component: the one that the key is about; None: the files' keys say.
        key: its name, for messages.

    Raises:
        ValueError: it names no LoRAs, or files that are none.
    """
    return [
        Lora(file=LoraFile(path=path, key=key), scale=own, components=components, trained=trained, component=component)
        for path, own in read_choice(value, scale=scale, key=key)
    ]


class LoraMerge:
    """LoRAs that are added to a transformer's weights, one parameter at a time.

    Args:
        transformer: diffusers model, on any device, ``meta`` too: its names and shapes are looked at.
        loras: merged together, in one rounding.
        component: which of the model's transformers it is. One that is not trained may have no keys.

    Raises:
        ValueError: a file is of another model, or of the other transformer alone.
    """

    def __init__(self, transformer: nn.Module, loras: Sequence[Lora], *, component: str) -> None:
        found = [(lora, lora.plan(transformer, component=component)) for lora in loras]
        self._plans = [(lora, plan) for lora, plan in found if plan is not None]
        for lora, plan in self._plans:
            lora.say(plan, component=component)

    def changes(self, name: str) -> bool:
        """Whether anything is added to a parameter."""
        return any(name in plan.addends for _, plan in self._plans)

    def merged(self, name: str, value: Tensor) -> Tensor:
        """A parameter with what is added to it.

        Args:
            name: name of the parameter.
            value: the whole parameter, of any floating dtype, which the sum is rounded to once.

        Raises:
            ValueError: a sum is not finite.
        """
        chosen = [(lora, addend) for lora, plan in self._plans for addend in plan.addends.get(name, ())]
        if not chosen:
            return value
        total = value.float()
        for lora, addend in chosen:
            with lora.file.open() as stream:
                added = addend.value(stream, shape=value.shape).to(total.device)
            total = total + added * (addend.factor * lora.scale)
        rounded, last = total.to(value.dtype), chosen[-1][0]
        source = f"{last.file.key}={last.file.path}: merged with model.lora_scale={last.scale}"
        check_finite([(name, rounded)], source=source, remedy="lower the scale, or get the LoRA again")
        return rounded


def merge_loras_(transformer: nn.Module, loras: Sequence[Lora], *, component: str) -> None:
    """Add LoRAs to a transformer's weights, in place; nothing but the weights is changed. See :class:`LoraMerge`."""
    merge = LoraMerge(transformer, loras, component=component)
    for name, parameter in transformer.named_parameters():
        if merge.changes(name):
            parameter.data = merge.merged(name, parameter.data)
