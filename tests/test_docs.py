"""README and docs: every command is composed by the real command line, every link and picture exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import qvgen
from qvgen.cli import main, verb_files
from qvgen.config.compose import compose_plain, expand_sweep
from qvgen.config.flags import parse_flags
from qvgen.config.leaves import conf_directory
from qvgen.config.positional import name_positionals

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "kernels" / "README.md"]
ALL_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
GENERATED = ROOT / "docs" / "benchmarks"
LONGEST_LINE = 120


def _commands() -> list[list[str]]:
    """Each command once, however many pages have it."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["python", "train.py"]:
                    found.append(["train", *words[2:]])
                elif words[:1] in (["torchrun"], ["srun"]) and "train.py" in words:
                    found.append(["train", *words[words.index("train.py") + 1 :]])
                elif words[:1] in (["torchrun"], ["srun"]):
                    program = "qvgen.cli" if "qvgen.cli" in words else "qvgen"
                    found.append(words[words.index(program) + 1 :])
                elif words[:1] == ["qvgen"]:
                    found.append(words[1:])
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


@pytest.mark.parametrize("arguments", _commands(), ids=" ".join)
def test_command_of_the_docs_is_one_that_exists(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    verb, *words = arguments
    assert verb in verb_files()
    if "--help" in words:
        assert main(arguments) == 0
        assert f"qvgen {verb}" in capsys.readouterr().out
        return
    flags = parse_flags(name_positionals(verb, words))
    first = expand_sweep(flags.overrides, multirun=bool(flags.multirun))[0]
    folder = Path(flags.config_dir) if flags.config_dir else None
    assert "debug" in compose_plain(verb, first, extra_directory=folder, resolve=False)


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^    |`)make (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_commands_have_one_form_which_the_first_page_explains() -> None:
    """`python` and `qvgen` are those of .venv once it is activated; no page has a form that works only elsewhere."""
    for page in (ROOT / "README.md", ROOT / "docs" / "quickstart.md"):
        text = page.read_text(encoding="utf-8")
        assert text.index("source .venv/bin/activate") < text.index("\npython train.py"), page
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in filter(None, block.splitlines()):
                words = shlex.split(line, comments=True)
                if words[:1] == ["bash"]:
                    assert (ROOT / words[1]).is_file(), f"{page}: {line}"
                    continue
                assert words[:1] in ([], ["python"], ["qvgen"], ["source"], ["make"], ["torchrun"], ["srun"]), (
                    f"{page}: {line}"
                )
        assert "git clone ..." not in page.read_text(encoding="utf-8")
        assert "pip install 'qvgen" not in page.read_text(encoding="utf-8"), "qvgen is on no package index"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("CORES=2",), "train.py devices=2 strategy=ddp"),
        (("CORES=16", "ARGS=bits=4 seed=1"), "train.py devices=2 strategy=ddp bits=4 seed=1"),
        (("CORES=1", "ARGS=bits=4"), "train.py bits=4"),
        (("CORES=2", "ARGS=devices=1"), "train.py devices=1"),
        (("CORES=2", "ARGS=seed=1 strategy=single"), "train.py seed=1 strategy=single"),
        (("CORES=2", "ARGS=batch_size=1"), "train.py batch_size=1"),
    ],
)
def test_make_demo_takes_two_processes_where_there_are_two_cores(given: tuple[str, ...], expected: str) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "demo", "GPUS=", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].split() == [".venv/bin/python", *expected.split()]
    on_gpus = subprocess.run(
        ["make", "--no-print-directory", "-n", "demo", "CORES=2", "GPUS=x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert on_gpus.stdout.splitlines()[-1].split() == [".venv/bin/python", "train.py"]  # devices=auto


@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "qvgen").exists(), reason="make venv has not made .venv here")
def test_make_shell_is_where_the_commands_work() -> None:
    typed = "command -v python qvgen; exit\n"
    shell = subprocess.run(["make", "shell"], cwd=ROOT, input=typed, capture_output=True, text=True, check=False)
    assert shell.returncode == 0, shell.stderr
    assert {str(ROOT / ".venv" / "bin" / name) for name in ("python", "qvgen")} <= set(shell.stdout.split())


def test_a_python_without_the_libraries_says_how_to_activate(tmp_path: Path) -> None:
    """-S -I: the same interpreter without its site-packages, as where .venv was not activated."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from qvgen.cli import main; sys.exit(main(['train']))"
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(r"has no module \w+; first run: source", line)
    assert str(Path(".venv") / "bin" / "activate") in line


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith(("|---", "| promise"))]
    assert rows
    for row in rows:
        assert "::" in row.rpartition(" | ")[2], row
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), f"{path}::{name}"


def _long_lines(text: str) -> list[str]:
    """Lines of running text that are too long; tables, pictures, code and what has no place to break stay as they are."""
    text = re.sub(r"```.*?```|(?m:^    [^\n]*$)", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if len(line) > LONGEST_LINE]
    unbroken = re.compile(r"`[^`]+`")
    return [
        line
        for line in lines
        if not line.lstrip().startswith(("|", "![")) and " " in unbroken.sub("", line).strip("-; ")
    ]


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_wrap(page: Path) -> None:
    assert page.is_relative_to(GENERATED) or not _long_lines(page.read_text(encoding="utf-8"))


def test_what_counts_as_a_long_line() -> None:
    words = "word " * 30
    assert _long_lines(words) == [words]
    assert _long_lines(f"| {words} |\n\n```\n{words}\n```\n    {words}\n![{words}](x.png)\n`{words}`;") == []


def test_the_site_has_every_page() -> None:
    """`make docs` builds it; a page that its configuration lacks would be an error there."""
    listed = re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    made = [page for page in listed if page.startswith("reference/")]
    assert {f"reference/{room.name}.md" for room in (ROOT / "qvgen").iterdir()} >= set(made)
    written = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(listed) - set(made) == written


def test_the_site_fetches_nothing() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["strict"] is True
    assert site["theme"]["highlightjs"] is False


def test_every_public_name_is_in_the_reference() -> None:
    shown = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = {name.rpartition(".")[2] for name in shown}
    assert {name for name in qvgen.__all__ if not name.startswith("__")} <= names


def test_the_changelog_knows_the_version() -> None:
    assert f"\n## {qvgen.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_papers_of_all_methods_are_cited() -> None:
    """The citation file names the leaf of conf/ that each paper is implemented by."""
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    papers = yaml.safe_load(text)["references"]
    assert all(
        re.fullmatch(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|nips\.cc/Conferences/\S+)", paper["url"])
        and paper["authors"]
        for paper in papers
    )
    leaves = re.findall(r"(init|method)=(\w+)", text)
    assert leaves
    assert all((conf_directory() / group / f"{name}.yaml").is_file() for group, name in leaves)
    own = {"autoencoder", "pretrain", "ptq", "rtn", "mse"}
    files = [path for group in ("init", "method") for path in (conf_directory() / group).glob("*.yaml")]
    assert {path.stem for path in files} - own == {name for _, name in leaves}


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_the_forge_reads_its_files(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "workflows":
        steps = [step.get("run") for job in content["jobs"].values() for step in job["steps"]]
        assert ".ci/run" in steps
    else:
        assert {"name", "description", "body"} <= set(content) or content == {"blank_issues_enabled": True}
