"""The house rules that a linter does not know: leaves and their files in conf/, and the sizes of modules and functions."""

import ast
import functools
import importlib
import inspect
from pathlib import Path

import pytest
import yaml

from qvgen.config.leaves import conf_directory
from qvgen.config.schema.by_verb import SCHEMAS
from tests.conftest import LONGEST_FIRST

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "init": ("initializers",), "method": ("methods",), "model": ("models",), "export": ("deploy.exporters",),
    "metric": ("evaluation.metrics", "evaluation.vbench"),
}  # fmt: skip
"""Group of conf/ -> packages of its leaves."""
NOT_LEAVES = {"__init__", "base", "calibration", "context_parallel", "named_family", "objectives", "prepare", "total"}
"""Modules of those packages that are no leaves by their purpose; nor is any that a sibling imports, as its part."""
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 60, 7

WHOLE_CONFIGURATIONS = {kind.__name__ for kind in SCHEMAS.values()} | {"VerbConfig", "load_run"}
"""Classes that one verb's `run` receives, and what else of qvgen.config gives such an object."""

SOURCES = sorted([*(ROOT / "qvgen").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "train.py"])
LEAF_FILES = [
    path for path in sorted(conf_directory().rglob("*.yaml")) if "_target_" in (yaml.safe_load(path.read_text()) or {})
]


def relative(path):
    return str(path.relative_to(ROOT))


ROOMS = sorted({path.parent for path in SOURCES})


def sources_of(room):
    return [path for path in SOURCES if path.parent == room]


@functools.cache
def target_of(path):
    return yaml.safe_load(path.read_text())["_target_"]


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def imports_of(path):
    """Full names of the modules that a module imports."""
    nodes = list(ast.walk(tree_of(path)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def leaf_modules(package):
    """Modules that stand by themselves: what only conf/ leads to."""
    folder = ROOT / "qvgen" / package.replace(".", "/")
    parts = {name for path in folder.rglob("*.py") for name in imports_of(path)}
    return {
        path.stem
        for path in folder.glob("*.py")
        if path.stem not in NOT_LEAVES and f"qvgen.{package}.{path.stem}" not in parts
    }


@pytest.mark.parametrize(("group", "packages"), PACKAGES.items())
def test_every_leaf_has_its_file_in_conf(group, packages):
    targets = {target_of(path).rpartition(".")[0] for path in LEAF_FILES if path.parent.name == group}
    assert {f"qvgen.{package}.{name}" for package in packages for name in leaf_modules(package)} == targets


@pytest.mark.parametrize("path", LEAF_FILES, ids=relative)
def test_every_target_exists_and_takes_its_values(path):
    """Every value is an argument, and every argument without a default has a value or is given at run time."""
    spec = yaml.safe_load(path.read_text())
    module, _, name = spec.pop("_target_").rpartition(".")
    target = getattr(importlib.import_module(module), name)
    assert target.__module__ == module  # named at its home
    parameters = inspect.signature(target).parameters
    given = set(spec) - ({"recipe"} if path.parent.name == "model" else set())
    assert given <= set(parameters)
    if path.parent.name != "data":  # a data set is told its split and size by the verb
        missing = {key for key, value in parameters.items() if value.default is inspect.Parameter.empty} - given
        assert not missing


def test_there_are_files_to_look_at():
    assert len(SOURCES) > 40
    assert {path.parent.name for path in LEAF_FILES} >= {"init", "method", "profile"}


def test_the_files_that_are_run_first_are_there():
    assert set(LONGEST_FIRST) <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


@functools.cache
def configured_modules():
    """Modules of leaves, and of the families that leaves derive from."""
    targets = (target_of(path).rpartition(".") for path in LEAF_FILES)
    classes = (getattr(importlib.import_module(module), name) for module, _, name in targets)
    return {base.__module__ for found in classes for base in getattr(found, "__mro__", (found,))}


def configured_functions(path):
    """Functions of a module that files of conf/ call, in place of a class."""
    module = f"qvgen.{path.parent.name}.{path.stem}"
    return {target_of(file).rpartition(".")[2] for file in LEAF_FILES if target_of(file).rpartition(".")[0] == module}


@pytest.mark.parametrize("room", ROOMS, ids=relative)
def test_modules_and_functions_fit(room):
    for path in sources_of(room):
        check_sizes(path)


def check_sizes(path):
    leaf = f"qvgen.{path.parent.name}.{path.stem}" in configured_modules()
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_MODULE_LINES, f"{relative(path)} has {lines} lines; split it by what it does"
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        length = node.end_lineno - start + 1
        where = f"{relative(path)}:{node.lineno} {node.name}"
        assert length <= MAX_FUNCTION_LINES, f"{where} has {length} lines; give its parts names"
        if leaf and node.name in ("__init__", *configured_functions(path)):
            assert not node.args.args[1:], f"{where}: the keys of its file in conf/ must be keyword-only"
            continue  # they may be many: this is the model's or method's configuration
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls", "ctx")])
        assert count <= MAX_PARAMETERS, f"{where} has {count} parameters; group them in a dataclass"


@pytest.mark.parametrize("room", ROOMS, ids=relative)
def test_modules_say_what_they_are(room):
    for path in sources_of(room):
        tree = tree_of(path)
        assert ast.get_docstring(tree) or not tree.body, relative(path)


def whole_configurations(tree):
    """Names in a module that stand for a verb's whole configuration: imported, also for types alone, or looked up."""
    nodes = list(ast.walk(tree))
    named = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    named |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    named |= {
        node.value for node in nodes if isinstance(node, ast.Constant) if isinstance(node.value, str)
    }  # "TrainConfig"
    return named & WHOLE_CONFIGURATIONS


@pytest.mark.parametrize(
    "room",
    [
        room
        for room in ROOMS
        if room.is_relative_to(ROOT / "qvgen") and not {"verbs", "config"} & set(room.relative_to(ROOT).parts)
    ],
    ids=relative,
)
def test_configurations_stop_at_the_verbs(room):
    """Below the verbs, and in the Python interface, a function takes the parts that it needs, under their own types."""
    for path in sources_of(room):
        if path != ROOT / "qvgen" / "cli.py":
            check_takes_parts(path)


def check_takes_parts(path):
    tree = tree_of(path)
    found = whole_configurations(tree)
    assert not found, f"{relative(path)} takes {', '.join(sorted(found))}; take the section or the values that it needs"
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg in ("config", "cfg"):
            kind = ast.unparse(node.annotation) if node.annotation is not None else ""
            assert kind not in ("", "Any", "object"), (
                f"{relative(path)}:{node.lineno} {node.arg} may be a configuration"
            )


@pytest.mark.parametrize(
    "source",
    [
        "from qvgen.config.schema.train import TrainConfig",
        "from qvgen.config import FoldConfig as Config",
        "if TYPE_CHECKING:\n    from qvgen.config.schema.verbs import BenchmarkConfig",
        "import qvgen.config\ndef f(run: qvgen.config.TrainConfig): ...",
        "def f(run: 'TrainConfig'): ...",
        "def f():\n    from qvgen.config.build import load_run",
    ],
)
def test_what_would_bring_a_configuration_below_the_verbs_is_found(source):
    assert whole_configurations(ast.parse(source))
