"""Names of diffusers' transformers -> those of the code that the model was published with, as data.

ComfyUI, LightX2V and DiffSynth-Studio read checkpoints with the original names. diffusers' converters
(``convert_wan_transformer_to_diffusers`` in ``diffusers.loaders.single_file_utils``) go the other way; a family that can go
back says so by an attribute ``original_names`` of its class. Every rule renames a module or a lone parameter, and a name may
pass through several rules; tensors themselves stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qvgen.errors import UserError

OriginalNames = Sequence[tuple[str, str]]
"""(regular expression, replacement), applied in order to the name of a module, or of a parameter of no module of its own."""

WAN_ORIGINAL_NAMES: OriginalNames = (
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^proj_out", "head.head"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.to_out\.0$", ".o"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
    (r"^(blocks\.\d+)\.norm2$", r"\1.norm3"),
)
"""Names of diffusers' WanTransformer3DModel -> those of Wan's own code (text to video)."""

LTX_ORIGINAL_NAMES: OriginalNames = (
    (r"^proj_in", "patchify_proj"),
    (r"^time_embed", "adaln_single"),
    (r"\.norm_([qk])$", r".\1_norm"),
)
"""Names of diffusers' LTXVideoTransformer3DModel -> those of the authors' own code."""


def original_module_name(name: str, rules: OriginalNames) -> str:
    """The original name of a module, or of a parameter that is no weight or bias of one.

    Example:
        >>> original_module_name("blocks.3.attn2.to_out.0", WAN_ORIGINAL_NAMES)
        'blocks.3.cross_attn.o'
    """
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def original_name(key: str, rules: OriginalNames) -> str:
    """The original name of a tensor; what follows a module's name (weight, bias, weight_scale, ...) stays.

    Example:
        >>> original_name("scale_shift_table", WAN_ORIGINAL_NAMES)
        'head.modulation'
        >>> original_name("blocks.0.ffn.net.2.weight_scale", WAN_ORIGINAL_NAMES)
        'blocks.0.ffn.2.weight_scale'
    """
    module, _, last = key.rpartition(".")
    renamed = f"{original_module_name(module, rules)}.{last}" if module else key
    return original_module_name(renamed, rules)  # a parameter of a block itself


def original_names(keys: Iterable[str], rules: OriginalNames) -> dict[str, str]:
    """Key -> original key, of all tensors of a file.

    Raises:
        UserError: Two keys have the same original name.
    """
    found = {key: original_name(key, rules) for key in keys}
    taken: dict[str, str] = {}
    for key, name in found.items():
        if name in taken:
            raise UserError(f"{key!r} and {taken[name]!r} are both {name!r} in the original code; it has no such model")
        taken[name] = key
    return found
