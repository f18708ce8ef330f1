"""AdamW tensor by tensor against torch.optim.AdamW to the bit, and rounding by chance against what it promises."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qvgen.cli import BAD_INPUT, DONE
from qvgen.layers.swap import quantized_layers
from qvgen.methods.parameter_group import parameter_groups
from qvgen.methods.phi_decay import forget_moments_
from qvgen.training.loss.prediction_loss import freeze_the_rest_
from qvgen.training.optim.eight_bit import torchao_modules
from qvgen.training.optim.master_precision import check_masters, narrow_masters_, widen_masters_
from qvgen.training.optim.optimizer import build_optimizer
from qvgen.training.optim.stochastic_rounding import round_stochastically, rounding_generator
from qvgen.training.optim.streamed_adamw import StreamedAdamW
from tests.parts import prepared
from tests.runs import UNSEEN, copy_until, load_state, packed_bytes, read_metrics, shallow, train, train_config

CPU = torch.device("cpu")


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 65), (7,), (1, 3, 5))]


def steps(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def groups(trained: list[nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"name": "weights", "params": trained[:1], "lr": 1e-2, "weight_decay": 1e-2},
        {"name": "scales", "params": trained[1:], "lr": 3e-3, "weight_decay": 0.0},
    ]


def streamed(trained: list[nn.Parameter], **options: object) -> StreamedAdamW:
    return StreamedAdamW(groups(trained), betas=(0.9, 0.95), eps=1e-8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("offload", [False, True])
def test_in_float32_it_gives_the_bits_of_torch(offload: bool) -> None:
    mine, other = parameters(), parameters()
    optimizer = streamed(mine, offload=offload)
    reference = torch.optim.AdamW(groups(other), betas=(0.9, 0.95), eps=1e-8, foreach=True)  # type: ignore[arg-type]
    steps(optimizer, mine, range(5))
    steps(reference, other, range(5))
    for a, b in zip(mine, other, strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == reference.state[b].keys()
        for name, value in optimizer.state[a].items():
            assert torch.equal(value, reference.state[b][name]), name


def test_a_saved_state_goes_on_to_the_same_bits_and_forgets_as_torchs() -> None:
    """Masters of two types, moments on the host: what is drawn depends on the step that the state holds."""
    whole, half = parameters(), parameters()
    for trained in (whole, half):
        trained[0].data = trained[0].data.bfloat16()
    steps(streamed(whole, offload=True, seed=5), whole, range(6))
    first = streamed(half, offload=True, seed=5)
    steps(first, half, range(3))
    second = streamed(half, offload=True, seed=5)
    second.load_state_dict(first.state_dict())
    assert second.state[half[0]]["exp_avg"].dtype == torch.float32  # of a bfloat16 parameter
    assert second.state[half[0]]["exp_avg"] is not first.state[half[0]]["exp_avg"]
    steps(second, half, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))
    forget_moments_(second, half[0])
    assert all(not value.any() for value in second.state[half[0]].values())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        StreamedAdamW([groups(half)[0]], betas=(0.9, 0.95), eps=1e-8).load_state_dict(first.state_dict())


def test_rounding_by_chance_is_right_in_the_mean_and_goes_to_a_neighbour() -> None:
    value = torch.tensor([1.0 + 2**-7 * 0.3, -3.0 - 2**-6 * 0.9, 1e-30, 0.0, 1.5])
    draws = 20_000
    rounded = round_stochastically(
        value.repeat(draws, 1).contiguous(), generator=rounding_generator(CPU, seed=1, step=1, tensor=0)
    )
    assert rounded.dtype == torch.bfloat16
    low, high = rounded.float().min(0).values, rounded.float().max(0).values
    assert torch.equal(low[:2], torch.tensor([1.0, -3.015625]))
    assert torch.equal(high[:2], torch.tensor([1.0078125, -3.0]))
    assert torch.equal(low[3:], value[3:])  # numbers of bfloat16 stay
    assert torch.equal(high[3:], value[3:])
    # Five standard deviations of a mean of numbers that lie at most one step of bfloat16 apart.
    tolerance = 5 * (high - low) / 2 / math.sqrt(draws)
    assert ((rounded.double().mean(0) - value.double()).abs() <= tolerance.double()).all()


def test_what_is_drawn_depends_on_seed_step_and_tensor_alone() -> None:
    value = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))

    def drawn(**key: int) -> torch.Tensor:
        torch.randn(5)  # the global generator has no say
        return round_stochastically(
            value, generator=rounding_generator(CPU, **{"seed": 1, "step": 1, "tensor": 1, **key})
        )

    assert torch.equal(drawn(), drawn())
    for name in ("seed", "step", "tensor"):
        assert not torch.equal(drawn(), drawn(**{name: 2})), name


def test_small_steps_move_a_bfloat16_master() -> None:
    """A step of 1e-4 on numbers about 1, whose neighbours are 8e-3 away: to nearest, nothing would ever move."""
    master = nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
    optimizer = StreamedAdamW(
        [{"name": "weights", "params": [master], "lr": 1e-4, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    for _ in range(20):
        master.grad = torch.ones_like(master)
        optimizer.step()
    # A mean of 10 000 numbers, each 20 draws between neighbours 4e-3 apart: three hundred-thousandths of deviation.
    assert float(master.detach().float().mean()) == pytest.approx(1 - 20e-4, abs=2e-4)


def test_gradients_are_added_up_in_the_type_that_was_asked_for() -> None:
    student, _ = prepared(train_config(*shallow(1)))
    layers = quantized_layers(student).values()
    for masters, gradients in (("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        narrow_masters_(student, masters=masters, gradients=gradients)
        layer = next(iter(layers))
        layer.weight.grad = None
        layer.noise_band.set_timestep(torch.tensor([500.0]))
        for factor in (1.0, 2.0**-10):  # too small a second part for bfloat16
            (layer(torch.ones(1, 2, layer.in_features)).sum() * factor).backward()
        assert layer.weight.dtype == getattr(torch, masters)
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == getattr(torch, gradients)
        first = layer.weight.grad.abs().max()
        assert (float(first) == float(first.bfloat16())) is (gradients == "bfloat16")
        assert {p.dtype for name, p in student.named_parameters() if not name.endswith("weight")} == {torch.float32}
        widen_masters_(student)
        assert {p.dtype for p in student.parameters()} == {torch.float32}


OPTIONS = (
    *shallow(1), *UNSEEN, "steps=4", "phi.ranks=[4,2]", "phi.tail_share=0.3", "accumulate=2", "evaluation.samples=1",
    "checkpoint.every_steps=2", "checkpoint.keep=9", "optim.masters=bfloat16", "optim.gradients=bfloat16",
)  # fmt: skip
EVERYWHERE = ("optim.offload=true", "strategy.teacher_offload=true", "ema.decay=0.5", "ema.host=true")


@pytest.fixture(scope="module")
def narrow_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16 masters and gradients, two micro-batches per step; the average is kept and not used."""
    folder = tmp_path_factory.mktemp("narrow") / "run"
    assert train(folder, *OPTIONS, "ema.decay=0.5", "ema.fold=false") == DONE
    return folder


def test_a_run_with_all_on_the_host_is_the_same_and_goes_on_to_the_same_bytes(narrow_run: Path, tmp_path: Path) -> None:
    """From a step in which Phi's rank falls; the checkpoint has bfloat16 masters, the packed file their codes."""
    run_dir = tmp_path / "run"
    options = (*OPTIONS, *EVERYWHERE, "ema.fold=false")
    assert train(run_dir, *options) == DONE
    assert packed_bytes(run_dir) == packed_bytes(narrow_run)
    assert read_metrics(run_dir) == read_metrics(narrow_run)
    kinds = {
        value.dtype
        for name, value in load_state(run_dir / "checkpoints" / "step-00000004.ckpt").items()
        if ".blocks." in name and name.endswith(".weight") and value.ndim > 1
    }
    assert kinds == {torch.bfloat16}
    again = copy_until(run_dir, tmp_path / "again", step=2)
    assert train(again, *options, "resume=true") == DONE
    assert packed_bytes(again) == packed_bytes(narrow_run)
    assert read_metrics(again) == read_metrics(narrow_run)
    states = [
        torch.load(folder / "checkpoints" / "step-00000004.ckpt", weights_only=True) for folder in (narrow_run, again)
    ]
    for part in ("state_dict", "average"):
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items())
    moments = [state["optimizer_states"][0]["state"] for state in states]
    assert all(
        torch.equal(value, moments[1][key][n]) for key, entry in moments[0].items() for n, value in entry.items()
    )


def test_two_processes_round_alike(narrow_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "two"
    assert train(run_dir, *OPTIONS, "accumulate=1", "devices=2", "strategy=ddp") == DONE
    assert packed_bytes(run_dir) == packed_bytes(narrow_run)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.masters=bfloat16", "devices=2", "strategy=fsdp"], "optim.masters=bfloat16 and strategy=fsdp"),
        (["optim.gradients=bfloat16", "devices=2", "strategy=fsdp"], "optim.gradients=bfloat16 and strategy=fsdp"),
        (
            ["optim.gradients=bfloat16", "devices=2", "strategy=ddp"],
            "write optim.gradients=float32, or strategy=single",
        ),
        (["optim.masters=bfloat16", "devices=2", "strategy=ddp"], "write optim.gradients=bfloat16, or strategy=single"),
        (["strategy.teacher_offload=true", "devices=2", "strategy=fsdp"], "the teacher is shared out already"),
        (["optim.masters=bfloat16", "method=pretrain"], "this one trains a transformer; leave it out"),
        (["ema.decay=0.9", "method=pretrain"], "ema.decay=0.9 is for methods that train quantized layers"),
        (["ema.decay=1.0"], r"ema.decay=1.0 is outside \(0, 1\)"),
        (["optim.masters=float16"], r"optim.masters=float16 is unknown"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_config(*overrides)


def test_a_method_without_trained_weights_is_refused_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "method=efficientdm", "method.rank=4", "optim.masters=bfloat16") == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "optim.masters=bfloat16 optim.gradients=float32: the method trains no weights of quantized layers" in line
    assert not (tmp_path / "run").exists()


def test_an_older_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = train_config(*shallow(1))
    student, _ = prepared(config)
    freeze_the_rest_(student, method=config.method, optim=config.optim)
    monkeypatch.setattr("qvgen.training.optim.master_precision.has_grad_dtype", lambda: False)
    check_masters(student, masters="bfloat16", gradients="bfloat16")
    with pytest.raises(ValueError, match=r"optim.gradients=bfloat16 with optim.masters=float32 needs torch >= 2.10"):
        check_masters(student, masters="float32", gradients="bfloat16")


def test_without_torchao_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    torchao_modules.cache_clear()
    try:
        assert train(tmp_path / "run", "optim=adamw_8bit") == BAD_INPUT
    finally:
        torchao_modules.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert "optim.name=adamw_8bit needs torchao (it is not installed); pip install 'torchao>=0.18,<0.19'" in line
    assert not (tmp_path / "run").exists()


def test_the_default_is_torchs_own() -> None:
    config = train_config()
    trained = parameters()
    optimizer, _ = build_optimizer(parameter_groups(nn.ParameterList(trained), config.optim), config.optim, num_steps=2)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert not isinstance(optimizer, StreamedAdamW)
