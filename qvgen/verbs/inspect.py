"""Show one table of a packed directory's layers: bits, profile, bytes, error."""

from __future__ import annotations

from collections.abc import Sequence

from qvgen.config.verb_schema import InspectConfig
from qvgen.deploy.manifest import MANIFEST_FILE, WEIGHTS_FILE, LayerEntry, Manifest, read_manifest

HEADER = ("layer", "shape", "bits", "profile", "bytes", "weight error")


def run(config: InspectConfig) -> None:
    """Print the table; the weights themselves are not loaded."""
    directory = config.packed
    if directory is None:
        assert config.run_dir is not None, "the configuration has one of the two"
        directory = config.run_dir / "packed"
    manifest = read_manifest(directory)
    weights = directory / WEIGHTS_FILE
    if not weights.is_file():
        raise ValueError(f"{weights} is missing; copy the whole packed directory")
    if config.dry_run:
        print(f"would read {directory / MANIFEST_FILE} and the size of {weights}")
        return
    for line in table(manifest, file_bytes=weights.stat().st_size):
        print(line)


def table(manifest: Manifest, *, file_bytes: int) -> list[str]:
    """Lines of the table: one per layer, then the total."""
    rows = [HEADER, *(_row(layer) for layer in manifest.layers)]
    rows += [(f"({name})", "", "full", "", "", "") for name in manifest.skipped]
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
    ]
    return lines


def _row(layer: LayerEntry) -> tuple[str, ...]:
    error = "-" if layer.weight_error is None else f"{layer.weight_error:.5f}"
    shape = f"{layer.out_features} x {layer.in_features}"
    return (layer.name, shape, layer.form.label, layer.form.profile.name, str(layer.nbytes), error)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    left = {0, 3}
    cells = [
        text.ljust(width) if column in left else text.rjust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
