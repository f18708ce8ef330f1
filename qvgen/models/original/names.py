"""Names of diffusers' transformers -> those of the code that the model was published with, as data.

ComfyUI, LightX2V and DiffSynth-Studio read checkpoints with the original names, and finetunes come with them. A family whose
names are known says so by an attribute ``original_names`` of its class. Sources: the converters of
``diffusers.loaders.single_file_utils`` for Wan, LTX-Video and HunyuanVideo, which go the other way; for HunyuanVideo 1.5
diffusers' scripts/convert_hunyuan_video1_5_to_diffusers.py.

    rules      rename a module or a lone parameter; a name may pass through several
    fused      layers that the original code has as one: its rows are theirs, one layer after another
    apart      names that such layers have in files that do not fuse them
    swapped    modules whose two halves of rows change places (diffusers has scale before shift, HunyuanVideo's code after it)
    comfy      names that ComfyUI gives tensors of the original code as it loads them, and saves them and trains LoRAs with
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qvgen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OriginalNames:
    """How the code that a model was published with names its tensors.

    Attributes:
        code: Name of the model, for messages.
        sign: End of a tensor's name by which a file with these names is known.
        rules: (regular expression, replacement), applied in order to the name of a module, or of a parameter of no module of
            its own. A layer that is a part of a fused one gets the name LAYER.PART.
        fused: (regular expression, parts): names of fused layers, and their parts in the order of their rows.
        apart: (regular expression, replacement), applied to LAYER.PART: the name of that part where the authors' own files
            have it by itself and ComfyUI's have the fused layer.
        swapped: Regular expressions of the original names of modules whose halves of rows change places.
        comfy: (regular expression, replacement), applied in order to the original name of a tensor: ComfyUI's name of it.
        header: The settings besides sizes that the authors' files have in their header's ``config``; None: theirs have none.
    """

    code: str
    sign: str
    rules: Sequence[tuple[str, str]]
    fused: Sequence[tuple[str, Sequence[str]]] = ()
    apart: Sequence[tuple[str, str]] = ()
    swapped: Sequence[str] = ()
    comfy: Sequence[tuple[str, str]] = ()
    header: Mapping[str, bool] | None = None


WAN_ORIGINAL_NAMES = OriginalNames(
    code="Wan",
    sign="blocks.0.self_attn.q.weight",
    rules=(
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
        (r"\.add_([kv])_proj$", r".\1_img"),
        (r"\.norm_added_k$", ".norm_k_img"),
        (r"^condition_embedder\.image_embedder\.norm1$", "img_emb.proj.0"),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
        (r"^condition_embedder\.image_embedder\.norm2$", "img_emb.proj.4"),
    ),
)
"""Names of diffusers' WanTransformer3DModel -> those of Wan's own code, text to video and image to video."""

LTX_ORIGINAL_NAMES = OriginalNames(
    code="LTX-Video",
    sign="patchify_proj.weight",
    rules=(
        (r"^proj_in", "patchify_proj"),
        (r"^time_embed", "adaln_single"),
        (r"\.norm_([qk])$", r".\1_norm"),
    ),
    header={"causal_temporal_positioning": False},
)
"""Names of diffusers' LTXVideoTransformer3DModel -> those of the authors' own code, 0.9.0 and 0.9.1."""

LTX_CAUSAL_ORIGINAL_NAMES = replace(LTX_ORIGINAL_NAMES, header={"causal_temporal_positioning": True})
"""The same for 13B, in whose positions the first latent frame is one frame long."""

_REFINER = r"^(context_embedder\.token_refiner\.refiner_blocks\.\d+)"
_DOUBLE = r"^(transformer_blocks\.\d+)"
_SINGLE = r"^(single_transformer_blocks\.\d+)"

HUNYUAN_VIDEO_ORIGINAL_NAMES = OriginalNames(
    code="HunyuanVideo",
    sign="txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight",
    rules=(
        (r"^x_embedder", "img_in"),
        (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.mlp.0"),
        (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.mlp.2"),
        (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.mlp.0"),
        (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.mlp.2"),
        (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
        (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
        (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1", "txt_in.t_embedder.mlp.0"),
        (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2", "txt_in.t_embedder.mlp.2"),
        (r"^context_embedder\.time_text_embed\.text_embedder", "txt_in.c_embedder"),
        (r"^context_embedder\.proj_in", "txt_in.input_embedder"),
        (_REFINER + r"\.attn\.to_([qkv])$", r"\1.self_attn_qkv.\2"),
        (_REFINER + r"\.attn\.to_out\.0$", r"\1.self_attn_proj"),
        (_REFINER + r"\.ff\.net\.0\.proj$", r"\1.mlp.fc1"),
        (_REFINER + r"\.ff\.net\.2$", r"\1.mlp.fc2"),
        (_REFINER + r"\.norm_out\.linear$", r"\1.adaLN_modulation.1"),
        (r"^context_embedder\.token_refiner\.refiner_blocks", "txt_in.individual_token_refiner.blocks"),
        (_DOUBLE + r"\.norm1\.linear$", r"\1.img_mod.linear"),
        (_DOUBLE + r"\.norm1_context\.linear$", r"\1.txt_mod.linear"),
        (_DOUBLE + r"\.attn\.to_([qkv])$", r"\1.img_attn_qkv.\2"),
        (_DOUBLE + r"\.attn\.add_([qkv])_proj$", r"\1.txt_attn_qkv.\2"),
        (_DOUBLE + r"\.attn\.norm_([qk])$", r"\1.img_attn_\2_norm"),
        (_DOUBLE + r"\.attn\.norm_added_([qk])$", r"\1.txt_attn_\2_norm"),
        (_DOUBLE + r"\.attn\.to_out\.0$", r"\1.img_attn_proj"),
        (_DOUBLE + r"\.attn\.to_add_out$", r"\1.txt_attn_proj"),
        (_DOUBLE + r"\.ff\.net\.0\.proj$", r"\1.img_mlp.fc1"),
        (_DOUBLE + r"\.ff\.net\.2$", r"\1.img_mlp.fc2"),
        (_DOUBLE + r"\.ff_context\.net\.0\.proj$", r"\1.txt_mlp.fc1"),
        (_DOUBLE + r"\.ff_context\.net\.2$", r"\1.txt_mlp.fc2"),
        (r"^transformer_blocks", "double_blocks"),
        (_SINGLE + r"\.attn\.to_([qkv])$", r"\1.linear1.\2"),
        (_SINGLE + r"\.proj_mlp$", r"\1.linear1.mlp"),
        (_SINGLE + r"\.attn\.norm_([qk])$", r"\1.\2_norm"),
        (_SINGLE + r"\.norm\.linear$", r"\1.modulation.linear"),
        (_SINGLE + r"\.proj_out$", r"\1.linear2"),
        (r"^single_transformer_blocks", "single_blocks"),
        (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1"),
        (r"^proj_out", "final_layer.linear"),
    ),
    fused=((r"_attn_qkv$", ("q", "k", "v")), (r"^single_blocks\.\d+\.linear1$", ("q", "k", "v", "mlp"))),
    swapped=(r"^final_layer\.adaLN_modulation\.1$",),
    comfy=(  # ComfyUI's comfy/supported_models.py, class HunyuanVideo
        (r"(_in|t_embedder)\.mlp\.0\.", r"\1.in_layer."),
        (r"(_in|t_embedder)\.mlp\.2\.", r"\1.out_layer."),
        (r"c_embedder\.linear_1\.", "c_embedder.in_layer."),
        (r"c_embedder\.linear_2\.", "c_embedder.out_layer."),
        (r"(_mod|\.modulation)\.linear\.", r"\1.lin."),
        (r"_attn_(qkv|proj)\.", r"_attn.\1."),
        (r"mlp\.fc1\.", "mlp.0."),
        (r"mlp\.fc2\.", "mlp.2."),
        (r"(_attn_|\.)q_norm\.weight$", r"\1norm.query_norm.scale"),
        (r"(_attn_|\.)k_norm\.weight$", r"\1norm.key_norm.scale"),
        (r"_attn_norm\.", "_attn.norm."),
    ),
)
"""Names of diffusers' HunyuanVideoTransformer3DModel -> those of the authors' own code."""

HUNYUAN_VIDEO_15_ORIGINAL_NAMES = replace(
    HUNYUAN_VIDEO_ORIGINAL_NAMES,
    code="HunyuanVideo 1.5",
    sign="cond_type_embedding.weight",
    rules=(
        (r"^time_embed\.timestep_embedder\.linear_1", "time_in.mlp.0"),
        (r"^time_embed\.timestep_embedder\.linear_2", "time_in.mlp.2"),
        (r"^context_embedder_2\.norm$", "byt5_in.layernorm"),
        (r"^context_embedder_2\.linear_", "byt5_in.fc"),
        (r"^image_embedder\.norm_in$", "vision_in.proj.0"),
        (r"^image_embedder\.linear_1$", "vision_in.proj.1"),
        (r"^image_embedder\.linear_2$", "vision_in.proj.3"),
        (r"^image_embedder\.norm_out$", "vision_in.proj.4"),
        (r"^cond_type_embed$", "cond_type_embedding"),
        *HUNYUAN_VIDEO_ORIGINAL_NAMES.rules,
    ),
    apart=((r"^(double_blocks\.\d+\.(?:img|txt)_attn)_qkv\.([qkv])$", r"\1_\2"),),
)
"""Names of diffusers' HunyuanVideo15Transformer3DModel -> those of the files that ComfyUI reads (1361 tensors)."""

ORIGINAL_NAMES: Mapping[str, OriginalNames] = {
    "WanTransformer3DModel": WAN_ORIGINAL_NAMES,
    "LTXVideoTransformer3DModel": LTX_ORIGINAL_NAMES,
    "HunyuanVideo15Transformer3DModel": HUNYUAN_VIDEO_15_ORIGINAL_NAMES,  # before the other, whose sign its files have too
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO_ORIGINAL_NAMES,
}
"""Class of diffusers -> names of its tensors in the original code."""


def original_module_name(name: str, names: OriginalNames) -> str:
    """The original name of a module, or of a parameter that is no weight or bias of one.

    Example:
        >>> original_module_name("blocks.3.attn2.to_out.0", WAN_ORIGINAL_NAMES)
        'blocks.3.cross_attn.o'
    """
    for pattern, replacement in names.rules:
        name = re.sub(pattern, replacement, name)
    return name


def original_name(key: str, names: OriginalNames) -> str:
    """The original name of a tensor; what follows a module's name (weight, bias, weight_scale, ...) stays.

    Example:
        >>> original_name("scale_shift_table", WAN_ORIGINAL_NAMES)
        'head.modulation'
        >>> original_name("blocks.0.ffn.net.2.weight_scale", WAN_ORIGINAL_NAMES)
        'blocks.0.ffn.2.weight_scale'
    """
    module, _, last = key.rpartition(".")
    renamed = f"{original_module_name(module, names)}.{last}" if module else key
    return original_module_name(renamed, names)  # a parameter of a block itself


def original_names(keys: Iterable[str], names: OriginalNames) -> dict[str, str]:
    """Key -> original key, of all tensors of a file; that of a fused layer's part is LAYER.PART and the key's end.

    Raises:
        UserError: Two keys have the same original name.
    """
    found = {key: original_name(key, names) for key in keys}
    taken: dict[str, str] = {}
    for key, name in found.items():
        if name in taken:
            raise UserError(f"{key!r} and {taken[name]!r} are both {name!r} in the original code; it has no such model")
        taken[name] = key
    return found


def fused_layer(module: str, names: OriginalNames) -> tuple[str, str, Sequence[str]]:
    """The layer that a module of :func:`original_module_name` is a part of, which part, and all parts in the rows' order.

    A module that is no part of another one is itself, part "", and has no parts.
    """
    layer, _, part = module.rpartition(".")
    parts = next((parts for pattern, parts in names.fused if re.search(pattern, layer)), ())
    return (layer, part, parts) if part in parts else (module, "", ())


def apart_name(module: str, names: OriginalNames) -> str | None:
    """The name that a part of a fused layer has in files that do not fuse it; None for all other modules.

    Args:
        module: The name of :func:`original_module_name`: LAYER.PART.
        names: The original names.

    Example:
        >>> apart_name("double_blocks.0.txt_attn_qkv.v", HUNYUAN_VIDEO_15_ORIGINAL_NAMES)
        'double_blocks.0.txt_attn_v'
    """
    return next((re.sub(one, other, module) for one, other in names.apart if re.search(one, module)), None)


def comfy_names(name: str, names: OriginalNames) -> set[str]:
    """The names under which ComfyUI has a tensor of the original code, this one too where it keeps it.

    Its versions differ in whether the factor of a norm ends in ``scale`` or in ``weight``.

    Example:
        >>> sorted(comfy_names("double_blocks.0.img_attn_q_norm.weight", HUNYUAN_VIDEO_ORIGINAL_NAMES))
        ['double_blocks.0.img_attn.norm.query_norm.scale', 'double_blocks.0.img_attn.norm.query_norm.weight']
    """
    for pattern, replacement in names.comfy:
        name = re.sub(pattern, replacement, name)
    return {name, re.sub(r"_norm\.scale$", "_norm.weight", name)}


def has_swapped_halves(module: str, names: OriginalNames) -> bool:
    """Whether the two halves of the rows of a module with an original name stand the other way round in diffusers."""
    return any(re.search(pattern, module) for pattern in names.swapped)
