"""Typed configuration: bits, types, ranges, leaves; checked against the values of conf/ and written-out errors."""

from itertools import zip_longest
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvgen.cli import main
from qvgen.config import Bits, FoldConfig, GenerateConfig, TrainConfig, UserError, did_you_mean
from qvgen.config.build import build, check, load_run
from qvgen.config.compose import compose_plain, expand_sweep
from qvgen.config.leaves import LEAF_GROUPS, build_leaf, conf_directory, group_targets, load_foreign_leaf, load_leaf
from qvgen.run_directory import write_plain


def train(*overrides: str) -> TrainConfig:
    config = check("train", compose_plain("train", overrides))
    assert isinstance(config, TrainConfig)
    return config


@given(st.integers(2, 8), st.integers(2, 8))
def test_bits_come_back_from_their_label(weight: int, activation: int) -> None:
    bits = Bits(weight=weight, activation=activation)
    assert Bits.parse(bits.label) == bits
    assert Bits.parse(f"w{weight}a{activation}") == bits


@pytest.mark.parametrize("text", ["1", "9", "w1a4", "w4a9", "w4x3", "w4", "3.0", "True", "None", "²"])
def test_bad_bits_are_named_with_a_fix(text: str) -> None:
    with pytest.raises(UserError, match=rf"bits={text} .*write for example bits=3 or bits=w4a8"):
        Bits.parse(text)


def test_defaults_hold_what_the_design_says() -> None:
    config = train()
    assert config.bits == Bits(weight=3, activation=3)
    assert config.phi.rank == 32
    assert config.phi.tail_share == 0.1
    assert config.names.method == "qvgen"
    assert config.run_dir.match("outputs/tiny-3-qvgen/*")
    assert config.plain["steps"] == config.steps


def test_bits_reach_the_profile_and_the_path() -> None:
    config = train("bits=w4a8", "method=lsq")
    assert (config.profile["weight_bits"], config.profile["activation_bits"]) == (4, 8)
    assert config.run_dir.match("outputs/tiny-w4a8-lsq/*")


@pytest.mark.parametrize("name", ["paper", "svdq_g64", "convrot", "int8"])
def test_every_profile_builds(name: str) -> None:
    profile = build_leaf(train(f"profile={name}", "bits=w3a8").profile, key="profile")
    assert (profile.name, profile.weight.bits, profile.activation.bits) == (name, 3, 8)


def test_experiment_sets_values_and_the_command_line_wins() -> None:
    assert train("experiment=tiny_teacher").names.method == "pretrain"
    assert train("experiment=tiny_teacher", "steps=7").steps == 7


def test_jobs_started_together_get_different_folders() -> None:
    assert len({train("run_dir=${start_time:}").run_dir for _ in range(4)}) == 4
    assert expand_sweep(["bits=4,3", "seed=1,2"], multirun=True) == [
        ["bits=4", "seed=1"],
        ["bits=4", "seed=2"],
        ["bits=3", "seed=1"],
        ["bits=3", "seed=2"],
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("phi.rank=0", "phi.rank=0 must be greater than 0"),
        ("phi.ranks=[8,8]", r"phi.ranks=\[8,8\] must be positive and strictly decreasing"),
        ("phi.ranks=[8,0]", r"phi.ranks=\[8,0\] must be positive"),
        ("phi.ranks=[]", r"phi.ranks=\[\] must be positive"),
        ("phi.decay=0", "phi.decay=0 takes nothing away, .*write phi.keep=true too"),
        ("phi.decay=-0.1", r"phi.decay=-0.1 is outside \[0, 1\]"),
        ("optim.gradient_clip=0", "optim.gradient_clip=0.0 must be greater than 0"),
        ("phi.decay=.nan", "phi.decay=.*nan"),
        ("phi.tail_share=1", r"phi.tail_share=1.0 is outside \[0, 1\)"),
        ("phi.anneal=cosin", "phi.anneal=cosin is unknown; did you mean 'cosine'"),
        ("steps=0", "steps=0 must be greater than 0"),
        ("steps=2.5", "steps=2.5 is not a whole number"),
        ("steps=true", "steps=True is not a whole number"),
        ("steps=null", "steps=null is not a whole number"),
        ("seed=-1", "seed=-1 is outside"),
        ("dry_run=1", "dry_run=1 is not true or false"),
        ("optim.learning_rate=-1e-3", "optim.learning_rate=-0.001 must be greater than 0"),
        ("optim.betas=[0.9]", r"optim.betas=\[0.9\] has 1 entries; give 2"),
        ("devices=2 strategy=single", "devices=2 needs more than one process; write devices=2 strategy=auto"),
        ("strategy=fsdp", "strategy=fsdp shares one model .*devices=8 strategy=fsdp .*or strategy=single"),
        ("batch_size=30 accumulate=4", "batch_size=30 cannot be divided by .*accumulate=4; .*batch_size=32"),
        ("batch_size=1 devices=2 strategy=ddp", "batch_size=1 cannot .*batch_size=2"),
        ("phi=3", "phi=3 is a section"),
        ("phi=null", "phi=null is a section"),
        ("~seed", "seed is missing"),
        ("run_dir=", "run_dir"),
        ("evaluation.prompts=[]", "evaluation.prompts=.. is empty"),
        ("checkpoint.every_steps=0", "checkpoint.every_steps=0 must be greater"),
        ("+method.foo=1", "unknown key 'method.foo'"),
    ],
)
def test_bad_values_are_named_with_their_key(overrides: str, message: str) -> None:
    plain = compose_plain("train", overrides.split())
    with pytest.raises(UserError, match=message):
        build("train", plain)


def test_scalars_become_lists_of_one_and_numbers_may_be_captions() -> None:
    config = check("generate", compose_plain("generate", ["packed=p", "prompt=[a b,7]", "seed=3"]))
    assert isinstance(config, GenerateConfig)
    assert (config.prompt, config.seed) == (("a b", "7"), (3,))


def test_a_run_is_read_back_as_it_was_started(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.yaml is missing"):
        check("fold", compose_plain("fold", [f"run_dir={tmp_path}"]))
    started = train("bits=w4a8", "optim.eps=1e-9", "phi.ranks=[8,2]")
    write_plain(tmp_path / "config.yaml", started.plain)
    config = check("fold", compose_plain("fold", [f"run_dir={tmp_path}"]))
    assert isinstance(config, FoldConfig)
    assert config.run == started
    assert config.out == tmp_path / "packed"
    write_plain(tmp_path / "config.yaml", {name: value for name, value in started.plain.items() if name != "seed"})
    with pytest.raises(UserError, match=f"{tmp_path}: seed is missing"):
        load_run(tmp_path)


def test_all_files_of_conf_compose() -> None:
    """Each at least once; files of different groups together, because hydra takes a quarter of a second for a choice."""
    files = {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in conf_directory().iterdir()}
    for name in files.pop("export"):  # a group of the verb of that name
        check("export", compose_plain("export", ["packed=packed", "out=out", f"export={name}"]))
    for name in files.pop("suite"):
        check("evaluate", compose_plain("evaluate", ["packed=packed", f"suite={name}"]))
    del files["metric"]  # named by a suite, and chosen by no key: tests/conformance builds each
    for name in files.pop("experiment"):  # it may have bits of its own
        train(f"experiment={name}", "devices=1")
    for chosen in zip_longest(*([(group, name) for name in names] for group, names in files.items())):
        words = dict(choice for choice in chosen if choice is not None)
        processes = {"deepspeed": ["devices=2"], "fsdp": ["devices=2"], "hsdp": ["devices=4", "strategy.shard_size=2"]}
        more = processes.get(words.get("strategy", ""), ["devices=1"])
        config = train(*(f"{group}={name}" for group, name in words.items()), *more)
        assert config.bits.label == "3"
        assert all(getattr(config.names, group) == words[group] for group in words.keys() & LEAF_GROUPS)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "is no method of qvgen"),
        ("qvgen.cli.main", r"is no method of qvgen .there are: qvgen.methods.autoencoder.Autoencoder, "),
        ("qvgen.config.run_config.read_plain", "is no method of qvgen"),
        ("qvgen.config.bits.Bits", "is no method of qvgen"),
        ("qvgen.models.tiny.TinyVideoDiT", "is no method of qvgen"),
        ("qvgen.methods.base.Method", "is no method of qvgen"),
        ("qvgen.methods.lsq.lsq", "is no method of qvgen; did you mean 'qvgen.methods.lsq.LSQ'"),
        ("qvgen.methods.lsq.LSQ.__init__", "is no method of qvgen"),
        ("qvgen_kernels.contract.LinearSpec", "is no method of qvgen"),
        ("", "is no method of qvgen"),
        (None, "has no _target_"),
        (["qvgen.methods.lsq.LSQ"], "has no _target_"),
    ],
)
def test_a_section_is_built_by_leaves_of_its_own_group_alone(target: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_leaf({"_target_": target}, key="method")


@pytest.mark.parametrize("group", ["model", "profile", "method", "init", "data"])
def test_every_leaf_is_of_the_group_that_its_file_lies_in(group: str) -> None:
    targets = group_targets(group)
    assert targets
    for other in {"model", "profile", "method", "init", "data"} - {group}:
        with pytest.raises(UserError, match=f"is no {other} of qvgen"):
            build_leaf({"_target_": targets[0]}, key=other)


def test_a_runs_configuration_names_no_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for section, target in (("method", "qvgen.cli.main"), ("data", "qvgen.run_directory.atomic_write")):
        plain = compose_plain("train", [f"run_dir={tmp_path}"])
        plain[section] = {"_target_": target, "arguments": ["--version"]}
        write_plain(tmp_path / "config.yaml", plain)
        assert main(["fold", f"run_dir={tmp_path}"]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        (line,) = shown.err.splitlines()
        assert f"{section}._target_={target} is no {section} of qvgen" in line


def test_a_target_below_a_section_is_refused() -> None:
    spec = train().model
    for nested in ({"_target_": "qvgen.cli.main"}, [{"a": {"_target_": "qvgen.cli.main"}}]):
        with pytest.raises(UserError, match=r"model.prompts holds a _target_; only model itself has one"):
            build_leaf({**spec, "prompts": nested}, key="model")


def test_another_leaf_of_the_group_is_the_users_to_choose(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("_target_: qvgen.methods.lsq.LSQ\n")
    config = build("train", compose_plain("train", ["method=mine"], extra_directory=tmp_path))
    assert type(config.method).__name__ == "LSQ"


def test_arguments_of_leaves_are_checked() -> None:
    spec = {key: value for key, value in train().model.items() if key != "recipe"}
    assert build_leaf(spec, key="model").name == "tiny"
    with pytest.raises(UserError, match="model.width is missing"):
        build_leaf({key: value for key, value in spec.items() if key != "width"}, key="model")
    with pytest.raises(UserError, match="unknown key 'model.widht'; did you mean 'model.width'"):
        build_leaf(spec | {"widht": 3}, key="model")
    for key, value, wanted in (
        ("width", "many", "int"), ("width", None, "int"), ("width", True, "int"), ("width", 64.0, "int"),
        ("guidance_scale", "x", "float"), ("guidance_scale", float("nan"), "float"),
        ("prompts", "one", r"\S*Sequence\[str\]"), ("prompts", [["two"]], r"\S*Sequence\[str\]"),
        ("weights", 3, r"str \| None"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"model.{key}=.* is of the wrong type; give {wanted}"):
            build_leaf(spec | {key: value}, key="model")
    assert build_leaf(spec | {"guidance_scale": 2}, key="model").guidance_scale == 2
    with pytest.raises(UserError, match="unknown model=tini; did you mean 'tiny'"):
        load_leaf("model", "tini")


def test_arguments_out_of_a_file_are_bounded_and_named() -> None:
    for arguments, message in (
        (
            {"image_size": 2**62},
            r"model=tiny can't be built as it says: model.image_size=\d+ is no whole number from 1 to 65536",
        ),
        ({"fps": -1}, "model=tiny can't be built as it says: model.fps=-1 is no whole number from 1 to 65536"),
        ({"num_heads": 7}, "model=tiny can't be built as it says: width=64 is no multiple of 14"),
        ({"prompts": {"a": 1}}, "model=tiny can't be built as it says: model.prompts="),
        ({"_target_": "qvgen.cli.main"}, "model=tiny can't be built as it says: .*_target_"),
    ):
        with pytest.raises(UserError, match=f"^packed/manifest.json: {message}"):
            load_foreign_leaf("model", "tiny", arguments, source="packed/manifest.json")
    assert load_foreign_leaf("model", "tiny", {"fps": 5}, source="packed/manifest.json").fps == 5


def test_suggestions_find_a_key_by_its_last_part() -> None:
    assert did_you_mean("bitz", ["bits", "seed"]) == "; did you mean 'bits'?"
    assert did_you_mean("rnk", ["bits", "phi.rank"]) == "; did you mean 'phi.rank'?"
    assert did_you_mean("zzz", ["bits"]) == ""
