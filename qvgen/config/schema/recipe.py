"""``model.recipe``: what a model's training takes unless the command says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from qvgen.config.schema.value_range import Range, check_ranges
from qvgen.config.typed import from_plain


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Defaults of a run with this model, which conf/ reads as ``${model.recipe.KEY}``; no leaf receives them.

    Attributes:
        steps: Default of ``steps``.
        batch_size: Default of ``batch_size``.
        learning_rate: Default of ``optim.learning_rate``.
        data: Default of the group ``data``.
        quality_videos: Default of ``evaluation.quality_videos``; None: that of ``evaluation.samples``.
        micro_batch_size: Samples that a device works on at once, from which the default of ``accumulate`` follows;
            None: all of its share of the batch.
        gradient_checkpointing: Default of ``strategy.gradient_checkpointing``.
        video_every_steps: Default of ``evaluation.video_every_steps``.
    """

    steps: Annotated[int | None, Range("> 0")] = None
    batch_size: Annotated[int | None, Range("> 0")] = None
    learning_rate: Annotated[float | None, Range("> 0")] = None
    data: str = "clips"
    quality_videos: Annotated[int | None, Range("> 0")] = None
    micro_batch_size: Annotated[int | None, Range("> 0")] = None
    gradient_checkpointing: bool = False
    video_every_steps: Annotated[int | None, Range("> 0")] = None

    def __post_init__(self) -> None:
        check_ranges(self, section="model.recipe")


def check_recipe(given: Mapping[str, Any]) -> None:
    """Raise UserError for a key of a ``recipe`` that no configuration reads, or a value of another type or range."""
    from_plain(Recipe, {**asdict(Recipe()), **given}, key="model.recipe")
