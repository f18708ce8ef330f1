"""Model folders name classes; here their names are looked at before anybody follows them.

A downloaded folder may say that a tokenizer or a model is a class of its own (``auto_map``, a component of another library,
an attention kernel out of a repository). Loading such a thing would run code that came with data, so it is refused by name,
before anything is imported and without a question at the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LIBRARIES = ("diffusers", "transformers")
_CODE_KEYS = ("auto_map", "custom_pipelines", "custom_pipeline")
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_config(config: Mapping[str, Any], *, file: Path) -> None:
    """Look through a component's configuration.

    Args:
        config: content of config.json, tokenizer_config.json or scheduler_config.json.
        file: for the message.

    Raises:
        ValueError: it names code.
    """
    for key, value in _entries(config):
        foreign = key in _CODE_KEYS and value
        if foreign or (key in _IMPLEMENTATIONS and "/" in str(value)):
            raise ValueError(
                f"{file} names code of its own ({key}: {_short(value)}), which is never run; use a folder whose parts are of "
                f"{' and '.join(LIBRARIES)}"
            )


def check_model_index(index: Mapping[str, Any], *, file: Path) -> None:
    """Look through a model_index.json.

    Raises:
        ValueError: the pipeline or a component is of a library that is neither diffusers nor transformers, or a component is
            one that diffusers has inside of a pipeline (LTX-2's vocoder).
    """
    import diffusers

    pipeline = index.get("_class_name", "DiffusionPipeline")
    if not isinstance(pipeline, str) or pipeline not in dir(diffusers):
        raise ValueError(
            f"{file} names a pipeline that diffusers does not have, {_short(pipeline)}, whose code is never run; if its "
            "parts are made for one of diffusers' pipelines, write that one's name as _class_name"
        )
    for name, value in index.items():
        if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
            continue  # [null, null] is a part that the model does without
        if _is_of_a_pipeline(value[0]):
            raise ValueError(
                f"{file} says that the {name} of a {pipeline} is {_short(value[1])}, which is made for diffusers' pipeline "
                f"{value[0]} alone; no family of qvgen has such a part"
            )
        if value[0] not in LIBRARIES or not str(value[1]).isidentifier():
            raise ValueError(
                f"{file} says that {name} is {'.'.join(map(str, value))[:100]}, whose code is never run; use a folder whose "
                f"parts are of {' and '.join(LIBRARIES)}"
            )
    check_config(index, file=file)


def _is_of_a_pipeline(library: str) -> bool:
    """Whether a library is the name of one of diffusers' folders of pipelines, which it writes for classes in there."""
    import diffusers.pipelines

    return library.isidentifier() and (Path(diffusers.pipelines.__path__[0]) / library / "__init__.py").is_file()


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys at any depth, with what they hold."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield str(key), entry
            yield from _entries(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _entries(entry)


def _short(value: Any) -> str:
    return " ".join(str(value).split())[:100]
