"""LoRA files of every trainer's keys against W + scale alpha / rank B A + scale D in float64, on tiny models.

Which key is of which layer is written down here by hand, from the trainers' own files; nothing of qvgen's naming is used.
What diffusers' converter makes of the same file is a second oracle, where it takes it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from qvgen.cli import main
from qvgen.config.build import build, check
from qvgen.config.compose import compose_plain
from qvgen.config.run_config import read_config
from qvgen.models.base import LOCAL_ARGUMENTS
from qvgen.run_directory import RunDirectory
from tests.models.hub_folders import make_wan_folder
from tests.models.lora_files import Model, make_model, plain_teacher, tiny_family

SCALE, RANK, ALPHA = 0.7, 3, 5.0
Tensors = dict[str, Tensor]

BLOCK = {  # Wan's own code: diffusers
    **{
        f"self_attn.{ours}": f"attn1.{theirs}"
        for ours, theirs in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    },
    **{
        f"cross_attn.{ours}": f"attn2.{theirs}"
        for ours, theirs in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    },
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
AROUND = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}
NORMS = {
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "norm3": "norm2",
}
BLOCKS = {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for i in range(2) for ours, theirs in BLOCK.items()}
EVERY = BLOCKS | AROUND
COGVIDEOX = [
    "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_out.0", "transformer_blocks.0.norm1.linear",
    "transformer_blocks.1.ff.net.0.proj", "proj_out", "time_embedding.linear_1",
]  # fmt: skip


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model("wan", tmp_path_factory.mktemp("hub") / "wan")


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model("cogvideox", tmp_path_factory.mktemp("hub") / "cogvideox")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("hub") / "a14b", "a14b")


class Halves:
    """Random A and B of layers, and what they must add to a weight, float64."""

    def __init__(self, weights: Tensors, layers: list[str], *, seed: int = 0, alpha: float | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up, self.added = {}, {}, {}
        for layer in layers:
            outputs, *inputs = weights[f"{layer}.weight"].shape
            self.down[layer] = torch.randn(RANK, *inputs, generator=generator) * 0.2
            self.up[layer] = torch.randn(outputs, RANK, *[1] * (len(inputs) - 1), generator=generator) * 0.2
            product = self.up[layer].double().flatten(1) @ self.down[layer].double().flatten(1)
            self.added[f"{layer}.weight"] = (
                (RANK if alpha is None else alpha) / RANK * product.reshape(outputs, *inputs)
            )

    def tensors(self, key: Callable[[str, str], str], *, down: str, up: str, alpha: float | None = None) -> Tensors:
        """The file: ``key(layer, end)`` is a tensor's key."""
        found = {}
        for layer in self.down:
            found[key(layer, down)], found[key(layer, up)] = self.down[layer], self.up[layer]
            if alpha is not None:
                found[key(layer, "alpha")] = torch.tensor(alpha)
        return found


def original(layer: str, names: dict[str, str]) -> str:
    return next(ours for ours, theirs in names.items() if theirs == layer)


def weights_of(model: Model) -> Tensors:
    return dict(plain_teacher(model).state_dict())


def check_added(model: Model, path: Path | list[Any], added: Tensors, *, scale: Any = SCALE) -> None:
    """Every parameter is its old value plus scale times what is in ``added``; all others are bitwise what they were."""
    before = weights_of(model)
    after = tiny_family(
        model.name, model.folder, lora=path if isinstance(path, list) else str(path), lora_scale=scale
    ).load_teacher()
    assert set(added) <= set(before)
    for name, value in after.state_dict().items():
        if name not in added:
            assert torch.equal(value, before[name]), name
            continue
        factor = 1.0 if isinstance(path, list) else scale
        wanted = before[name].double() + factor * added[name]
        assert torch.allclose(value.double(), wanted, rtol=0, atol=1e-6), name  # float32 of values about 1
        assert (value - before[name]).abs().max() > 1e-3, name


def diffusers_form(halves: Halves) -> Tensors:
    return halves.tensors(lambda layer, end: f"transformer.{layer}.{end}", down="lora_A.weight", up="lora_B.weight")


FORMS: dict[str, tuple[dict[str, str], float | None, Callable[[Halves], Tensors]]] = {
    # name: (layers, alpha, the file)
    "diffusers, finetrainers, ai-toolkit": (EVERY, None, diffusers_form),
    "ComfyUI": (EVERY, ALPHA, lambda h: h.tensors(
        lambda layer, end: f"diffusion_model.{original(layer, EVERY)}.{end}", down="lora_down.weight", up="lora_up.weight",
        alpha=ALPHA)),
    "diffusion-pipe": (EVERY, None, lambda h: h.tensors(
        lambda layer, end: f"diffusion_model.{original(layer, EVERY)}.{end}", down="lora_A.weight", up="lora_B.weight")),
    "ComfyUI, whole model": (BLOCKS, ALPHA, lambda h: h.tensors(
        lambda layer, end: f"model.diffusion_model.{original(layer, EVERY)}.{end}", down="lora_down.weight",
        up="lora_up.weight", alpha=ALPHA)),
    "musubi-tuner": (BLOCKS, ALPHA, lambda h: h.tensors(
        lambda layer, end: f"lora_unet_{original(layer, EVERY).replace('.', '_')}.{end}", down="lora_down.weight",
        up="lora_up.weight", alpha=ALPHA)),
    "musubi-tuner, one block": ({"blocks.1.self_attn.q": "blocks.1.attn1.to_q"}, ALPHA, lambda h: h.tensors(
        lambda layer, end: f"lora_unet_blocks_1_self_attn_q.{end}", down="lora_down.weight", up="lora_up.weight",
        alpha=ALPHA)),
    "musubi-tuner, include_patterns": ({f"blocks.{i}.ffn.0": f"blocks.{i}.ffn.net.0.proj" for i in range(2)}, ALPHA,
        lambda h: h.tensors(lambda layer, end: f"lora_unet_blocks_{layer[7]}_ffn_0.{end}", down="lora_down.weight",
        up="lora_up.weight", alpha=ALPHA)),
    "DiffSynth-Studio": (BLOCKS, None, lambda h: h.tensors(
        lambda layer, end: f"{original(layer, EVERY)}.{end}", down="lora_A.default.weight", up="lora_B.default.weight")),
    "DiffSynth-Studio, pipe.dit": (BLOCKS, None, lambda h: h.tensors(
        lambda layer, end: f"pipe.dit.{original(layer, EVERY)}.{end}", down="lora_A.default.weight",
        up="lora_B.default.weight")),
    "peft's names": (EVERY, None, lambda h: h.tensors(
        lambda layer, end: f"base_model.model.{layer}.{end}", down="lora_A.weight", up="lora_B.weight")),
    "no prefix": (EVERY, ALPHA, lambda h: h.tensors(
        lambda layer, end: f"{layer}.{end}", down="lora_down.weight", up="lora_up.weight", alpha=ALPHA)),
    "old diffusers": (EVERY, None, lambda h: h.tensors(
        lambda layer, end: f"transformer.{layer}.{end}", down="lora.down.weight", up="lora.up.weight")),
    "a patch embedding": ({"patch_embedding": "patch_embedding"}, ALPHA, lambda h: h.tensors(
        lambda layer, end: f"diffusion_model.{layer}.{end}", down="lora_down.weight", up="lora_up.weight", alpha=ALPHA)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_adds_the_formula(form: str, wan: Model, tmp_path: Path) -> None:
    names, alpha, write = FORMS[form]
    halves = Halves(weights_of(wan), list(names.values()), alpha=alpha)
    save_file(write(halves), tmp_path / "lora.safetensors")
    check_added(wan, tmp_path / "lora.safetensors", halves.added)


@pytest.mark.parametrize("form", ["transformer.", "", "base_model.model."])
def test_cogvideox_files(form: str, cogvideox: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """CogVideo's own trainer saves no alpha: what is assumed is logged, once."""
    halves = Halves(weights_of(cogvideox), COGVIDEOX)
    path = tmp_path / "lora.safetensors"
    save_file(halves.tensors(lambda name, end: f"{form}{name}.{end}", down="lora_A.weight", up="lora_B.weight"), path)
    with caplog.at_level(logging.INFO):
        check_added(cogvideox, path, halves.added)
    lines = [record.message for record in caplog.records if "alpha" in record.message]
    assert len(lines) == 1
    assert f"model.lora={path} says no alpha for 6 of 6 layers" in lines[0]
    assert "alpha is taken to be the rank. CogVideo's own trainer" in lines[0]
    assert f"model.lora={path}: 6 layers and 0 differences are merged into transformer at scale 0.7" in caplog.text


def test_nothing_is_logged_about_alphas_that_are_there(
    wan: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names, _, write = FORMS["musubi-tuner"]
    save_file(write(Halves(weights_of(wan), list(names.values()))), tmp_path / "lora.safetensors")
    with caplog.at_level(logging.INFO):
        tiny_family("wan", wan.folder, lora=str(tmp_path / "lora.safetensors")).load_teacher()
    assert "no alpha" not in caplog.text


# Few-step distillation: differences of norms, biases and modulations


def differences(weights: Tensors) -> Iterator[tuple[str, str]]:
    """(key, parameter) of all differences that LightX2V's, CausVid's and AccVideo's files have."""
    for i in range(2):
        for ours, theirs in BLOCK.items():
            yield f"blocks.{i}.{ours}.diff_b", f"blocks.{i}.{theirs}.bias"
        for ours, theirs in NORMS.items():
            yield f"blocks.{i}.{ours}.diff", f"blocks.{i}.{theirs}.weight"
        yield f"blocks.{i}.norm3.diff_b", f"blocks.{i}.norm2.bias"
        yield f"blocks.{i}.diff_m", f"blocks.{i}.scale_shift_table"
    for ours, theirs in AROUND.items():
        yield f"{ours}.diff_b", f"{theirs}.bias"
    yield "head.diff_m", "scale_shift_table"
    yield "patch_embedding.diff", "patch_embedding.weight"
    yield "patch_embedding.diff_b", "patch_embedding.bias"


@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_differences_are_added_times_the_scale(wan: Model, alpha: float | None, tmp_path: Path) -> None:
    weights = weights_of(wan)
    layers = [layer for layer in EVERY.values() if layer != "proj_out"]
    halves = Halves(weights, layers, alpha=alpha)
    tensors = halves.tensors(
        lambda name, end: f"diffusion_model.{original(name, EVERY)}.{end}", down="lora_down.weight",
        up="lora_up.weight", alpha=alpha,
    )  # fmt: skip
    pairs = [*differences(weights), ("head.head.diff", "proj_out.weight")]
    generator = torch.Generator().manual_seed(9)
    for key, name in pairs:
        tensors[f"diffusion_model.{key}"] = torch.randn(weights[name].shape, generator=generator) * 1.6e-2
        halves.added[name] = tensors[f"diffusion_model.{key}"].double()  # never times alpha / rank
    save_file(tensors, tmp_path / "lora.safetensors")
    check_added(wan, tmp_path / "lora.safetensors", halves.added)
    changed = sum(not torch.equal(value, weights[name]) for name, value in tiny_family(
        "wan", wan.folder, lora=str(tmp_path / "lora.safetensors")).load_teacher().state_dict().items())  # fmt: skip
    assert changed == len(set(halves.added)) == len(layers) + len(pairs)


def test_diffusers_converter_agrees_where_it_takes_a_file(wan: Model, tmp_path: Path) -> None:
    for form in ("ComfyUI", "diffusion-pipe", "musubi-tuner"):
        names, alpha, write = FORMS[form]
        if form == "ComfyUI":  # it knows alphas in the blocks alone
            names = BLOCKS
        tensors = write(Halves(weights_of(wan), list(names.values()), alpha=alpha))
        path = tmp_path / f"{form}.safetensors"
        save_file(tensors, path)
        ours = tiny_family("wan", wan.folder, lora=str(path)).load_teacher().state_dict()
        theirs = plain_teacher(wan)
        theirs.load_lora_adapter(WanPipeline.lora_state_dict(dict(tensors)), prefix="transformer")
        theirs.fuse_lora()
        theirs.unload_lora()
        for name, value in theirs.state_dict().items():
            assert torch.allclose(ours[name], value, rtol=0, atol=1e-6), (form, name)


# Several LoRAs


def write_two(model: Model, tmp_path: Path) -> tuple[list[Path], list[Halves]]:
    weights, found = weights_of(model), []
    for seed, layers in enumerate((["blocks.0.attn1.to_q", "proj_out"], ["blocks.0.attn1.to_q", "blocks.1.ffn.net.2"])):
        halves = Halves(weights, layers, seed=seed)
        save_file(diffusers_form(halves), tmp_path / f"{seed}.safetensors")
        found.append(halves)
    return [tmp_path / "0.safetensors", tmp_path / "1.safetensors"], found


def summed(halves: list[Halves], scales: list[float]) -> Tensors:
    found: Tensors = {}
    for one, scale in zip(halves, scales, strict=True):
        for name, added in one.added.items():
            found[name] = found.get(name, 0) + scale * added
    return found


@pytest.mark.parametrize(
    ("write", "scale", "scales"),
    [
        (lambda a, b: [a, b], 0.5, [0.5, 0.5]),
        (lambda a, b: [a, b], [0.5, -0.25], [0.5, -0.25]),
        (lambda a, b: [{"path": a, "scale": 2}, b], 0.5, [2.0, 0.5]),
        (lambda a, b: [{"path": a}, {"path": b, "scale": 0.1}], 1, [1.0, 0.1]),
    ],
    ids=["one scale", "a list of scales", "own scales", "mappings"],
)
def test_a_list_of_loras_is_their_sum(write: Any, scale: Any, scales: list[float], wan: Model, tmp_path: Path) -> None:
    paths, halves = write_two(wan, tmp_path)
    check_added(wan, write(*map(str, paths)), summed(halves, scales), scale=scale)


def test_a_list_is_rounded_once(wan: Model, tmp_path: Path) -> None:
    paths, halves = write_two(wan, tmp_path)
    before = dict(plain_teacher(wan, dtype="bfloat16").state_dict())
    family = tiny_family("wan", wan.folder, lora=list(map(str, paths)), dtype="bfloat16")
    after = family.load_teacher().state_dict()
    for name, added in summed(halves, [1.0, 1.0]).items():
        wanted = before[name].double() + added
        half_step = torch.exp2(torch.frexp(wanted).exponent - 9.0)  # bf16 has 8 bits of significand
        assert bool(((after[name].double() - wanted).abs() <= half_step + 1e-6).all()), name


def test_revisions_are_of_all_files_scales_and_their_order(wan: Model, tmp_path: Path) -> None:
    (first, second), _ = write_two(wan, tmp_path)
    a, b = str(first), str(second)
    chosen = [
        (None, 1.0), (a, 1.0), (b, 1.0), ([a, b], 1.0), ([b, a], 1.0), ([a, b], 0.5), ([a, b], [0.5, 1.0]),
        ([a, b], [1.0, 0.5]), ([a, a], 1.0),
    ]  # fmt: skip
    revisions = [tiny_family("wan", wan.folder, lora=lora, lora_scale=scale).revision for lora, scale in chosen]
    assert len(set(revisions)) == len(chosen)
    same = [(a, 1), ([a], 1.0), ([a], [1.0]), ({"path": a, "scale": 1.0}, 0.3), ([{"path": a, "scale": 1.0}], 7)]
    assert {tiny_family("wan", wan.folder, lora=lora, lora_scale=scale).revision for lora, scale in same} == {
        revisions[1]
    }
    first.write_bytes(second.read_bytes())
    assert tiny_family("wan", wan.folder, lora=a).revision == revisions[2]


# Two experts


def expert_family(folder: Path, expert: str, **changes: Any) -> Any:
    return tiny_family("wan2.2-a14b", folder, expert=expert, **changes)


def test_each_expert_has_a_lora_of_its_own(experts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Model(name="wan2.2-a14b", folder=experts, pipeline=WanPipeline)
    (high, low), halves = write_two(model, tmp_path)
    keys = {"lora_high": str(high), "lora_low": {"path": str(low), "scale": 0.5}, "lora_scale": 2.0}
    for expert in ("high", "low"):
        family, plain = expert_family(experts, expert, **keys), expert_family(experts, expert)
        pairs = [(family.load_teacher(), plain.load_teacher())]
        pairs.append((family.partner(pairs[0][0]), plain.partner(pairs[0][1])))
        for (found, before), one, scale in zip(
            pairs if expert == "high" else pairs[::-1], halves, (2.0, 0.5), strict=True
        ):
            check_pair(found, before, one, scale=scale)
    assert "gets no LoRA" not in caplog.text
    revisions = {
        expert_family(experts, "high", **changes).revision
        for changes in (keys, {"lora_high": str(high)}, {"lora_low": str(high)}, {"lora": str(high)}, {})
    }
    assert len(revisions) == 5


def test_a_manifest_s_record_tells_that_the_partner_s_lora_is_missing(experts: Path, tmp_path: Path) -> None:
    model = Model(name="wan2.2-a14b", folder=experts, pipeline=WanPipeline)
    (high, low), _ = write_two(model, tmp_path)
    keys = {"lora_high": str(high), "lora_low": str(low), "lora_scale": 0.5}
    made = expert_family(experts, "high", **keys)
    record = json.loads(json.dumps(made.lora_record))
    assert [(entry["transformers"], entry["scale"]) for entry in record] == [
        (["transformer"], 0.5),
        (["transformer_2"], 0.5),
    ]
    assert not any(str(tmp_path) in str(value) for entry in record for value in entry.values())
    assert not made.partner_lora_is_missing(record)
    moved = shutil.copy(low, tmp_path / "moved.safetensors")
    assert not expert_family(experts, "high", lora_low=str(moved), lora_scale=0.5).partner_lora_is_missing(record)
    for changes in ({}, {"lora_low": str(low)}, {"lora_low": str(high), "lora_scale": 0.5}, {"lora_high": str(low)}):
        assert expert_family(experts, "high", **changes).partner_lora_is_missing(record)
    for nothing in (None, [], [3], [{}], "a", [{"transformers": ["transformer"]}]):
        assert not expert_family(experts, "high").partner_lora_is_missing(nothing)


def check_pair(found: nn.Module, before: nn.Module, halves: Halves, *, scale: float) -> None:
    weights = before.state_dict()
    for name, value in found.state_dict().items():
        wanted = weights[name].double() + scale * halves.added.get(name, 0)
        assert torch.allclose(value.double(), wanted, rtol=0, atol=1e-6), name
        assert (name in halves.added) == (not torch.equal(value, weights[name])), name


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_partner_without_a_lora_is_warned_of(
    experts: Path, expert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model(name="wan2.2-a14b", folder=experts, pipeline=WanPipeline)
    (path, _), _ = write_two(model, tmp_path)
    other = "low" if expert == "high" else "high"
    warning = (
        f"the {other}-noise expert gets no LoRA, and the other one does; write model.lora_{other}=FILE for its own"
    )
    for key in ("lora", f"lora_{expert}"):
        caplog.clear()
        expert_family(experts, expert, **{key: str(path)})
        assert [record.message for record in caplog.records] == [warning]
    caplog.clear()
    expert_family(experts, expert)
    expert_family(experts, expert, lora=str(path), **{f"lora_{other}": str(path)})
    assert not caplog.records


def test_files_that_name_an_expert(experts: Path, tmp_path: Path) -> None:
    model = Model(name="wan2.2-a14b", folder=experts, pipeline=WanPipeline)
    (path, _), halves = write_two(model, tmp_path)
    own = {key.replace("transformer.", "transformer_2."): value for key, value in diffusers_form(halves[0]).items()}
    second, both = tmp_path / "second.safetensors", tmp_path / "both.safetensors"
    save_file(own, second)
    save_file(own | diffusers_form(halves[1]), both)
    check_pair(
        expert_family(experts, "low", lora_low=str(second)).load_teacher(), expert_family(experts, "low").load_teacher(),
        halves[0], scale=1.0,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=rf"^model.lora_high={second}: it is of transformer_2 alone; write model.lora_low="
    ):
        expert_family(experts, "high", lora_high=str(second))
    with pytest.raises(
        ValueError, match="it has keys of both transformers; write it as model.lora, which gives each its own"
    ):
        expert_family(experts, "high", lora_high=str(both))
    with pytest.raises(
        ValueError, match=r"model.lora_scale=\[1.0\] is a list for model.lora; give model.lora_high {path"
    ):
        expert_family(experts, "high", lora_high=str(path), lora_scale=[1.0])
    with pytest.raises(ValueError, match="unknown key 'model.lora_high'"):
        tiny_family("wan", None, lora_high=str(path))


# Configurations


def test_the_command_line_config_yaml_and_resume_hold_lists(
    wan: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (a, b), _ = write_two(wan, tmp_path)
    keys = [
        "model=wan", f"model.path={wan.folder}", "model.height=32", "model.width=48", "model.num_frames=9",
        "model.sampling_frames=9", "bits=4", "logger=csv", f"data.path={tmp_path}",
    ]  # fmt: skip
    chosen = [f"model.lora=[{a},{{path: {b}, scale: 0.5}}]", "model.lora_scale=2"]
    plain = compose_plain("train", [*keys, *chosen])
    family = build("train", plain).model
    assert [(str(lora.file.path), lora.scale) for lora in family._loras] == [(str(a), 2.0), (str(b), 0.5)]
    with RunDirectory.claim(tmp_path / "run", plain, resume=False):
        pass
    again = read_config(tmp_path / "run")
    assert build("train", again).model.revision == family.revision
    with RunDirectory.claim(tmp_path / "run", plain, resume=True):
        pass
    other = compose_plain("train", [*keys, f"model.lora=[{a},{{path: {b}, scale: 0.75}}]", "model.lora_scale=2"])
    # The list is a key of places; that its scales are others is seen by the identity of what lies there.
    identities = [build("train", each).model.identity(transformer_only=True)["lora"] for each in (plain, other)]
    assert identities[0] != identities[1]
    assert [" times 0.5" in identities[0], " times 0.75" in identities[1]] == [True, True]
    assert {"lora", "lora_high", "lora_low"} <= set(LOCAL_ARGUMENTS)  # paths
    assert "lora_scale" not in LOCAL_ARGUMENTS
    check("train", again)


def test_a_lora_of_another_model_is_refused_before_weights_or_clips_are_read(
    wan: Model, cogvideox: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halves = Halves(weights_of(cogvideox), COGVIDEOX)
    path = tmp_path / "lora.safetensors"
    save_file(diffusers_form(halves), path)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,a dog\n")
    (tmp_path / "a.mp4").write_bytes(b"no clip")
    keys = [
        "model=wan", f"model.path={wan.folder}", "model.height=32", "model.width=48", "model.num_frames=9",
        "model.sampling_frames=9", "bits=4", f"data.path={tmp_path}", f"run_dir={tmp_path / 'run'}",
        f"data.cache={tmp_path / 'cache'}", f"model.lora={path}", "steps=4", "batch_size=2", "phi.ranks=[4]",
    ]  # fmt: skip
    for more in ([], ["dry_run=true"]):
        assert main(["train", *keys, *more]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"model.lora={path}: " in line
        assert "matches no layer of WanTransformer3DModel; use a LoRA of this model" in line
    assert not (tmp_path / "cache").exists()
