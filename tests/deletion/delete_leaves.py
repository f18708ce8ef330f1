"""Delete leaves of each kind from a copy of the sources, and look whether anything misses them. A program.

    python delete_leaves.py COPY        COPY has qvgen, kernels, conf and tests; it is changed

The libraries are imported once; leaves are deleted and looked at in a process of its own that is forked from here, and put
back. What has to hold without them: every module imports, every verb composes, the help offers what is left and them no
more, and pytest collects the conformance suite. Leaves of different kinds go together: import-linter keeps a kind from
importing another, so that none can hide that another one is missed. Two of one kind go one after the other.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import io
import os
import pkgutil
import sys
from pathlib import Path

LEAVES: dict[str, tuple[str, list[str]]] = {
    "init=svdquant": (
        "a PTQ method",
        ["qvgen/initializers/svdquant.py", "conf/init/svdquant.yaml", "tests/initializers/test_svdquant.py"],
    ),
    "method=lsq": ("a training method", ["qvgen/methods/lsq.py", "conf/method/lsq.yaml"]),
    "method=efficientdm": (
        "a training method that adds to a layer",
        ["qvgen/methods/efficientdm.py", "conf/method/efficientdm.yaml", "tests/methods/test_efficientdm.py"],
    ),
    "model=cogvideox": (
        "a model family",
        ["qvgen/models/cogvideox*.py", "conf/model/cogvideox*.yaml", "tests/models/test_cogvideox.py"],
    ),
    "kernel=vnni": (
        "a kernel backend, with its benchmark",
        [
            "kernels/qvgen_kernels/cpu.py",
            "kernels/qvgen_kernels/cpu_prepack.py",
            "qvgen/verbs/benchmarks/kernels/*.py",
            "tests/kernels/test_cpu*.py",
        ],
    ),
}
"""What chooses a leaf -> what it is, and its files."""

ROUNDS = [[choice for choice in LEAVES if choice != "method=efficientdm"], ["method=efficientdm"]]
"""Leaves that are deleted together."""

GROUPS = ("init", "method", "model")


def import_all() -> None:
    """Import every module of both packages."""
    for package in ("qvgen", "qvgen_kernels"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if module.name.startswith("qvgen_kernels.triton.") and importlib.util.find_spec("triton") is None:
                continue  # there are machines without a wheel of Triton
            importlib.import_module(module.name)


def look(choices: list[str], root: Path) -> None:
    """Raise unless everything works without the leaves."""
    import_all()
    assert all(Path(str(sys.modules[name].__file__)).is_relative_to(root) for name in ("qvgen", "qvgen_kernels"))
    from qvgen.cli import main, verbs
    from qvgen.config.compose import compose_plain
    from qvgen.config.leaves import group_targets, leaf_names
    from qvgen_kernels import kernel_names

    deleted = [(group, name) for group, _, name in (choice.partition("=") for choice in choices)]
    for group, name in deleted:
        assert name not in (kernel_names() if group == "kernel" else leaf_names(group))
    assert all(map(group_targets, GROUPS))
    for verb in verbs():
        compose_plain(verb, [], resolve=False)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main(["train", "--help"]) == 0
    for group, name in deleted:
        options = [line for line in shown.getvalue().splitlines() if line.startswith(f"  {group}: ") and ", " in line]
        assert len(options) == (group != "kernel")
        assert not any(name in line.partition(": ")[2].split(", ") for line in options)
    import pytest

    words = ["--collect-only", "-q", "-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        status = pytest.main([*words, "--rootdir", str(root), "-c", str(root / "pyproject.toml"), "tests/conformance"])
    assert status == 0, shown.getvalue()[-2000:]
    assert "test_initializers.py" in shown.getvalue()
    for _, name in deleted:
        assert not any(line.endswith((f"[{name}]", f"[{name}-paper]")) for line in shown.getvalue().splitlines())


def without(choices: list[str], root: Path) -> int:
    """Delete leaves, look in a process of its own, and put them back; the exit status of that process."""
    files = []
    for patterns in (LEAVES[choice][1] for choice in choices):
        for pattern in patterns:
            found = list(root.glob(pattern))
            assert found, f"{pattern} is not there"
            files += found
    contents = {path: path.read_bytes() for path in files}
    child = os.fork()
    if child == 0:
        for path in files:
            path.unlink()
        status = 1
        try:
            look(choices, root)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    for path, content in contents.items():
        path.write_bytes(content)
    return os.waitstatus_to_exitcode(status)


def forget_imported() -> None:
    """Keep of what this process has imported the libraries alone: it may be a fork of one that had imported qvgen."""
    if "qvgen" in sys.modules:
        checkout = Path(str(sys.modules["qvgen"].__file__)).resolve().parents[1]
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (checkout, checkout / "kernels")]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("qvgen", "qvgen_kernels", "tests")]:
        library = getattr(sys.modules.pop(name), "_library", None)
        if library is not None:
            library._destroy()  # its operators are defined again


def run(root: Path) -> int:
    """Look at all leaves; 0 if nothing missed any of them."""
    forget_imported()
    os.chdir(root)
    sys.path[:0] = [str(root), str(root / "kernels")]
    sys.dont_write_bytecode = False  # else each process compiles all modules again
    for library in (
        "diffusers",
        "lightning",
        "transformers",
        "hydra",
        "matplotlib",
        "pytest",
        "wandb",
        "datasets",
        "peft",
    ):
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # the libraries' objects stay: no collection in a forked process looks at them again
    gc.set_threshold(20_000, 20, 20)
    failed = []
    for choices in ROUNDS:
        if without(choices, root):
            failed += choices
        for choice in choices:
            said = "something misses it or one deleted with it" if choice in failed else "nothing misses it"
            sys.stderr.write(f"{LEAVES[choice][0]}, {choice}: {said}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]).resolve()))
