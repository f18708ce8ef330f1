"""Numbers of a config.json that its packed layers do not warrant, refused before diffusers builds a transformer from them.

diffusers' ``from_pretrained`` builds the skeleton of a model before it asks a quantizer anything: its parameters are on the
meta device and take no memory, but a block takes some for its modules, and what a configuration computes from numbers alone
(rotary tables, positional embeddings) is real. The skeleton comes from ``from_config``, whose dictionary has the packed
layers' description beside the numbers. So that method looks at those of this library first:

    config.json's numbers --> one block of each kind on the meta device --> so many Linears as the description names,
                                                                            tables within TABLE_BYTES --> diffusers goes on

The description names every Linear of the model, packed or not, in a file that was read whole, so that what is built is in
proportion to it. The headers of the weights are compared later, by the quantizer (:mod:`qvgen.deploy.quantizer`).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from torch import nn

from qvgen.deploy.manifest import Manifest
from qvgen.deploy.packed_record import CONFIG_FILE, from_quantization_config
from qvgen.deploy.quantization_config import QvgenConfig
from qvgen.deploy.size_check import DAMAGED, TABLE_BYTES, check_config, check_tables, instantiate
from qvgen.deploy.transformer_class import block_counts, transformer_class

LARGEST_WEIGHT = 2**30
"""Numbers of one weight: fifteen times those of the largest models' feed-forward. accelerate's context makes each weight of a
skeleton, without writing to its memory, before it is on the meta device."""

_SOURCE = Path(CONFIG_FILE)


def check_skeleton(kind: type[nn.Module], config: Mapping[str, Any], stored: QvgenConfig) -> None:
    """Look at a config.json before a transformer is built from it.

    Args:
        kind: Class that is built.
        config: Its content.
        stored: Its ``quantization_config``, which has packed layers.

    Raises:
        ValueError: A description of another class, arguments of other types than the class has, more blocks than there are
            Linears for, a weight of more than ``LARGEST_WEIGHT`` numbers, or tables of more than ``TABLE_BYTES``.
    """
    known = inspect.signature(kind.__init__).parameters  # diffusers says which others it ignores
    own = {key: value for key, value in config.items() if key in known}
    manifest = from_quantization_config(stored, own, source=CONFIG_FILE)
    if transformer_class(manifest.transformer) is not kind:
        raise ValueError(f"{_SOURCE} is of {manifest.transformer}, not of {kind.__name__}; load it with that class")
    check_config(manifest, source=_SOURCE)
    arguments = manifest.transformer_config
    counts = block_counts(kind, arguments)
    single = {**arguments, **{key: min(value, 1) for key, value in counts.items()}}
    named = len({entry.name for entry in manifest.layers} | set(manifest.skipped))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are refused a few lines below
        one = instantiate(manifest, single, source=_SOURCE, empty=True)
        for name, weight in one.named_parameters():
            if weight.numel() > LARGEST_WEIGHT:
                raise ValueError(
                    f"{_SOURCE}: {name} would have {weight.numel()} numbers, more than any model's; {DAMAGED}"
                )
        check_tables(one, one.state_dict(), allowed=TABLE_BYTES, source=_SOURCE)
        for key, count in counts.items():
            in_block = _linears_of_a_block(manifest, single, key, one=one) if count > 1 else 0
            if count * in_block > named:
                raise ValueError(
                    f"{_SOURCE}: {key}={count} blocks of {in_block} Linears are more than the {named} that its packed layers "
                    f"name; {DAMAGED}"
                )


def _linears_of_a_block(manifest: Manifest, single: Mapping[str, Any], key: str, *, one: nn.Module) -> int:
    """Linears that one more block of a kind has, at least 1; 1 where more of it alone builds nothing."""
    try:
        two = instantiate(manifest, {**single, key: 2}, source=_SOURCE, empty=True)
    except ValueError:
        return 1
    return max(1, _linears(two) - _linears(one))


def _linears(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Linear) for module in model.modules())


def check_before_building() -> None:
    """Have ``from_config`` of diffusers' classes look at packed models first; any other dictionary goes on as it was."""
    build = ConfigMixin.from_config.__func__

    @wraps(build)
    def from_config(
        cls: Any, config: Mapping[str, Any] | str | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        stored = config.get("quantization_config") if isinstance(config, Mapping) else None
        if isinstance(stored, QvgenConfig) and stored.manifest is not None:
            check_skeleton(cls, config, stored)
        return build(cls, config, return_unused_kwargs, **kwargs)

    ConfigMixin.from_config = classmethod(from_config)
