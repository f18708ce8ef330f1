"""The class of a part by its name: diffusers', or one of a family's own, where diffusers does not have it.

A family lists such classes in ``own_classes``, each with its module. Names come out of data (manifests, configurations), so
nothing is imported by them: they choose among what diffusers and the installed families have.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qvgen.models.folder.published import known_models


def model_class(name: str) -> Any:
    """The class of a name; None where neither diffusers nor a family has one."""
    if not name.isidentifier() or name.startswith("_"):
        return None
    import diffusers  # seconds, in which a plan of recorded layers is done

    if (found := getattr(diffusers, name, None)) is not None:
        return found  # without a look at the families, whose modules would all be imported
    module = next((model.own_classes[name] for model in known_models() if name in model.own_classes), None)
    return None if module is None else getattr(import_module(module), name)
