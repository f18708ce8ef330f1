"""Which classes a packed checkpoint may be of: every transformer of diffusers or of a family, called with a timestep.

    a name is looked up in diffusers and among the installed families' own, must be that of a ModelMixin there, and the class
    must have one argument for each entry of its own configuration: its arguments are what a manifest stores

There is no list of classes: a transformer that a later diffusers brings is one as soon as it is installed.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, cast

from torch import nn

from qvgen.models.folder.model_class import model_class

_COUNT = re.compile(r"(^|_)(num_|n_)?\w*(layers|blocks)$")
"""Names of the arguments that say how often a block is repeated: num_layers, num_single_layers, n_refiner_layers, ..."""


def transformer_class(name: str) -> type[nn.Module]:
    """The class that a manifest names.

    Raises:
        ValueError: diffusers has no model of that name, or one that takes no timestep.
    """
    import diffusers
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.models.modeling_utils import ModelMixin

    model = model_class(name)
    if not inspect.isclass(model) or not issubclass(model, ModelMixin) or not issubclass(model, ConfigMixin):
        raise ValueError(f"transformer class {name!r} is no model of diffusers {diffusers.__version__}")
    if "timestep" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name}.forward takes no timestep: it is no diffusion transformer")
    return cast(type[nn.Module], model)


def check_can_save(model: nn.Module) -> None:
    """Find out before a model is trained whether it can be saved when it is folded.

    Raises:
        ValueError: It is no transformer of diffusers itself: a class that derives from one would be loaded as another class.
    """
    name = type(model).__name__
    if transformer_class(name) is not type(model):
        raise ValueError(
            f"{type(model).__module__}.{name} only has the name of diffusers.{name}; a packed checkpoint can be loaded into "
            "classes of diffusers alone"
        )


def check_can_export(name: str, exporter: Any, *, target: str) -> None:
    """Find out whether what reads an export can know a transformer's class.

    Args:
        name: Name of the class.
        exporter: The target; one whose ``takes_own_classes`` is set does not need diffusers' class.
        target: Its name, for the message.

    Raises:
        ValueError: diffusers does not have it.
    """
    import diffusers

    if not hasattr(diffusers, name) and not getattr(exporter, "takes_own_classes", False):
        raise ValueError(
            f"export {target} is read by diffusers' own classes, and {name} is one of qvgen's; sample by `qvgen generate "
            "packed=FOLDER`, or export target=diffusers (the packed folder, for qvgen) or target=bf16 (what the model's own "
            "code reads)"
        )


def block_counts(model_class: type[nn.Module], config: dict[str, Any]) -> dict[str, int]:
    """The arguments that say how often blocks are repeated, with their values: the configuration's, or the class's own."""
    known = inspect.signature(model_class.__init__).parameters
    values = {name: config.get(name, known[name].default) for name in known if _COUNT.search(name)}
    return {name: value for name, value in values.items() if type(value) is int}
