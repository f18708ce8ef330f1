"""docs/configuration.md and --help, against conf/, the classes as Python imports them, and the schema's annotations."""

import inspect
from pathlib import Path

import pytest
import yaml

from qvgen.cli import main
from qvgen.config.leaves import _find, conf_directory
from qvgen.config.reference import _table, plain_text, reference, section_rows
from qvgen.config.schema.field_docs import field_docs
from qvgen.config.schema.recipe import check_recipe
from qvgen.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LEAVES = sorted(path for path in conf_directory().glob("*/*.yaml") if "_target_" in path.read_text(encoding="utf-8"))


def test_the_page_is_what_the_schema_and_conf_say() -> None:
    """Made anew by `make reference`."""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == reference()


def test_the_page_has_defaults_ranges_and_meanings() -> None:
    (row,) = [line for line in reference().splitlines() if line.startswith("| `phi.tail_share`")]
    assert row.startswith("| `phi.tail_share` | `0.1` | number, [0, 1) | Share of the steps that train without Phi")
    (row,) = [line for line in reference().splitlines() if line.startswith("| `profile.rotation`")]
    assert "(convrot); `0` (int8, paper, svdq_g64, w4a8_row)" in row


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_is_read_from_the_source_is_what_python_sees(path: Path) -> None:
    section = yaml.safe_load(path.read_text(encoding="utf-8"))
    real = inspect.signature(_find(section["_target_"], key=path.parent.name)).parameters
    read = field_docs(section["_target_"])
    assert set(real) <= set(read)
    assert all(read[name].meaning for name in section if name not in ("_target_", "recipe"))


def test_a_key_that_no_class_explains_has_no_meaning_and_stops_the_page() -> None:
    (row,) = section_rows({"made_up": 3}, "qvgen.config.schema.sections.PhiConfig")
    assert (row.key, row.default, row.meaning) == ("made_up", "3", "")
    with pytest.raises(ValueError, match="made_up of conf/ has no meaning"):
        _table("default", [(row, row.default)])


def test_meanings_speak_as_the_command_line_does() -> None:
    assert plain_text("None: see :class:`a.B`; ``x`` where True.") == "null: see a.B; `x` where true."


def test_help_shows_value_meaning_and_range_of_each_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "init=gptq", "phi.rank=8", "--help"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "=" in line]
    meanings = {line[0]: line[1] for line in lines if len(line) == 2}
    assert meanings["phi.rank=8"] == "Number of components of Phi (columns of L) at the start; range > 0"
    assert meanings["steps=220"].startswith("Optimizer steps")
    assert "init.damping=0.01" in meanings
    assert "init.alpha=0.5" not in meanings
    assert all(key.partition("=")[0] and meaning for key, meaning in meanings.items())


def test_help_of_what_needs_a_value_shows_that_it_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fold", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "run_dir=???" in shown
    assert "out=${run_dir}/packed" in shown


def test_a_recipe_takes_only_what_conf_reads() -> None:
    check_recipe({"steps": 3, "learning_rate": 1e-3})
    for recipe, message in (
        ({"stepz": 3}, "unknown key 'model.recipe.stepz'"),
        ({"steps": 0}, "steps=0 must be greater"),
    ):
        with pytest.raises(UserError, match=message):
            check_recipe(recipe)
