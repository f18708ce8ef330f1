"""Repositories, licences and papers of models and methods: what a model card says that is in no run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from qvgen.config.leaf_file import installed_names, leaf_path

LICENSES: Mapping[str, tuple[str, str]] = {
    "Wan-AI": ("apache-2.0", ""),
    "zai-org/CogVideoX-2b": ("apache-2.0", ""),
    "zai-org/CogVideoX": ("other", "cogvideox-license"),
    "Lightricks/LTX-Video": ("other", "ltx-video-open-weights-license"),
    "hunyuanvideo-community/HunyuanVideo": ("other", "tencent-hunyuan-community"),
    "genmo/mochi-1": ("apache-2.0", ""),
    "maxin-cn/Latte": ("apache-2.0", ""),
    "hpcai-tech/OpenSora": ("apache-2.0", ""),
}
"""Beginning of a repository's name -> the hub's identifier of its licence, and its name where that is ``other``."""

PAPERS: Mapping[str, tuple[str, str]] = {
    "qvgen": ("QVGen: Pushing the Limit of Quantized Video Generative Models", "2505.11497"),
    "lsq": ("Learned Step Size Quantization", "1902.08153"),
    "smoothquant": (
        "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        "2211.10438",
    ),
    "gptq": ("GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", "2210.17323"),
    "svdquant": ("SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", "2411.05007"),
    "vidit_q": ("ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers", "2406.02540"),
    "vidit_q_mp": ("ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers", "2406.02540"),
    "dvd_quant": ("DVD-Quant: Data-free Video Diffusion Transformers Quantization", "2505.18663"),
    "static": ("Hardware-Friendly Static Quantization Method for Video Diffusion Transformers", "2502.15077"),
}
"""Name of a method or a PTQ method -> title and arXiv number of what to cite."""


def base_repository(name: str) -> str:
    """ORG/NAME of the full-precision model on the hub; empty for one that is unknown or has none."""
    if name not in installed_names("model"):
        return ""
    return str(yaml.safe_load(leaf_path("model", name).read_text(encoding="utf-8")).get("repository", ""))


def license_of(base: str) -> tuple[str, str]:
    """The hub's identifier of a repository's licence, and its name where that is ``other``; empty where it is unknown."""
    found = [
        value for start, value in sorted(LICENSES.items(), key=lambda item: -len(item[0])) if base.startswith(start)
    ]
    return found[0] if found and base else ("", "")


def license_name(base: str) -> str:
    """A repository's licence in words."""
    identifier, name = license_of(base)
    return name or identifier or "unknown; see the base model"


def papers_of(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title and arXiv number of what a run's method and PTQ method are from."""
    names = dict.fromkeys([str(training.get("method")), str(training.get("init"))])
    return list(dict.fromkeys(PAPERS[name] for name in names if name in PAPERS))
