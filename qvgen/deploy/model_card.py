"""README.md of a packed folder: what it is, where it comes from, what it is worth and how to load it.

Everything in it was written by the run: the manifest says what is packed and of which model, report.json what was measured
and on what. A number that was not measured is not there, and no path of a machine is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import yaml

from qvgen.config.leaf_file import installed_names, leaf_path
from qvgen.config.plain_json import read_json
from qvgen.deploy.manifest import WEIGHTS_FILE, Manifest, read_manifest
from qvgen.run_directory import atomic_write

CARD_FILE, REPORT_FILE = "README.md", "report.json"

LICENSES: Mapping[str, tuple[str, str]] = {
    "Wan-AI": ("apache-2.0", ""),
    "zai-org/CogVideoX-2b": ("apache-2.0", ""),
    "zai-org/CogVideoX": ("other", "cogvideox-license"),
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

_SHOWN = 12
"""Names of layers that are written out; of more, the rest is counted."""


def write_model_card(
    packed: Path, *, out: Path | None = None, report: Path | None = None, repository: str = "ORG/NAME"
) -> Path:
    """Write the README.md of a packed folder.

    Args:
        packed: Its manifest is read.
        out: Folder that gets the file; None: the packed folder itself.
        report: The run's report.json; None: the one beside the packed folder, if there is one.
        repository: ORG/NAME that the folder is going to have on the hub, for the lines that load it.

    Returns:
        The file.

    Raises:
        ValueError: No manifest, or a report.json that is no report.
    """
    beside = packed.parent / REPORT_FILE
    file = report or (beside if beside.is_file() else None)
    data = None if file is None else read_json(file)
    if data is not None and (not isinstance(data, dict) or "relative_error" not in data):
        raise ValueError(f"{file} is no report of a run; give the report.json that train or ptq wrote, or none")
    card = model_card(
        read_manifest(packed), report=data, repository=repository, size=(packed / WEIGHTS_FILE).stat().st_size
    )
    target = (out or packed) / CARD_FILE
    atomic_write(target, card.encode())
    return target


def model_card(manifest: Manifest, *, report: Mapping[str, Any] | None, repository: str, size: int) -> str:
    """The text of a model card, with the header that the hub reads.

    Args:
        manifest: The packed model's.
        report: Content of the run's report.json; None: nothing was measured.
        repository: ORG/NAME on the hub.
        size: Bytes of the weights.
    """
    base = base_repository(manifest.base_name)
    training = manifest.training
    bits = _widths(manifest)
    sections = [
        _header(manifest, base=base),
        f"# {repository.rpartition('/')[2]}",
        f"{base or manifest.base_name or manifest.transformer} with {bits} in {len(manifest.layers)} Linears, packed by "
        f"qvgen: {size / 1e9:.3f} GB of weights.",
        "## Load",
        _load(manifest, base=base, repository=repository),
        "## What it is",
        _table(
            {
                "base model": f"{base}, or a finetune of it with the revision below" if base else manifest.base_name,
                "licence of the base model": _license_name(base) if base else "see the base model",
                "revision of its weights": manifest.base_revision,
                "transformer": manifest.transformer,
                "bits": bits,
                "profile": ", ".join(sorted({layer.form.profile.name for layer in manifest.layers})),
                "method": training.get("method"),
                "start (PTQ)": training.get("init"),
                "steps": training.get("steps"),
                "seed": training.get("seed"),
                "LoRAs merged before": ", ".join(map(str, training.get("loras", ()))),
            }
        ),
        "## In full precision",
        _listed(manifest.skipped) + " Norms, embeddings, convolutions and biases are in full precision too.",
        "## Recipe",
        _recipe(report),
        "## Measured",
        _measured(report),
        "## Cite",
        _cite(training),
    ]
    return "\n\n".join(sections) + "\n"


def base_repository(name: str) -> str:
    """ORG/NAME of the full-precision model on the hub; empty for one that is unknown or has none."""
    if name not in installed_names("model"):
        return ""
    return str(yaml.safe_load(leaf_path("model", name).read_text(encoding="utf-8")).get("repository", ""))


def _license_of(base: str) -> tuple[str, str]:
    found = [
        value for start, value in sorted(LICENSES.items(), key=lambda item: -len(item[0])) if base.startswith(start)
    ]
    return found[0] if found and base else ("", "")


def _license_name(base: str) -> str:
    identifier, name = _license_of(base)
    return name or identifier or "see the base model"


def _header(manifest: Manifest, *, base: str) -> str:
    identifier, name = _license_of(base)
    fields = {
        **({"license": identifier} if identifier else {}),
        **({"license_name": name, "license_link": f"https://huggingface.co/{base}/blob/main/LICENSE"} if name else {}),
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["qvgen", "quantized", *sorted({f"w{w}a{a}" for w, a in _counted(manifest)})],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _counted(manifest: Manifest) -> Counter[tuple[int, int]]:
    profiles = (layer.form.profile for layer in manifest.layers)
    return Counter((profile.weight.bits, profile.activation.bits) for profile in profiles)


def _widths(manifest: Manifest) -> str:
    counted = _counted(manifest).most_common()
    words = [f"{weight}-bit weights and {activation}-bit activations" for (weight, activation), _ in counted]
    if len(words) == 1:
        return words[0]
    return ", ".join(f"{word} ({count} layers)" for word, (_, count) in zip(words, counted, strict=True))


def pipeline_class(transformer: str) -> str:
    """Name of the pipeline that a transformer is for; diffusers' general one where the names do not tell.

    The general one ignores a ``transformer=`` that a pipeline's class calls optional, as Wan's does.

    Example:
        >>> pipeline_class("WanTransformer3DModel"), pipeline_class("LTXVideoTransformer3DModel")
        ('WanPipeline', 'DiffusionPipeline')
    """
    name = f"{transformer.partition('Transformer')[0]}Pipeline"
    return name if hasattr(diffusers, name) else "DiffusionPipeline"


def _load(manifest: Manifest, *, base: str, repository: str) -> str:
    pipeline = pipeline_class(manifest.transformer)
    lines = [
        "import qvgen",
        "import torch",
        f"from diffusers import {pipeline}, {manifest.transformer}",
        f'model = {manifest.transformer}.from_pretrained("{repository}", dtype=torch.bfloat16)',
        f'pipe = {pipeline}.from_pretrained("{base or "BASE"}", transformer=model, dtype=torch.bfloat16)',
    ]
    return (
        "```python\n" + "\n".join(lines) + "\n```\n\n`import qvgen` tells diffusers how to read "
        'the packed layers. `qvgen.load_packed("FOLDER")` loads a local copy and checks it against its sha256.'
    )


def _recipe(report: Mapping[str, Any] | None) -> str:
    text = report.get("config") if report is not None else None
    config = yaml.safe_load(text) if isinstance(text, str) else None
    if not isinstance(config, Mapping):
        return "The run's configuration is not part of this folder."
    optim, names = config.get("optim") or {}, config.get("names") or {}
    return _table(
        {
            "data": names.get("data"),
            "batch size": config.get("batch_size"),
            "optimizer": optim.get("name"),
            "learning rate": optim.get("learning_rate"),
            "rank of the helper, at first": (config.get("phi") or {}).get("rank"),
            "rank of the helper, at the end": _helper_rank(report),
        }
    )


def _helper_rank(report: Mapping[str, Any] | None) -> object:
    """Rank of Phi when the model was folded, and that it stayed, where it did."""
    rank = report.get("phi_rank_final") if report is not None else None
    return f"{rank}, kept as a low-rank branch" if report is not None and report.get("phi_kept") else rank


def _measured(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "Nothing was measured in the run that made this folder."
    error, on = report["relative_error"], report.get("relative_error_measured_on") or {}
    names = {"rtn": "round to nearest", "ptq": "PTQ start", "qat": "trained, fake-quantized", "packed": "packed"}
    rows = [f"| {names[key]} | {value:.4g} |" for key, value in error.items() if key in names and value is not None]
    text = "\n".join(["| model | relative error of its predictions |", "|---|---|", *rows])
    text += (
        f"\n\nMean of |y - y_teacher|^2 / |y_teacher|^2 on {on.get('num_samples')} samples ({on.get('split')}), "
        f"seed {on.get('seed')}."
    )
    quality = report.get("quality") or {}
    if found := _videos(quality):
        count, seeds, steps = (quality.get(key) for key in ("num_videos", "seeds", "num_steps"))
        text += f"\n\n{found}\n\n{count} videos, seeds {seeds}, {steps} steps."
    return text


def _videos(quality: Mapping[str, Any]) -> str:
    columns = {"psnr_db": "PSNR in dB", "ssim": "SSIM", "lpips": "LPIPS"}
    variants = quality.get("variants") or {}
    rows = [
        f"| {name} | " + " | ".join("" if value.get(key) is None else f"{value[key]:.4g}" for key in columns) + " |"
        for name, value in variants.items()
        if any(value.get(key) is not None for key in columns)
    ]
    if not rows:
        return ""
    head = ["| videos, against the full-precision model's | " + " | ".join(columns.values()) + " |", "|---" * 4 + "|"]
    return "\n".join([*head, *rows])


def _cite(training: Mapping[str, Any]) -> str:
    names = dict.fromkeys([str(training.get("method")), str(training.get("init"))])
    papers = dict.fromkeys(PAPERS[name] for name in names if name in PAPERS)
    lines = [f"- {title}, arXiv:{number}" for title, number in papers]
    return "\n".join(["- The base model, as its authors ask for.", *lines, "- qvgen (CITATION.cff in its sources)."])


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "No Linear."
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} Linears: " + ", ".join(f"`{name}`" for name in names[:_SHOWN]) + f"{more}."


def _table(values: Mapping[str, Any]) -> str:
    """Rows of what is known."""
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items() if value not in (None, "", [])]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
