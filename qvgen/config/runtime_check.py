"""Whether the runtime that a profile is for has what a run asks of it, found out before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qvgen.config.bits import Bits
from qvgen.config.leaf_file import leaf_names, read_leaf
from qvgen.config.leaves import load_profile
from qvgen.errors import UserError

if TYPE_CHECKING:
    from qvgen.quant.grid import Profile

_WORDS = {
    "rotation": "rotates whole rows",
    "smoothing": "multiplies inputs by a vector",
    "branch": "adds a low-rank branch",
    "static": "takes ranges from a table",
    "widths": "gives layers or steps other widths",
    "attention": "computes attention with integers",
}


def check_runtime(profile: Profile, *, additions: Iterable[str] = (), init: str = "", what: str = "") -> None:
    """Refuse bits and additions that the profile's runtime does not have; a profile without one takes all.

    Args:
        profile: The grids of the run.
        additions: What the PTQ method adds to layers (:data:`qvgen.quant.runtime.Addition`).
        init: The method's name, for the message.
        what: What adds it, in place of the method, as it is written on the command line.

    Raises:
        UserError: What is not there, and which profiles have it.
    """
    runtime, bits = profile.runtime, (profile.weight.bits, profile.activation.bits)
    if runtime is None:
        return
    for key, (wanted, given) in _changed_options(profile).items():
        having = [name for name in leaf_names("profile") if _offers(name, bits, key, given)]
        instead = f", choose profile={' or '.join(having)}" if having else ""
        raise UserError(
            f"profile={profile.name} is for {runtime.name}, which computes with {key}={wanted}, not {given}; leave "
            f"profile.{key} out{instead}, or add profile.runtime=null to keep the grid for qvgen's own kernels"
        )
    missing = [name for name in additions if name not in runtime.additions]
    if profile.attention is not None and "attention" not in runtime.additions:
        missing, additions = ["attention"], ["attention"]
        what = f"profile.attention={profile.attention.kind}"
    if runtime.has(*bits) and not missing:
        return
    others = [name for name in leaf_names("profile") if _takes(name, bits, additions)]
    instead = f"choose profile={' or '.join(others)}, or " if others else ""
    grid_alone = "profile.runtime=null keeps the grid for qvgen's own kernels"
    if not runtime.has(*bits):
        weights, inputs = (_listed(widths) for widths in (runtime.weight_bits, runtime.activation_bits))
        raise UserError(
            f"profile={profile.name} is for {runtime.name}, with weights of {weights} and inputs of {inputs} bits, not "
            f"bits={profile.label}; {instead}change bits ({grid_alone})"
        )
    raise UserError(
        f"profile={profile.name} is for {runtime.name}, and {what or f'init={init}'} {_WORDS[missing[0]]}, which that does "
        f"not have; {instead}{'leave it out' if what else 'another init'} ({grid_alone})"
    )


def _changed_options(profile: Profile) -> dict[str, tuple[Any, Any]]:
    """Options of a profile that are not those of its file -> (the file's, the profile's); bits aside."""
    if profile.name not in leaf_names("profile"):
        return {}
    plain = load_profile(profile.name, Bits(weight=profile.weight.bits, activation=profile.activation.bits))
    files, ours = (_options(each) for each in (plain, profile))
    if set(ours["rotation"]) <= set(files["rotation"]):  # one that was chosen for a model
        ours["rotation"] = files["rotation"]
    dtypes = () if profile.runtime is None else profile.runtime.scale_dtypes
    return {
        key: (value, ours[key])
        for key, value in files.items()
        if ours[key] != value and not (key.endswith(".scale_dtype") and {value, ours[key]} <= set(dtypes))
    }


def _options(profile: Profile) -> dict[str, Any]:
    """Every option by its key; the rotation is its kind and all sizes to choose from."""
    sides = {
        f"{side}.{key}": value for side in ("weight", "activation") for key, value in profile.to_dict()[side].items()
    }
    return sides | {"rotation": (profile.rotation_kind, *(profile.rotations or (profile.rotation,)))}


def _offers(name: str, bits: tuple[int, int], key: str, value: Any) -> bool:
    """Whether a profile takes these bits with an option: one without a runtime any, others the value of their file."""
    if not _takes(name, bits, ()):
        return False
    plain = load_profile(name, Bits(weight=bits[0], activation=bits[1]))
    return plain.runtime is None or _options(plain).get(key) == value


def _takes(name: str, bits: tuple[int, int], additions: Iterable[str]) -> bool:
    """Whether a file of conf/profile takes these bits and additions."""
    runtime: dict[str, Any] | None = read_leaf("profile", name, resolve=False).get("runtime")
    if runtime is None:
        return True
    sides = zip(bits, (runtime["weight_bits"], runtime["activation_bits"]), strict=True)
    return all(width in widths for width, widths in sides) and set(additions) <= set(runtime.get("additions", ()))


def _listed(widths: Iterable[int]) -> str:
    return " or ".join(map(str, widths))
