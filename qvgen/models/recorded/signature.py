"""Which pipeline of diffusers a folder is of, and what that pipeline's call takes and its ``encode_prompt`` returns.

Names are read from diffusers' own classes. A folder's files choose among them and say no code: a pipeline is a name in
diffusers, a part is a class of diffusers or transformers (:mod:`qvgen.models.folder.foreign_code`). A pipeline that is made
from more than a caption, or that runs more than one transformer, is refused by that.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import diffusers

_MORE_THAN_A_CAPTION = (
    "image", "images", "video", "mask_image", "mask_video", "control_image", "control_video", "control_frames", "conditions",
    "reference_images", "pose_video", "face_video", "action", "audio", "last_image", "latent_image", "input_images",
)  # fmt: skip
_FRAMES = ("num_frames", "frames", "video_length")
_NEEDED = (
    "prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "generator",
    "output_type",
    "prompt_embeds",
)
_TOKENIZERS = ("tokenizer", "processor")
_DENOISERS = ("transformer", "unet", "prior")
_SOUND = ("audio_vae", "vocoder")
_EMBEDDINGS = "prompt_embeds"


_EARLIER = {("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel"}
"""Class and ``norm_type`` of earlier releases -> the class that diffusers makes of them when it loads them."""


def present_class(name: str, config: Mapping[str, Any]) -> str:
    """The class that a transformer has when diffusers has loaded it: PixArt's folders name an earlier one.

    Args:
        name: Class that the folder names.
        config: The transformer's configuration.
    """
    return _EARLIER.get((name, str(config.get("norm_type"))), name)


def present_config(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :func:`present_class`; of an earlier class those that the present one has.

    Args:
        name: Class that the folder names.
        config: The transformer's configuration.
    """
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    if (present := present_class(name, config)) == name:
        return own
    known = inspect.signature(getattr(diffusers, present).__init__).parameters
    return {key: value for key, value in own.items() if key in known}


@dataclass(frozen=True, kw_only=True)
class PipelineSignature:
    """The part of a folder's pipeline that its classes tell.

    Attributes:
        name: Class of the pipeline.
        transformer: Class of the transformer as the folder names it; see :func:`present_class`.
        vae: Class of the autoencoder.
        text_encoders: Folder -> class of transformers.
        tokenizers: Folders of tokenizers and processors.
        options: Arguments of the pipeline that are no parts, such as ``force_zeros_for_empty_prompt``.
        call: Argument of a call -> its default; those without one have ``inspect.Parameter.empty``.
        texts: Names of what ``encode_prompt`` returns, which are arguments of the call; those of the negative prompt begin
            with ``negative_``.
    """

    name: str
    transformer: str
    vae: str
    text_encoders: Mapping[str, str]
    tokenizers: tuple[str, ...]
    options: Mapping[str, Any]
    call: Mapping[str, Any]
    texts: tuple[str, ...]

    @classmethod
    def read(cls, index: Mapping[str, Any], *, given: str) -> Self:
        """Read what the ``model_index.json`` of a folder says.

        Args:
            index: Its content, which :mod:`qvgen.models.folder.foreign_code` has let through.
            given: How the user named the folder, for messages.

        Raises:
            ValueError: The pipeline is of a kind that is not supported; the message names what it is.
        """
        name = str(index.get("_class_name"))
        kind = getattr(diffusers, name, None)
        if not inspect.isclass(kind) or not issubclass(kind, diffusers.DiffusionPipeline):
            raise ValueError(f"{given}: model_index.json names {name}, which is no pipeline of diffusers")
        parts = {
            key: value
            for key, value in index.items()
            if isinstance(value, list) and len(value) == 2 and value[1] is not None
        }
        found = _sorted_parts(parts, name=name, given=given)
        call = {
            key: value.default for key, value in inspect.signature(kind.__call__).parameters.items() if key != "self"
        }
        _check_call(call, name=name, given=given)
        known = inspect.signature(kind.__init__).parameters
        options = {key: value for key, value in index.items() if key in known and not isinstance(value, list)}
        return cls(name=name, call=call, options=options, texts=_returned_texts(kind, call, given=given), **found)

    @property
    def frames_argument(self) -> str | None:
        """Name of the argument that says how many frames a video has; None for a pipeline that makes images."""
        return next((name for name in _FRAMES if name in self.call), None)

    def default(self, *names: str | None) -> Any:
        """The default of the first of these arguments that the call has; None where it has no value."""
        value = next((self.call[name] for name in names if name in self.call), None)
        return None if value is inspect.Parameter.empty else value


def _sorted_parts(parts: Mapping[str, list[str]], *, name: str, given: str) -> dict[str, Any]:
    """The parts of a pipeline by what they are.

    Raises:
        ValueError: There is none of a kind, more than one, or one of no known kind.
    """
    of_diffusers = {key: kind for key, (library, kind) in parts.items() if library == "diffusers"}
    denoisers = {key: kind for key, kind in of_diffusers.items() if "Transformer" in kind or key.startswith(_DENOISERS)}
    if list(denoisers) != ["transformer"] or denoisers["transformer"].startswith("UNet"):
        shown = ", ".join(f"{key} ({kind})" for key, kind in denoisers.items()) or "none"
        raise ValueError(
            f"{given} holds a {name} whose denoisers are {shown}; model=diffusers runs one transformer, named transformer"
        )
    for key in ("vae", "scheduler"):
        if key not in of_diffusers:
            raise ValueError(f"{given} holds a {name} without {key}; model=diffusers needs one of diffusers")
    if sound := [key for key in _SOUND if key in parts]:
        raise ValueError(
            f"{given} holds a {name}, whose transformer denoises sound beside the video (it has {' and '.join(sound)}); "
            "clips are trained on without their sound, so qvgen has no family of it"
        )
    of_text = {key: kind for key, (library, kind) in parts.items() if library == "transformers"}
    tokenizers = tuple(key for key in of_text if key.startswith(_TOKENIZERS))
    encoders = {key: kind for key, kind in of_text.items() if key.startswith("text_encoder")}
    unknown = [key for key in parts if key not in {"transformer", "vae", "scheduler", *tokenizers, *encoders}]
    if unknown:
        kind = parts[unknown[0]][1]
        raise ValueError(
            f"{given} holds a {name} with the part {unknown[0]} ({kind}), of which model=diffusers knows nothing; it takes "
            "pipelines of text encoders, one transformer and a VAE, made from a caption alone"
        )
    if not encoders:
        raise ValueError(f"{given} holds a {name} without text_encoder; model=diffusers is conditioned on captions")
    _check_models(parts, ["transformer", "vae", *encoders], given=given)
    found = {"transformer": denoisers["transformer"], "vae": of_diffusers["vae"]}
    return {**found, "text_encoders": encoders, "tokenizers": tokenizers}


def _check_models(parts: Mapping[str, list[str]], names: list[str], *, given: str) -> None:
    """Raise ValueError for a part whose class is none of its library's models: nothing else is ever called to make one."""
    import transformers

    bases = {
        "diffusers": (diffusers, diffusers.ModelMixin),
        "transformers": (transformers, transformers.PreTrainedModel),
    }
    for key in names:
        library, kind = parts[key]
        module, base = bases[library]
        found = getattr(module, kind, None)
        if not inspect.isclass(found) or not issubclass(found, base):
            raise ValueError(f"{given}: model_index.json says that {key} is {kind}, which is no model of {library}")


def _check_call(call: Mapping[str, Any], *, name: str, given: str) -> None:
    """Raise ValueError for a pipeline whose call takes more than a caption, or lacks what sampling needs."""
    for key in _MORE_THAN_A_CAPTION:
        if key in call:
            raise ValueError(
                f"{given} holds a {name}, whose call takes {key}= besides the caption; model=diffusers makes videos and "
                "images of a caption alone (image to video: wan-i2v-14b, wan2.2-i2v-a14b, wan2.2-i2v-5b, cogvideox-i2v, "
                "cogvideox1.5-i2v, hunyuanvideo1.5-i2v)"
            )
    if lengths := [key for key in call if key.endswith("cu_seqlens")]:
        raise ValueError(
            f"{given} holds a {name}, whose captions keep their own numbers of tokens (its call takes {lengths[0]}=); "
            "model=diffusers needs captions that are padded to one length"
        )
    own = [key for key in call if key.startswith(_EMBEDDINGS)]
    if own and _EMBEDDINGS not in own:
        raise ValueError(
            f"{given} holds a {name}, whose call takes a caption as {'= and '.join(own)}=, and none of them is "
            f"{_EMBEDDINGS}=; model=diffusers can't tell which one the transformer's tokens are"
        )
    for key in _NEEDED:
        if key not in call:
            raise ValueError(f"{given} holds a {name}, whose call has no {key}=; model=diffusers can't run it")
    if "true_cfg_scale" in call:
        raise ValueError(
            f"{given} holds a {name}, whose transformer is told its guidance (it has true_cfg_scale=); model=diffusers runs "
            "classifier-free guidance alone"
        )


def _returned_texts(kind: Any, call: Mapping[str, Any], *, given: str) -> tuple[str, ...]:
    """The names of what ``encode_prompt`` returns, read from its last return statement.

    Pipelines of diffusers name these variables as the arguments of their call that take the same tensors.
    """
    encode = getattr(kind, "encode_prompt", None)
    if encode is None:
        raise ValueError(f"{given} holds a {kind.__name__}, which has no encode_prompt; model=diffusers can't run it")
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(encode))).body
    returns = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    last = max(returns, key=lambda node: node.lineno)
    names = [ast.unparse(node) for node in (last.elts if isinstance(last, ast.Tuple) else [last])]
    for name in names:
        if name not in call:
            raise ValueError(
                f"{given} holds a {kind.__name__}, whose encode_prompt returns {name} and whose call takes no {name}=; "
                "captions can't be encoded apart from sampling"
            )
    for name in call:
        if name.startswith(_EMBEDDINGS) and name not in names:
            raise ValueError(
                f"{given} holds a {kind.__name__}, whose call takes {name}= and whose encode_prompt does not return "
                f"{name}; captions can't be encoded apart from sampling"
            )
    return tuple(names)
