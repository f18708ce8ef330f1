"""Folders of the known models, of their siblings and of image-to-video models: each is told by its configurations alone.

The folders hold configurations and no weights: those of conf/model (``published``), and for models that qvgen does not have
what their repositories' configurations differ in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvgen.cli import main
from qvgen.config.leaves import conf_directory, load_leaf
from qvgen.models.folder.published import known_models

TRANSFORMERS = {
    "cogvideox": "CogVideoXTransformer3DModel",
    "wan": "WanTransformer3DModel",
    "small": "WanTransformer3DModel",
    "ltx": "LTXVideoTransformer3DModel",
    "latte": "LatteTransformer3DModel",
    "hunyuanvideo1.5": "HunyuanVideo15Transformer3DModel",
    "hunyuanvideo": "HunyuanVideoTransformer3DModel",
    "mochi": "MochiTransformer3DModel",
    "opensora": "STDiT3",
}
PIPELINES = {
    "cogvideox": "CogVideoXPipeline", "wan": "WanPipeline", "small": "WanPipeline", "ltx": "LTXPipeline",
    "latte": "LattePipeline", "hunyuanvideo1.5": "HunyuanVideo15Pipeline",
    "hunyuanvideo": "HunyuanVideoPipeline", "mochi": "MochiPipeline",
}  # fmt: skip
ENCODERS = {
    "cogvideox": "T5EncoderModel", "wan": "UMT5EncoderModel", "small": "BertModel", "ltx": "T5EncoderModel",
    "latte": "T5EncoderModel", "mochi": "T5EncoderModel", "hunyuanvideo1.5": "Qwen2_5_VLTextModel",
    "hunyuanvideo": "LlamaModel",
}  # fmt: skip
NO_FOLDER = {"tiny", "tiny_fewstep", "tiny_wide", "diffusers"}  # without published configurations
TWINS = ("wan2.2-ti2v", "wan2.2-i2v-5b")
"""Two models of one folder: without an image and with one."""
NAMES = [path.stem for path in sorted((conf_directory() / "model").glob("*.yaml")) if path.stem not in NO_FOLDER]


def kin(name: str) -> str:
    return next(key for key in TRANSFORMERS if name.startswith(key))


def write_configs(folder: Path, name: str, *, index: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The configurations of ``conf/model/NAME.yaml`` as the hub lays them out, with changes of the transformer's."""
    published = load_leaf("model", name).published
    if name == "opensora":  # without an index and a scheduler; configurations are those of transformers
        contents = {"transformer/config.json": {"architectures": ["STDiT3"], **published["transformer"]}}
        contents["vae/config.json"] = {"architectures": ["VideoAutoencoderPipeline"]}
        return write_files(folder, contents)
    contents = {
        "model_index.json": {
            "_class_name": PIPELINES[kin(name)], "text_encoder": ["transformers", ENCODERS[kin(name)]],
            **published.get("model_index", {}), **(index or {}),
        },
        "transformer/config.json": {"_class_name": TRANSFORMERS[kin(name)], **published["transformer"], **changes},
        "vae/config.json": published["vae"],
        "scheduler/scheduler_config.json": published["scheduler"],
    }  # fmt: skip
    return write_files(folder, contents)


def write_files(folder: Path, contents: dict[str, Any]) -> Path:
    for file, content in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content))
    return folder


def test_the_known_models_are_those_of_conf() -> None:
    assert [model.name for model in known_models()] == sorted(NAMES)
    kinds = [(tuple(model.kind.values()), tuple(model.sizes.values())) for model in known_models()]
    assert len(set(kinds)) == len(NAMES) - 1  # every one can be told from every other, but for the twins
    assert [model.takes_image for model in known_models()] == [
        "i2v" in model.name.split("-") for model in known_models()
    ]


@pytest.mark.parametrize("there", NAMES)
def test_every_other_model_s_folder_is_refused_with_the_right_name(there: str, tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "hub", there)
    assert load_leaf("model", there, path=str(folder)).folder.path == folder
    right = " or model=".join(TWINS) if there in TWINS else there
    for asked in NAMES:
        if {asked, there} == set(TWINS):
            assert load_leaf("model", asked, path=str(folder)).folder.path == folder
        elif asked != there:
            with pytest.raises(ValueError, match=rf"model.path={folder} holds .*; use model={right}$") as caught:
                load_leaf("model", asked, path=str(folder))
            assert "\n" not in str(caught.value)


def test_a_finetune_of_other_sizes_is_the_chosen_model_s(tmp_path: Path) -> None:
    for name in ("wan", "cogvideox-5b", "wan2.2-a14b"):
        folder = write_configs(tmp_path / name, name, num_layers=7)
        assert load_leaf("model", name, path=str(folder)).transformer_config["num_layers"] == 7
    # Weights of text-to-video are the same under a pipeline that edits videos.
    folder = write_configs(tmp_path / "v2v", "wan", index={"_class_name": "WanVideoToVideoPipeline"})
    load_leaf("model", "wan", path=str(folder))


IMAGE = {
    # repository: (of which model, changes, of model_index.json, what shows it, the model to use)
    "Wan2.1-FLF2V-14B": ("wan-14b", {"in_channels": 36, "image_dim": 1280, "pos_embed_seq_len": 514},
        {"_class_name": "WanImageToVideoPipeline", "image_encoder": ["transformers", "CLIPVisionModel"]},
        "takes 36 channels", "wan-14b"),
    "CogVideoX-Fun-2b": ("cogvideox", {"in_channels": 33}, {"_class_name": "CogVideoXFunControlPipeline"},
        "takes 33 channels", "cogvideox"),
    "HunyuanVideo-I2V": ("hunyuanvideo", {"in_channels": 33, "image_condition_type": "latent_concat"},
        {"_class_name": "HunyuanVideoImageToVideoPipeline"}, "takes 33 channels and its VAE makes 16", "hunyuanvideo"),
    "HunyuanVideo-I2V-33ch": ("hunyuanvideo", {"image_condition_type": "token_replace"},
        {"_class_name": "HunyuanVideoImageToVideoPipeline"}, "image_condition_type is token_replace", "hunyuanvideo"),
    "HunyuanVideo-1.5-480p_i2v without its encoder": ("hunyuanvideo1.5", {"task_type": "i2v"},
        {"_class_name": "HunyuanVideo15ImageToVideoPipeline"}, "takes 65 channels and its VAE makes 32", "hunyuanvideo1.5"),
    "a small image encoder": ("wan", {}, {"image_encoder": ["transformers", "CLIPVisionModel"]}, "has an image_enc", "wan"),
}  # fmt: skip


KNOWN_IMAGE = {
    # the folder's own sizes: (of which model, changes, of model_index.json, the model to use)
    "latents and CLIP": ("wan", {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 1536},
        {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}, "wan-i2v-14b"),
    "latents alone": ("wan2.2-a14b", {"in_channels": 36}, {"boundary_ratio": 0.9, "image_encoder": [None, None]},
        "wan2.2-i2v-a14b"),
    "learned positions": ("cogvideox-5b", {"in_channels": 32, "use_learned_positional_embeddings": True}, {},
        "cogvideox-i2v"),
    "latents and SigLIP": ("hunyuanvideo1.5", {"task_type": "i2v"},
        {"image_encoder": ["transformers", "SiglipVisionModel"]}, "hunyuanvideo1.5-i2v"),
    "ofs": ("cogvideox1.5", {"in_channels": 32, "ofs_embed_dim": 512}, {}, "cogvideox1.5-i2v"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KNOWN_IMAGE)
def test_image_to_video_models_of_any_size_name_their_own_model(kind: str, tmp_path: Path) -> None:
    of, changes, index, use = KNOWN_IMAGE[kind]
    folder = write_configs(tmp_path / "hub", of, index=index, **changes)
    for asked in ("wan", of):
        with pytest.raises(ValueError, match=rf"model.path={folder} holds .*use model={use}$"):
            load_leaf("model", asked, path=str(folder))
    assert (
        load_leaf("model", use, path=str(folder), **({"width": 720} if use == "cogvideox-i2v" else {})).folder
        is not None
    )


@pytest.mark.parametrize("repository", IMAGE)
def test_image_to_video_models_are_refused_with_their_text_to_video_sibling(repository: str, tmp_path: Path) -> None:
    of, changes, index, sign, use = IMAGE[repository]
    folder = write_configs(tmp_path / "hub", of, index=index, **changes)
    wanted = rf"model.path={folder} holds an image-to-video or control model \(.*{sign}.*use model={use} with \S+/\S+$"
    for asked in ("wan", "cogvideox", of):
        with pytest.raises(ValueError, match=wanted):
            load_leaf("model", asked, path=str(folder))


def test_models_that_qvgen_does_not_have_are_named(tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "hub", "wan", _class_name="WanVACETransformer3DModel")
    with pytest.raises(
        ValueError, match="holds a WanVACETransformer3DModel, model=wan is .*; no model of qvgen is such a Wan"
    ):
        load_leaf("model", "wan", path=str(folder))
    folder = write_configs(tmp_path / "few", "wan", index={"_class_name": "WanDMDPipeline"})
    with pytest.raises(ValueError, match="names a pipeline that diffusers does not have, WanDMDPipeline"):
        load_leaf("model", "wan", path=str(folder))


def test_verbs_refuse_a_sibling_in_one_line_before_anything_is_encoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_configs(tmp_path / "hub", "wan2.2-ti2v")
    cache = tmp_path / "cache"
    for verb in ("train", "precompute"):
        assert main([verb, "model=wan", f"model.path={folder}", f"data.path={tmp_path}", f"data.cache={cache}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("use model=wan2.2-ti2v or model=wan2.2-i2v-5b")
    assert main(["generate", "model=wan", f"model.path={folder}", "prompt=a dog", f"out={tmp_path / 'out'}"]) == 2
    assert "use model=wan2.2-ti2v" in capsys.readouterr().err
    assert not cache.exists()
