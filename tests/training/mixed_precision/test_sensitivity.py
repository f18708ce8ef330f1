"""Sensitivities of the real tiny model against direct evaluation, and what makes hours of them safe.

Direct: the model with weights that are what the grid leaves of them, taken back to the model's coordinates in float64; for
activations, a hook that rounds a layer's input by the grid's definition. Neither uses the probe.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from qvgen.config.prompts.prompt import Prompts
from qvgen.data.assets import find_asset
from qvgen.evaluation.damage import motion_damage, visual_damage
from qvgen.evaluation.distance import relative_error, ssim
from qvgen.evaluation.mixed_precision_files import ALL_WINDOWS, SensitivityStore, combined_scores
from qvgen.evaluation.networks import i3d, raft
from qvgen.layers.layer_group import layer_units
from qvgen.layers.noise_band import NoiseBand, watch_timestep
from qvgen.training.mixed_precision.group_metric import ATTENTION, OUTPUT
from qvgen.training.mixed_precision.layer_probe import LayerProbe
from qvgen.training.mixed_precision.sensitivity import SEED_OFFSET, SensitivityMeasurement, Wanted
from qvgen.training.mixed_precision.trajectory import record, sampling_of
from qvgen.verbs._parts import sampled_teacher
from tests.hadamard_oracle import rotation_matrix
from tests.parts import calibrated_model
from tests.runs import shallow, train_config

BANDS = 50
FAST = (
    "init=vidit_q_mp",
    "init.visual=ssim",
    "init.motion=differences",
    "init.videos=2",
    "init.steps=4",
    "init.windows=2",
)


FEWEST = ("init.videos=1", "init.steps=2", *shallow(1))
"""For what does not depend on how much is sampled, nor on how deep the model is."""


def configured(tmp_path, *overrides: str):
    """Composed once for each of the overrides: the folder is put in afterwards."""
    config = train_config(*FAST, "calibration.videos=1", "calibration.steps=2", *overrides)
    return replace(config, calibration=replace(config.calibration, cache=str(tmp_path / "cache")))


def measurement(config, *, encode=None) -> SensitivityMeasurement:
    transformer = config.model.load_teacher()
    statistics = calibrated_model(config, teacher=transformer, encode=config.model.encode, num_bands=BANDS)
    teacher = sampled_teacher(config, transformer, encode=encode or config.model.encode)
    return SensitivityMeasurement(teacher=teacher, init=config.init, profile=config.profile, statistics=statistics)


def units_of(config, *names: str):
    model = config.model.load_teacher()
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found = {unit.name: unit for unit in layer_units(linears, config.model.layer_groups)}
    return tuple(found[name] for name in names)


def wanted(config, *names: str, widths=(4,), sides=("weight", "activation")) -> Wanted:
    return Wanted(units=units_of(config, *names), widths=dict.fromkeys(sides, widths))


def direct_model(config, layers, *, side: str, window: int, windows):
    """A copy of the teacher that is quantized where the timestep is in the window, by the definitions."""
    model = config.model.load_teacher()
    now = {"inside": False}

    def read(module, args, kwargs):
        timestep = float(kwargs["timestep"].flatten()[0])
        now["inside"] = window in (windows[min(int(timestep * BANDS / 1000), BANDS - 1)], ALL_WINDOWS)

    model.register_forward_pre_hook(read, with_kwargs=True)
    for name, layer in layers.items():
        linear = model.get_submodule(name)
        rotation = torch.tensor(rotation_matrix(layer.in_features, layer.profile.rotation), dtype=torch.float64)
        factor = layer.input_scale.double()
        if side == "weight":
            left = (layer.quantized_weight().double() @ rotation.mT) * factor

            def product(x, left=left, linear=linear):
                return x.double() @ left.mT + linear.bias.double()
        else:
            clips = tuple(float(table[0].detach()) for table in layer.activation_quantizer.tables())

            def product(
                x,
                linear=linear,
                rotation=rotation,
                factor=factor,
                levels=2**layer.profile.activation.bits - 1,
                clips=clips,
            ):
                rows = (x.double() * factor) @ rotation
                low, high = (
                    rows.amin(-1, keepdim=True).clamp(max=0) * clips[0],
                    rows.amax(-1, keepdim=True).clamp(min=0) * clips[1],
                )
                scale = ((high - low) / levels).clamp(min=1e-8)
                zero = (-low / scale).round()
                rounded = ((rows / scale).round() + zero).clamp(0, levels) - zero
                back = (rounded * scale) @ rotation.mT / factor
                return back @ linear.weight.double().mT + linear.bias.double()

        def replace_output(module, inputs, output, product=product):
            return product(inputs[0]).to(output.dtype) if now["inside"] else None

        linear.register_forward_hook(replace_output)
    return model


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A configuration that judges videos of the feed-forward layers by both metrics, and its measurement."""
    config = configured(tmp_path_factory.mktemp("judged"), "init.metrics.ffn=[visual,motion]", *shallow(2))
    return config, measurement(config)


@pytest.mark.parametrize("side", ["weight", "activation"])
@pytest.mark.parametrize("unit", ["ffn:blocks.1", "cross_attention:blocks.0", "other:proj_out"])
def test_a_measurement_is_what_direct_evaluation_gives(judged, unit, side):
    config, made = judged
    asked = wanted(config, unit, sides=(side,))
    measured = made.measure(asked)
    family, init = config.model, config.init
    layers = made.layers(asked.units[0], 4, NoiseBand(BANDS))
    seeds = [config.seed + SEED_OFFSET, config.seed + SEED_OFFSET + 1]

    def sample(model):
        return family.generate(
            model, family.prompts[:2], seeds, num_steps=init.steps, guidance_scale=family.guidance_scale
        )

    teacher = family.load_teacher()
    calls: list = []
    teacher.register_forward_hook(lambda m, args, kwargs, out: calls.append((args, kwargs, out[0])), with_kwargs=True)
    exact = sample(teacher)
    assert len(calls) == 4  # steps; guidance is in the batch
    for window in (0, 1, ALL_WINDOWS):
        model = direct_model(config, layers, side=side, window=window, windows=measured.window_of_band)
        row = measured.rows[asked.units[0].group, asked.units[0].block, side, 4, window]
        videos = sample(model)
        # Videos are rounded to 256 levels, and float32 against float64 moves a code of an activation now and then.
        assert row.output_error == pytest.approx(mean_square(videos, exact), rel=0.1, abs=1e-7)
        assert row.output_error > 1e-7
        if unit.startswith("ffn"):
            assert list(row.scores) == ["ssim", "differences"]
            assert row.scores["ssim"] == pytest.approx(1 - ssim(videos, exact, max_value=255), rel=0.1, abs=1e-4)
            moved = (videos.double().diff(dim=1) - exact.double().diff(dim=1)).abs().mean() / 255
            assert row.scores["differences"] == pytest.approx(float(moved), rel=0.1, abs=1e-4)
        if unit.startswith("other"):
            assert row.scores == {OUTPUT: row.output_error}
        if unit.startswith("cross"):
            assert list(row.scores) == [ATTENTION]
            assert row.scores[ATTENTION] == pytest.approx(
                attention_change(
                    model, teacher, list(calls) if window == ALL_WINDOWS else calls[2 * window : 2 * window + 2]
                ),
                rel=2e-2,
            )


@pytest.mark.skipif(
    any(find_asset(asset) is None for asset in (i3d.ASSET, raft.ASSET)),
    reason=f"not fetched: qvgen assets names=[{i3d.ASSET},{raft.ASSET}]",
)
def test_attention_over_space_and_time_is_judged_by_i3d_and_raft(tmp_path):
    judges = ("init.metrics.self_attention=[visual,motion]", "init.visual=i3d", "init.motion=raft")
    config = configured(tmp_path, *judges, "init.windows=1", *FEWEST)
    made = measurement(config)
    unit = "self_attention:blocks.0"
    measured = made.measure(wanted(config, unit, widths=(3, 8), sides=("weight",)))
    assert measured.metrics == {"self_attention": "i3d + raft"}
    family = config.model
    exact, videos = (
        family.generate(
            model,
            family.prompts[:1],
            [config.seed + SEED_OFFSET],
            num_steps=config.init.steps,
            guidance_scale=family.guidance_scale,
        )
        for model in (
            family.load_teacher(),
            direct_model(
                config,
                made.layers(units_of(config, unit)[0], 3, NoiseBand(BANDS)),
                side="weight",
                window=ALL_WINDOWS,
                windows=measured.window_of_band,
            ),
        )
    )
    low, high = (measured.rows["self_attention", "blocks.0", "weight", bits, 0] for bits in (3, 8))
    for name, damage in (("i3d", visual_damage("i3d")), ("raft", motion_damage("raft"))):
        # a level of a pixel that rounds otherwise moves both networks a little
        assert low.scores[name] == pytest.approx(damage.measure(videos, exact, config.model.prompts[:1]), rel=0.1)
        assert low.scores[name] > 2 * high.scores[name] > 0
    assert combined_scores(measured.rows.values())[low.key] > 1


def mean_square(a, b) -> float:
    """Of pixels in [0, 1]."""
    return float(((a.double() - b.double()) / 255).square().mean())


def attention_change(model, teacher, calls) -> float:
    """Relative error of blocks.0.attn2's output; its input is the same in both, as nothing before it is quantized."""
    outputs: dict[str, list[torch.Tensor]] = {"model": [], "teacher": []}
    for name, network in (("model", model), ("teacher", copy.deepcopy(teacher))):
        network.get_submodule("blocks.0.attn2").register_forward_hook(
            lambda module, args, out, name=name: outputs[name].append(out)
        )
        with torch.no_grad():
            for args, kwargs, _ in calls:
                network(*args, **kwargs)
    return relative_error(torch.cat(outputs["model"]), torch.cat(outputs["teacher"]))


def test_the_model_is_as_it_was_and_the_numbers_are_the_same_again(tmp_path):
    config = configured(tmp_path, *FEWEST)
    made = measurement(config)
    before = {name: value.clone() for name, value in made.teacher.transformer.state_dict().items()}
    asked = wanted(config, "self_attention:blocks.0")
    first = made.measure(asked)
    assert all(torch.equal(before[name], value) for name, value in made.teacher.transformer.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.teacher.transformer.modules())
    other = configured(tmp_path / "elsewhere", *FEWEST)
    second = measurement(other).measure(asked)
    for key, row in first.rows.items():
        assert replace(row, seconds=0) == replace(second.rows[key], seconds=0)
    assert first.window_of_band == second.window_of_band
    assert first.window_calls == (1, 1)
    seeded = configured(tmp_path, *FEWEST, "seed=7")
    third = measurement(seeded).measure(asked)
    assert all(third.rows[key].output_error != row.output_error for key, row in first.rows.items())


def test_what_was_measured_survives_a_kill_and_is_not_measured_again(tmp_path):
    """The sampling of the fourth video measurement is interrupted as Ctrl-C does it."""
    config = configured(tmp_path, *FEWEST)
    asked = wanted(config, "ffn:blocks.0", widths=(4, 8))
    count = {"calls": 0, "limit": 5}

    def encode(captions):
        count["calls"] += 1
        if count["calls"] == count["limit"]:
            raise KeyboardInterrupt
        return config.model.encode(captions)

    made = measurement(config, encode=encode)
    with pytest.raises(KeyboardInterrupt):
        made.measure(asked)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.teacher.transformer.modules())
    (file,) = (tmp_path / "cache").glob("sensitivity-*.jsonl")
    assert len(file.read_text().splitlines()) == 3
    kept = file.read_text()
    count.update(calls=0, limit=0)
    resumed = measurement(config, encode=encode).measure(asked)
    assert count["calls"] == 1 + 12 - 3
    assert file.read_text().startswith(kept)
    count.update(calls=0)
    again = measurement(config, encode=encode).measure(asked)
    assert count["calls"] == 1  # only what was sampled to compare with
    assert again == resumed
    whole = measurement(configured(tmp_path / "elsewhere", *FEWEST)).measure(asked)
    for key, row in whole.rows.items():
        assert replace(row, seconds=0) == replace(resumed.rows[key], seconds=0)


def test_another_setting_is_another_file(tmp_path):
    asked = wanted(configured(tmp_path, *FEWEST), "ffn:blocks.0", sides=("weight",))
    for keys in (
        (),
        ("init.steps=3",),
        ("init.alpha=0.75",),
        ("seed=1",),
        ("profile=int8", "profile.runtime=null"),
        ("init.metrics.ffn=motion",),
    ):
        measurement(configured(tmp_path, *FEWEST, *keys)).measure(asked)
    files = sorted((tmp_path / "cache").glob("sensitivity-*.jsonl"))
    assert len(files) == 6
    assert sorted(line.count('"differences"') for line in (file.read_text() for file in files)) == [0, 0, 0, 0, 0, 3]
    other = configured(tmp_path, *FEWEST, "bits=w4a4", "init.mean_weight_bits=5")  # changes no number
    measurement(other).measure(asked)
    assert sorted((tmp_path / "cache").glob("sensitivity-*.jsonl")) == files


def test_more_bits_and_full_precision_lose_less(tmp_path):
    config = configured(tmp_path, *FEWEST)
    measured = measurement(config).measure(wanted(config, "ffn:blocks.0", "cross_attention:blocks.0", widths=(2, 4, 8)))
    for side in ("weight", "activation"):
        for group, block in (("ffn", "blocks.0"), ("cross_attention", "blocks.0")):
            rows = [[measured.rows[group, block, side, bits, window] for bits in (2, 4, 8)] for window in (0, 1)]
            for low, middle, high in rows:
                assert (
                    low.output_error > 3 * middle.output_error > 9 * high.output_error >= 0
                )  # none on some processors
                scores = [next(iter(row.scores.values())) for row in (low, middle, high)]
                assert scores[0] > scores[1] >= scores[2] >= 0


def test_samples_of_one_batch_are_quantized_by_their_own_timestep(tmp_path):
    """One sample's timestep lies in the window, the other's does not: bitwise the full-precision output there."""
    config = configured(tmp_path, *FEWEST)
    made = measurement(config)
    (unit,) = units_of(config, "ffn:blocks.0")
    band = NoiseBand(BANDS)
    handle = watch_timestep(made.teacher.transformer, band)
    probe = LayerProbe(made.teacher.transformer, band, windows=[1] * 25 + [0] * 25)
    layers = made.layers(unit, 4, band)
    x = torch.randn(2, *config.model.sample_shape, generator=torch.Generator().manual_seed(0))
    timestep, condition = torch.tensor([900.0, 100.0]), config.model.encode(config.model.prompts[:2])
    with torch.no_grad():
        exact = config.model.predict(made.teacher.transformer, x, timestep, condition)
        with probe.quantizing(layers, side="weight", window=0):
            found = config.model.predict(made.teacher.transformer, x, timestep, condition)
    handle.remove()
    assert torch.equal(found[1], exact[1])
    assert not torch.equal(found[0], exact[0])


def test_the_recorded_calls_give_the_same_answers(tmp_path):
    config = configured(tmp_path, *FEWEST)
    model, band = config.model.load_teacher(), NoiseBand(BANDS)
    handle = watch_timestep(model, band)
    sampling = sampling_of(
        sampled_teacher(config, model, encode=config.model.encode),
        Prompts.of(config.model.prompts),
        videos=3,
        steps=2,
        seed_offset=5,
    )
    assert sampling.seeds == (config.seed + 5, config.seed + 6, config.seed + 7)
    calls, videos = record(model, band, sampling, names=["proj_out"])
    handle.remove()
    assert len(calls) == 2
    assert [call.band for call in calls] == [49, 0]  # diffusers' schedule has the strongest and the weakest noise in it
    assert all(torch.equal(call.again(model), call.output) for call in calls)
    assert torch.equal(sampling.videos(model), videos)
    tokens = 8 * 4 * 4  # frames and patches
    assert [call.values for call in calls] == [
        {"proj_out": 6 * tokens * 64}
    ] * 2  # three videos, with and without caption


def test_every_step_can_be_a_window(tmp_path):
    config = configured(tmp_path, *FEWEST, "init.steps=4", "init.windows=4")
    measured = measurement(config).measure(wanted(config, "other:proj_out"))
    assert measured.window_calls == (1, 1, 1, 1)


MEASURES = """
import sys
from pathlib import Path
from qvgen.data.claims import Claims
from qvgen.evaluation.mixed_precision_files import Sensitivity, SensitivityStore
from qvgen.training.mixed_precision.shared_rows import SharedRows
path, keys = Path(sys.argv[1]), [("ffn", str(block), "weight", 4, 0) for block in range(5)]
with Claims(path.parent, key="calibration.cache") as claims:
    shared = SharedRows(SensitivityStore(path), claims)
    for key in shared.missing(keys):
        print(key[1], flush=True)
        sys.stdin.readline()
        place = dict(zip(("group", "block", "side", "bits", "window"), key))
        shared.add(Sensitivity(**place, output_error=0.5, scores={}, seconds=0))
    assert set(shared.rows) == set(keys)
"""


def test_processes_on_one_cache_measure_each_row_once(tmp_path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", MEASURES, str(tmp_path / "rows.jsonl")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as slow, subprocess.Popen(command, **pipes) as other:
        first = {process.stdout.readline() for process in (slow, other)}
        assert len(first) == 2  # both at once, and not the same
        slow.stdin.write("\n" * 9)
        slow.stdin.flush()
        made, _ = other.communicate("\n" * 9)
        slow_made, _ = slow.communicate()
    assert (slow.returncode, other.returncode) == (0, 0)
    assert sorted([*first, *made.splitlines(keepends=True), *slow_made.splitlines(keepends=True)]) == [
        f"{block}\n" for block in range(5)
    ]
    assert len(SensitivityStore(tmp_path / "rows.jsonl").read()) == 5
