"""README and docs: every command is composed by the real command line, every link and picture exists."""

import re
import shlex
from pathlib import Path

import pytest

from qvgen.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "kernels" / "README.md"]


def _commands() -> list[list[str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["python", "train.py"]:
                    found.append(["train", *words[2:]])
                elif words[:1] == ["qvgen"]:
                    found.append(words[1:])
    return found


@pytest.mark.parametrize("arguments", _commands(), ids=" ".join)
def test_command_of_the_docs_is_one_that_exists(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    extra = [] if "--help" in arguments else ["--cfg", "job"]
    one_job = [re.sub(r"=([^,\[]+),.*", r"=\1", word) for word in arguments if word != "-m"]
    assert main([*one_job, *extra]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_readme_names_both_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"    make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
