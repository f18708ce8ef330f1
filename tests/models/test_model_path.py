"""``model.path`` as people have it: the hub's cache, and what lies in a model's place, each answered by its name.

The cache is laid out by hand as the hub's client documents it (refs, snapshots of links into blobs). Connections are
forbidden.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from qvgen.cli import main
from qvgen.models.folder.hub_cache import cache_of
from tests.models.hub_folders import CAPTIONS, make_wan_folder
from tests.models.lora_files import make_model, save_diffusers, save_peft, tiny_family

REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
WEIGHTS = "diffusion_pytorch_model.safetensors"
DOWNLOAD = f"`hf download {REPOSITORY} --local-dir FOLDER` and write model=wan model.path=FOLDER"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("hub") / "wan")


@pytest.fixture
def folder(hub: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hub, tmp_path / "wan"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; no connection can be made."""

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    root = tmp_path / "home" / "hub"
    root.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    return root


def fill_cache(root: Path, folder: Path, repository: str, *, commit: str = "a" * 40, main: bool = True) -> Path:
    """What `hf download REPOSITORY` leaves of a folder; its snapshot."""
    place = root / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = place / "blobs" / f"{commit[0]}{len(list(place.glob('blobs/*')))}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    if main:
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(commit)
    return snapshot


def answer(path: object, **changes: Any) -> str:
    """The one line that refuses a path."""
    with pytest.raises(ValueError, match="model.path=") as caught:
        tiny_family("wan", path, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The hub's cache


def test_a_repository_s_name_is_found_in_the_cache(hub: Path, cache: Path) -> None:
    plain = tiny_family("wan", hub)
    snapshot = fill_cache(cache, hub, "acme/style-wan")
    family = tiny_family("wan", "acme/style-wan")
    assert family.folder.path == snapshot
    assert (family.revision, family.text_revision, family.latent_revision) == (
        plain.revision, plain.text_revision, plain.latent_revision,
    )  # fmt: skip
    wanted = plain.load_teacher().state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in family.load_teacher().state_dict().items())
    embedding = family.encode(CAPTIONS)["encoder_hidden_states"]
    assert torch.equal(embedding, plain.encode(CAPTIONS)["encoder_hidden_states"])


def test_a_cache_s_root_and_its_folders_are_found(hub: Path, cache: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(hub, tmp_path / "other"))
    main = fill_cache(cache, hub, REPOSITORY)
    fill_cache(cache, other, REPOSITORY, commit="b" * 40, main=False)
    for path in (cache, cache.parent, main.parent.parent, main.parent, main, REPOSITORY):
        assert tiny_family("wan", path).folder.path == main
    assert cache_of(main) == (REPOSITORY, cache)
    # Where a revision was asked for by its hash there is no main; the only snapshot is meant.
    moved = tmp_path / "elsewhere"
    only = fill_cache(moved, hub, "acme/wan", main=False)
    assert tiny_family("wan", moved / "models--acme--wan").folder.path == only
    # Another model's cache says what it holds.
    assert f"is the hub's cache and does not hold {REPOSITORY} (but acme/wan)" in answer(moved)


def test_a_repository_that_is_not_in_the_cache_is_to_be_downloaded_there(cache: Path) -> None:
    line = answer("acme/style-wan")
    assert f"is no folder, and the hub's cache {cache} holds no such repository; download the weights with" in line
    assert "--local-dir acme/style-wan` and write model=wan model.path=acme/style-wan" in line  # a folder is likelier
    assert line.endswith("if acme/style-wan is a repository of the hub, `hf download acme/style-wan` puts it there")
    own = answer(REPOSITORY)
    assert own.endswith(f"download it with `hf download {REPOSITORY}`, or write the folder where it lies")
    assert "--local-dir" not in own
    for name in ("weights/Wan2.1-1.3B", "weights/wan"):
        assert f"--local-dir {name}` and write model=wan model.path={name}" in answer(name)


def test_what_is_in_the_cache_is_not_to_be_downloaded_again(hub: Path, cache: Path, tmp_path: Path) -> None:
    assert DOWNLOAD in answer(tmp_path)
    fill_cache(cache, hub, REPOSITORY)
    have = f"the hub's cache holds {REPOSITORY}: write model=wan model.path={REPOSITORY}"
    for line in (answer(tmp_path / "nowhere"), answer(tmp_path)):
        assert have in line
        assert "hf download" not in line
    with pytest.raises(ValueError, match=have):
        tiny_family("wan", None).load_teacher()


def test_an_unfinished_download_says_which_file_and_the_command_that_goes_on(hub: Path, cache: Path) -> None:
    snapshot = fill_cache(cache, hub, "acme/wan")
    (snapshot / "transformer" / WEIGHTS).resolve().unlink()
    family = tiny_family("wan", "acme/wan")
    with pytest.raises(ValueError, match="is a link to nothing") as caught:
        family.load_teacher()
    assert str(caught.value).endswith("get it with `hf download acme/wan --include 'transformer/*'`")
    (snapshot / "model_index.json").unlink()
    assert answer("acme/wan").endswith("lacks model_index.json; get it with `hf download acme/wan model_index.json`")
    # In another cache than the environment's the command names it.
    moved = cache.parent.parent / "moved"
    other = fill_cache(moved, hub, "acme/wan")
    (other / "vae" / WEIGHTS).unlink()
    with pytest.raises(
        ValueError, match=f"vae holds no weights; get it with .* --include 'vae/.' --cache-dir {moved}`"
    ):
        _ = tiny_family("wan", other).latent_revision


# Folders with something missing or in another form


def test_a_download_into_a_folder_that_stopped(folder: Path) -> None:
    (folder / "transformer" / WEIGHTS).unlink()
    part = folder / ".cache" / "huggingface" / "download" / "transformer" / "abc=.123.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"")
    with pytest.raises(
        ValueError, match=rf"download was not finished \({part.name}\); get it with `hf download {REPOSITORY}"
    ):
        tiny_family("wan", folder).load_teacher()


def test_variants_are_loaded_where_there_is_nothing_else(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = tiny_family("wan", folder).load_teacher()
    model = WanTransformer3DModel.from_pretrained(folder / "transformer")
    model.half().save_pretrained(folder / "transformer", variant="fp16", max_shard_size="40KB")
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    full, caplog_level = tiny_family("wan", folder), logging.WARNING
    assert torch.equal(full.load_teacher().proj_out.weight, wanted.proj_out.weight)
    assert not [record for record in caplog.records if "variant" in record.message]
    before = full.revision
    (folder / "transformer" / WEIGHTS).unlink()
    with caplog.at_level(caplog_level):
        found = tiny_family("wan", folder).load_teacher()
    assert "transformer holds the variant fp16 alone; its rounded weights are used" in caplog.text
    assert all(torch.equal(value, wanted.state_dict()[key].half().float()) for key, value in found.state_dict().items())
    assert tiny_family("wan", folder).revision != before
    shards = sorted((folder / "transformer").glob("*fp16*.safetensors"))
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[0].name}"):
        tiny_family("wan", folder).load_teacher()


def test_revision_is_of_the_files_that_are_loaded(folder: Path) -> None:
    before = tiny_family("wan", folder).revision
    save_file({"a": torch.ones(1)}, folder / "transformer" / "copy.safetensors")
    assert tiny_family("wan", folder).revision == before


def edited(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def edit(transformer: Path) -> None:
        save_file(change(load_file(transformer / WEIGHTS)), transformer / WEIGHTS, metadata={"format": "pt"})

    return edit


def shard(transformer: Path) -> None:
    (transformer / WEIGHTS).rename(transformer / "diffusion_pytorch_model-00001-of-00001.safetensors")


def rename(name: str) -> Callable[[Path], None]:
    return lambda transformer: (transformer / WEIGHTS).rename(transformer / name) and None


def release(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Linear as QVGen's own release stores it."""
    weight = tensors.pop("proj_out.weight")
    return tensors | {
        "proj_out.w": weight, "proj_out.wquantizer.scale": weight[:, :1].clone(),
        "proj_out.wquantizer.zero_point": weight[:, :1].clone(), "proj_out.aquantizer.lower": torch.zeros(50),
    }  # fmt: skip


TRANSFORMERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shards without index": (shard, r"holds shards \(\S+\) without their index \S+.index.json; get it"),
    "pickles": (rename("diffusion_pytorch_model.bin"), r"holds pickles alone \(\S+.bin\), .* convert them to"),
    "gguf": (rename("wan-Q4_K_M.gguf"), r"holds GGUF \(wan-Q4_K_M.gguf\), whose weights are quantized already"),
    "another name": (rename("style.safetensors"),
        r"holds style.safetensors, and weights are called \S+ or model.safetensors; rename it"),
    "git-lfs": (lambda t: (t / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        f"{WEIGHTS} is the pointer that git-lfs leaves in place of the weights; run `git lfs pull` there"),
    "empty": (lambda t: (t / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is empty: its download was not finished; get it"),
    "cut off": (lambda t: (t / WEIGHTS).write_bytes((t / WEIGHTS).read_bytes()[:-1]), r"is cut off: it has \d+ of \d+"),
    "cut header": (lambda t: (t / WEIGHTS).write_bytes((t / WEIGHTS).read_bytes()[:99]), "cut off: it has 99 bytes, its"),
    "fp8": (edited(lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}),
        r"holds weights that are quantized already \(\S+weight is F8_E4M3\): .* quantized a second time; take the "
        "full-precision ones, in bf16, fp16 or fp32$"),
    "int8": (edited(lambda t: t | {"proj_out.weight": t["proj_out.weight"].to(torch.int8)}),
        r"quantized already \(proj_out.weight is I8\)"),
    "the release": (edited(release), r"a checkpoint of QVGen's own release \(proj_out.aquantizer.lower\)"),
    "a damaged index": (lambda t: (shard(t), (t / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../a"}}')),
        "holds a damaged index, diffusion_pytorch_model.safetensors.index.json"),
    "no configuration": (lambda t: (t / "config.json").unlink(), "transformer/config.json can't be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_what_lies_in_place_of_weights_is_named(case: str, folder: Path) -> None:
    change, match = TRANSFORMERS[case]
    change(folder / "transformer")
    for call in (lambda: tiny_family("wan", folder).revision, lambda: tiny_family("wan", folder).load_teacher()):
        with pytest.raises(ValueError, match=match) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        assert ";" in message


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS: dict[str, Any] = {
    "no mapping": [], "a number": 3, "no entries": {"a": 3}, "no offsets": {"a": {}},
    "no shape": {"a": {**ENTRY, "shape": None}},
    "three offsets": {"a": {**ENTRY, "data_offsets": [0, 4, 8]}}, "backwards": {"a": {**ENTRY, "data_offsets": [4, 0]}},
    "before the file": {"a": {**ENTRY, "data_offsets": [-9, 4]}}, "half a byte": {"a": {**ENTRY, "data_offsets": [0, 0.5]}},
    "a size of text": {"a": {**ENTRY, "shape": ["1"]}}, "a type of numbers": {"a": {**ENTRY, "dtype": 3}},
    "overlapping": {"a": ENTRY, "b": ENTRY}, "another size": {"a": {**ENTRY, "shape": [2**40]}},
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_headers_are_one_line(case: str, folder: Path) -> None:
    raw = json.dumps(HEADERS[case]).encode()
    for file in (folder / "transformer" / WEIGHTS, folder / "text_encoder" / "model.safetensors"):
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    family = tiny_family("wan", folder)
    for call in (family.load_teacher, lambda: family._module("text_encoder")):
        with pytest.raises(ValueError, match=r"is no safetensors file|can't be loaded") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"^model.lora={folder / 'transformer'}: "):
        tiny_family("wan", None, lora=str(folder / "transformer"))


def test_weights_that_a_configuration_calls_quantized(folder: Path) -> None:
    file = folder / "text_encoder" / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(
        ValueError, match=r"text_encoder is quantized already .*bitsandbytes.*; take the full-precision weights"
    ):
        tiny_family("wan", folder).encode(CAPTIONS)


def test_a_tokenizer_that_is_missing_or_damaged(folder: Path) -> None:
    remedy = f"get it with `hf download {REPOSITORY} --include 'tokenizer/*' --local-dir {folder}`"
    tokenizer = folder / "tokenizer"
    (tokenizer / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="tokenizer can't be loaded") as caught:
        tiny_family("wan", folder).encode(CAPTIONS)
    assert str(caught.value).endswith(remedy)
    (tokenizer / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer holds none of tokenizer.json, spiece.model"):
        tiny_family("wan", folder).encode(CAPTIONS)
    shutil.rmtree(tokenizer)
    for call in (lambda: tiny_family("wan", folder).text_revision, lambda: tiny_family("wan", folder).encode(CAPTIONS)):
        with pytest.raises(ValueError, match="tokenizer is missing") as caught:
            call()
        assert str(caught.value).endswith(remedy)


def test_a_dry_run_looks_at_every_part(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "ptq", "model=wan", f"model.path={folder}", "model.height=32", "model.width=48", "model.num_frames=9",
        "model.sampling_frames=9", "bits=4", "init=rtn", "evaluation.samples=2", "dry_run=true",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main(command) == 0
    weights = folder / "vae" / WEIGHTS
    content = weights.read_bytes()
    for change, message in (
        (lambda: weights.write_bytes(content[:-1]), f"{weights} is cut off"),
        (weights.unlink, "vae holds no weights"),
    ):
        change()
        capsys.readouterr()
        assert main(command) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    weights.write_bytes(content)
    shutil.rmtree(folder / "tokenizer")
    assert main(command) == 2
    assert "tokenizer is missing; get it with `hf download" in capsys.readouterr().err.splitlines()[-1]


# Other things in a model's place


def write_files(folder: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict) and name.endswith(".safetensors"):
            save_file(content, path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


ORIGINAL = {f"blocks.0.self_attn.{part}.weight": torch.ones(2, 2) for part in "qkvo"}
OURS = {"blocks.0.attn1.to_q.weight": torch.ones(2, 2)}
WAN = {"_class_name": "WanTransformer3DModel"}
FOLDERS: dict[str, tuple[dict[str, object], str]] = {
    "a transformer alone": ({"config.json": WAN, WEIGHTS: OURS},
        r"holds a transformer alone \(WanTransformer3DModel\), without "
        r"VAE, text encoder and tokenizer; write model.transformer=\S+other beside the base model, whose folder is "
        "model.path; download the weights with"),
    "original Wan": ({"config.json": {"_class_name": "WanModel"}, WEIGHTS: ORIGINAL, "Wan2.1_VAE.pth": "x"},
        "is in Wan's original layout, and diffusers' layout is needed"),
    "original A14B": ({f"{noise}_noise_model/config.json": {"_class_name": "WanModel"} for noise in ("high", "low")},
        "is in Wan's original layout"),
    "SAT": ({"transformer/1000/mp_rank_00_model_states.pt": "x"}, r"is in CogVideoX's original layout \(SAT\)"),
    "ComfyUI": ({"wan2.1_t2v_1.3B_bf16.safetensors": {f"model.diffusion_model.{k}": v for k, v in ORIGINAL.items()}},
        "holds wan2.1_t2v_1.3B_bf16.safetensors: one file in Wan's original layout"),
    "GGUF": ({"wan-Q4.gguf": "GGUF"}, r"holds wan-Q4.gguf alone \(GGUF, quantized already\)"),
    "pickles": ({"pytorch_model.bin": "x"}, r"holds pytorch_model.bin alone \(pickles, which are never read\)"),
    "the release": ({"config.json": WAN, WEIGHTS: release({"proj_out.weight": torch.ones(2, 2)})},
        f"holds {WEIGHTS}, which is a checkpoint of QVGen's own release"),
    "no index": ({"transformer/config.json": WAN}, "lacks model_index.json; get it with `hf download"),
    "packed": ({"manifest.json": {"format": "qvgen-packed"}}, r"is a packed model; write packed=\S+other instead"),
    "a run": ({"config.yaml": "a: 1", "packed/manifest.json": {}}, "is the run of a training, whose packed model is packed="),
    "a training's run": ({"model/model_index.json": {}}, r"is the run of a training; write model.path=\S+other/model$"),
    "nothing": ({"notes.txt": "x"}, "holds no model_index.json; download the weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_no_model_are_named(case: str, tmp_path: Path) -> None:
    files, match = FOLDERS[case]
    write_files(tmp_path / "other", files)
    with pytest.raises(ValueError, match=rf"^model.path={tmp_path / 'other'} {match}"):
        tiny_family("wan", tmp_path / "other")
    assert f"--local-dir {tmp_path / 'other'}`" not in answer(tmp_path / "other") or case == "no index"


def test_a_part_of_a_model_leads_to_its_folder(folder: Path) -> None:
    above = f"write model.path={folder}"
    assert f"holds a transformer alone; its model is the folder above, {above}" in answer(folder / "transformer")
    assert f"write its folder, model.path={folder}" in answer(folder / "model_index.json")
    assert f"write the model's folder, model.path={folder}" in answer(folder / "transformer" / WEIGHTS)


FILES: dict[str, tuple[object, str]] = {
    "wan2.1_t2v.safetensors": (
        ORIGINAL,
        r"one file in Wan's original layout; write model.transformer=\S+ beside the base model, whose folder is model.path",
    ),
    "transformer.safetensors": (OURS, "a transformer alone, without VAE, text encoder and configurations"),
    "fp8.safetensors": (
        {k: v.to(torch.float8_e4m3fn) for k, v in OURS.items()},
        r"quantized already \(blocks.0.attn1.to_q.weight",
    ),
    "other.safetensors": ({"a.weight": torch.ones(1)}, r"weights alone \(a.weight\)"),
    "cut.safetensors": ("x", "is no safetensors file"),
    "wan.gguf": ("GGUF", "GGUF, whose weights are quantized already"),
    "wan.ckpt": ("x", "a pickle, which runs code when it is read and never is"),
    "wan.zip": ("x", "needed is a folder in the hub's layout"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_model_are_named_and_never_a_place_to_download_to(name: str, tmp_path: Path) -> None:
    content, match = FILES[name]
    write_files(tmp_path, {name: content})
    with pytest.raises(
        ValueError, match=rf"^model.path={tmp_path / name} is a file: .*{match}.*; download the weights"
    ):
        tiny_family("wan", tmp_path / name)
    assert DOWNLOAD in answer(tmp_path / name)
    assert DOWNLOAD in answer(tmp_path / f"not-there-{name}")


def test_a_lora_in_a_model_s_place(tmp_path: Path) -> None:
    model = make_model("wan", tmp_path / "hub")
    saved = save_diffusers(model, tmp_path / "lora")
    assert f"a LoRA; write model.lora={saved.path} beside the model's own folder" in answer(saved.path)
    for path in (saved.path.parent, save_peft(model, tmp_path / "peft").path):
        assert f"is a LoRA; write model.lora={path}" in answer(path)
