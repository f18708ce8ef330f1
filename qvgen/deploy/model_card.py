"""README.md of a packed folder: what it is, where it comes from, what it is worth and how to load it.

Everything in it was written by the run: the manifest says what is packed and of which model, report.json what was measured
and on what. A number that was not measured is not there, and no path of a machine is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qvgen.deploy.attention_entry import attention_counts
from qvgen.deploy.card_evaluation import evaluated_text, read_card_evaluation
from qvgen.deploy.card_facts import base_repository, license_name, license_of, papers_of
from qvgen.deploy.card_report import measured_text, read_report, recipe_text, speed_text
from qvgen.deploy.card_table import card_table
from qvgen.deploy.manifest import WEIGHTS_FILE, Manifest, read_manifest
from qvgen.models.folder.published import known_models
from qvgen.run_directory import atomic_write

CARD_FILE = "README.md"
PLACEHOLDER = "ORG/NAME"

_SHOWN = 12
"""Names of layers that are written out; of more, the rest is counted."""


@dataclass(frozen=True, kw_only=True)
class CardSources:
    """Files that a card's numbers come from.

    Attributes:
        report: The run's report.json; None: the one beside the packed folder, if there is one.
        evaluation: evaluation.json, or its folder; None: the card says that nothing was evaluated.
    """

    report: Path | None = None
    evaluation: Path | None = None


def write_model_card(
    packed: Path,
    *,
    out: Path | None = None,
    sources: CardSources | None = None,
    repository: str | None = None,
    times: str = "",
) -> Path:
    """Write the README.md of a packed folder.

    Args:
        packed: Its manifest is read.
        out: Folder that gets the file; None: the packed folder itself.
        sources: Where numbers come from; None: the report beside the packed folder alone.
        repository: ORG/NAME that the folder is going to have on the hub, for the lines that load it.
        times: Markdown on how fast its layers are, of whoever measured it.

    Returns:
        The file.

    Raises:
        ValueError: No manifest, a report.json that is no report, or another run's, or another model's evaluation.
    """
    target = (out or packed) / CARD_FILE
    text = card_of(packed, sources=sources or CardSources(), repository=repository, times=times)
    atomic_write(target, text.encode())
    return target


def card_of(packed: Path, *, sources: CardSources, repository: str | None, part: str = ".", times: str = "") -> str:
    """The text of the README.md that :func:`write_model_card` writes; raises as that does.

    Args:
        packed: The packed folder.
        sources: See :func:`write_model_card`.
        repository: See :func:`write_model_card`.
        part: Folder of the packed model in the repository; "." where it has no other parts.
        times: See :func:`write_model_card`.
    """
    manifest, size = read_manifest(packed), (packed / WEIGHTS_FILE).stat().st_size
    measured = Measured(
        report=read_report(sources.report, packed, manifest, size=size),
        evaluation=None if sources.evaluation is None else read_card_evaluation(sources.evaluation, packed, manifest),
        times=times,
    )
    return model_card(manifest, measured, repository=repository or PLACEHOLDER, size=size, part=part)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that is known of a packed model besides its manifest.

    Attributes:
        report: Content of the run's report.json; None: nothing was measured.
        evaluation: Content of evaluation.json; None: it was not evaluated.
        times: Markdown on how fast its layers are; empty where they were not timed.
    """

    report: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    times: str = ""


def model_card(manifest: Manifest, measured: Measured, *, repository: str, size: int, part: str = ".") -> str:
    """The text of a model card, with the header that the hub reads.

    Args:
        manifest: The packed model's.
        measured: What is known of it.
        repository: ORG/NAME on the hub.
        size: Bytes of the weights.
        part: Folder of the packed model in the repository; "." where it has no other parts.
    """
    base = base_repository(manifest.base_name)
    training = manifest.training
    bits, attentions = _widths(manifest), attention_counts(manifest.attentions)
    sections = [
        _header(manifest, base=base),
        f"# {repository.rpartition('/')[2]}",
        f"{base or manifest.base_name or manifest.transformer} with {bits} in {len(manifest.layers)} Linears, packed by "
        f"qvgen: {size / 1e9:.3f} GB of weights.",
        "## Load",
        _load(manifest, base=base, repository=repository, part=part),
        "## What it is",
        card_table(
            {
                "base model": f"{base}, or a finetune of it with the revision below" if base else manifest.base_name,
                "licence of the base model": license_name(base),
                "revision of its weights": manifest.base_revision,
                "transformer": manifest.transformer,
                "bits": bits,
                "profile": ", ".join(sorted({layer.form.profile.name for layer in manifest.layers})),
                "attention": ", ".join(f"{count} {words}" for words, count in attentions.items()) or None,
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
        recipe_text(measured.report),
        "## Quality",
        evaluated_text(measured.evaluation),
        "## Measured in the run",
        measured_text(measured.report),
        "## Speed and memory",
        "\n\n".join(filter(None, [speed_text(measured.report), measured.times])),
        "## Cite",
        _cite(training),
    ]
    return "\n\n".join(sections) + "\n"


def _header(manifest: Manifest, *, base: str) -> str:
    identifier, name = license_of(base)
    fields = {
        **({"license": identifier} if identifier else {}),
        **({"license_name": name, "license_link": f"https://huggingface.co/{base}/blob/main/LICENSE"} if name else {}),
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video" if takes_image(manifest) else "text-to-video",
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


def takes_image(manifest: Manifest) -> bool:
    """Whether a packed model is given an image: its family says so, or, of an unknown one, more channels than it predicts."""
    known = next((model for model in known_models() if model.name == manifest.base_name), None)
    if known is not None:
        return known.takes_image
    inputs, outputs = (manifest.transformer_config.get(key) for key in ("in_channels", "out_channels"))
    return inputs is not None and outputs is not None and inputs > outputs


def pipeline_class(transformer: str, *, image: bool = False) -> str:
    """Name of the pipeline that a transformer is for; diffusers' general one where the names do not tell.

    Args:
        transformer: Name of its class.
        image: Whether :func:`takes_image`.

    The general one ignores a ``transformer=`` that a pipeline's class calls optional, as Wan's does.

    Example:
        >>> pipeline_class("WanTransformer3DModel"), pipeline_class("LTXVideoTransformer3DModel")
        ('WanPipeline', 'DiffusionPipeline')
    """
    import diffusers

    name = f"{transformer.partition('Transformer')[0]}{'ImageToVideo' if image else ''}Pipeline"
    return name if hasattr(diffusers, name) else "DiffusionPipeline"


def _load(manifest: Manifest, *, base: str, repository: str, part: str) -> str:
    pipeline = pipeline_class(manifest.transformer, image=takes_image(manifest))
    names = pipeline if part != "." else f"{pipeline}, {manifest.transformer}"
    lines = ["import qvgen", "import torch", f"from diffusers import {names}"]
    if part == ".":
        source = base or "BASE"
        lines += [
            f'model = {manifest.transformer}.from_pretrained("{repository}", dtype=torch.bfloat16)',
            f'pipe = {pipeline}.from_pretrained("{source}", transformer=model, dtype=torch.bfloat16)',
        ]
    else:
        lines += [
            f'pipe = {pipeline}.from_pretrained("{repository}", dtype=torch.bfloat16)',
            "pipe.enable_model_cpu_offload()",
        ]
    folder = "FOLDER" if part == "." else f"FOLDER/{part}"
    return (
        "```python\n" + "\n".join(lines) + "\n```\n\n`import qvgen` tells diffusers how to read "
        f'the packed layers. `qvgen.load_packed("{folder}")` loads a local copy and checks it against its sha256.'
    )


def _cite(training: Mapping[str, Any]) -> str:
    lines = [f"- {title}, arXiv:{number}" for title, number in papers_of(training)]
    return "\n".join(["- The base model, as its authors ask for.", *lines, "- qvgen (CITATION.cff in its sources)."])


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "No Linear."
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} Linears: " + ", ".join(f"`{name}`" for name in names[:_SHOWN]) + f"{more}."
