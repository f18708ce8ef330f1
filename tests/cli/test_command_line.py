"""`qvgen VERB ...`: exit codes, and what is on stderr and stdout; checked against the contract for users."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qvgen.cli import BAD_INPUT, BUG, DONE, INTERRUPTED, _guarded, main, verbs
from qvgen.config.leaves import conf_directory


@pytest.fixture(autouse=True)
def in_a_clean_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train bitz=3", "unknown key 'bitz'; did you mean 'bits'?"),
        ("train rank=8", "unknown key 'rank'; did you mean 'phi.rank'?"),
        ("train phi.rnk=8", "unknown key 'phi.rnk'; did you mean 'phi.rank'?"),
        ("train +speed=8", "unknown key 'speed'"),
        ("train phi.foo=1", "(phi has: anneal, decay, "),
        (
            "train +profile.foo=1",
            "unknown key 'profile.foo' (profile has: activation, activation_bits, attention, name, rotation, ",
        ),
        (
            "train +profile.weight.clp=1",
            "unknown key 'profile.weight.clp'; did you mean 'profile.weight.clip'? (profile.weight has: arithmetic, clip, ",
        ),
        (
            "ptq profile=int8 bits=8 +profile.activation.foo=1",
            "unknown key 'profile.activation.foo' (profile.activation has: ",
        ),
        ("train +method.foo=1", "unknown key 'method.foo' (method has: "),
        ("train init=gptq +init.foo=1", "unknown key 'init.foo' (init has: "),
        ("train +model.foo=1", "unknown key 'model.foo'"),
        ("train +data.foo=1", "unknown key 'data.foo' (data has: "),
        ("train +optim.foo=1", "unknown key 'optim.foo' (optim has: "),
        ("train +strategy.foo=1", "unknown key 'strategy.foo' (strategy has: "),
        ("train +logger.foo=1", "unknown key 'logger.foo' (logger has: "),
        ("train ~profile.weight.granularity", "profile.weight.granularity is missing"),
        ("train method=qvgn", "unknown method=qvgn; did you mean 'qvgen'?"),
        ("train profile=4", "unknown profile=4"),
        ("train model=null", "unknown model=null"),
        (
            "train method=lsq.yaml",
            "unknown method=lsq.yaml (there are: autoencoder, efficientdm, ",
        ),  # hydra would take it
        ("train evaluation.prompts.0=a", "unknown key 'evaluation.prompts.0'"),
        ("train seed.low=3", "unknown key 'seed.low'"),
        ("train ++speed=8", "unknown key 'speed'"),
        ("train ~method", "takes method away"),
        ("fold method=lsq", "unknown key 'method'"),
        ("train bits=9", "bits=9 is outside 2..8"),
        ("train bits=w4x3", "bits=w4x3 is neither"),
        ("train -m bits=4,9", "bits=9 is outside 2..8"),
        ("train bits=4,3", "bits=4,3 names several values; add -m"),
        ("train bits", "cannot read 'bits'; write key=value"),
        ("train steps=${nowhere}", "nowhere"),
        ("train resume=true", "resume=true needs run_dir"),
        ("train --bits 3", "unknown flag --bits"),
        ("train --config-name other", "can't be used"),
        ("train --config-dir nowhere", "nowhere is no folder"),
        ("train hydra.run.dir=x", "hydra.run.dir has no effect"),
        ("trian", "unknown verb 'trian'; did you mean 'train'?"),
        ("fold", "run_dir is missing"),
        ("inspect", "give one of packed=DIR and run_dir=DIR"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    line: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(line.split()) == BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert message in shown.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ask", ["debug=true", "HYDRA_FULL_ERROR"])
def test_the_traceback_is_shown_on_request(
    ask: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if ask == "HYDRA_FULL_ERROR":
        monkeypatch.setenv(ask, "1")
    assert main(["train", "bits=9", *([ask] if "=" in ask else [])]) == BAD_INPUT
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("qvgen train: bits=9 is outside 2..8")


def test_exit_codes_tell_bad_input_from_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    def code(error: BaseException) -> int:
        def fail() -> None:
            raise error

        return _guarded(fail, name="train", show_traceback=False)

    assert _guarded(lambda: None, name="train", show_traceback=False) == DONE
    assert code(ValueError("two\nlines")) == BAD_INPUT
    assert capsys.readouterr().err == "qvgen train: two lines\n"
    assert code(OSError(28, "No space left on device", "model.bin")) == BAD_INPUT
    assert capsys.readouterr().err == "qvgen train: model.bin: No space left on device\n"
    assert code(RuntimeError("raised outside of qvgen, as torch does")) == BUG
    assert code(KeyError("bug")) == BUG
    assert code(KeyboardInterrupt()) == INTERRUPTED


def test_our_own_runtime_errors_are_about_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert main(["train"]) == BAD_INPUT
    assert "torchrun started this process" in capsys.readouterr().err


def test_ranks_that_another_launcher_left_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", "bitz=3"]) == BAD_INPUT
    assert "LOCAL_RANK" not in os.environ


def test_every_job_of_a_multirun_runs_and_the_worst_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", "-m", "packed=first,second"]) == BAD_INPUT
    shown = capsys.readouterr().err.splitlines()
    assert ["first" in shown[0], "second" in shown[1], len(shown)] == [True, True, 2]
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_and_help_answer_for_every_verb(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for verb in verbs():
        assert (conf_directory() / f"{verb}.yaml").is_file()
        assert main([verb, "--cfg", "job"]) == DONE
        assert "debug: false" in capsys.readouterr().out
        assert main([verb, "--help"]) == DONE
        assert f"qvgen {verb}" in capsys.readouterr().out
    assert main(["train", "--help"]) == DONE
    methods = ", ".join(sorted(path.stem for path in (conf_directory() / "method").glob("*.yaml")))
    assert f"method: {methods}" in capsys.readouterr().out
    assert main(["train", "bits=w4a8", "--cfg", "job", "--resolve"]) == DONE
    shown = capsys.readouterr().out
    assert "weight_bits: 4" in shown
    assert "run_dir: outputs/tiny-w4a8-qvgen/" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_user_adds_to_conf(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "my conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nsteps: 7\n")
    assert main(["train", "--config-dir", str(folder.parent), "experiment=mine", "--cfg", "job"]) == DONE
    assert "\nsteps: 7\n" in capsys.readouterr().out


def test_overview_lists_the_verbs_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from qvgen.cli import main; assert main([]) == 0; "
        "assert not {'torch', 'hydra', 'lightning', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb, line in verbs().items():
        assert line.endswith(".")
        assert f"{verb}" in done.stdout
        assert line in done.stdout


def test_train_script_is_the_train_verb() -> None:
    package = importlib.util.find_spec("qvgen")
    assert package is not None
    assert package.origin is not None
    script = Path(package.origin).parents[1] / "train.py"
    done = subprocess.run([sys.executable, str(script), "bitz=3"], capture_output=True, text=True, check=False)
    assert done.returncode == BAD_INPUT
    assert done.stderr == "qvgen train: unknown key 'bitz'; did you mean 'bits'?\n"
