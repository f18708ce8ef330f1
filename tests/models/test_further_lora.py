"""LoRAs of further families, as diffusers saves them, against the pipeline that loaded the same file itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline, MochiPipeline
from peft import LoraConfig, get_peft_model_state_dict

from tests.models.family_checks import draw, tiny_family
from tests.models.further_folders import make_hunyuan_folder, make_mochi_folder

FILE = "pytorch_lora_weights.safetensors"
MODELS = {
    "hunyuanvideo": (
        make_hunyuan_folder, HunyuanVideoPipeline, {},
        ["attn.to_q", "attn.add_v_proj", "ff.net.2", "proj_mlp", "norm1.linear", "context_embedder.proj_in"],
    ),
    "mochi": (
        make_mochi_folder, MochiPipeline, {"num_frames": 7, "sampling_frames": 7},
        ["attn1.to_q", "attn1.to_add_out", "ff.net.0.proj", "norm1_context.linear", "caption_proj"],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_pipeline_with_the_lora(name: str, tmp_path: Path) -> None:
    make, pipeline_class, sizes, layers = MODELS[name]
    folder = make(tmp_path / "hub")
    pipeline = pipeline_class.from_pretrained(folder, local_files_only=True)
    pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=layers))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in pipeline.transformer.named_parameters():
        if ".lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    state = get_peft_model_state_dict(pipeline.transformer)
    metadata = pipeline.transformer.peft_config["default"].to_dict()
    pipeline_class.save_lora_weights(
        tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata
    )
    family = tiny_family(name, folder, **sizes, lora=str(tmp_path / FILE))
    noisy, timestep, condition = draw(family)
    with torch.no_grad():
        found = family.predict(family.load_teacher(), noisy, timestep, condition)
        wanted = family.predict(pipeline.transformer.eval(), noisy, timestep, condition)
        plain = family.predict(tiny_family(name, folder, **sizes).load_teacher(), noisy, timestep, condition)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert (found - plain).norm() >= 1e-3 * wanted.norm()
    assert family.lora_record[0]["transformers"] == ["transformer"]
