"""Check a packed directory whole and show one table of its layers: bits, profile, bytes, error."""

from __future__ import annotations

from collections.abc import Sequence

from qvgen.config.schema.verbs import InspectConfig
from qvgen.deploy.attention_entry import AttentionEntry, attention_counts
from qvgen.deploy.checkpoint import check_packed
from qvgen.deploy.manifest import MANIFEST_FILE, WEIGHTS_FILE, LayerEntry, Manifest, read_manifest

HEADER = ("layer", "shape", "bits", "profile", "bytes", "weight error")


def run(config: InspectConfig) -> None:
    """Print the table of a directory that would load: its hash, names, shapes and values are checked first.

    Raises:
        ValueError: Whatever :func:`qvgen.deploy.checkpoint.check_packed` refuses.
    """
    directory = config.packed
    if directory is None:
        assert config.run_dir is not None, "the configuration has one of the two"
        directory = config.run_dir / "packed"
    weights = directory / WEIGHTS_FILE
    if config.dry_run:
        read_manifest(directory)
        if not weights.is_file():
            raise ValueError(f"{weights} is missing; copy the whole packed directory")
        print(f"would check {directory / MANIFEST_FILE} against {weights}")
        return
    manifest = check_packed(directory)
    for line in table(manifest, file_bytes=weights.stat().st_size):
        print(line)


def table(manifest: Manifest, *, file_bytes: int) -> list[str]:
    """Lines of the table: one per layer, then the total."""
    rows = [HEADER, *(_row(layer) for layer in manifest.layers)]
    rows += [(f"({name})", "", "full", "", "", "") for name in manifest.skipped]
    rows += [_attention_row(entry) for entry in manifest.attentions]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [_aligned(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    layers = sum(layer.nbytes for layer in manifest.layers)
    weights = sum(layer.out_features * layer.in_features for layer in manifest.layers)
    training = " ".join(f"{key}={value}" for key, value in manifest.training.items())
    lines += [
        "",
        f"{len(manifest.layers)} layers of {manifest.transformer} ({manifest.base_name}), {weights} weights, "
        f"{layers} bytes ({8 * layers / weights:.2f} bits per weight with scales, clips and biases); file {file_bytes} bytes",
        f"weight error: |Q(W) - W|^2 / |W|^2 against the trained master weight; {training}",
        *(f"attention {words}: {count}" for words, count in attention_counts(manifest.attentions).items()),
        "whole: sha256, names, shapes and values are right",
    ]
    return [_printable(line) for line in lines]


def _row(layer: LayerEntry) -> tuple[str, ...]:
    error = "-" if layer.weight_error is None else f"{layer.weight_error:.5f}"
    shape = f"{layer.out_features} x {layer.in_features}"
    return (layer.name, shape, layer.form.label, layer.form.profile.name, str(layer.nbytes), error)


def _attention_row(entry: AttentionEntry) -> tuple[str, ...]:
    label = "qk8" if entry.form.kind == "int8_qk" else "a8"
    return (entry.name, f"{entry.form.heads} x {entry.form.head_size}", label, "attention", "", "")


def _printable(line: str) -> str:
    """Texts of a manifest may hold anything, but nothing that a terminal obeys."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    left = {0, 3}
    cells = [
        text.ljust(width) if column in left else text.rjust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
