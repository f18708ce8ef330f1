"""How far the means over a few prompts of a list lie from those over the whole list, in an evaluation of the whole.

    python -m qvgen.evaluation.suite.subset_error WHOLE/evaluation.json VBench_full_info.json 72 > errors.json

Of each metric with a value for each video:

    whole, subset     mean over prompts of their videos' means; of all prompts, and of those that were chosen
    error             subset - whole
    predicted         sqrt(sum_h W_h^2 (1 - n_h / N_h) s_h^2 / n_h), from the spread s_h of the chosen prompts alone in each
                      group h of prompts of the same dimensions: n_h of N_h are chosen, W_h = n_h / n  (W. G. Cochran,
                      Sampling Techniques, 1977, chapter 5); a group of one chosen prompt has the spread of all
    rms               of the errors of 1000 further choices of the same kind

``error`` is one draw: of many metrics about two thirds lie within ``predicted`` where that is right, and ``rms`` is the error
that a choice has.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

from qvgen.errors import UserError
from qvgen.evaluation.prompt_list import PromptList, read_prompt_list
from qvgen.evaluation.prompt_subset import choose_subset
from qvgen.evaluation.suite.summary import read_evaluation

DRAWS = 1000


def subset_errors(content: Mapping[str, Any], prompts: PromptList, count: int) -> dict[str, dict[str, Any]]:
    """The errors by metric, and under ``dimensions`` those of the prompts of each dimension alone; see the module.

    Args:
        content: An evaluation of all prompts.
        prompts: The list.
        count: Prompts that are chosen.

    Raises:
        UserError: The evaluation has not the whole list.
    """
    values = _values_by_metric(content)
    measured = {video["caption"] for video in content["videos"]}
    if missing := [text for text in prompts.prompts if text not in measured]:
        raise UserError(f"the evaluation lacks {len(missing)} of the list's prompts, the first of them {missing[0]!r}")
    groups = {text: tuple(sorted(facts.dimensions)) for text, facts in prompts.prompts.items()}
    chosen = choose_subset(prompts, count).prompts
    draws = [choose_subset(prompts, count, salt=f"{draw} ").prompts for draw in range(DRAWS)]
    names = sorted({name for facts in prompts.prompts.values() for name in facts.dimensions})
    found = {}
    for name, values_of in values.items():
        by_prompt = {text: value for text, value in values_of.items() if groups.get(text)}
        parts = {
            part: _row(
                {text: value for text, value in by_prompt.items() if part in groups[text]}, groups, chosen, draws
            )
            for part in names
        }
        row = _row(by_prompt, groups, chosen, draws)
        if row is not None:
            found[name] = {**row, "dimensions": {part: row for part, row in parts.items() if row is not None}}
    return found


def _row(
    by_prompt: Mapping[str, float],
    groups: Mapping[str, tuple[str, ...]],
    chosen: Collection[str],
    draws: Sequence[Collection[str]],
) -> dict[str, float] | None:
    """The errors of some prompts' mean; None: fewer than two of them are chosen."""
    ours = {text: value for text, value in by_prompt.items() if text in chosen}
    if len(ours) < 2:
        return None
    whole, subset = fmean(by_prompt.values()), fmean(ours.values())
    drawn = [[by_prompt[text] for text in draw if text in by_prompt] for draw in draws]
    return {
        "prompts": len(by_prompt), "chosen": len(ours), "spread": stdev(by_prompt.values()),
        "whole": whole, "subset": subset, "error": subset - whole,
        "predicted": _predicted(ours, groups, whole=list(by_prompt)),
        "rms": math.sqrt(fmean([(fmean(each) - whole) ** 2 for each in drawn if each])),
    }  # fmt: skip


def _values_by_metric(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Metric -> caption -> mean of its videos."""
    rows: dict[str, dict[str, list[float]]] = {}
    for video in content["videos"]:
        for name, value in video["values"].items():
            rows.setdefault(name, {}).setdefault(video["caption"], []).append(value)
    return {name: {text: fmean(each) for text, each in row.items()} for name, row in rows.items()}


def _predicted(ours: Mapping[str, float], groups: Mapping[str, tuple[str, ...]], *, whole: Sequence[str]) -> float:
    """Standard error of the mean of chosen prompts, from their own spread."""
    total = 0.0
    for group in {groups[text] for text in ours}:
        values = [value for text, value in ours.items() if groups[text] == group]
        size = sum(groups[text] == group for text in whole)
        spread = variance(values) if len(values) > 1 else variance(ours.values())
        total += (len(values) / len(ours)) ** 2 * (1 - len(values) / size) * spread / len(values)
    return math.sqrt(total)


def main(words: Sequence[str]) -> None:
    """Write the errors to stdout."""
    if len(words) != 3 or not words[2].isascii() or not words[2].isdigit():
        raise UserError("write python -m qvgen.evaluation.suite.subset_error EVALUATION VBench_full_info.json 72")
    content = read_evaluation(Path(words[0]), key="EVALUATION")
    found = subset_errors(content, read_prompt_list(Path(words[1])), int(words[2]))
    sys.stdout.write(json.dumps({"prompts": int(words[2]), "metrics": found}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
