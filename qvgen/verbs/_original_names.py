"""The original names of a packed checkpoint's family: what its class says (qvgen.models.original.names)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qvgen.config.leaf_class import find_class
from qvgen.config.leaf_file import leaf_target, users_targets
from qvgen.deploy.manifest import read_manifest
from qvgen.errors import UserError

if TYPE_CHECKING:
    from qvgen.models.original.names import OriginalNames


def original_names_of(packed: Path) -> OriginalNames | None:
    """Those of the family that a packed directory names; None where it names none, or one without such names.

    The manifest chooses among the files of conf/model, ours, a plug-in's and the command's own, and names no class.

    Raises:
        UserError: It names a family that there is not.
    """
    name = read_manifest(packed).base_name
    if not name:
        return None
    try:
        target = leaf_target("model", name)
    except UserError as error:
        raise UserError(f"{packed} was made from a model of a family that is not here: {error}") from error
    if target is None:
        return None
    family = find_class(target, key="model", is_users=bool(users_targets("model", name)))
    names: OriginalNames | None = getattr(family, "original_names", None)
    return names
