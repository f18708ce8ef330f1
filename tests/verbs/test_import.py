"""`qvgen import`, against the release's modules written down anew (tests/deploy/importers/release.py)."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvgen.cli import BAD_INPUT, DONE, main
from qvgen.deploy.checkpoint import load_packed
from qvgen.deploy.manifest import file_sha256
from qvgen.deploy.model_card import write_model_card
from qvgen.layers.swap import packed_layers
from qvgen.quant.affine import quantize
from tests.deploy.importers.release import make_release, release_layers, save_release, set_groups
from tests.models.family_checks import tiny_family
from tests.models.hub_folders import make_cogvideox_folder, make_wan_folder

MAKE = {"wan": make_wan_folder, "cogvideox": make_cogvideox_folder}
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES = ("model.height=32", "model.width=48", "model.num_frames=9", "model.sampling_frames=9")
LAYER = "blocks.1.attn1.to_q"
Words = Callable[..., int]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME: the base model; release-NAME: a bfloat16 checkpoint; packed-NAME: what it is imported as."""
    root = tmp_path_factory.mktemp("import")
    for name, make in MAKE.items():
        make(root / name)
        save_release(make_release(name), root / f"release-{name}")
        assert do_import(root, root / f"release-{name}", root / f"packed-{name}", name=name) == DONE
    return root


def do_import(root: Path, source: Path, out: Path, *words: str, name: str = "wan", bits: str = "w4a4") -> int:
    given = [f"source={source}", f"model={name}", f"model.path={root / name}", f"out={out}", f"bits={bits}"]
    return main(["import", *given, *SIZES, *words])


def steps_of(root: Path, name: str, *, num_steps: int = 50) -> list[int]:
    scheduler = tiny_family(name, root / name).scheduler()
    scheduler.set_timesteps(num_steps)
    timesteps: list[int] = scheduler.timesteps.tolist()
    return timesteps


@torch.no_grad()
def outputs(model: Any, timesteps: list[int], *, call: str = "cond") -> Tensor:
    """One call in which each sample has its own timestep, as a pipeline makes it."""
    generator, count = torch.Generator().manual_seed(0), len(timesteps)
    is_wan = isinstance(model, WanTransformer3DModel)
    with model.cache_context(call):
        output: Tensor = model(
            hidden_states=torch.randn(count, *((4, 3, 4, 6) if is_wan else (3, 4, 4, 6)), generator=generator),
            encoder_hidden_states=torch.randn(count, 8 if is_wan else 226, 16, generator=generator),
            timestep=torch.tensor(timesteps),
            return_dict=False,
        )[0]
    return output


def differences(
    packed: Any, release: Any, timesteps: list[int], groups: list[int], *, call: str = "cond"
) -> list[float]:
    """|y - y_release| / |y_release| of each step."""
    set_groups(release, groups)
    wanted = outputs(release, timesteps).flatten(1)
    error = outputs(packed, timesteps, call=call).flatten(1) - wanted
    return (error.norm(dim=1) / wanted.norm(dim=1)).tolist()


def check_equal(found: list[float]) -> None:
    """The same in float32; an input that is halfway between two codes may round to either in a few of the steps."""
    assert sorted(found)[len(found) - 1 - len(found) // 12] <= 1e-6
    assert max(found) < 0.05


def check_codes(packed: Any, release: Any) -> None:
    layers = packed_layers(packed)
    assert list(layers) == list(release_layers(release))
    for key, theirs in release_layers(release).items():
        layer, (codes, scale, zero_point) = layers[key], theirs.weight_codes()
        assert torch.equal(layer.integer_codes(), codes.to(torch.uint8)), key
        assert torch.equal(layer.weight_scale, scale.float().flatten())
        assert torch.equal(layer.weight_zero_point, zero_point.float().flatten())
        # A master weight at the centre of its code would be given the same code by our own quantizer.
        qparams = {"scale": layer.weight_scale[:, None], "zero_point": layer.weight_zero_point[:, None]}
        assert torch.equal(
            quantize(layer.dequantized_weight(), **qparams, grid=layer.weight_grid), layer.integer_codes()
        )


GROUPS = {"wan": [max(0, 49 - 2 * step) for step in range(50)], "cogvideox": list(range(49, -1, -1))}


@pytest.mark.parametrize("name", MAKE)
def test_codes_and_both_calls_of_every_step_are_the_release_s(name: str, root: Path) -> None:
    packed, release = load_packed(root / f"packed-{name}", kernel="reference"), make_release(name)
    check_codes(packed, release)
    outside = [
        (layer.weight_zero_point < 0) | (layer.weight_zero_point > 15) for layer in packed_layers(packed).values()
    ]
    assert all(rows.any() for rows in outside)  # rows without 0 are in every layer
    timesteps = steps_of(root, name)
    check_equal(differences(packed, release, timesteps, GROUPS[name]))
    if name == "wan":  # the release's counter goes down by one between the two calls of a step
        second = [max(0, group - 1) for group in GROUPS[name]]
        check_equal(differences(packed, release, timesteps, second, call="uncond"))
        wrong = differences(packed, release, timesteps, second)
        assert min(wrong[:25]) > 1e-3, "the groups differ until the counter has run out"
        halves = timesteps[:25] + timesteps[:25]  # a batch of both halves, the one without captions first
        check_equal(differences(packed, release, halves, second[:25] + GROUPS[name][:25], call="cond_uncond"))


@torch.no_grad()
def test_an_ordinary_pipeline_takes_the_counter_s_group_in_every_call(root: Path) -> None:
    """The release's counter on the pipeline's own calls, of an imported model that was saved, loaded and copied."""
    family = tiny_family("wan", root / "wan")
    WanTransformer3DModel.from_pretrained(root / "packed-wan").save_pretrained(root / "saved-wan")
    packed: Any = copy.deepcopy(WanTransformer3DModel.from_pretrained(root / "saved-wan"))
    release, found = make_release("wan"), []
    layer = packed_layers(packed)[LAYER]

    def compare(_: Any, __: Any, keywords: dict[str, Any], output: Any) -> None:
        set_groups(release, [max(0, 49 - len(found))])
        found.append(release_layers(release)[LAYER].aquantizer.lower.sigmoid().float()[max(0, 49 - len(found))] * 0.95)
        assert torch.equal(layer.row_params(torch.zeros(1, 1, 32), bits=4)[0].flatten(), found[-1].reshape(1))
        wanted = release(**keywords)[0]
        errors.append(float((output[0] - wanted).norm() / wanted.norm()))

    errors: list[float] = []
    packed.register_forward_hook(compare, with_kwargs=True)
    # Padding of captions is zeros, which the release's layers make NaN of: texts of eight tokens without any.
    texts = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    family.generate(
        packed, ["a boat"], [0], num_steps=50, guidance_scale=5.0,
        encode=lambda given: {"encoder_hidden_states": texts[: len(given)]},
    )  # fmt: skip
    assert len(found) == 100
    check_equal(errors)


def test_a_call_that_nobody_names_and_a_step_without_guidance_are_refused(root: Path) -> None:
    packed: Any = load_packed(root / "packed-wan", kernel="reference")
    first, second, third = steps_of(root, "wan")[:3]
    for name in ("pred_cond_skip", None):
        with (
            pytest.raises(ValueError, match=r"call it within transformer.cache_context\('cond'\), 'uncond' or"),
            packed.cache_context(name) if name else contextlib.nullcontext(),
        ):
            call_fixed_at(packed, first)
    with pytest.raises(ValueError, match="has 3 samples, which are no two halves"):
        outputs(packed, [first] * 3, call="cond_uncond")
    for timestep in (first, first, third):  # again, and a step that is not the next one
        outputs(packed, [timestep])
    outputs(packed, [first])
    with pytest.raises(
        ValueError, match="a step of the sampler had no call without a caption, .* guidance_scale above 1"
    ):
        outputs(packed, [second])
    outputs(packed, [first])
    outputs(packed, [first], call="uncond")
    outputs(packed, [second])
    with pytest.raises(ValueError, match="a step of the sampler had no call without a caption"):
        tiny_family("wan", root / "wan").generate(packed, ["a boat"], [0], num_steps=50, guidance_scale=1.0)


def call_fixed_at(packed: Any, timestep: int) -> None:
    packed(
        hidden_states=torch.zeros(1, 4, 3, 4, 6),
        encoder_hidden_states=torch.zeros(1, 8, 16),
        timestep=torch.tensor([timestep]),
    )


def test_float32_shards_with_loras_and_layers_in_full_precision(root: Path, tmp_path: Path) -> None:
    release = make_release("wan", dtype=torch.float32, rank=2, keep="attn2.to_k", bits=(3, 4))
    source = save_release(release, tmp_path / "run" / "transformer", dtype=torch.float32, shards=3)
    assert do_import(root, source.parent, tmp_path / "out", bits="w3a4") == DONE
    packed = load_packed(tmp_path / "out", kernel="reference")
    check_codes(packed, release)
    check_equal(differences(packed, release, steps_of(root, "wan"), GROUPS["wan"]))
    record = json.loads((tmp_path / "out" / "import.json").read_text())
    assert (record["loras_merged"], record["dtypes"]) == (24, ["float32"])
    assert record["full_precision"] == [f"blocks.{block}.attn2.to_k" for block in (0, 1)]
    assert record["not_taken_over"]["weight_rounding"] == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["skipped"] == record["full_precision"]


def test_the_last_group_alone_and_the_mean_are_for_any_sampler(root: Path, tmp_path: Path) -> None:
    source, release, timesteps = root / "release-wan", make_release("wan"), steps_of(root, "wan", num_steps=7)
    for clips in ("last", "mean"):
        assert do_import(root, source, tmp_path / clips, f"clips={clips}", "model.shift=8.0") == DONE
    last, mean = (load_packed(tmp_path / clips, kernel="reference") for clips in ("last", "mean"))
    check_equal(differences(last, release, timesteps, [49] * 7))
    table = packed_layers(mean)[LAYER].clip_low
    logits = release_layers(release)[LAYER].aquantizer.lower
    assert isinstance(table, Tensor)
    assert table.shape == (1,)
    assert float(table) == pytest.approx(float(0.95 * logits.sigmoid().double().mean()), abs=1e-6)
    assert json.loads((tmp_path / "mean" / "manifest.json").read_text())["training"]["clips"] == "mean of the 50 groups"


def test_the_manifest_and_the_record_say_what_was_imported(root: Path) -> None:
    packed = root / "packed-wan"
    manifest = json.loads((packed / "manifest.json").read_text())
    file = root / "release-wan" / WEIGHTS
    assert manifest["training"] == {
        "method": "imported",
        "source": "release-wan",
        "sha256": file_sha256(file),
        "clips": "50 steps of UniPCMultistepScheduler (flow_shift=3.0, use_flow_sigmas=True), two calls a step",
    }
    assert manifest["base"]["name"] == "wan"
    assert manifest["base"]["revision"] == tiny_family("wan", root / "wan").revision
    assert manifest["timesteps"] == sorted(steps_of(root, "wan"))
    assert (manifest["num_noise_bands"], manifest["strict_timesteps"], manifest["guided"]) == (100, True, True)
    other = json.loads((root / "packed-cogvideox" / "manifest.json").read_text())  # one call a step
    assert (other["num_noise_bands"], other["strict_timesteps"], "guided" in other) == (50, True, False)
    assert str(root) not in (packed / "manifest.json").read_text() + (packed / "import.json").read_text()
    record = json.loads((packed / "import.json").read_text())
    rows = sum(len(layer.w) for layer in release_layers(make_release("wan")).values())
    assert record["rows"] == rows
    assert record["rows_without_zero"] == sum(
        len(layer.w[::5]) for layer in release_layers(make_release("wan")).values()
    )
    assert record["clips_approximate"] == ""
    assert len(record["checked"]) == 5
    assert all(0 < check["relative_difference"] <= 1e-6 for check in record["checked"].values())
    lost = record["not_taken_over"]
    assert 1e-3 < lost["weight_rounding"] < 1e-2  # bfloat16 has 8 binary places
    assert 1e-2 < lost["activation_rounding"] < 0.3
    assert lost["tokens_without_zero"]["found"] < lost["tokens_without_zero"]["of"]


def test_an_imported_folder_does_what_packed_folders_do(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = root / "packed-wan"
    timesteps = steps_of(root, "wan")
    wanted = outputs(load_packed(packed), timesteps)
    assert torch.equal(outputs(WanTransformer3DModel.from_pretrained(packed), timesteps), wanted)
    assert main(["inspect", f"packed={packed}"]) == DONE
    shown = capsys.readouterr().out
    assert "w4a4" in shown
    assert "method=imported" in shown
    assert main(["export", f"packed={packed}", "target=bf16", f"out={tmp_path / 'bf16'}"]) == DONE
    assert (tmp_path / "bf16" / "parity.json").is_file()
    card = write_model_card(packed, out=tmp_path).read_text()
    assert "| method | imported |" in card
    command = ["generate", f"packed={packed}", "model=wan", f"model.path={root / 'wan'}", "prompt=a red boat"]
    assert main([*command, f"out={tmp_path / 'videos'}"]) == DONE
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert video.stat().st_size > 0


def test_another_sampler_is_refused_with_what_would_work(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str, *words: str) -> str:
        command = ["generate", f"packed={root / f'packed-{name}'}", f"model={name}", f"model.path={root / name}"]
        capsys.readouterr()
        assert main([*command, "prompt=a red boat", "dry_run=true", f"out={tmp_path / 'videos'}", *words]) == BAD_INPUT
        return capsys.readouterr().err

    # 25 trailing steps visit timesteps of the 50: the release would have counted other groups.
    for name, words in (("wan", ["num_steps=40"]), ("wan", ["model.shift=8.0"]), ("cogvideox", ["num_steps=25"])):
        message = refused(name, *words)
        assert "sample with num_steps=50" in message
        assert "or with clips=mean" in message
    message = refused("wan", "guidance_scale=1")
    assert "guidance_scale=1 makes one call a step, and the packed model has clips for two; sample with" in message
    packed = load_packed(root / "packed-cogvideox")
    with pytest.raises(ValueError, match=r"timestep \[998.0\] is not among the 50 .* import with clips=mean"):
        outputs(packed, [998])
    # A table for other steps, and at import another scheduler.
    assert do_import(root, root / "release-cogvideox", tmp_path / "25", "num_steps=25", name="cogvideox") == DONE
    fewer = load_packed(tmp_path / "25", kernel="reference")
    release = make_release("cogvideox")
    steps = steps_of(root, "cogvideox", num_steps=25)
    check_equal(differences(fewer, release, steps, list(range(49, 24, -1))))
    assert json.loads((tmp_path / "25" / "manifest.json").read_text())["base"]["arguments"]["num_inference_steps"] == 25
    capsys.readouterr()
    assert do_import(root, root / "release-wan", tmp_path / "no", "model.shift=8.0") == BAD_INPUT
    message = capsys.readouterr().err
    assert (
        "the model's scheduler has flow_shift=8.0, and the release samples with 3.0; write model.shift=3.0" in message
    )


def edited(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


def config(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "unfinished": (edited(lambda t: t.update({f"{LAYER}.wquantizer.L": torch.ones(32, 2)})),
        f"is of an unfinished training: '{LAYER}.wquantizer.L' is part of its low-rank helper; train it to the end"),
    "another rounding": (edited(lambda t: t.update({f"{LAYER}.ps": torch.ones(1)})), f"has '{LAYER}.ps': its weights are"),
    "lacks a scale": (edited(lambda t: t.pop(f"{LAYER}.wquantizer.scale")),
        f"lacks '{LAYER}.wquantizer.scale' of model=wan"),
    "lacks a bias": (edited(lambda t: t.pop(f"{LAYER}.b")), f"lacks '{LAYER}.b' of model=wan"),
    "lacks a norm": (edited(lambda t: t.pop("blocks.0.norm2.weight")), "lacks 'blocks.0.norm2.weight' of model=wan"),
    "half a LoRA": (edited(lambda t: t.update({f"{LAYER}.loraA": torch.ones(2, 32)})), f"lacks '{LAYER}.loraB'"),
    "a tensor more": (edited(lambda t: t.update({"more": torch.ones(1)})), "holds 'more' and 0 other tensors that"),
    "both forms": (edited(lambda t: t.update({f"{LAYER}.weight": torch.ones(32, 32)})), f"holds '{LAYER}.weight'"),
    "another shape": (edited(lambda t: t.update({f"{LAYER}.aquantizer.lower": torch.ones(49)})),
        f"'{LAYER}.aquantizer.lower' has shape [49], model=wan needs [50]"),
    "integers": (edited(lambda t: t.update({f"{LAYER}.w": torch.ones(32, 32, dtype=torch.int8)})), f"'{LAYER}.w' is I8"),
    "not finite": (edited(lambda t: t[f"{LAYER}.w"].fill_(float("inf"))), f"'{LAYER}.w', bfloat16 [32, 32], holds 1024"),
    "a negative scale": (edited(lambda t: t[f"{LAYER}.wquantizer.scale"].neg_()), "and a scale is above 0"),
    "another model": (config(num_layers=2, qk_norm=None), "its config.json has qk_norm=None, and model=wan has"),
    "another class": (config(_class_name="CogVideoXTransformer3DModel"), "its config.json says CogVideoXTransformer3DModel"),
    "an absurd size": (config(rope_max_seq_len=2**60), "its config.json has rope_max_seq_len=1152921504606846976, and"),
    "quantized": (config(quantization_config={"quant_method": "x"}), "its config.json has a quantization_config"),
    "cut off": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1]), "is cut off"),
    "a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "model.pt"), "holds pickles alone"),
    "no release": (lambda folder: shutil.copy(folder.parent / "plain", folder / WEIGHTS), "full-precision weights are given"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_whole_checkpoint_of_the_model_is_named(
    case: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = BROKEN[case]
    folder = Path(shutil.copytree(root / "release-wan", tmp_path / "release"))
    shutil.copy(root / "wan" / "transformer" / WEIGHTS, tmp_path / "plain")
    change(folder)
    capsys.readouterr()
    assert do_import(root, folder, tmp_path / "out") == BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_shards_that_lie_outside_or_hold_a_tensor_twice_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_release(make_release("wan"), tmp_path / "release", shards=2)
    index = folder / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = load_file(second)
    save_file(tensors | {sorted(load_file(first))[0]: torch.ones(1)}, second)
    assert do_import(root, folder, tmp_path / "out") == BAD_INPUT
    assert "holds too; get the checkpoint again" in capsys.readouterr().err
    save_file(tensors, second)
    index.write_text(json.dumps({**content, "weight_map": {"a": f"../{folder.name}/{first.name}"}}))
    assert do_import(root, folder, tmp_path / "out") == BAD_INPUT
    assert "holds a damaged index" in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["w3a4", "w5a4"])
def test_other_bits_than_the_checkpoint_s_are_told_from_its_codes(
    bits: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert do_import(root, root / "release-wan", tmp_path / "out", bits=bits) == BAD_INPUT
    assert "write for example bits=w4a4" in capsys.readouterr().err


def test_what_import_refuses_before_it_reads(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = root / "release-wan" / WEIGHTS
    for words, message in (
        (["clips=first"], "clips=first is unknown; use one of steps, last, mean"),
        (["num_steps=0"], "num_steps=0"),
        (["model.lora=x.safetensors"], "model.lora"),
        ([f"out={source}"], "is the checkpoint itself"),
        (["source=nowhere.safetensors"], "source=nowhere.safetensors is not there"),
    ):
        assert do_import(root, source, tmp_path / "out", *words) == BAD_INPUT
        assert message in capsys.readouterr().err
    assert main(["import", f"source={source}", "model=tiny", "bits=4", f"out={tmp_path / 'out'}"]) == BAD_INPUT
    assert "model=tiny is no model that QVGen's release trains" in capsys.readouterr().err
    assert main(["import", f"source={source}", "bits=4", f"out={tmp_path / 'out'}"]) == BAD_INPUT
    assert "model is missing; write model=NAME" in capsys.readouterr().err
    assert main(["import", f"source={source}", "model=wan", f"out={tmp_path / 'out'}"]) == BAD_INPUT
    assert "bits" in capsys.readouterr().err
    assert do_import(root, source, root / "packed-wan") == BAD_INPUT
    assert "overwrite=true" in capsys.readouterr().err
    assert do_import(root, source, tmp_path / "out", "dry_run=true") == DONE
    assert f"would import 26 layers of {source} as model=wan bits=4 into {tmp_path / 'out'}" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
