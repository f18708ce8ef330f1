"""Whose `_target_` is followed: what this command names itself, on its line or in its folder; never what data names.

The user's package lies in the present folder, as with `python -c "import mine"`, and leaves a file when it is imported.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.config.build import build, load_run
from qvgen.config.compose import compose_plain
from qvgen.config.conf_folder import using_directory
from qvgen.config.leaves import LEAF_GROUPS, build_leaf, load_leaf
from qvgen.errors import UserError
from qvgen.run_directory import write_plain
from qvgen.training import source_checksum
from qvgen.training.distributed.child_command import worker_command
from qvgen.training.source_checksum import foreign_sources
from qvgen_kernels import get_backend, registry
from tests.runs import UNSEEN, copy_until, packed_bytes, shallow, snapshot, train

SOURCE = """
from pathlib import Path
from qvgen.data.moving_digits import MovingDigitsSource
from qvgen.deploy.exporters.bf16 import Bf16
from qvgen.initializers.rtn import RoundToNearest
from qvgen.methods.lsq import LSQ
from qvgen.models.tiny import TinyVideoDiT
from qvgen.quant.grid import profile_from_bits
from qvgen_kernels.reference import ReferenceBackend

Path(__file__).with_name("imported").touch()

class Init(RoundToNearest):
    def __init__(self, *, keep: float = 1.0, **others):
        self.keep = keep

class Method(LSQ):
    pass

class Model(TinyVideoDiT):
    pass

class Data(MovingDigitsSource):
    pass

class Target(Bf16):
    pass

class Fast(ReferenceBackend):
    name = "mine_fast"

def profile(**arguments):
    return profile_from_bits(**arguments)

class Empty:
    pass

number = 3
"""
LEAVES = {"init": "Init", "method": "Method", "model": "Model", "data": "Data", "profile": "profile"}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The present folder, with a package `mine` and a folder `conf` in it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "leaves.py").write_text(SOURCE)
    (tmp_path / "mine" / "torn.py").write_text("import no_such_library")
    for folder, text in (("init", "_target_: mine.leaves.Init\nkeep: 0.5\n"), ("experiment", "# @package _global_\n")):
        (tmp_path / "conf" / folder).mkdir(parents=True)
        (tmp_path / "conf" / folder / "own.yaml").write_text(text)
    with (tmp_path / "conf" / "experiment" / "own.yaml").open("a") as file:
        file.write("method:\n  _target_: mine.leaves.Method\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_made", {})
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def made(*overrides: str, **options: Any) -> Any:
    return build("ptq", compose_plain("ptq", overrides, **options))


def was_imported(folder: Path) -> bool:
    return (folder / "mine" / "imported").exists()


@pytest.mark.parametrize("group", sorted(set(LEAF_GROUPS) - {"export", "metric", "suite"}))
def test_a_class_on_the_command_line_is_followed_in_every_group(group: str, mine: Path) -> None:
    words = ["method=lsq", f"{group}._target_=mine.leaves.{LEAVES[group]}"]
    config = build("train", compose_plain("train", words))
    built = getattr(config, group)
    assert type(built).__module__ == ("qvgen.quant.grid" if group == "profile" else "mine.leaves")
    assert getattr(config.names, group) == LEAVES[group]
    assert list(foreign_sources(config.plain)) == ["mine"]


def test_a_target_of_exports_on_the_command_line_is_followed(mine: Path) -> None:
    words = ["packed=packed", "out=out", "export=bf16", "export._target_=mine.leaves.Target"]
    config = build("export", compose_plain("export", words))
    assert type(config.export).__module__ == "mine.leaves"
    assert (config.target, config.names.export, config.export.dtype) == ("Target", "Target", "bfloat16")


def test_a_class_in_the_users_folder_is_followed(mine: Path) -> None:
    config = made("init=own", extra_directory=mine / "conf")
    assert (type(config.init).__name__, config.init.keep, config.names.init) == ("Init", 0.5, "own")
    assert made("init=own", "init.keep=0.25", extra_directory=mine / "conf").init.keep == 0.25
    assert made("init=own", "+init.more=1", extra_directory=mine / "conf").init.keep == 0.5  # it takes any others
    with using_directory(mine / "conf"):
        assert load_leaf("init", "own", keep=0.75).keep == 0.75
    with pytest.raises(UserError, match="unknown init=own"):
        load_leaf("init", "own")
    plain = compose_plain("train", ["experiment=own", "method=lsq", "steps=2"], extra_directory=mine / "conf")
    assert type(build("train", plain).method).__name__ == "Method"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mine.leaves.Inti", "mine.leaves has no Inti; did you mean 'Init'"),
        ("mine.nothing.Init", "mine has no nothing"),
        ("nowhere.Init", "there is no module 'nowhere'; run the command in the folder that holds it"),
        ("mine.torn.Init", "importing mine.torn failed: ModuleNotFoundError: No module named 'no_such_library'"),
        ("mine.leaves.number", "is a int; name a class or a function"),
        ("mine.leaves.Empty", "makes a Empty, which lacks initialize_, needs; see qvgen.initializers.base.Initializer"),
        ("mine.leaves.Method", "which lacks initialize_, needs"),
        ("qvgen.cli.main", "is no init of qvgen"),
        ("qvgen.methods.lsq.LSQ", "is no init of qvgen"),
    ],
)
def test_what_can_not_be_an_init_is_named(target: str, message: str, mine: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        made("init=mse", f"init._target_={target}")


def test_a_runs_configuration_names_no_class_unless_the_command_does(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = compose_plain("train", ["run_dir=run", "init._target_=mine.leaves.Init", "steps=2"])
    (mine / "run").mkdir()
    write_plain(mine / "run" / "config.yaml", plain)
    assert main(["fold", "run_dir=run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "init._target_=mine.leaves.Init is no init of qvgen or of a plug-in" in line
    assert """if it is yours write 'trust=["mine.leaves.Init"]'""" in line
    for trusted in ((), ["mine.leaves.Method"]):
        with pytest.raises(UserError, match="is no init of qvgen"):
            build("train", plain, trusted=trusted)
    with pytest.raises(UserError, match="is no init of qvgen"):
        load_run(mine / "run")
    with pytest.raises(UserError, match="is no init of qvgen"):
        build_leaf({"_target_": "mine.leaves.Init"}, key="init")
    assert not was_imported(mine)
    # And with it.
    fold = compose_plain("fold", ["run_dir=run", "trust=[mine.leaves.Init]"])
    assert type(build("fold", fold).run.init).__name__ == "Init"
    with using_directory(mine / "conf"):
        assert type(build("fold", compose_plain("fold", ["run_dir=run"])).run.init).__name__ == "Init"
    changed = {**plain, "method": {"_target_": "os.system", "command": "true"}}
    write_plain(mine / "run" / "config.yaml", changed)
    with pytest.raises(UserError, match="os.system is no method of qvgen"):
        build("fold", fold)


def test_a_run_is_resumed_by_the_command_that_names_its_class(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["run_dir=run", "logger=csv", "init=mse"]
    (mine / "run").mkdir()
    write_plain(mine / "run" / "config.yaml", compose_plain("train", [*keys, "init._target_=mine.leaves.Init"]))
    assert main(["train", *keys, "resume=true"]) == 2
    assert "init._target_ is mine.leaves.Init there and qvgen.initializers.mse" in capsys.readouterr().err
    assert not was_imported(mine)


def test_a_worker_follows_what_its_parent_was_told_to(mine: Path) -> None:
    plain = compose_plain("train", ["init._target_=mine.leaves.Init", "steps=2"])
    with using_directory(mine / "conf"):
        words = worker_command("train", Path("worker.yaml"), plain)
    assert words[4:] == ["train", "worker.yaml", "--config-dir", str(mine / "conf"), "--trust", "mine.leaves.Init"]
    assert worker_command("train", Path("worker.yaml"), compose_plain("train", []))[6:] == []
    assert type(build("train", plain, trusted=["mine.leaves.Init"]).init).__name__ == "Init"


def test_a_kernel_of_the_users_own_is_named_by_its_class(mine: Path) -> None:
    plain = compose_plain("ptq", ["kernel=mine.leaves.Fast"])
    assert build("ptq", plain).kernel == "mine.leaves.Fast"
    with pytest.raises(UserError, match="kernel=mine.leaves.Fast is a class of your own, and followed only where"):
        build("ptq", plain, trusted=())
    assert not was_imported(mine)
    backend = get_backend("mine.leaves.Fast")
    assert backend.name == "mine_fast"
    assert get_backend("mine.leaves.Fast") is get_backend("mine_fast") is backend
    for name, message in (("mine.leaves.Empty", "is no backend: it lacks name"), ("mine.leaves.Fats", "can't be made")):
        with pytest.raises(ValueError, match=message):
            get_backend(name)


def test_the_present_folder_is_searched_last_also_by_an_installed_command(mine: Path) -> None:
    """A script's own folder is the first on Python's path, and the present one is not on it."""
    (mine / "yaml.py").write_text("raise SystemExit('a file of the present folder stood in place of a library')")
    (mine / "mine" / "light.py").write_text("class Init: pass")
    script = mine / "bin" / "qvgen"
    script.parent.mkdir()
    script.write_text(
        "import sys; from qvgen.config.leaf_class import find_class; before = list(sys.path)\n"
        "print(find_class('mine.light.Init', key='init', is_users=True)); import yaml\n"
        "print(sys.path == [*before, sys.argv[1]])"
    )
    command = [sys.executable, str(script), str(mine)]
    done = subprocess.run(command, cwd=mine, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["<class 'mine.light.Init'>", "True"], done.stderr


def test_a_run_of_the_users_own_classes(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One process and two give the same bytes; videos need the class's name again; changed source is another run."""
    own = [f"{group}._target_=mine.leaves.{LEAVES[group]}" for group in ("model", "data", "init")]
    keys = (*own, *UNSEEN, *shallow(1), "method=lsq", "steps=2", "checkpoint.every_steps=1", "checkpoint.keep=9")
    assert train(mine / "one", *keys) == DONE
    assert train(mine / "two", *keys, "devices=2", "strategy=ddp") == DONE
    assert packed_bytes(mine / "two") == packed_bytes(mine / "one")
    assert "Traceback" not in (mine / "two" / "logs" / "rank1.log").read_text()

    capsys.readouterr()
    generate = ["generate", "packed=one/packed", "out=videos", "num_steps=1", "prompt=a red three standing still"]
    assert main(generate) == BAD_INPUT
    assert "unknown model=Model" in capsys.readouterr().err
    assert main([*generate, "model=tiny", "model._target_=mine.leaves.Model"]) == DONE
    assert [path.suffix for path in (mine / "videos").iterdir()] == [".mp4"]

    again = copy_until(mine / "one", mine / "again", step=1)
    there = json.loads((again / "identity.json").read_text())["facts"]["code.mine"]
    with (mine / "mine" / "leaves.py").open("a") as file:
        file.write("# another line\n")
    source_checksum._module_checksum.cache_clear()  # as in another process
    here = f"source {source_checksum._checksum('mine')[:12]}"
    before = snapshot(again)
    capsys.readouterr()
    assert train(again, *keys, "resume=true") == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"code.mine was {there[:19]} and is {here}" in line
    assert here != there[:19]
    assert "resume=force" in line
    assert snapshot(again) == before
    assert train(again, *keys, "resume=force") == DONE
    (change,) = json.loads((again / "report.json").read_text())["changes"]
    assert (change["step"], change["name"], change["before"][:19]) == (1, "code.mine", there[:19])


def test_a_packed_folder_names_no_class(short_run: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = shutil.copytree(short_run / "packed", mine / "packed")
    manifest = json.loads((packed / "manifest.json").read_text())
    for base in ({"name": "mine.leaves.Model"}, {"name": "tiny", "arguments": {"_target_": "mine.leaves.Model"}}):
        changed = {**manifest, "base": {**manifest["base"], **base}}
        (packed / "manifest.json").write_text(json.dumps(changed))
        assert main(["generate", "packed=packed", "dry_run=true"]) == 2
        assert capsys.readouterr().err.startswith("qvgen generate: ")
    assert not was_imported(mine)
