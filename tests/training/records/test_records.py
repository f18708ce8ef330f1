"""Records of plans: they say what the models say; what is damaged, of another version or of other settings is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qvgen.config.build import build
from qvgen.config.compose import compose_plain
from qvgen.config.leaf_file import installed_names, read_leaf
from qvgen.errors import UserError
from qvgen.models.named_family import NamedFamily
from qvgen.training.design.meta_model import build_teacher, build_transformer, planned_transformer
from qvgen.training.planning.counted_step import count_step
from qvgen.training.planning.memory import find_device
from qvgen.training.planning.training_plan import step_settings
from qvgen.training.records import keys, store
from qvgen.training.records.frame import assemble, describe
from qvgen.training.records.keys import NoKeyError, family_key, frame_key, key_hash, key_text
from qvgen.training.records.shipped import collect, shipped_text
from qvgen.training.records.store import recorded
from qvgen.verbs._parts import training_run
from tests.runs import train_config

COUNTED = ("tiny", "wan", "cogvideox", "hunyuanvideo")
"""Models of four families whose steps are counted again in every run of the tests."""
LONG = pytest.mark.skipif(
    os.environ.get("QVGEN_LONG_TESTS") != "1", reason="set QVGEN_LONG_TESTS=1 to count every shipped model again"
)
MADE_WITH = {"torch": "2.13.0", "diffusers": "0.42.1"}
"""Versions that the shipped records were made with: under others they are not found, and plans build the models."""
OF_THESE_VERSIONS = pytest.mark.skipif(
    keys._versions() != MADE_WITH, reason=f"the shipped records are of {MADE_WITH}, and here are {keys._versions()}"
)
WITHOUT = ("diffusers",)
"""Models that are whatever a folder holds."""
SHIPPED_MODELS = [name for name in installed_names("model") if name not in WITHOUT]

_PROGRAM = """
import sys
from qvgen.cli import main
code = main(sys.argv[1:])
heavy = ("diffusers", "transformers", "peft", "scipy", "sympy", "torch._dynamo", "lightning", "pandas", "matplotlib")
print("imported:", *(name for name in heavy if name in sys.modules))
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of records, without the shipped ones."""
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "plans"))
    monkeypatch.setattr(store, "shipped", dict)
    return tmp_path / "plans"


def facts(model: nn.Module) -> list[Any]:
    """All that a plan reads of a model's modules and tensors, in order."""
    tensors = [
        (kind, name, tuple(value.shape), value.dtype, value.requires_grad)
        for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers()))
        for name, value in named
    ]
    kinds = (nn.Linear, nn.ModuleList, nn.Dropout)
    modules = [
        (name, type(module).__name__ if name else "", next((kind for kind in kinds if isinstance(module, kind)), None))
        for name, module in model.named_modules()
    ]
    return [*tensors, *modules, sorted(model.state_dict()), sorted(model._keep_in_fp32_modules or ())]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tiny", "cogvideox", "hunyuanvideo1.5"])
def test_a_frame_has_the_modules_and_tensors_of_its_model(name: str) -> None:
    model = build_transformer(NamedFamily.load(name).family)
    described = describe(model)
    assert described is not None
    made = assemble(json.loads(json.dumps(described)))
    assert facts(made) == facts(model)
    assert type(made).__name__ == type(model).__name__
    with pytest.raises(RuntimeError, match="made for a plan"):
        made(timestep=0)


@OF_THESE_VERSIONS
@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_the_shipped_frame_is_the_models_own(name: str) -> None:
    family: Any = NamedFamily.load(name).family
    content = store.shipped().get(key_hash(key_text(frame_key(family))))
    assert content is not None, "records are missing; see qvgen/training/records/shipped.py"
    assert content == describe(build_transformer(family))


@OF_THESE_VERSIONS
@pytest.mark.parametrize("name", COUNTED)
def test_the_shipped_counts_are_those_of_today(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _compare_counts(name, monkeypatch)


@OF_THESE_VERSIONS
@LONG
@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi turns it off, in its own way
@pytest.mark.parametrize("name", [name for name in SHIPPED_MODELS if name not in COUNTED])
def test_every_models_shipped_counts_are_those_of_today(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _compare_counts(name, monkeypatch)


def _compare_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count a model as its dry run does, and as its shipped record says."""
    config = build("train", compose_plain("train", [f"model={name}", "bits=4"]))
    run = training_run(config)
    settings = step_settings(run, find_device(None, devices=1))
    answers = []
    for where in (store.OFF, "/nowhere/at/all"):  # the second can hold nothing
        monkeypatch.setenv(store.VARIABLE, where)
        if where != store.OFF:
            monkeypatch.setattr("qvgen.training.planning.counted_step._count_step", None)  # a miss would call it
        answers.append(count_step(run.model, run.design, settings, optim=run.steps.optim))
    assert answers[0] == answers[1]


def test_counts_do_not_depend_on_the_number_of_bits() -> None:
    counts = []
    for bits in ("2", "4", "8"):
        run = training_run(train_config(f"bits={bits}"))
        settings = step_settings(run, find_device(80.0, devices=1))
        counts.append(count_step(run.model, run.design, settings, optim=run.steps.optim))
    assert counts[0] == counts[1] == counts[2]


def test_a_record_is_found_again_and_a_damaged_one_is_found_out_again(folder: Path) -> None:
    asked: list[int] = []

    def answer(value: int = 7) -> int:
        def find() -> int:
            asked.append(1)
            return value

        def read(content: Any) -> int:
            if not isinstance(content, int) or content < 0:
                raise ValueError("no number")
            return content

        return recorded(lambda: {"kind": "test", "of": "x"}, read=read, find=find, write=lambda found: found)

    assert (answer(), answer(8), len(asked)) == (7, 7, 1)
    (file,) = folder.glob("*.json")
    whole = file.read_bytes()
    other = json.loads(whole) | {"key": "of something else"}
    of_form = {"sha256": store._checksum(-1), "key": json.loads(whole)["key"], "content": -1}
    damaged = [
        b"", whole[: len(whole) // 2], b"[]", b"null", b"\xff\xfe",
        b'{"sha256": 1}', b'{"content": NaN}', json.dumps(other).encode(), json.dumps(of_form).encode(), b"[" * 9999,
        whole.replace(b'"content":7', b'"content":8'),
    ]  # fmt: skip
    for number, content in enumerate(damaged):
        file.write_bytes(content)
        assert answer() == 7
        assert len(asked) == number + 2, content[:50]
        assert file.read_bytes() == whole
    file.unlink()
    file.mkdir()  # it can be neither read nor replaced
    assert answer() == 7


def test_nothing_is_kept_where_no_folder_can_be_made_or_records_are_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    for where in (str(tmp_path / "file" / "plans"), store.OFF):
        monkeypatch.setenv(store.VARIABLE, where)
        assert recorded(lambda: {"kind": "test"}, read=int, find=lambda: 3, write=int) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_version_source_or_configuration_is_another_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family: Any = NamedFamily.load("tiny").family
    planned_transformer(family)
    assert len(list(folder.glob("*.json"))) == 1
    monkeypatch.setattr("qvgen.training.design.meta_model.build_transformer", None)
    planned_transformer(family)  # from the record
    misses = [
        (keys, "_versions", lambda: {"torch": "0", "diffusers": "0"}),
        (store, "own_sources", lambda: "edited"),
        (family, "transformer_config", {**family.transformer_config, "num_layers": 2}),
    ]
    for place, name, value in misses:
        with monkeypatch.context() as changed:
            changed.setattr(place, name, value)
            with pytest.raises(TypeError, match="NoneType"):
                planned_transformer(family)


def test_a_count_follows_the_settings_that_it_depends_on() -> None:
    run = training_run(train_config())
    design, settings = run.design, step_settings(run, find_device(80.0, devices=1))
    texts = {
        key_text(value)
        for value in (
            {"design": design, "settings": settings},
            {"design": design, "settings": replace(settings, micro_batch=settings.micro_batch + 1)},
            {"design": design, "settings": replace(settings, teacher_dtype=torch.float16)},
            {"design": replace(design, phi=replace(design.phi, rank=2 * design.phi.rank)), "settings": settings},
        )
    }
    assert len(texts) == 4
    profile = replace(design.profile, weight=replace(design.profile.weight, bits=2))
    assert key_text({"design": replace(design, profile=profile), "settings": settings}) in texts


def test_what_a_users_class_does_has_no_key() -> None:
    class Mine:
        pass

    with pytest.raises(NoKeyError):
        key_text({"method": Mine()})
    for key in (lambda: family_key(Mine(), {}), lambda: frame_key(Mine())):
        with pytest.raises(NoKeyError):
            key()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("class",), "os.system"),
        (("module", "kind"), "code"),
        (("module", "parts"), {}),
        (("module", "own"), [["scale", [2**40], "torch.float32", True]]),
        (("module", "own"), [["scale", [1], "torch.float31", True]]),
        (("module", "buffers"), [["table", [-1], "torch.float32", True]]),
        (("float32",), [1]),
        (("timestep",), "yes"),
        (("module",), None),
    ],
)
def test_a_frame_of_another_form_is_refused(path: tuple[str, ...], value: Any) -> None:
    record = json.loads(json.dumps(describe(build_transformer(NamedFamily.load("tiny").family))))
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=r"."):
        assemble(record)


def test_tied_modules_and_own_linears_are_not_described() -> None:
    class OwnLinear(nn.Linear):
        pass

    with torch.device("meta"):
        linear = nn.Linear(2, 2)
        assert describe(nn.Sequential(linear, linear)) is None
        assert describe(nn.Sequential(OwnLinear(2, 2))) is None
        assert describe(nn.Sequential(nn.Linear(2, 2))) is not None


def test_a_teacher_from_a_record_keeps_what_its_class_keeps(folder: Path) -> None:
    family: Any = NamedFamily.load("wan", num_frames=5).family
    twice = [build_teacher(family, dtype=torch.bfloat16, is_planned=True) for _ in range(2)]
    assert [type(model).__module__.partition(".")[0] for model in twice] == ["diffusers", "qvgen"]
    types = [[(name, value.dtype) for name, value in model.named_parameters()] for model in twice]
    assert types[0] == types[1]
    assert {dtype for _, dtype in types[0]} == {torch.bfloat16, torch.float32}


def test_records_of_a_folder_become_the_shipped_file(folder: Path) -> None:
    with pytest.raises(UserError, match="no records"):
        collect(folder)
    recorded(lambda: {"kind": "test"}, read=int, find=lambda: 3, write=int)
    assert json.loads(shipped_text(collect(folder))) == {key_hash(key_text({"kind": "test"})): 3}


@OF_THESE_VERSIONS
@pytest.mark.parametrize(("model", "linears", "code"), [("wan-14b", 406, 3), ("opensora", 392, 0)])
def test_a_dry_run_of_a_shipped_model_imports_no_diffusers(model: str, linears: int, code: int, tmp_path: Path) -> None:
    arguments = ["train", f"model={model}", "bits=4", "device_memory_gib=80", "dry_run=true"]
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, store.VARIABLE: str(tmp_path / "plans"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr  # 3: it does not fit, and was planned to the end
    assert f"quantized: {linears} Linears" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["imported:"]
    assert not (tmp_path / "plans").exists()  # all of it is shipped


def test_the_module_of_no_family_imports_diffusers() -> None:
    targets = sorted({read_leaf("model", name)["_target_"] for name in SHIPPED_MODELS})
    program = "import sys; [__import__(name) for name in sys.argv[1:]]; sys.exit('diffusers' in sys.modules)"
    assert targets
    subprocess.run([sys.executable, "-c", program, *(name.rpartition(".")[0] for name in targets)], check=True)
