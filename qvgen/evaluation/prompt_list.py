"""VBench's list of prompts, a user's file: which dimensions each prompt is measured in, and what the prompt asks for there.

    [{"prompt_en": "a bird and a cat",
      "dimension": ["multiple_objects"],
      "auxiliary_info": {"multiple_objects": {"object": "bird and cat"}}}, ...]

It is VBench_full_info.json of Vchitect/VBench, 946 prompts, or a part of it. A prompt that comes twice has both entries'
dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvgen.errors import UserError, one_line


@dataclass(frozen=True, kw_only=True)
class PromptFacts:
    """One prompt's entry.

    Attributes:
        dimensions: Names of the dimensions that its videos are measured in.
        auxiliary: For a dimension that has it, what the prompt asks for, as published: objects, color, relation, scene,
            style.
    """

    dimensions: frozenset[str]
    auxiliary: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptList:
    """All prompts of a file, by their text, or a part of them.

    Attributes:
        prompts: Text -> what is known of it.
        left_out: Texts of the file that are no part of it.
    """

    prompts: Mapping[str, PromptFacts]
    left_out: frozenset[str] = frozenset()

    def facts(self, caption: str | None) -> PromptFacts | None:
        """The entry of a caption; None: it is not in the list, and no dimension looks at its videos."""
        return None if caption is None else self.prompts.get(caption)

    def content(self, caption: str | None) -> list[Any] | None:
        """The facts of a caption as a JSON value in a fixed order; None where the list does not have the caption."""
        facts = self.facts(caption)
        return None if facts is None else [sorted(facts.dimensions), facts.auxiliary]

    def entries(self) -> list[dict[str, Any]]:
        """All prompts in the published form."""
        return [
            {"prompt_en": caption, "dimension": sorted(facts.dimensions), "auxiliary_info": dict(facts.auxiliary)}
            for caption, facts in self.prompts.items()
        ]


def read_prompt_list(path: Path) -> PromptList:
    """Read a list.

    Raises:
        UserError: It can't be read, or an entry has not the published form, with its number.
    """
    try:
        entries = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"vbench.info={path} can't be read: {one_line(error)}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"vbench.info={path} is no list of prompts; give VBench_full_info.json, or a part of it")
    found: dict[str, PromptFacts] = {}
    for number, entry in enumerate(entries, 1):
        caption, facts = _entry(entry, number=number, path=path)
        before = found.get(caption)
        if before is not None:
            facts = PromptFacts(
                dimensions=before.dimensions | facts.dimensions, auxiliary={**before.auxiliary, **facts.auxiliary}
            )
        found[caption] = facts
    return PromptList(prompts=found)


def _entry(entry: object, *, number: int, path: Path) -> tuple[str, PromptFacts]:
    at = f"vbench.info={path}: entry {number}"
    if not isinstance(entry, Mapping):
        raise UserError(f"{at} is no mapping; it needs prompt_en and dimension")
    caption, dimensions = entry.get("prompt_en"), entry.get("dimension")
    if not isinstance(caption, str) or not caption:
        raise UserError(f"{at} has no text prompt_en")
    if not isinstance(dimensions, list) or not all(isinstance(name, str) for name in dimensions):
        raise UserError(f"{at} has dimension={dimensions}, which is no list of names")
    auxiliary = entry.get("auxiliary_info", {})
    if not isinstance(auxiliary, Mapping):
        raise UserError(f"{at} has auxiliary_info={auxiliary}, which is no mapping from dimensions")
    return caption, PromptFacts(dimensions=frozenset(dimensions), auxiliary=dict(auxiliary))
