"""Complete folders of further families in the hub's layout, of the real classes at tiny sizes with random weights."""

import inspect
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMochi,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.models.hub_folders import PIECES, TEXT_SIZE, _copy, _text_sizes

POOLED_SIZE = 8
LETTERS_SIZE = 8
CROPPED_TOKENS = 108
"""Tokens before a caption that HunyuanVideo15Pipeline cuts off."""
WORDS = ["a", "red", "boat", "boats", "two", "dog", "dogs", "run"]

HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
    "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": TEXT_SIZE, "pooled_projection_dim": POOLED_SIZE,
    "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
HUNYUAN15 = {
    "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
    "num_refiner_layers": 1, "text_embed_dim": TEXT_SIZE, "text_embed_2_dim": LETTERS_SIZE, "image_embed_dim": 12,
    "rope_axes_dim": (4, 6, 6), "task_type": "t2v",
}  # fmt: skip
MOCHI = {
    "in_channels": 12, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "pooled_projection_dim": 16,
    "text_embed_dim": TEXT_SIZE, "time_embed_dim": 8,
}  # fmt: skip


def make_hunyuan_folder(path: Path, variant: str = "", *, seed: int = 0) -> Path:
    """HunyuanVideo: 2 + 2 blocks of width 32 and a refiner of one, a VAE of 4 latent channels, Llama, CLIP.

    Args:
        path: Where it is made.
        variant: ``undistilled`` for weights that are told no guidance.
        seed: Seed of the weights.
    """
    return _copy(_save_hunyuan, path, variant, seed)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the template and of tests' captions; the template's head has 95 tokens, as with Llama's own tokenizer."""
    head = DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")[0]
    special = ["<|pad|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    words = dict.fromkeys(word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(head))
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*special, "[UNK]", *WORDS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    missing = DEFAULT_PROMPT_TEMPLATE["crop_start"] - len(tokenizer.encode(head).ids)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([special[1]] * missing + ["$A"]), special_tokens=[(special[1], vocabulary[special[1]])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], padding_side="right")


def clip_tokenizer() -> CLIPTokenizer:
    """Letters, and letters at a word's end; 77 tokens at most."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def _save_hunyuan(path: Path, variant: str) -> None:
    llama, clip = llama_tokenizer(), clip_tokenizer()
    HunyuanVideoPipeline(
        text_encoder=LlamaModel(
            LlamaConfig(
                vocab_size=len(llama), hidden_size=TEXT_SIZE, intermediate_size=24, num_hidden_layers=3,
                num_attention_heads=2, pad_token_id=llama.pad_token_id,
            )
        ).eval(),
        tokenizer=llama,
        text_encoder_2=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip), hidden_size=POOLED_SIZE, intermediate_size=12, num_hidden_layers=1,
                num_attention_heads=2, projection_dim=POOLED_SIZE, bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
            )
        ).eval(),
        tokenizer_2=clip,
        transformer=HunyuanVideoTransformer3DModel(**HUNYUAN, guidance_embeds=variant != "undistilled"),
        vae=AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    ).save_pretrained(path)  # fmt: skip


def make_hunyuan15_folder(path: Path, variant: str = "", *, seed: int = 0) -> Path:
    """HunyuanVideo 1.5: 2 blocks of width 32 and a refiner of one, a VAE of 4 latent channels, Qwen2.5-VL, ByT5.

    Args:
        path: Where it is made.
        variant: ``distilled`` for weights that are sampled without guidance; ``image`` for those that are given an image,
            with an image encoder of four tokens, whose pipeline samples 32 x 48 pixels for an image of 2 to 3.
        seed: Seed of the weights.
    """
    return _copy(_save_hunyuan15, path, variant, seed)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the template and of tests' captions; the template's head has 108 tokens, as with Qwen's own tokenizer."""
    message = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
    words = dict.fromkeys(word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(message))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = [*special, "[UNK]", "system", "user", "assistant", *WORDS, *words]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    used = len(tokenizer.encode(f"<|im_start|>system\n{message}<|im_end|>\n<|im_start|>user\n").ids)
    template = (
        "<|im_start|>"
        * (CROPPED_TOKENS - used)
        + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], padding_side="right", chat_template=template
    )


def _siglip() -> dict[str, Any]:
    """An image encoder of four tokens with its processor."""
    config = SiglipVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return {"image_encoder": SiglipVisionModel(config).eval(), "feature_extractor": processor}


def _save_hunyuan15(path: Path, variant: str) -> None:
    qwen, letters = qwen_tokenizer(), ByT5Tokenizer()
    takes_image = variant == "image"
    config = {**HUNYUAN15, "task_type": "i2v", "target_size": 40} if takes_image else HUNYUAN15
    pipeline = HunyuanVideo15ImageToVideoPipeline if takes_image else HunyuanVideo15Pipeline
    pipeline(
        text_encoder=Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=len(qwen), hidden_size=TEXT_SIZE, intermediate_size=24, num_hidden_layers=3,
                num_attention_heads=2, num_key_value_heads=1, pad_token_id=qwen.pad_token_id, bos_token_id=None,
                eos_token_id=None,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
            )
        ).eval(),
        tokenizer=qwen,
        text_encoder_2=T5EncoderModel(
            T5Config(**{**_text_sizes(), "vocab_size": len(letters), "d_model": LETTERS_SIZE}, feed_forward_proj="gated-gelu")
        ).eval(),
        tokenizer_2=letters,
        transformer=HunyuanVideo15Transformer3DModel(**config),
        vae=AutoencoderKLHunyuanVideo15(block_out_channels=(8,) * 5, latent_channels=4, layers_per_block=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=1.0 if variant == "distilled" else 6.0),
        **(_siglip() if takes_image else {}),
    ).save_pretrained(path)  # fmt: skip


def make_mochi_folder(path: Path, variant: str = "", *, seed: int = 0) -> Path:
    """Mochi: 2 blocks of width 32 and 16, a VAE of 12 latent channels (the pipeline knows no others), compressing 6 x 8 x 8.

    Args:
        path: Where it is made.
        variant: ``zeros`` for a pipeline that encodes the empty caption as zeros.
        seed: Seed of the weights.
    """
    return _copy(_save_mochi, path, variant, seed)


def _save_mochi(path: Path, variant: str) -> None:
    tokenizer = T5Tokenizer(vocab=PIECES, extra_ids=0)
    MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32), latent_channels=12,
            layers_per_block=(1, 1, 1, 1, 1), add_attention_block=(False, False, False, False, True),
            latents_mean=[0.1 * i - 0.2 for i in range(12)], latents_std=[0.5 + 0.1 * i for i in range(12)],
        ),
        text_encoder=T5EncoderModel(T5Config(**_text_sizes(), feed_forward_proj="gated-gelu")).eval(),
        tokenizer=tokenizer,
        transformer=MochiTransformer3DModel(**MOCHI),
        force_zeros_for_empty_prompt=variant == "zeros",
    ).save_pretrained(path)  # fmt: skip
