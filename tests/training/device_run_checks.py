"""The whole way on a device that is not the CPU: PTQ start, steps, decay of Phi, checkpoint, resume, fold, packed videos.

It is a run of Lightning's trainer, by an accelerator of these tests, on the stand-in of tests/stand_in_device.py: a tensor
left on the CPU or a float64 tensor is an error, and what reads values back is noted by name. Attention is torch's own
formula on both devices, so that all but the optimizer computes the CPU's bits. tests/layers/test_other_device.py runs this
file in a process of its own.
"""

import lightning
import pytest
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.nn.attention import SDPBackend, sdpa_kernel

import qvgen
from qvgen.data.datamodule import MeasuredData
from qvgen.deploy.packed_fusion import kernel_names
from qvgen.evaluation.held_out import HeldOut
from qvgen.evaluation.sampling import generate_videos
from qvgen.layers.swap import quantized_layers
from qvgen.training.blocks.teacher_offload import OffloadedBlocks
from qvgen.training.callbacks.steps import MethodSchedule, StepMetrics
from qvgen.training.checkpoint_writer import CheckpointWriter, checkpoints
from qvgen.training.optim.streamed_adamw import StreamedAdamW
from qvgen.training.start.student import fold_student, set_up_student_
from qvgen.training.trainer import Processes, build_trainer, fit, restored_settings, trainer_arguments
from qvgen.verbs._parts import named_family, ptq_method, sampled_teacher, student_design, training_run
from tests.conformance.initializer_cases import initialize_, initialized, made_layer, make_weight
from tests.parts import prepared, training_module
from tests.profiles import make_profile
from tests.runs import method_schedule, shallow, train_config
from tests.stand_in_device import NAME, noted_reads, reading_allowed, register, stand_in_device

register()

STEPS = 3
KINDS = "model.include=['*.attn1.to_q','*.attn1.to_k','*.attn2.to_v','*.ffn.net.2','*.linear_1','proj_out']"
"""Layers of each kind: of tokens, of text and of a sample; with an input of their own and with a shared one."""
CPU = torch.device("cpu")


class StandInAccelerator(Accelerator):
    """What Lightning asks of a kind of device."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    def get_device_stats(self, device):
        del device
        return {}

    @staticmethod
    def parse_devices(devices):
        del devices
        return [0]

    @staticmethod
    def get_parallel_devices(devices):
        del devices
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME


class AtTheEnd(lightning.Callback):
    """Notes what the steps have read, before the model is taken to the CPU."""

    def __init__(self, reads):
        self.reads, self.found = reads, {}

    def on_train_end(self, trainer, pl_module):
        del trainer, pl_module
        self.found = dict(self.reads)


@pytest.fixture(autouse=True)
def _attention_by_its_formula():
    with sdpa_kernel(SDPBackend.MATH):
        yield


def config(*overrides):
    return train_config(
        *shallow(1), KINDS, "init=rtn", f"steps={STEPS}", "phi.rank=2", "checkpoint.every_steps=2",
        "evaluation.samples=2", *overrides,
    )  # fmt: skip


def train(device, folder, *, checkpoint=None, reads=None):
    """A run of STEPS steps of two micro-batches, or its rest; the student, and what the steps read."""
    folder.mkdir()
    cfg = config()
    student, _ = prepared(cfg)
    teacher = cfg.model.load_teacher().requires_grad_(False).eval()
    split = training_run(cfg).data.open(cfg.model, split="train")
    module = training_module(cfg, student=student.train(), teacher=teacher, encode=split.encode)
    schedule = method_schedule(cfg)
    options = trainer_arguments(cfg.trainer, gradient_clip=cfg.optim.gradient_clip, run_dir=folder)
    if device != CPU:
        strategy = SingleDeviceStrategy(device=device)
        options |= {"accelerator": StandInAccelerator(), "strategy": strategy, "precision": "32-true"}
    end = AtTheEnd({} if reads is None else reads)
    callbacks = [
        MethodSchedule(schedule),
        StepMetrics(folder / "metrics.csv", schedule=schedule, num_steps=STEPS),
        CheckpointWriter(folder / "checkpoints", config=cfg.checkpoint, num_steps=STEPS),
        end,
    ]
    data = MeasuredData(split, batch_size=2, accumulate=2, seed=cfg.seed)
    with restored_settings():
        trainer = build_trainer(
            steps=STEPS, accumulate=2, processes=Processes(), callbacks=callbacks, loggers=[], options=options
        )
        fit(trainer, module, data, checkpoint=checkpoint)
    schedule.apply_(student, None, step=STEPS)
    return student.eval(), end.found


def largest_difference(one, other):
    """Of two models' tensors. Torch's AdamW takes all parameters at once on a GPU, with other last bits than on a CPU."""
    state = {key: value.cpu() for key, value in other.state_dict().items()}
    return max(float((value - state[key]).abs().max()) for key, value in one.state_dict().items())


def test_a_run_and_its_packed_model_are_those_of_the_cpu(tmp_path):
    cfg = config()
    on_cpu, _ = train(CPU, tmp_path / "cpu")
    split = training_run(cfg).data.open(cfg.model, split="held_out")
    held_out = HeldOut(cfg.model, split, num_samples=2, batch_size=2)
    with stand_in_device(float64=True) as device:
        with noted_reads() as reads:
            student, found = train(device, tmp_path / "there", reads=reads)
        assert 0 < largest_difference(on_cpu, student) < 1e-4
        on_cpu.load_state_dict({key: value.cpu() for key, value in student.state_dict().items()})
        # One wait before a step, one for its row, two where layers are looked at: here always, and Phi goes before the end.
        expected = {"OptimizerModule._check_finite": STEPS, "StepMetrics.on_train_batch_end": STEPS}
        assert found == {**expected, "phi_singular_values": STEPS - 1, "_clips": STEPS}
        student.to(device)
        with reading_allowed():
            predictions = [list(held_out.predictions(model)) for model in (student, on_cpu)]
            fold_student(student, tmp_path / "packed", model=named_family(cfg), training={})
            fold_student(on_cpu, tmp_path / "expected", model=named_family(cfg), training={})
            packed = qvgen.load_packed(tmp_path / "packed", device=device)
        assert all(torch.equal(*pair) for pair in zip(*predictions, strict=True))
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("packed", "expected")]
        assert files[0] == files[1]
        assert kernel_names(packed) == ("dequantize",)
        reference = qvgen.load_packed(tmp_path / "packed", kernel="dequantize")
        with noted_reads() as reads:
            videos = generate_videos(cfg.model, packed, ["a red three moving up left"], [0], encode=cfg.model.encode)
        assert torch.equal(
            videos, generate_videos(cfg.model, reference, ["a red three moving up left"], [0], encode=cfg.model.encode)
        )
        assert not {name for name in reads if name.startswith(("NoiseBand", "PackedLinear", "MergedPackedLinear"))}

    with stand_in_device() as device, reading_allowed():  # a checkpoint of it goes on where there is no float64
        middle = checkpoints(tmp_path / "there" / "checkpoints")[0]
        assert middle.name == "step-00000002.ckpt"
        resumed, _ = train(device, tmp_path / "resumed", checkpoint=middle)
    assert largest_difference(on_cpu, resumed) < 1e-4


@pytest.mark.parametrize("name", ["gptq", "static", "svdquant"])
def test_ptq_starts_there_as_on_the_cpu(name):
    """Between them: Hessians and their Cholesky factors, refined grids, singular vectors, ranges and smoothing."""
    profile = make_profile("paper", weight_bits=4, activation_bits=4)
    weight = make_weight()
    expected = initialized(name, profile, weight)
    with stand_in_device() as device, reading_allowed():
        layer = made_layer(profile, weight).to(device)
        initialize_(name, layer)
        state = {key: value.cpu() for key, value in layer.state_dict().items()}
        assert {value.device for value in layer.state_dict().values()} == {device}
    assert state.keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(state[key], value), key


def test_calibration_watches_a_model_there(tmp_path):
    few = "model.include=['*.attn1.to_q']"  # their clips are searched, which takes long
    cfg = config(
        "init=smoothquant", "calibration.steps=1", "calibration.videos=1", f"calibration.cache={tmp_path}", few
    )
    scales = []
    with stand_in_device() as device, reading_allowed():
        for place in (CPU, device):
            student = prepared(cfg)[0].to(place)
            teacher = cfg.model.load_teacher().requires_grad_(False).eval().to(place)
            sampled = sampled_teacher(cfg, teacher, encode=cfg.model.encode)
            set_up_student_(student, design=student_design(cfg), ptq=ptq_method(cfg), teacher=sampled)
            smoothed = [layer.input_scale for layer in quantized_layers(student).values()]
            scales.append([value.cpu() for value in smoothed if value is not None])
            for file in tmp_path.rglob("*.safetensors"):
                file.unlink()  # what the CPU has sampled is not taken over
    assert scales[0]
    assert all(torch.equal(*pair) for pair in zip(*scales, strict=True))


def test_blocks_and_moments_that_lie_on_the_host_give_the_same_bits_there():
    """The teacher's blocks are on the device while they compute, and on the host else; moments come tensor by tensor."""
    cfg = config()
    clip = torch.randn(2, *cfg.model.sample_shape)
    condition = cfg.model.encode(["", "a red three moving up left"])
    timestep = torch.tensor([10.0, 700.0])
    teacher = cfg.model.load_teacher().requires_grad_(False).eval()
    expected = cfg.model.predict(teacher, clip, timestep, condition)
    weights = [torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    with stand_in_device() as device, reading_allowed():
        offloaded, seen = OffloadedBlocks(teacher, device), []
        for block in teacher.blocks:
            parameters = list(block.parameters())
            assert {parameter.device for parameter in parameters} == {CPU}
            block.register_forward_pre_hook(lambda block, _: seen.append({p.device for p in block.parameters()}))
        there = {name: value.to(device) for name, value in condition.items()}
        for _ in range(2):
            found = cfg.model.predict(teacher, clip.to(device), timestep.to(device), there)
            assert torch.equal(found.cpu(), expected)
        assert seen == [{device}] * 2 * len(teacher.blocks)
        assert {p.device for block in teacher.blocks for p in block.parameters()} == {CPU}
        offloaded.remove()

        results = []
        for offload in (False, True):
            trained = [torch.nn.Parameter(weight.to(device)) for weight in weights]
            group = {"name": "weights", "params": trained, "lr": 1e-2, "weight_decay": 1e-2}
            optimizer = StreamedAdamW([group], betas=(0.9, 0.95), eps=1e-8, offload=offload)
            for step in range(3):
                for index, parameter in enumerate(trained):
                    gradient = torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * step + index))
                    parameter.grad = gradient.to(device)
                optimizer.step()
            places = {
                value.device for state in optimizer.state.values() for name, value in state.items() if name != "step"
            }
            assert places == {CPU if offload else device}
            results.append([parameter.detach().cpu() for parameter in trained])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        again = StreamedAdamW([group], betas=(0.9, 0.95), eps=1e-8, offload=True)
        again.load_state_dict(optimizer.state_dict())
        assert {value.device for state in again.state.values() for value in state.values()} == {CPU}
