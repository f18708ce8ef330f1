"""Change one line of the sources in a copy, and look which test notices; again for N lines drawn at random. A program.

    python tests/mutants/mutate_lines.py N SEED [--rooms quant layers] [--seconds 900] [--only NUMBER ...] [--list]

A mutant is one expression or statement of one line: another operator or comparison, another number, True for False, a
condition turned round, None for a returned value, a dropped statement. The rooms take turns, and within a room every
place that can be changed is drawn with the same chance. Left out is what no test should notice: docstrings, type
annotations, log messages and the words of an error.

Each mutant meets the test files that are most likely to notice first: its mirror tests/ROOM/test_FILE.py and the room's
files that import its module, then the rest of the room's tests, then files elsewhere that import it, then END_TO_END. A
test that fails, or takes longer than it may, counts only if it passes on the unchanged copy: a test that is broken or too
slow anyway kills nothing. The table on stdout has a row for each mutant; the exit
status is 1 if one survived. The sources themselves are never touched.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("quant", "layers", "lowrank", "training", "deploy")
END_TO_END = ("tests/verbs/test_train.py", "tests/verbs/test_fold.py")
"""What runs last for every mutant: training, folding, packing, and the run's report."""

FILES_AT_ONCE = 6
"""Test files of one run of pytest: starting one takes seconds, and a mutant that loops forever costs its whole time."""

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
"""An operator -> the one that takes its place."""


@dataclass(frozen=True)
class Mutant:
    """A change of one line of a file."""

    file: str
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        """Place and change, as the table shows them."""
        return f"{self.file}:{self.line}  {self.before.strip()}  ->  {self.after.strip()}"


def changed(node: ast.AST) -> ast.AST | None:
    """The node that takes the place of one, or None where nothing is changed."""
    new = copy.copy(node)
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPPED:
        new.op = SWAPPED[type(node.op)]()  # type: ignore[attr-defined]
    elif isinstance(node, ast.Compare):
        new.ops = [SWAPPED[type(node.ops[0])](), *node.ops[1:]]  # type: ignore[attr-defined]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        return node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        new.value = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2 or 1.0  # type: ignore[attr-defined]
    elif isinstance(node, ast.IfExp):
        new.body, new.orelse = node.orelse, node.body  # type: ignore[attr-defined]
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        return ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Expr | ast.Raise | ast.Continue | ast.Break) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    ):
        return ast.Pass()
    else:
        return None
    return new


def silent(node: ast.AST) -> bool:
    """Whether no test should notice that this node is changed: text, and what is only logged."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or ast.unparse(node.value).startswith(("log.", "logging."))
    return isinstance(node, ast.JoinedStr | ast.arguments | ast.Import | ast.ImportFrom)


def places(node: ast.AST, *, message: bool = False) -> Iterator[ast.AST]:
    """Every node below one that may be changed; inside of a `raise` or an `assert` only the condition."""
    if silent(node):
        if isinstance(node, ast.arguments):
            for default in (*node.defaults, *node.kw_defaults):
                if default is not None:
                    yield from places(default)
        return
    if not message:
        yield node
    for name, value in ast.iter_fields(node):
        below = value if isinstance(value, list) else [value]
        for child in below:
            if isinstance(child, ast.AST) and name not in ("annotation", "returns", "decorator_list", "msg"):
                yield from places(child, message=message or isinstance(node, ast.Raise))


def mutants(root: Path, room: str) -> list[Mutant]:
    """Every mutant of a room, in the order of its files and lines."""
    made = []
    for path in sorted((root / "qvgen" / room).rglob("*.py")):
        text = path.read_bytes()
        lines = text.splitlines()
        for node in places(ast.parse(text)):
            new = changed(node)
            if new is None or node.lineno != node.end_lineno:  # type: ignore[attr-defined]
                continue
            line, start, end = lines[node.lineno - 1], node.col_offset, node.end_col_offset  # type: ignore[attr-defined]
            brackets = "({})" if isinstance(new, ast.expr) and not isinstance(new, ast.Constant) else "{}"
            after = line[:start] + brackets.format(ast.unparse(new)).encode() + line[end:]
            made.append(Mutant(str(path.relative_to(root)), node.lineno, line.decode(), after.decode()))  # type: ignore[attr-defined]
    return made


def drawn(root: Path, rooms: tuple[str, ...], count: int, seed: int) -> list[Mutant]:
    """`count` mutants, the rooms in turn; a room's are the same ones for the same seed and sources of that room."""
    orders = [mutants(root, room) for room in rooms]
    for room, order in zip(rooms, orders, strict=True):
        random.Random(f"{seed} {room}").shuffle(order)
    return [orders[index % len(rooms)][index // len(rooms)] for index in range(count)]


def stages(root: Path, mutant: Mutant) -> list[list[str]]:
    """Test files that meet a mutant, the likeliest first, each in one run of pytest of at most FILES_AT_ONCE."""
    source = Path(mutant.file).relative_to("qvgen")
    module = ".".join(("qvgen", *source.with_suffix("").parts))
    mirror = root / "tests" / source.parent / f"test_{source.name}"
    package, _, name = module.rpartition(".")
    imports = re.compile(rf"{re.escape(module)}\b|from {re.escape(package)} import [^\n]*\b{name}\b")
    tests = sorted((root / "tests").rglob("test_*.py"))
    near = [test for test in tests if imports.search(test.read_text(encoding="utf-8"))]
    room = [test for test in tests if source.parts[0] in test.relative_to(root / "tests").parts]
    room.sort(key=lambda test: test.parent != mirror.parent)  # its own inner room first
    seen: set[Path] = set()
    result = []
    for group in ([mirror, *(test for test in near if test in room)], room, near, [root / test for test in END_TO_END]):
        fresh = [test for test in dict.fromkeys(group) if test.is_file() and test not in seen]
        seen.update(fresh)
        files = [str(test.relative_to(root)) for test in fresh]
        result += [files[start : start + FILES_AT_ONCE] for start in range(0, len(files), FILES_AT_ONCE)]
    return result


def first_failure(root: Path, tests: list[str], seconds: float, broken: set[str]) -> str | None:
    """The test that fails first, all files' names if they take too long, None if all but the broken ones pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *tests]
    command += [f"--deselect={name}" for name in sorted(broken)]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)  # the processes that a test started too
        child.wait()
        return " ".join(tests)
    if child.returncode in (0, 5):
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failed[1] if failed else " ".join(tests)


def killer(root: Path, mutant: Mutant, seconds: float, broken: set[str]) -> str | None:
    """The test that notices a mutant in the copy at `root`, None if it survives; `broken` collects what fails anyway."""
    path = root / mutant.file
    original = path.read_bytes()
    lines = original.decode().splitlines(keepends=True)
    lines[mutant.line - 1] = mutant.after + "\n"
    for tests in stages(root, mutant):
        while True:
            path.write_text("".join(lines), encoding="utf-8")
            try:
                failed = first_failure(root, tests, seconds, broken)
            finally:
                path.write_bytes(original)
            if failed is None:
                break
            if first_failure(root, failed.split(" "), seconds, broken) is None:
                return failed
            broken.update(failed.split(" "))
    return None


def main() -> int:
    """Draw, run, print; 1 if a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--rooms", nargs="+", default=ROOMS, choices=ROOMS)
    parser.add_argument("--seconds", type=float, default=900.0, help="for one run of pytest")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="only these of the N mutants, from 1")
    parser.add_argument("--list", action="store_true", help="only show the mutants")
    chosen = parser.parse_args()
    out = sys.stdout
    survived, broken = 0, set[str]()
    with tempfile.TemporaryDirectory(prefix="qvgen-mutants-") as folder:
        root = Path(folder) / "copy"
        left_out = shutil.ignore_patterns("__pycache__", ".venv", ".git", "outputs", "build", "*.so")
        shutil.copytree(ROOT, root, ignore=left_out)
        numbered = dict(enumerate(drawn(root, tuple(chosen.rooms), chosen.count, chosen.seed), 1))
        for number in chosen.only or numbered:
            mutant = numbered[number]
            started = time.monotonic()
            by = "" if chosen.list else killer(root, mutant, chosen.seconds, broken) or "SURVIVED"
            survived += by == "SURVIVED"
            out.write(f"{number:3d}  {mutant}\n     {by}  ({time.monotonic() - started:.0f} s)\n")
            out.flush()
    out.write("".join(f"fails without any change, so it was left out: {name}\n" for name in sorted(broken)))
    if not chosen.list:
        count = len(chosen.only or numbered)
        out.write(f"{count - survived} of {count} mutants are killed\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
