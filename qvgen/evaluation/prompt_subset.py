"""A few prompts of VBench's list that stand for all of it: as many of each dimension, chosen by their checksums.

    python -m qvgen.evaluation.prompt_subset VBench_full_info.json 72 > VBench_72_info.json

The dimension that has the fewest prompts so far takes its next one, until there are enough: 72 are 6 or 7 of each, since
some prompts are of three dimensions. A dimension counts the same in the total however many prompts it has, so the largest
error of one is smallest where all have as many. Next is the prompt whose text has the smallest SHA-256: the choice depends
on nothing but the texts, and is a simple random sample as far as scores are concerned.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qvgen.errors import UserError
from qvgen.evaluation.prompt_list import PromptList, read_prompt_list


def choose_subset(prompts: PromptList, count: int, *, salt: str = "") -> PromptList:
    """So many prompts of a list, in the list's order.

    Args:
        prompts: All prompts; one that no dimension looks at is never chosen.
        count: How many.
        salt: Goes before the text in its checksum: another salt is another choice of the same kind.

    Raises:
        UserError: There are as few prompts, or a dimension would have none.

    >>> from qvgen.evaluation.prompt_list import PromptFacts
    >>> color, scene = (PromptFacts(dimensions=frozenset([name]), auxiliary={}) for name in ("color", "scene"))
    >>> every = PromptList(prompts={"a cat": color, "a dog": color, "a cup": scene, "a bus": scene})
    >>> list(choose_subset(every, 2).prompts)
    ['a cat', 'a cup']
    """
    ranked = sorted(
        (text for text, facts in prompts.prompts.items() if facts.dimensions),
        key=lambda text: hashlib.sha256(f"{salt}{text}".encode()).digest(),
    )
    if count >= len(ranked):
        raise UserError(f"vbench.subset={count} is no part of a list of {len(ranked)} prompts; leave it out")
    queues: dict[str, list[str]] = {}
    for text in reversed(ranked):  # the next prompt of a dimension is the last one of its list
        for name in prompts.prompts[text].dimensions:
            queues.setdefault(name, []).append(text)
    taken, chosen = dict.fromkeys(sorted(queues), 0), set()
    while len(chosen) < count:
        fewest = min(taken, key=lambda name: (not queues[name], taken[name]))
        text = queues[fewest].pop()
        if text not in chosen:
            chosen.add(text)
            for name in prompts.prompts[text].dimensions:
                taken[name] += 1
    if empty := [name for name, number in taken.items() if not number]:
        raise UserError(f"vbench.subset={count} is too few: no prompt would be left for {', '.join(empty)}")
    return PromptList(
        prompts={text: facts for text, facts in prompts.prompts.items() if text in chosen},
        left_out=frozenset(text for text in prompts.prompts if text not in chosen),
    )


def main(words: Sequence[str]) -> None:
    """Write the part of a list to stdout, in the published form."""
    if len(words) != 2 or not words[1].isascii() or not words[1].isdigit():
        raise UserError("write python -m qvgen.evaluation.prompt_subset VBench_full_info.json 72")
    entries = choose_subset(read_prompt_list(Path(words[0])), int(words[1])).entries()
    sys.stdout.write(json.dumps(entries, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
